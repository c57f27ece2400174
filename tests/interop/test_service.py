# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Test the program userns-storage, which creates and removes layers on a host, together with podman."""

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
from support.images import Image, build, file
from support.lab import Lab
from support.machines import Result
from support.store_cases import Case
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
    """The program, as the lookup plugin builds it."""
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
    """Four versions of the image localhost/app:1."""
    return [
        build(lab.folder(), [{"a": file(f"{number}\n")}, {"b": file(str(number), uid=1000)}], NAME)
        for number in range(4)
    ]


@dataclasses.dataclass
class ConfiguredService:
    """The program with configurations for the store of a case."""

    case: Case
    program: pathlib.Path

    def config(self, **settings: t.Any) -> pathlib.Path:
        """Write a configuration for the store."""
        store = {} if self.case.as_user else self.case.store.module_args()
        path = self.case.store.base / "tmp" / f"{time.monotonic_ns()}.json"
        path.write_text(json.dumps({"stores": [{**store, **settings}]}))
        path.chmod(0o644)
        return path

    def mapping_config(self, *images: str, **settings: t.Any) -> pathlib.Path:
        """Write a configuration with images and, by default, the case's namespace."""
        return self.config(
            images=list(images or (NAME,)), **{"mappings": [self.case.mapping_args], **settings}
        )

    def command(self, *args: t.Any) -> t.List[str]:
        return ["/usr/bin/python3", str(self.program), *map(str, args)]

    def _environ(self) -> t.Dict[str, str]:
        forced = "_CONTAINERS_OVERLAY_DISABLE_IDMAP"
        env = self.case.store.env()
        return {forced: env[forced]} if forced in env else {}

    def run(self, *args: t.Any, status: int = 0) -> Result:
        """Run the program to its end."""
        account = self.case.store.account if self.case.as_user else None
        done = self.case.store.machine.run(
            self.command(*args), account=account, env=self._environ(), check=False
        )
        assert done.rc == status, done
        return done

    @contextlib.contextmanager
    def watching(self, config: pathlib.Path, quiet: str = "1") -> t.Iterator[Watcher]:
        """Run `watch` until the context ends."""
        log = self.case.store.base / "tmp" / "watch.log"
        with open(log, "wb") as output:
            process = self.case.store.machine.popen(
                self.command("watch", config, "--quiet", quiet, "--interval", "0.2"),
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
    """A running `watch`."""

    process: subprocess.Popen[bytes]
    log: pathlib.Path

    def lines(self) -> t.List[str]:
        """The lines of its output, without the first, which names the watched stores."""
        return self.log.read_text().splitlines()[1:]

    def wait_for(self, count: int) -> t.List[str]:
        """Wait for a number of lines."""
        wait_until(
            lambda: len(self.lines()) >= count, while_running=self.process, describe=self.lines
        )
        return self.lines()


@pytest.fixture
def service(case: Case, program: pathlib.Path) -> ConfiguredService:
    """The program for each kind of case."""
    return ConfiguredService(case, program)


@pytest.fixture
def vfs(make_case: MakeCase, program: pathlib.Path) -> ConfiguredService:
    """The program for a rootful store of the driver vfs."""
    return ConfiguredService(make_case("vfs"), program)


def assert_starts_without_a_copy(service: ConfiguredService) -> None:
    """Assert that podman adds only the container's own layer, on top of the created layer."""
    store = service.case.store
    before, made = store.layer_ids(), store.mapped_layers(NAME)
    assert len(made) == 1
    container = store.container(store.create(NAME, *service.case.podman_args))
    assert store.layer_ids() - before == {container["layer"]}
    assert store.layer(container["layer"])["parent"] == made[0]


def test_layer_of_new_version_is_created_before_next_start(
    service: ConfiguredService, versions: t.List[Image]
) -> None:
    store = service.case.store
    config = service.mapping_config()
    # A missing image is not an error.
    assert service.run("ready", config).stdout == ""
    with service.watching(config) as watcher:
        for number in (0, 1):
            image_id = store.load(versions[number], NAME)
            lines = watcher.wait_for(number + 1)
            assert f"created layer {store.mapped_layers(NAME)[0][:12]} of {NAME} for " in lines[-1]
            assert store.image(NAME)["id"] == image_id
            assert_starts_without_a_copy(service)
        # The name now refers to an image without a mapped layer.
        store.load(versions[2], "localhost/other:1")
        store.podman("tag", "localhost/other:1", NAME)
        watcher.wait_for(3)
        assert_starts_without_a_copy(service)
        _measure_reads(watcher.process, 10)
        assert len(watcher.lines()) == 3


def test_burst_of_changes_starts_one_run_and_own_changes_none(
    vfs: ConfiguredService, versions: t.List[Image]
) -> None:
    store = vfs.case.store
    config = vfs.mapping_config("localhost/b*:1")
    with vfs.watching(config, quiet="1") as watcher:
        wait_until(lambda: _is_idle(watcher.process.pid))
        # The watcher is stopped, so that it sees the changes as a burst on any machine.
        watcher.process.send_signal(signal.SIGSTOP)
        for number, image in enumerate(versions):
            store.load(image, f"localhost/b{number}:1")
        watcher.process.send_signal(signal.SIGCONT)
        watcher.wait_for(4)
        made = {name: store.mapped_layers(name) for name in _names(store.images())}
        assert [len(made[f"localhost/b{n}:1"]) for n in range(4)] == [1, 1, 1, 1]
        assert made["localhost/small:1"] == []
        token = (store.graphroot / "vfs-images/images.lock").read_bytes()
        # It inspects the store once more after its own changes; then it only reads 64 bytes at intervals.
        wait_until(lambda: _reads_only_tokens(watcher.process))
        state = store.disk_state()
        assert all(_reads_only_tokens(watcher.process) for _round in range(2))
        assert (store.graphroot / "vfs-images/images.lock").read_bytes() == token
        assert state.changes(store.disk_state()) == []
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


def _is_idle(pid: int) -> bool:
    """Whether a process has no child and the I/O priority idle."""
    done = subprocess.run(["ionice", "-p", str(pid)], capture_output=True, text=True, check=False)
    children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return done.stdout.strip() == "idle" and not children


def _reads_only_tokens(process: subprocess.Popen[bytes]) -> bool:
    """Whether the next ten reads of a process are of 64 bytes each, and it writes nothing."""
    reads, read, written = _measure_reads(process, 10)
    return (read, written) == (64 * reads, 0)


def _measure_reads(process: subprocess.Popen[bytes], count: int) -> t.Tuple[int, int, int]:
    """Wait for `count` more reads of a process; returns its reads, and the bytes that it read and wrote."""

    def counters() -> t.Tuple[int, int, int]:
        lines = pathlib.Path(f"/proc/{process.pid}/io").read_text().splitlines()
        found = {
            name: int(value) for name, _colon, value in (line.partition(":") for line in lines)
        }
        return found["syscr"], found["rchar"], found["wchar"]

    first = counters()
    wait_until(lambda: counters()[0] >= first[0] + count, while_running=process)
    reads, read, written = (now - then for now, then in zip(counters(), first))
    return reads, read, written


def _names(images: t.Iterable[Json]) -> t.List[str]:
    return [name for image in images for name in image.get("names") or ()]


def test_collect_removes_by_policy_and_keeps_declared_layers(
    service: ConfiguredService, versions: t.List[Image]
) -> None:
    store = service.case.store
    store.load(versions[0], NAME)
    both = service.mapping_config(NAME, service.case.image.name)
    done = service.run("ready", both)
    assert len(done.stdout.splitlines()) == 2
    assert service.run("ready", both, "--quiet", "0.4").stdout == ""
    policy = service.config(policy={"min_age": 0, "max_copies_per_image": 0})
    assert service.run("collect", policy, "--keep", both).stdout == ""
    declared = service.mapping_config(NAME)
    kept = store.mapped_layers(NAME)
    (undeclared,) = service.case.mapped()
    lines = service.run("collect", policy, "--keep", declared).stdout.splitlines()
    assert f"removed layer {undeclared[:12]} of {service.case.image.name}" in lines[0]
    assert "1 mapped layers, but only 0 are allowed" in lines[0]
    assert (store.mapped_layers(NAME), service.case.mapped()) == (kept, [])
    # A missing configuration declares no layers.
    service.run("collect", policy, "--keep", "/nonexistent.json")
    assert store.mapped_layers(NAME) == []


def test_directory_of_configurations_is_read(lab: Lab, vfs: ConfiguredService) -> None:
    folder = lab.folder()
    for number, uidmap in enumerate(("0:100000:65536", OTHER_MAP)):
        config = vfs.mapping_config(vfs.case.image.name, mappings=[{"uidmap": [uidmap]}])
        (folder / f"{number}.json").write_text(config.read_text())
    (folder / "notes.txt").write_text("no configuration")
    assert len(vfs.run("ready", folder).stdout.splitlines()) == 2
    with vfs.watching(folder) as watcher:
        name = vfs.case.image.name
        line = f"root: watching the store for {name}, 1 mapping each\n"
        wait_until(lambda: watcher.log.read_text() == 2 * line)
    vfs.run("check", lab.folder(), status=78)


@pytest.mark.parametrize(
    ("command", "status", "message"),
    [
        ("watch", 78, "no store has images and mappings, so nothing is watched"),
        ("ready", 0, "no store has images and mappings, so no layer is created"),
        ("collect", 0, "no store has a policy, so nothing is removed"),
    ],
)
def test_configuration_without_work_is_reported(
    vfs: ConfiguredService, tmp_path: pathlib.Path, command: str, status: int, message: str
) -> None:
    path = tmp_path / "none.json"
    path.write_text('{"stores": [{"user": "root"}]}')
    done = vfs.run(command, path, status=status)
    assert f"{path}: {message}" in done.stderr


def test_refusal_is_reported_and_other_work_is_done(vfs: ConfiguredService) -> None:
    name = vfs.case.image.name
    mappings = [{"uidmap": ["0:100000:5"]}, {"uidmap": [OTHER_MAP]}]
    done = vfs.run("ready", vfs.mapping_config(name, mappings=mappings), status=1)
    assert f"refused {name} for 0:100000:5: " in done.stderr
    assert f"of {name} for {OTHER_MAP}, by " in done.stdout


@pytest.mark.parametrize(
    ("text", "message"),
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
        # Options for a single run are not part of a policy.
        ('{"stores": [{"policy": {"deadline": 1}}]}', "policy.deadline: is unknown"),
        ('{"stores": [{"policy": {"layers": ["a"]}}]}', "policy.layers: is unknown"),
    ],
)
def test_invalid_configuration_is_reported(
    text: str, message: str, lab: Lab, program: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    command = ["/usr/bin/python3", str(program), "ready", str(path)]
    done = lab.machine.run(command, check=False)
    assert (done.rc, done.stdout) == (78, "")
    assert done.stderr.startswith(str(path))
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_program_is_built_reproducibly(lab: Lab, program: pathlib.Path) -> None:
    environ = {"PYTHONPATH": str(lab.tree), "PYTHONHASHSEED": "7"}
    command = ["/usr/bin/python3", "-c", BUILD]
    rebuilt = subprocess.run(command, env=environ, capture_output=True, check=True).stdout
    assert program.read_bytes() == rebuilt
