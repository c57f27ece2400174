# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Staging: live work is never touched, rubbish always goes, equal work is waited for."""

from __future__ import annotations

import contextlib
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


# Seconds for work of others that has to end: they end a test that hangs, and decide nothing else.
PATIENCE = 600.0


@pytest.fixture
def area(tmp_path: pathlib.Path) -> StagingArea:
    return StagingArea(str(tmp_path / "userns-storage"), timeout=PATIENCE)


@contextlib.contextmanager
def worker(area: StagingArea, what: str, key: str) -> t.Iterator[t.Tuple[t.Any, str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", _WORKER, area.root, what, key],
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


def test_nothing_is_made_before_it_is_needed(area: StagingArea) -> None:
    assert area.leftovers() == []
    assert area.sweep() == []
    assert not os.path.exists(area.root)


def test_claim(area: StagingArea) -> None:
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


def test_claim_ends_with_an_error(area: StagingArea) -> None:
    def work() -> None:
        with area.claim("x") as workspace:
            os.mkdir(workspace.path + "/tree")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert_empty(area)


def test_any_key(area: StagingArea) -> None:
    for key in ("", "../../x", "\ud800", "x" * 10000, "\0"):
        with area.claim(key) as workspace:
            assert os.path.dirname(workspace.path) == os.path.join(area.root, "staging")


@pytest.mark.parametrize("what", ["claim", "trash"])
def test_sweep_spares_live_work_and_takes_the_dead(area: StagingArea, what: str) -> None:
    started = time.time()
    with worker(area, what, "x") as (process, path):
        assert os.path.isdir(path + "/tree/deep")
        assert area.leftovers() == []
        assert area.sweep() == []
        assert os.path.isdir(path + "/tree/deep")
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert os.path.isdir(path + "/tree/deep")
        (left,) = area.leftovers()
        assert (left.path, left.kind) == (path, {"claim": "staging"}.get(what, what))
        # The kernel stamps files with a clock that is some milliseconds behind.
        assert started - 1 < left.modified <= time.time()
        assert area.sweep() == [path]
    assert_empty(area)


@pytest.mark.parametrize("what", ["claim", "trash"])
def test_worker_cleans_up(area: StagingArea, what: str) -> None:
    with worker(area, what, "x") as (process, _path):
        assert process.communicate("")[0].strip() == "done"
    assert_empty(area)


def test_equal_work_is_waited_for(area: StagingArea) -> None:
    with worker(area, "claim", "x") as (process, path):
        started = time.monotonic()
        with pytest.raises(LockTimeout) as caught, area.claim("x", timeout=0.3):
            pass
        assert time.monotonic() - started > 0.2
        assert path in str(caught.value)
        assert caught.value.facts["pid"] == process.pid
        assert caught.value.facts["seconds"] == 0.3
        threading.Timer(0.3, process.stdin.close).start()
        with area.claim("x", timeout=PATIENCE) as workspace:
            assert workspace.path == path
            assert os.listdir(path) == ["lock"]
            assert time.monotonic() - started > 0.5
    assert_empty(area)


def test_dead_work_is_taken_over_empty(area: StagingArea) -> None:
    with worker(area, "claim", "x") as (process, path):
        process.kill()
        process.wait()
    with area.claim("x") as workspace:
        assert workspace.path == path
        assert os.listdir(path) == ["lock"]
    assert_empty(area)


def test_dead_before_it_had_a_lock(area: StagingArea) -> None:
    with area.claim("x") as workspace:
        pass
    for path in (workspace.path, os.path.join(area.root, "trash", "y-1")):
        os.makedirs(path + "/half")
    with area.claim("x") as again:
        assert os.listdir(again.path) == ["lock"]
        assert area.sweep() == [os.path.join(area.root, "trash", "y-1")]
    os.makedirs(workspace.path + "/half")
    assert area.sweep() == [workspace.path]
    assert_empty(area)


def test_stray_files_go(area: StagingArea, tmp_path: pathlib.Path) -> None:
    area.discard(area.trash("x"))
    os.mkdir(tmp_path / "outside")
    (tmp_path / "outside" / "lock").write_text("")
    with area.claim("x"):
        pass
    for folder in ("staging", "trash"):
        pathlib.Path(area.root, folder, "file").write_text("")
    area.sweep()
    assert_empty(area)


def test_a_half_written_ledger_goes(area: StagingArea) -> None:
    area.discard(area.trash("x"))
    path = pathlib.Path(area.root, "ledger.json.tmp")
    path.write_text("{")
    (left,) = area.leftovers()
    assert (left.path, left.kind) == (str(path), "records")
    area.sweep()
    assert not path.exists()
    assert area.leftovers() == []


@pytest.mark.parametrize("where", ["", "staging", "trash", "staging/x", "trash/x"])
def test_links_are_not_followed(area: StagingArea, tmp_path: pathlib.Path, where: str) -> None:
    with area.claim("key") as workspace:
        name = workspace.id
    outside = tmp_path / "outside"
    (outside / "inner").mkdir(parents=True)
    (outside / "precious").write_text("safe")
    path = os.path.join(area.root, where.replace("x", name)).rstrip("/")
    if os.path.isdir(path):
        os.rename(path, tmp_path / "away")
    os.symlink(outside, path)
    assert area.leftovers() == [] or where.endswith("x")
    for action in (area.sweep, lambda: area.claim("key").__enter__(), lambda: area.trash("y")):
        with contextlib.suppress(StoreError):
            action()
    found = sorted(os.listdir(outside))
    assert found == ["inner", "precious"]
    assert os.listdir(outside / "inner") == []


def test_trash(area: StagingArea) -> None:
    one, two = area.trash("layer"), area.trash("layer")
    assert one != two
    assert os.listdir(one) == ["lock"]
    os.makedirs(one + "/a/b")
    assert area.sweep() == []
    area.discard(one)
    assert os.path.isdir(two)
    area.discard(two)
    assert_empty(area)


def test_trash_that_cannot_be_deleted_stays_for_the_next_sweep(
    area: StagingArea, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = area.trash("x")
    os.mkdir(path + "/tree")

    def fail(*_words: t.Any) -> None:
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


def test_destroy_is_passed_on(area: StagingArea, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def remove(path: str, destroy: t.Any) -> None:
        asked.append(destroy)
        os.rmdir(path)

    monkeypatch.setattr(staging, "remove_tree", remove)

    def destroy(_folder: int, _name: str) -> bool:
        return False

    with area.claim("x", destroy=destroy) as workspace:
        os.mkdir(workspace.path + "/a")
    path = area.trash("x")
    os.mkdir(path + "/a")
    area.discard(path, destroy)
    assert asked == [destroy, destroy]


@pytest.mark.parametrize("number", [13, 28, 30, 5])
def test_system_errors_are_explained(
    area: StagingArea, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    with area.claim("x"):
        pass
    os.makedirs(os.path.join(area.root, "trash", "rubbish"))

    def fail(*_words: t.Any, **_options: t.Any) -> t.Any:
        raise OSError(number, os.strerror(number), "/some/path")

    for name in ("mkdir", "open", "rename", "rmdir"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            for action in (
                lambda: area.claim("y").__enter__(),
                lambda: area.trash("z"),
                area.sweep,
            ):
                with contextlib.suppress(StoreError):
                    action()


def test_many_at_once(area: StagingArea) -> None:
    """Claims, trash and sweeps by several processes and threads: nobody loses work, nothing stays."""
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
    assert [process.wait(PATIENCE) for process in processes] == [0] * 4
    assert_empty(area)


class TestSuspended:
    @staticmethod
    def suspend(area: StagingArea, key: str = "work") -> pathlib.Path:
        with area.claim(key) as workspace:
            path = pathlib.Path(workspace.path)
            (path / "tree").mkdir()
            workspace.suspended = True
        return path

    def test_the_next_claim_finds_it(self, area: StagingArea) -> None:
        path = self.suspend(area)
        assert area.suspended("work")
        with area.claim("work", fits=lambda _path: True) as workspace:
            assert workspace.resumed
            assert workspace.path == str(path)
            assert (path / "tree").is_dir()
            assert not area.suspended("work")
        assert not path.exists()

    def test_it_can_be_suspended_again(self, area: StagingArea) -> None:
        path = self.suspend(area)
        with area.claim("work", fits=lambda _path: True) as workspace:
            workspace.suspended = True
        assert area.suspended("work")
        assert (path / "tree").is_dir()

    @pytest.mark.parametrize("fits", [None, lambda _path: False])
    def test_what_does_not_fit_goes(
        self, area: StagingArea, fits: t.Optional[t.Callable[[str], bool]]
    ) -> None:
        path = self.suspend(area)
        with area.claim("work", fits=fits) as workspace:
            assert not workspace.resumed
            assert os.listdir(path) == ["lock"]

    def test_sweeps_leave_it_alone(self, area: StagingArea) -> None:
        path = self.suspend(area)
        assert area.leftovers() == []
        assert area.sweep() == []
        assert (path / "tree").is_dir()

    def test_a_sweep_that_met_it_at_work_leaves_it_alone_too(
        self, area: StagingArea, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = self.suspend(area)
        monkeypatch.setattr(area, "_rubbish", lambda: [("staging", str(path))])
        assert area.leftovers() == []
        area.sweep()
        assert (path / "tree").is_dir()
        with area.claim("work", fits=lambda _path: True) as workspace:
            assert workspace.resumed

    def test_a_clock_that_was_set_back_a_little_does_no_harm(self, area: StagingArea) -> None:
        marker = self.suspend(area) / "suspended"
        for ahead, fits in ((60, True), (90000, False)):
            os.utime(marker, (time.time() + ahead,) * 2)
            assert area.suspended("work") is fits

    @pytest.mark.parametrize("how", ["boot", "day", "empty"])
    def test_waiting_is_limited(self, area: StagingArea, how: str) -> None:
        path = self.suspend(area)
        marker = path / "suspended"
        if how == "day":
            os.utime(marker, (time.time() - 90000,) * 2)
        else:
            marker.write_text("another boot" if how == "boot" else "")
        assert not area.suspended("work")
        assert [leftover.path for leftover in area.leftovers()] == [str(path)]
        assert area.sweep() == [str(path)]

    def test_who_takes_it_over_and_dies_leaves_rubbish(self, area: StagingArea) -> None:
        path = self.suspend(area)
        pid = os.fork()
        if pid == 0:
            with area.claim("work", fits=lambda _path: True):
                os._exit(0)
        os.waitpid(pid, 0)
        assert area.sweep() == [str(path)]
        assert not path.exists()
