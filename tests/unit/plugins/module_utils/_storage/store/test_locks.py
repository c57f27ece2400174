# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of lock files: POSIX locks against other processes and threads of this process, and the token."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import struct
import subprocess
import sys
import threading
import time
import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.errors import (
    InternalError,
    LockTimeout,
    StoreError,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.store.locks import (
    TOKEN_SIZE,
    LockFile,
    fresh_token,
)

# Timeout in seconds for locks that must be acquired. It only ends tests that hang.
TIMEOUT = 600.0

_HOLDER = """
import fcntl, os, sys
descriptor = os.open(sys.argv[1], os.O_RDWR)
fcntl.lockf(descriptor, fcntl.LOCK_SH if sys.argv[2] == "sh" else fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path: pathlib.Path) -> str:
    lock = LockFile(str(tmp_path / "layers.lock"))
    lock.create()
    return lock.path


@contextlib.contextmanager
def held_elsewhere(path: str, mode: str) -> t.Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDER, path, mode], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        try:
            yield process
        finally:
            process.kill()


def free_for_others(path: str, exclusive: bool = True) -> bool:
    """Whether another process can acquire the lock. Locks of the same process never conflict."""
    mode = "LOCK_EX" if exclusive else "LOCK_SH"
    script = f"import fcntl,os,sys; fcntl.lockf(os.open(sys.argv[1], os.O_RDWR), fcntl.{mode} | fcntl.LOCK_NB)"
    done = subprocess.run(
        [sys.executable, "-c", script, path], stderr=subprocess.DEVNULL, check=False
    )
    return done.returncode == 0


def test_create_makes_an_empty_file_and_keeps_existing_content(path: str) -> None:
    assert os.stat(path).st_size == 0
    pathlib.Path(path).write_bytes(b"x")
    LockFile(path).create()
    assert pathlib.Path(path).read_bytes() == b"x"


def test_exclusive_lock_blocks_other_processes(path: str) -> None:
    lock = LockFile(path)
    with lock.exclusive(1) as held:
        assert held.held
        assert not free_for_others(path)
        assert not free_for_others(path, exclusive=False)
    assert not lock.held
    assert free_for_others(path)


def test_shared_lock_allows_readers(path: str) -> None:
    with LockFile(path, read_only=True).shared(1):
        assert free_for_others(path, exclusive=False)
        assert not free_for_others(path)


@pytest.mark.parametrize(
    ("other_mode", "own_mode", "is_acquired"),
    [("sh", "shared", True), ("sh", "exclusive", False), ("ex", "shared", False)],
)
def test_only_shared_locks_do_not_conflict(
    path: str, other_mode: str, own_mode: str, is_acquired: bool
) -> None:
    with held_elsewhere(path, other_mode) as process:
        lock = LockFile(path)
        started = time.monotonic()
        if is_acquired:
            with getattr(lock, own_mode)(0.3):
                pass
            return
        with pytest.raises(LockTimeout) as caught, getattr(lock, own_mode)(0.3):
            pass
        assert time.monotonic() - started > 0.25
        assert caught.value.facts["seconds"] == 0.3
        assert path in str(caught.value)
        assert str(process.pid) in str(caught.value)
        assert caught.value.facts["pid"] == process.pid
        assert not lock.held
    # The thread that waits for the kernel releases the lock as soon as it is acquired.
    while not free_for_others(path):
        time.sleep(0.01)
    with LockFile(path).exclusive(TIMEOUT):
        assert not free_for_others(path)


def test_zero_timeout_tries_once(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: t.List[t.Tuple[t.Any, int]] = []
    lockf = fcntl.lockf

    def watch(file: t.Any, operation: int) -> None:
        calls.append((file, operation))
        lockf(file, operation)

    monkeypatch.setattr(fcntl, "lockf", watch)
    with held_elsewhere(path, "ex"):
        with pytest.raises(LockTimeout), LockFile(path).shared(0):
            pass
        assert [operation for _file, operation in calls] == [fcntl.LOCK_SH | fcntl.LOCK_NB]
    with LockFile(path).exclusive(0):
        pass


def test_lock_is_acquired_when_it_is_released(path: str) -> None:
    with held_elsewhere(path, "ex") as process:
        released = threading.Event()

        def release() -> None:
            released.set()
            process.kill()

        threading.Timer(0.3, release).start()
        with LockFile(path).exclusive(TIMEOUT) as lock:
            assert released.is_set()
            assert not free_for_others(path)
            lock.touch()
    assert free_for_others(path)


def test_lock_is_acquired_among_busy_writers(path: str) -> None:
    script = (
        "import fcntl,os,sys,time\n"
        "print('go', flush=True)\n"
        "while True:\n"
        "  d=os.open(sys.argv[1], os.O_RDWR); fcntl.lockf(d, fcntl.LOCK_EX)\n"
        "  time.sleep(0.005); os.close(d)\n"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", script, path], stdout=subprocess.PIPE)
        for _round in range(3)
    ]
    try:
        for writer in writers:
            assert writer.stdout is not None
            writer.stdout.readline()
        for _round in range(10):
            with LockFile(path).exclusive(TIMEOUT):
                assert not free_for_others(path)
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()


def test_threads_exclude_each_other(path: str) -> None:
    inside = []
    counts = []

    def work() -> None:
        for _round in range(20):
            with LockFile(path).exclusive(TIMEOUT):
                inside.append(1)
                counts.append(len(inside))
                time.sleep(0.0005)
                inside.pop()

    threads = [threading.Thread(target=work) for _round in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(counts) == 80
    assert max(counts) == 1


def test_another_object_does_not_release_the_lock(path: str, tmp_path: pathlib.Path) -> None:
    link = str(tmp_path / "link")
    os.link(path, link)
    with LockFile(path).exclusive(1):
        with pytest.raises(InternalError), LockFile(path).shared(1):
            pass
        with pytest.raises(InternalError), LockFile(link).shared(1):
            pass
        assert LockFile(link).busy_here
        assert not free_for_others(path)
        failures: t.List[BaseException] = []

        def other() -> None:
            try:
                with LockFile(path).shared(0.1):
                    pass
            except LockTimeout as error:
                failures.append(error)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert len(failures) == 1
        assert not free_for_others(path)
    assert not LockFile(link).busy_here


def test_forked_child_holds_no_lock(path: str) -> None:
    with LockFile(path).exclusive(1):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                with contextlib.suppress(LockTimeout), LockFile(path).exclusive(0.1):
                    code = 2
                    os._exit(code)
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        assert not free_for_others(path)


def test_token_changes_with_each_touch(path: str) -> None:
    with LockFile(path).exclusive(1) as lock:
        assert lock.token() == b""
        before = time.time_ns()
        token = lock.touch()
        assert lock.token() == token
        assert os.stat(path).st_size == TOKEN_SIZE == len(token)
        timestamp, _count, pid = struct.unpack_from("<QQI", token)
        assert before <= timestamp <= time.time_ns()
        assert pid == os.getpid()
        assert lock.touch() != token
        assert os.stat(path).st_size == TOKEN_SIZE
    with LockFile(path).shared(1) as lock:
        assert lock.token() == pathlib.Path(path).read_bytes()[:64] != token
        with pytest.raises(InternalError):
            lock.touch()
    with pytest.raises(InternalError):
        lock.token()


def test_fresh_tokens_differ() -> None:
    assert len({fresh_token() for _round in range(1000)}) == 1000


def test_missing_and_irregular_files_are_rejected(tmp_path: pathlib.Path) -> None:
    for mode in ("shared", "exclusive"):
        with pytest.raises(FileNotFoundError), getattr(LockFile(str(tmp_path / "no")), mode)(1):
            pass
    os.mkfifo(tmp_path / "fifo")
    os.mkdir(tmp_path / "dir")
    (tmp_path / "real").write_bytes(b"")
    os.symlink(tmp_path / "real", tmp_path / "link")
    for name in ("fifo", "dir", "link"):
        with pytest.raises(StoreError), LockFile(str(tmp_path / name)).shared(1):
            pass
    assert sorted(os.listdir(tmp_path)) == ["dir", "fifo", "link", "real"]


def test_read_only_lock_cannot_be_exclusive(path: str) -> None:
    with pytest.raises(InternalError), LockFile(path, read_only=True).exclusive(1):
        pass


def test_file_that_is_replaced_during_the_wait_is_locked(path: str) -> None:
    """A lock on the replaced file would not exclude processes that open the new file."""
    with held_elsewhere(path, "ex") as process:
        new = f"{path}.new"
        pathlib.Path(new).write_bytes(b"")

        def swap() -> None:
            os.rename(new, path)
            process.kill()

        threading.Timer(0.2, swap).start()
        with LockFile(path).exclusive(TIMEOUT) as lock:
            found = os.stat(path)
            assert lock.identity == (found.st_dev, found.st_ino)
            assert not free_for_others(path)


def test_flock_does_not_conflict_with_posix_locks(path: str) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        assert free_for_others(path)
    finally:
        os.close(descriptor)
