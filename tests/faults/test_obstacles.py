# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Obstacles at any path that is opened in a user's store do not make root wait or use unlimited memory."""

from __future__ import annotations

import os
import pathlib
import shutil
import signal
import socket
import threading
import time
import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.errors import WorkerError
from ansible_collections.userns.storage.plugins.module_utils._storage.store import libpod_db
from ansible_collections.userns.storage.plugins.module_utils._storage.store.config import Account
from ansible_collections.userns.storage.plugins.module_utils._storage.userns import (
    running as userns,
)
from support import written_store
from support.written_store import OPENED_PATHS

_TERABYTE = 1 << 40


def _socket(path: str) -> None:
    # The kernel limits the length of a socket's path.
    os.chdir(os.path.dirname(path))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.basename(path))
    os.chdir("/")


def _sparse(path: str) -> None:
    pathlib.Path(path).touch()
    os.truncate(path, 2 * _TERABYTE)


OBSTACLES: t.Mapping[str, t.Callable[[str], None]] = {
    "pipe": os.mkfifo,
    "socket": _socket,
    "endless file": lambda path: os.symlink("/dev/zero", path),
    "terminal": lambda path: os.symlink("/dev/tty", path),
    "full device": lambda path: os.symlink("/dev/full", path),
    "huge file": _sparse,
    "folder": os.mkdir,
    "link to itself": lambda path: os.symlink(path, path),
    "deep JSON": lambda path: _put(path, b"[" * 100_000),
    "deep objects": lambda path: _put(path, b'[{"a":' * 100_000),
    "many records": lambda path: _put(path, b"[" + b"{}," * 1_000_000 + b"{}]"),
    "long number": lambda path: _put(path, b"[" + b"1" * 1_000_000 + b"]"),
    "zeros": lambda path: _put(path, bytes(5_000_000)),
}


def _put(path: str, data: bytes) -> None:
    pathlib.Path(path).write_bytes(data)


def _run_as(account: Account, function: t.Callable[..., t.Any], *arguments: t.Any) -> t.Any:
    return userns.run(function, arguments, account)


def _operate_with_obstacle(home: str, location: str, obstacle: str) -> t.List[str]:
    """Run all operations in a store with an obstacle at a location; returns how each of them ended."""
    request = written_store.write(home)
    path = OPENED_PATHS[location].replace("~", home)
    path = os.path.join(home, "storage", path)
    if os.path.isdir(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.unlink(path)
    OBSTACLES[obstacle](path)
    return written_store.run_all_operations(request)


@pytest.mark.parametrize("location", OPENED_PATHS)
def test_obstacle_causes_no_internal_error(alice: Account, location: str) -> None:
    """All operations run as the user, and end with a result or a documented error."""
    for obstacle in OBSTACLES:
        found = _run_as(alice, _operate_with_obstacle, f"{alice.home}/made", location, obstacle)
        assert len(found) == 6
        assert "InternalError" not in found, obstacle


def test_operations_succeed_without_obstacle(alice: Account) -> None:
    """The operations of the test above read the files that the obstacles replace."""
    assert _run_as(alice, _operate_on_valid_store, f"{alice.home}/made") == ["done"] * 5 + [
        "LayerInUse"
    ]


def _operate_on_valid_store(home: str) -> t.List[str]:
    return written_store.run_all_operations(written_store.write(home))


ENDLESS = (
    "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) "
    "SELECT x AS GraphRoot, x AS RunRoot, x AS GraphDriver FROM c WHERE x < 0"
)


@pytest.mark.parametrize(
    "statements",
    [
        [f"CREATE VIEW DBConfig AS {ENDLESS}"],
        [f"CREATE VIEW more AS {ENDLESS}", "CREATE VIEW DBConfig AS SELECT * FROM more, more"],
        ["CREATE TABLE DBConfig(GraphRoot TEXT, RunRoot BLOB, GraphDriver INTEGER)"],
        [
            "CREATE TABLE DBConfig(GraphRoot TEXT, RunRoot TEXT, GraphDriver TEXT)",
            "INSERT INTO DBConfig VALUES (zeroblob(400000000), '', 'vfs')",
        ],
        [
            "CREATE TABLE DBConfig(GraphRoot TEXT, RunRoot TEXT, "
            "GraphDriver TEXT AS (printf('%.*c', 900000000, 'x')))",
            "INSERT INTO DBConfig VALUES ('/', '/')",
        ],
    ],
)
def test_database_with_unusual_tables_is_ignored(
    tmp_path: pathlib.Path, statements: t.List[str]
) -> None:
    written_store.write_database(str(tmp_path / "db.sql"), statements)
    assert libpod_db.recorded(str(tmp_path), str(tmp_path), False) is None


# Processes that do not respond

SHORT = userns.Limits(silence=0.3, stall=0.3, total=600.0, ending=0.3)


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _wait() -> None:
    from ansible_collections.userns.storage.plugins.module_utils._storage.kernel import steps

    steps.begin("reading /a/path")
    # A filesystem of the user that does not respond has the same effect.
    signal.sigwait([signal.SIGUSR1])


def _ignore_termination(ready: str) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    pathlib.Path(f"{ready}.pid").write_text(str(os.getpid()))
    os.rename(f"{ready}.pid", ready)
    signal.sigwait([signal.SIGUSR1])


def test_stopped_process_is_reported(alice: Account) -> None:
    with pytest.raises(WorkerError, match=f"user {alice.name}: .* did not respond"):
        userns.run(_stop, [], alice, SHORT._replace(stall=600.0))


def test_process_that_waits_forever_is_reported(alice: Account) -> None:
    limits = SHORT._replace(silence=600.0, stall=3.0)
    with pytest.raises(WorkerError, match="made no progress for 3 seconds while reading /a/path"):
        userns.run(_wait, [], alice, limits)


def test_process_that_ignores_sigterm_is_killed(alice: Account) -> None:
    received: t.List[int] = []
    ready = pathlib.Path(alice.home) / "ready"

    def terminate_when_ready() -> None:
        while not ready.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=terminate_when_ready)
    thread.start()
    before = signal.signal(signal.SIGTERM, lambda number, _frame: received.append(number))
    try:
        limits = SHORT._replace(silence=600.0, stall=600.0)
        with pytest.raises(WorkerError, match="did not terminate on request"):
            userns.run(_ignore_termination, [str(ready)], alice, limits)
    finally:
        signal.signal(signal.SIGTERM, before)
        thread.join()
    assert received == [signal.SIGTERM]
    assert not os.path.exists(f"/proc/{ready.read_text()}")


def _use_unlimited_memory() -> None:
    blocks = []
    while True:
        blocks.append(bytearray(1 << 28))


def test_memory_is_limited(alice: Account) -> None:
    with pytest.raises(Exception, match="needs more memory"):
        userns.run(_use_unlimited_memory, [], alice)


def _oversized_result() -> t.List[t.Any]:
    return [[]] * 700_000


def test_oversized_result_is_rejected(alice: Account) -> None:
    with pytest.raises(Exception, match="has too many entries.*Process fewer images"):
        userns.run(_oversized_result, [], alice)
