# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of staging: running work is kept, leftovers are removed, and claims wait for equal work."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.errors import (
    LockTimeout,
    StoreError,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.store import staging
from ansible_collections.userns.storage.plugins.module_utils._storage.store.staging import (
    StagingArea,
)

_WORKER = """
import os, sys
from ansible_collections.userns.storage.plugins.module_utils._storage.store.staging import StagingArea
area = StagingArea(sys.argv[1])
if sys.argv[2] == "claim":
    with area.claim(sys.argv[3]) as workspace:
        os.makedirs(workspace.path + "/tree/deep")
        print(workspace.path, flush=True)
        sys.stdin.read()
else:
    path = area.trash(sys.argv[3])
    os.makedirs(path + "/tree/deep")
    print(path, flush=True)
    sys.stdin.read()
    area.discard(path)
print("done", flush=True)
"""


# Timeout in seconds for work of other processes. It only ends tests that hang.
TIMEOUT = 600.0


@pytest.fixture
def area(tmp_path: pathlib.Path) -> StagingArea:
    return StagingArea(str(tmp_path / "userns-storage"), timeout=TIMEOUT)


@contextlib.contextmanager
def worker(area: StagingArea, step: str, key: str) -> t.Iterator[t.Tuple[t.Any, str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", _WORKER, area.root, step, key],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def entries(area: StagingArea) -> t.List[str]:
    return sorted(
        os.path.relpath(os.path.join(folder, name), area.root)
        for folder, folders, files in os.walk(area.root)
        for name in [*folders, *files]
    )


def assert_empty(area: StagingArea) -> None:
    assert set(entries(area)) <= {"lock", "staging", "trash"}


def test_directories_are_not_created_before_use(area: StagingArea) -> None:
    assert area.leftovers() == []
    assert area.sweep() == []
    assert not os.path.exists(area.root)


def test_claim_creates_and_removes_a_private_directory(area: StagingArea) -> None:
    with area.claim("image map") as workspace:
        assert os.path.dirname(workspace.path) == os.path.join(area.root, "staging")
        assert os.listdir(workspace.path) == ["lock"]
        for folder in (area.root, os.path.dirname(workspace.path), workspace.path):
            assert os.stat(folder).st_mode & 0o777 == 0o700
        os.makedirs(workspace.path + "/tree/a")
        with area.claim("another") as other:
            assert other.path != workspace.path
        assert area.leftovers() == []
        assert area.sweep() == []
        assert os.path.isdir(workspace.path + "/tree/a")
    assert_empty(area)


def test_claimed_directory_is_removed_after_an_error(area: StagingArea) -> None:
    def work() -> None:
        with area.claim("x") as workspace:
            os.mkdir(workspace.path + "/tree")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert_empty(area)


def test_any_key_gets_a_directory_in_staging(area: StagingArea) -> None:
    for key in ("", "../../x", "\ud800", "x" * 10000, "\0"):
        with area.claim(key) as workspace:
            assert os.path.dirname(workspace.path) == os.path.join(area.root, "staging")


@pytest.mark.parametrize("step", ["claim", "trash"])
def test_sweep_keeps_running_work_and_removes_leftovers(area: StagingArea, step: str) -> None:
    started = time.time()
    with worker(area, step, "x") as (process, path):
        assert os.path.isdir(path + "/tree/deep")
        assert area.leftovers() == []
        assert area.sweep() == []
        assert os.path.isdir(path + "/tree/deep")
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert os.path.isdir(path + "/tree/deep")
        (leftover,) = area.leftovers()
        assert (leftover.path, leftover.kind) == (path, {"claim": "staging"}.get(step, step))
        # The clock for timestamps of files is some milliseconds behind.
        assert started - 1 < leftover.modified <= time.time()
        assert area.sweep() == [path]
    assert_empty(area)


@pytest.mark.parametrize("step", ["claim", "trash"])
def test_worker_removes_its_directory(area: StagingArea, step: str) -> None:
    with worker(area, step, "x") as (process, _path):
        assert process.communicate("")[0].strip() == "done"
    assert_empty(area)


def test_claim_waits_for_equal_work(area: StagingArea) -> None:
    with worker(area, "claim", "x") as (process, path):
        started = time.monotonic()
        with pytest.raises(LockTimeout) as caught, area.claim("x", timeout=0.3):
            pass
        assert time.monotonic() - started > 0.2
        assert path in str(caught.value)
        assert caught.value.facts["pid"] == process.pid
        assert caught.value.facts["seconds"] == 0.3
        threading.Timer(0.3, process.stdin.close).start()
        with area.claim("x", timeout=TIMEOUT) as workspace:
            assert workspace.path == path
            assert os.listdir(path) == ["lock"]
            assert time.monotonic() - started > 0.5
    assert_empty(area)


def test_claim_after_a_kill_starts_with_an_empty_directory(area: StagingArea) -> None:
    with worker(area, "claim", "x") as (process, path):
        process.kill()
        process.wait()
    with area.claim("x") as workspace:
        assert workspace.path == path
        assert os.listdir(path) == ["lock"]
    assert_empty(area)


def test_directories_without_a_lock_are_leftovers(area: StagingArea) -> None:
    with area.claim("x") as workspace:
        pass
    for path in (workspace.path, os.path.join(area.root, "trash", "y-1")):
        os.makedirs(path + "/half")
    with area.claim("x") as reclaimed:
        assert os.listdir(reclaimed.path) == ["lock"]
        assert area.sweep() == [os.path.join(area.root, "trash", "y-1")]
    os.makedirs(workspace.path + "/half")
    assert area.sweep() == [workspace.path]
    assert_empty(area)


def test_stray_files_are_removed(area: StagingArea, tmp_path: pathlib.Path) -> None:
    area.discard(area.trash("x"))
    os.mkdir(tmp_path / "outside")
    (tmp_path / "outside" / "lock").write_text("")
    with area.claim("x"):
        pass
    for folder in ("staging", "trash"):
        pathlib.Path(area.root, folder, "file").write_text("")
    area.sweep()
    assert_empty(area)


def test_half_written_ledger_is_removed(area: StagingArea) -> None:
    area.discard(area.trash("x"))
    path = pathlib.Path(area.root, "ledger.json.tmp")
    path.write_text("{")
    (leftover,) = area.leftovers()
    assert (leftover.path, leftover.kind) == (str(path), "records")
    area.sweep()
    assert not path.exists()
    assert area.leftovers() == []


@pytest.mark.parametrize(
    ("location", "refused"),
    [
        ("", ["claim", "trash"]),
        ("staging", ["claim"]),
        ("trash", ["trash"]),
        ("staging/x", []),
        ("trash/x", []),
    ],
)
def test_links_are_not_followed(
    area: StagingArea, tmp_path: pathlib.Path, location: str, refused: t.List[str]
) -> None:
    with area.claim("key") as workspace:
        name = workspace.id
    outside = tmp_path / "outside"
    (outside / "inner").mkdir(parents=True)
    (outside / "precious").write_text("safe")
    path = os.path.join(area.root, location.replace("x", name)).rstrip("/")
    if os.path.isdir(path):
        os.rename(path, tmp_path / "away")
    os.symlink(outside, path)
    # A link in place of an entry is a leftover, and a sweep removes only the link.
    entry = location.endswith("/x")
    assert [leftover.path for leftover in area.leftovers()] == ([path] if entry else [])
    assert area.sweep() == []
    assert os.path.lexists(path) is not entry
    if entry:
        os.symlink(outside, path)

    def claim() -> None:
        with area.claim("key") as workspace:
            os.mkdir(workspace.path + "/tree")

    for action, act in (("claim", claim), ("trash", lambda: area.trash("y"))):
        if action in refused:
            with pytest.raises(StoreError, match="is not a directory"):
                act()
        else:
            act()
    found = sorted(os.listdir(outside))
    assert found == ["inner", "precious"]
    assert os.listdir(outside / "inner") == []


def test_directories_in_trash_are_discarded_separately(area: StagingArea) -> None:
    first, second = area.trash("layer"), area.trash("layer")
    assert first != second
    assert os.listdir(first) == ["lock"]
    os.makedirs(first + "/a/b")
    assert area.sweep() == []
    area.discard(first)
    assert os.path.isdir(second)
    area.discard(second)
    assert_empty(area)


def test_trash_that_cannot_be_deleted_is_removed_by_a_later_sweep(
    area: StagingArea, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = area.trash("x")
    os.mkdir(path + "/tree")

    def fail(*_args: t.Any) -> None:
        raise StoreError(path, "is stuck")

    monkeypatch.setattr(staging, "remove_tree", fail)
    with pytest.raises(StoreError, match="stuck"):
        area.discard(path)
    with pytest.raises(StoreError, match="stuck"):
        area.sweep()
    with area.claim("y") as workspace:
        os.mkdir(workspace.path + "/tree")
    assert len(area.leftovers()) == 2
    monkeypatch.undo()
    assert len(area.sweep()) == 2
    assert_empty(area)


def test_destroy_is_passed_to_the_removal(
    area: StagingArea, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def remove(path: str, destroy: t.Any) -> None:
        calls.append(destroy)
        os.rmdir(path)

    monkeypatch.setattr(staging, "remove_tree", remove)

    def destroy(_folder: int, _name: str) -> bool:
        return False

    with area.claim("x", destroy=destroy) as workspace:
        os.mkdir(workspace.path + "/a")
    path = area.trash("x")
    os.mkdir(path + "/a")
    area.discard(path, destroy)
    assert calls == [destroy, destroy]


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOSPC, errno.EROFS, errno.EIO])
def test_system_errors_become_store_errors(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(*_args: t.Any, **_options: t.Any) -> t.Any:
        raise OSError(number, os.strerror(number), "/some/path")

    def claim(area: StagingArea) -> None:
        with area.claim("y"):
            pass

    actions: t.Mapping[str, t.Callable[[StagingArea], t.Any]] = {
        "claim": claim,
        "trash": lambda area: area.trash("z"),
        "sweep": lambda area: area.sweep(),
    }
    failed: t.Dict[t.Tuple[str, str], str] = {}
    for name in ("mkdir", "open", "rename", "rmdir"):
        for action, act in actions.items():
            area = StagingArea(str(tmp_path / f"{name} {action}"), timeout=TIMEOUT)
            for folder in ("trash", "staging"):
                os.makedirs(os.path.join(area.root, folder, "rubbish"))
            with monkeypatch.context() as patch:
                patch.setattr(os, name, fail)
                try:
                    act(area)
                except StoreError as error:
                    failed[name, action] = str(error)
    # A claim ignores errors of its own removal, and on a full disk, entries are deleted without a move to the trash.
    expected = {("mkdir", "claim"), ("mkdir", "trash"), ("rmdir", "sweep")}
    expected |= {("open", action) for action in actions}
    if number != errno.ENOSPC:
        expected |= {("mkdir", "sweep"), ("rename", "sweep")}
    assert set(failed) == expected
    assert all(os.strerror(number).lower() in message for message in failed.values())


def test_concurrent_claims_and_sweeps_do_not_conflict(area: StagingArea) -> None:
    """Several processes claim, discard and sweep at once. No work is lost, and no leftovers remain."""
    script = (
        "import os, sys, random\n"
        "from ansible_collections.userns.storage.plugins.module_utils._storage.store.staging import StagingArea\n"
        "random.seed(int(sys.argv[2]))\n"
        "area = StagingArea(sys.argv[1], timeout=600)\n"
        "for _round in range(30):\n"
        "    step = random.choice(['claim', 'claim', 'trash', 'sweep'])\n"
        "    if step == 'claim':\n"
        "        with area.claim(random.choice('ab')) as w:\n"
        "            assert os.listdir(w.path) == ['lock'], os.listdir(w.path)\n"
        "            os.makedirs(w.path + '/tree/x')\n"
        "            open(w.path + '/tree/x/f', 'w').close()\n"
        "            os.unlink(w.path + '/tree/x/f')\n"
        "    elif step == 'trash':\n"
        "        path = area.trash('t')\n"
        "        os.makedirs(path + '/tree/x')\n"
        "        os.rmdir(path + '/tree/x')\n"
        "        area.discard(path)\n"
        "    else:\n"
        "        area.sweep()\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", script, area.root, str(seed)]) for seed in range(4)
    ]
    assert [process.wait(TIMEOUT) for process in processes] == [0] * 4
    assert_empty(area)


class TestSuspension:
    @staticmethod
    def suspend(area: StagingArea, key: str = "work") -> pathlib.Path:
        with area.claim(key) as workspace:
            path = pathlib.Path(workspace.path)
            (path / "tree").mkdir()
            workspace.suspended = True
        return path

    def test_next_claim_resumes_the_work(self, area: StagingArea) -> None:
        path = self.suspend(area)
        assert area.suspended("work")
        with area.claim("work", fits=lambda _path: True) as workspace:
            assert workspace.resumed
            assert workspace.path == str(path)
            assert (path / "tree").is_dir()
            assert not area.suspended("work")
        assert not path.exists()

    def test_resumed_work_can_be_suspended_again(self, area: StagingArea) -> None:
        path = self.suspend(area)
        with area.claim("work", fits=lambda _path: True) as workspace:
            workspace.suspended = True
        assert area.suspended("work")
        assert (path / "tree").is_dir()

    @pytest.mark.parametrize("fits", [None, lambda _path: False])
    def test_work_that_does_not_fit_is_removed(
        self, area: StagingArea, fits: t.Optional[t.Callable[[str], bool]]
    ) -> None:
        path = self.suspend(area)
        with area.claim("work", fits=fits) as workspace:
            assert not workspace.resumed
            assert os.listdir(path) == ["lock"]

    def test_sweep_keeps_suspended_work(self, area: StagingArea) -> None:
        path = self.suspend(area)
        assert area.leftovers() == []
        assert area.sweep() == []
        assert (path / "tree").is_dir()

    def test_sweep_keeps_work_that_is_suspended_meanwhile(
        self, area: StagingArea, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = self.suspend(area)
        monkeypatch.setattr(area, "_rubbish", lambda: [("staging", str(path))])
        assert area.leftovers() == []
        area.sweep()
        assert (path / "tree").is_dir()
        with area.claim("work", fits=lambda _path: True) as workspace:
            assert workspace.resumed

    def test_marker_slightly_in_the_future_is_accepted(self, area: StagingArea) -> None:
        marker = self.suspend(area) / "suspended"
        for ahead, fits in ((60, True), (90000, False)):
            os.utime(marker, (time.time() + ahead,) * 2)
            assert area.suspended("work") is fits

    @pytest.mark.parametrize("reason", ["boot", "day", "empty"])
    def test_suspended_work_expires(self, area: StagingArea, reason: str) -> None:
        path = self.suspend(area)
        marker = path / "suspended"
        if reason == "day":
            os.utime(marker, (time.time() - 90000,) * 2)
        else:
            marker.write_text("another boot" if reason == "boot" else "")
        assert not area.suspended("work")
        assert [leftover.path for leftover in area.leftovers()] == [str(path)]
        assert area.sweep() == [str(path)]

    def test_work_of_a_killed_resuming_process_is_removed(self, area: StagingArea) -> None:
        path = self.suspend(area)
        pid = os.fork()
        if pid == 0:
            with area.claim("work", fits=lambda _path: True):
                os._exit(0)
        os.waitpid(pid, 0)
        assert area.sweep() == [str(path)]
        assert not path.exists()
