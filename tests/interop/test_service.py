# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Hosts that keep themselves ready: the program userns-storage beside the real podman."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import subprocess
import sys
import time
import typing as t

import pytest
from support.cases import Case
from support.images import Image, build, file
from support.lab import Lab
from support.machines import Result

Json = t.Dict[str, t.Any]
MakeCase = t.Callable[..., Case]

NAME = "localhost/app:1"
OTHER_MAP = "0:300000:65536"
BUILD = (
    "import sys; from ansible_collections.userns.storage.plugins.plugin_utils import _zipapp; "
    "sys.stdout.buffer.write(_zipapp.build())"
)


@pytest.fixture(scope="module")
def program(lab: Lab) -> pathlib.Path:
    """The program, as the lookup makes it."""
    path = lab.folder() / "userns-storage.pyz"
    environ = {"PYTHONPATH": str(lab.tree)}
    path.write_bytes(
        subprocess.run(
            [sys.executable, "-c", BUILD], env=environ, capture_output=True, check=True
        ).stdout
    )
    return path


@pytest.fixture(scope="module")
def versions(lab: Lab) -> t.List[Image]:
    """Four images that all want to be called localhost/app:1."""
    return [
        build(lab.folder(), [{"a": file(f"{number}\n")}, {"b": file(str(number), uid=1000)}], NAME)
        for number in range(4)
    ]


@dataclasses.dataclass
class Keeper:
    """The program, configured for one case's store."""

    case: Case
    program: pathlib.Path

    def config(self, **settings: t.Any) -> pathlib.Path:
        """Write a configuration for the store."""
        store = {} if self.case.as_user else self.case.store.module_args()
        path = self.case.store.base / "tmp" / f"{time.monotonic_ns()}.json"
        path.write_text(json.dumps({"stores": [{**store, **settings}]}))
        path.chmod(0o644)
        return path

    def ready(self, *images: str, **settings: t.Any) -> pathlib.Path:
        """One that declares the case's namespace for images."""
        return self.config(
            images=list(images or (NAME,)), **{"mappings": [self.case.wanted], **settings}
        )

    def words(self, *words: t.Any) -> t.List[str]:
        return ["/usr/bin/python3", str(self.program), *map(str, words)]

    def _environ(self) -> t.Dict[str, str]:
        forced = "_CONTAINERS_OVERLAY_DISABLE_IDMAP"
        env = self.case.store.env()
        return {forced: env[forced]} if forced in env else {}

    def run(self, *words: t.Any, status: int = 0) -> Result:
        """Run it to its end."""
        account = self.case.store.account if self.case.as_user else None
        done = self.case.store.machine.run(
            self.words(*words), account=account, env=self._environ(), check=False
        )
        assert done.rc == status, done
        return done

    @contextlib.contextmanager
    def watching(self, config: pathlib.Path, quiet: str = "1") -> t.Iterator[Watcher]:
        """`watch` as long as the context lasts."""
        log = self.case.store.base / "tmp" / "watch.log"
        with open(log, "wb") as output:
            process = self.case.store.machine.popen(
                self.words("watch", config, "--quiet", quiet, "--interval", "0.2"),
                account=self.case.store.account if self.case.as_user else None,
                env=self._environ(),
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            yield Watcher(process, log)
        finally:
            process.terminate()
            process.wait(30)


@dataclasses.dataclass
class Watcher:
    """A `watch` that runs."""

    process: subprocess.Popen[bytes]
    log: pathlib.Path

    def lines(self) -> t.List[str]:
        return self.log.read_text().splitlines()

    def wait_for(self, count: int) -> t.List[str]:
        """Wait until it has said so many lines."""
        until = time.monotonic() + 60
        while len(self.lines()) < count:
            assert self.process.poll() is None, self.lines()
            assert time.monotonic() < until, self.lines()
            time.sleep(0.1)
        return self.lines()


@pytest.fixture
def keeper(case: Case, program: pathlib.Path) -> Keeper:
    """The four ways of use."""
    return Keeper(case, program)


@pytest.fixture
def vfs(make_case: MakeCase, program: pathlib.Path) -> Keeper:
    """A rootful store of the driver vfs."""
    return Keeper(make_case("vfs"), program)


def assert_starts_without_a_copy(keeper: Keeper) -> None:
    """podman adds no layer but the container's own, on top of the one that was made."""
    store = keeper.case.store
    before, made = store.layer_ids(), store.mapped_layers(NAME)
    assert len(made) == 1
    container = store.container(store.create(NAME, *keeper.case.podman_args))
    assert store.layer_ids() - before == {container["layer"]}
    assert store.layer(container["layer"])["parent"] == made[0]


def test_a_new_version_under_the_same_tag_is_ready_before_the_next_start(
    keeper: Keeper, versions: t.List[Image]
) -> None:
    store = keeper.case.store
    config = keeper.ready()
    # Nothing is there yet, and that is no fault.
    assert keeper.run("ready", config).stdout == ""
    with keeper.watching(config) as watcher:
        for number in (0, 1):
            image_id = store.load(versions[number], NAME)
            lines = watcher.wait_for(number + 1)
            assert f"made layer {store.mapped_layers(NAME)[0][:12]} of {NAME} for " in lines[-1]
            assert store.image(NAME)["id"] == image_id
            assert_starts_without_a_copy(keeper)
        # Retagged: the name now means an image that has no layer yet.
        store.load(versions[2], "localhost/other:1")
        store.podman("tag", "localhost/other:1", NAME)
        watcher.wait_for(3)
        assert_starts_without_a_copy(keeper)
        time.sleep(2)
        assert len(watcher.lines()) == 3


def test_a_burst_is_one_run_and_own_changes_start_none(
    vfs: Keeper, versions: t.List[Image]
) -> None:
    store = vfs.case.store
    config = vfs.ready("localhost/b*:1")
    with vfs.watching(config, quiet="3") as watcher:
        until = time.monotonic() + 10
        while not _asleep(watcher.process.pid):
            assert time.monotonic() < until
            time.sleep(0.1)
        for number, image in enumerate(versions):
            store.load(image, f"localhost/b{number}:1")
        assert watcher.lines() == []
        watcher.wait_for(4)
        made = {name: store.mapped_layers(name) for name in _names(store.images())}
        assert [len(made[f"localhost/b{n}:1"]) for n in range(4)] == [1, 1, 1, 1]
        assert made["localhost/small:1"] == []
        time.sleep(2)
        token = (store.graphroot / "vfs-images/images.lock").read_bytes()
        state = store.snapshot_of_disk()
        used = _processor_time(watcher.process.pid)
        time.sleep(4)
        assert (store.graphroot / "vfs-images/images.lock").read_bytes() == token
        assert state.changes(store.snapshot_of_disk()) == []
        assert len(watcher.lines()) == 4
        # Asleep: it reads 64 bytes now and then.
        assert _processor_time(watcher.process.pid) - used < 10
        priority = subprocess.run(
            ["ionice", "-p", str(watcher.process.pid)], capture_output=True, text=True, check=True
        )
        assert priority.stdout.strip() == "idle"
        nice = subprocess.run(
            ["ps", "-o", "ni=", "-p", str(watcher.process.pid)],
            capture_output=True,
            text=True,
            check=True,
        )
        assert nice.stdout.strip() == "19"


def _asleep(pid: int) -> bool:
    """Whether it has no child and has stepped back."""
    done = subprocess.run(["ionice", "-p", str(pid)], capture_output=True, text=True, check=False)
    children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return done.stdout.strip() == "idle" and not children


def _processor_time(pid: int) -> int:
    """Ticks that a process and its ended children have used."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(int(one) for one in fields[11:15])


def _names(images: t.Iterable[Json]) -> t.List[str]:
    return [name for image in images for name in image.get("names") or ()]


def test_collects_by_policy_and_leaves_what_is_declared(
    keeper: Keeper, versions: t.List[Image]
) -> None:
    store = keeper.case.store
    store.load(versions[0], NAME)
    ready = keeper.ready(NAME, keeper.case.image.name)
    done = keeper.run("ready", ready)
    assert len(done.stdout.splitlines()) == 2
    assert keeper.run("ready", ready, "--quiet", "0.4").stdout == ""
    policy = keeper.config(policy={"min_age": 0, "max_copies_per_image": 0})
    assert keeper.run("collect", policy, "--keep", ready).stdout == ""
    only = keeper.ready(NAME)
    kept = store.mapped_layers(NAME)
    (gone,) = keeper.case.mapped()
    lines = keeper.run("collect", policy, "--keep", only).stdout.splitlines()
    assert f"removed layer {gone[:12]} of {keeper.case.image.name}" in lines[0]
    assert "1 mapped layers, 0 are allowed" in lines[0]
    assert (store.mapped_layers(NAME), keeper.case.mapped()) == (kept, [])
    # A configuration that nobody has written declares nothing.
    keeper.run("collect", policy, "--keep", "/nonexistent.json")
    assert store.mapped_layers(NAME) == []


def test_a_refusal_is_told_and_the_rest_done(vfs: Keeper) -> None:
    name = vfs.case.image.name
    mappings = [{"uidmap": ["0:100000:5"]}, {"uidmap": [OTHER_MAP]}]
    done = vfs.run("ready", vfs.ready(name, mappings=mappings), status=1)
    assert f"refused {name} for 0:100000:5: " in done.stderr
    assert f"of {name} for {OTHER_MAP}, by " in done.stdout


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ("[]", "the whole: is no JSON object"),
        ("{}", "stores: names no store"),
        ('{"stores": [{"user": "nobody-of-that-name"}]}', "no such user"),
        ('{"stores": [{"image": []}]}', "stores[0].image: is not known"),
        ('{"stores": [{"images": ["a"]}]}', "stores[0].mappings: is empty"),
        ('{"stores": [{"images": "a"}]}', "stores[0].images: is no list"),
        (
            '{"stores": [{"images": ["a"], "mappings": [{"userns": "keep-it"}]}]}',
            "stores[0].mappings[0]: userns keep-it",
        ),
        ('{"stores": [{"policy": {"unused_for": "4x"}}]}', "stores[0].policy: unused_for: 4x"),
        ('{"stores": [{"policy": {"high_threshold": 85}}]}', "low_threshold go together"),
        # What a task asks of one run is no part of a policy.
        ('{"stores": [{"policy": {"deadline": 1}}]}', "policy.deadline: is not known"),
        ('{"stores": [{"policy": {"layers": ["a"]}}]}', "policy.layers: is not known"),
    ],
)
def test_a_wrong_configuration_is_told(
    text: str, said: str, lab: Lab, program: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    words = ["/usr/bin/python3", str(program), "ready", str(path)]
    done = lab.machine.run(words, check=False)
    assert (done.rc, done.stdout) == (78, "")
    assert done.stderr.startswith(str(path))
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_program_is_the_same_to_the_byte(lab: Lab, program: pathlib.Path) -> None:
    environ = {"PYTHONPATH": str(lab.tree), "PYTHONHASHSEED": "7"}
    words = ["/usr/bin/python3", "-c", BUILD]
    again = subprocess.run(words, env=environ, capture_output=True, check=True).stdout
    assert program.read_bytes() == again
