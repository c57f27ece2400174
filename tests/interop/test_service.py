# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Hosts that keep themselves ready: the program userns-storage beside the real podman."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import signal
import subprocess
import sys
import time
import typing as t

import pytest
from support.cases import Case
from support.images import Image, build, file
from support.lab import Lab
from support.machines import Result
from support.waiting import LIMIT, wait_until

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
            process.wait(LIMIT)


@dataclasses.dataclass
class Watcher:
    """A `watch` that runs."""

    process: subprocess.Popen[bytes]
    log: pathlib.Path

    def lines(self) -> t.List[str]:
        """What it has said, after the line that tells what it watches."""
        return self.log.read_text().splitlines()[1:]

    def wait_for(self, count: int) -> t.List[str]:
        """Wait until it has said so many lines."""
        wait_until(
            lambda: len(self.lines()) >= count, while_running=self.process, describe=self.lines
        )
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
            assert f"created layer {store.mapped_layers(NAME)[0][:12]} of {NAME} for " in lines[-1]
            assert store.image(NAME)["id"] == image_id
            assert_starts_without_a_copy(keeper)
        # Retagged: the name now means an image that has no layer yet.
        store.load(versions[2], "localhost/other:1")
        store.podman("tag", "localhost/other:1", NAME)
        watcher.wait_for(3)
        assert_starts_without_a_copy(keeper)
        _look(watcher.process, 10)
        assert len(watcher.lines()) == 3


def test_a_burst_is_one_run_and_own_changes_start_none(
    vfs: Keeper, versions: t.List[Image]
) -> None:
    store = vfs.case.store
    config = vfs.ready("localhost/b*:1")
    with vfs.watching(config, quiet="1") as watcher:
        wait_until(lambda: _asleep(watcher.process.pid))
        # Stopped, so that a burst is one on any machine.
        watcher.process.send_signal(signal.SIGSTOP)
        for number, image in enumerate(versions):
            store.load(image, f"localhost/b{number}:1")
        watcher.process.send_signal(signal.SIGCONT)
        watcher.wait_for(4)
        made = {name: store.mapped_layers(name) for name in _names(store.images())}
        assert [len(made[f"localhost/b{n}:1"]) for n in range(4)] == [1, 1, 1, 1]
        assert made["localhost/small:1"] == []
        token = (store.graphroot / "vfs-images/images.lock").read_bytes()
        # Once more it looks at the store, for its own changes; from then on it reads 64 bytes now and then.
        wait_until(lambda: _only_looks(watcher.process))
        state = store.snapshot_of_disk()
        assert all(_only_looks(watcher.process) for _round in range(2))
        assert (store.graphroot / "vfs-images/images.lock").read_bytes() == token
        assert state.changes(store.snapshot_of_disk()) == []
        assert len(watcher.lines()) == 4
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


def _only_looks(process: subprocess.Popen[bytes]) -> bool:
    """Whether a process that reads ten times more reads no more than a token each time, and writes nothing."""
    reads, read, written = _look(process, 10)
    return (read, written) == (64 * reads, 0)


def _look(process: subprocess.Popen[bytes], count: int) -> t.Tuple[int, int, int]:
    """Wait until a process has read `count` times more: its reads, and bytes read and written meanwhile."""

    def told() -> t.Tuple[int, int, int]:
        lines = pathlib.Path(f"/proc/{process.pid}/io").read_text().splitlines()
        found = {
            name: int(value) for name, _colon, value in (line.partition(":") for line in lines)
        }
        return found["syscr"], found["rchar"], found["wchar"]

    first = told()
    wait_until(lambda: told()[0] >= first[0] + count, while_running=process)
    reads, read, written = (now - then for now, then in zip(told(), first))
    return reads, read, written


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
    assert "1 mapped layers, but only 0 are allowed" in lines[0]
    assert (store.mapped_layers(NAME), keeper.case.mapped()) == (kept, [])
    # A configuration that nobody has written declares nothing.
    keeper.run("collect", policy, "--keep", "/nonexistent.json")
    assert store.mapped_layers(NAME) == []


def test_a_directory_of_configurations(lab: Lab, vfs: Keeper) -> None:
    folder = lab.folder()
    for number, uidmap in enumerate(("0:100000:65536", OTHER_MAP)):
        config = vfs.ready(vfs.case.image.name, mappings=[{"uidmap": [uidmap]}])
        (folder / f"{number}.json").write_text(config.read_text())
    (folder / "notes.txt").write_text("no configuration")
    assert len(vfs.run("ready", folder).stdout.splitlines()) == 2
    with vfs.watching(folder) as watcher:
        name = vfs.case.image.name
        line = f"root: watching the store for {name}, 1 mapping each\n"
        wait_until(lambda: watcher.log.read_text() == 2 * line)
    vfs.run("check", lab.folder(), status=78)


@pytest.mark.parametrize(
    ("command", "status", "said"),
    [
        ("watch", 78, "no store has images and mappings, so nothing is watched"),
        ("ready", 0, "no store has images and mappings, so no layer is created"),
        ("collect", 0, "no store has a policy, so nothing is removed"),
    ],
)
def test_a_configuration_without_work_is_reported(
    vfs: Keeper, tmp_path: pathlib.Path, command: str, status: int, said: str
) -> None:
    path = tmp_path / "none.json"
    path.write_text('{"stores": [{"user": "root"}]}')
    done = vfs.run(command, path, status=status)
    assert f"{path}: {said}" in done.stderr


def test_a_refusal_is_reported_and_the_other_work_is_done(vfs: Keeper) -> None:
    name = vfs.case.image.name
    mappings = [{"uidmap": ["0:100000:5"]}, {"uidmap": [OTHER_MAP]}]
    done = vfs.run("ready", vfs.ready(name, mappings=mappings), status=1)
    assert f"refused {name} for 0:100000:5: " in done.stderr
    assert f"of {name} for {OTHER_MAP}, by " in done.stdout


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ("[]", "the whole: is not a JSON object"),
        ("{}", "stores: contains no store"),
        ('{"stores": [{"user": "nobody-of-that-name"}]}', "no such user"),
        ('{"stores": [{"image": []}]}', "stores[0].image: is unknown"),
        ('{"stores": [{"images": ["a"]}]}', "stores[0].mappings: is empty"),
        ('{"stores": [{"images": "a"}]}', "stores[0].images: is not a list"),
        (
            '{"stores": [{"images": ["a"], "mappings": [{"userns": "keep-it"}]}]}',
            "stores[0].mappings[0]: userns keep-it",
        ),
        ('{"stores": [{"policy": {"unused_for": "4x"}}]}', "stores[0].policy: unused_for: 4x"),
        ('{"stores": [{"policy": {"high_threshold": 85}}]}', "low_threshold go together"),
        # What a task asks of one run is no part of a policy.
        ('{"stores": [{"policy": {"deadline": 1}}]}', "policy.deadline: is unknown"),
        ('{"stores": [{"policy": {"layers": ["a"]}}]}', "policy.layers: is unknown"),
    ],
)
def test_a_wrong_configuration_is_reported(
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
