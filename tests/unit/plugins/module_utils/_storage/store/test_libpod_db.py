# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of reading podman's databases, bolt and SQLite, intact and damaged."""

from __future__ import annotations

import base64
import json
import os
import pathlib
import sqlite3
import struct
import sys
import typing as t
import zlib

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.kernel import files
from ansible_collections.userns.storage.plugins.module_utils._storage.store import libpod_db
from ansible_collections.userns.storage.plugins.module_utils._storage.store.libpod_db import (
    PodmanStore,
    recorded,
)
from hypothesis import given
from hypothesis import strategies as st

PAGE = 4096
GRAPH, RUN = "/srv/ä/graph", "/run/x"
ENTRIES = {
    b"graph-driver-name": b"vfs",
    b"graph-root": GRAPH.encode(),
    b"os": b"linux",
    b"run-root": RUN.encode(),
}


def leaf(entries: t.Mapping[bytes, t.Tuple[int, bytes]], page: int = 0) -> bytes:
    """A leaf page with sorted keys."""
    body = b""
    elements = b""
    start = 16 * len(entries)
    for index, (key, (flags, value)) in enumerate(sorted(entries.items())):
        position = start - 16 * index + len(body)
        elements += struct.pack("<IIII", flags, position, len(key), len(value))
        body += key + value
    return struct.pack("<QHHI", page, 2, len(entries), 0) + elements + body


def branch(children: t.Sequence[t.Tuple[bytes, int]], page: int) -> bytes:
    body = b""
    elements = b""
    for index, (key, child) in enumerate(children):
        position = 16 * (len(children) - index) + len(body)
        elements += struct.pack("<IIQ", position, len(key), child)
        body += key
    return struct.pack("<QHHI", page, 1, len(children), 0) + elements + body


def meta(page: int, root: int, txid: int, size: int = PAGE) -> bytes:
    body = struct.pack("<IIIIQQQQQ", 0xED0CDAED, 2, size, 0, root, 0, 2, 9, txid)
    return struct.pack("<QHHI", page, 4, 0, 0) + body + struct.pack("<Q", libpod_db._fnv(body))


def bolt(pages: t.Mapping[int, bytes], size: int = PAGE) -> bytes:
    return b"".join(pages.get(number, b"").ljust(size, b"\0") for number in range(max(pages) + 1))


def small() -> bytes:
    """A database as podman writes it: a top page with inline buckets."""
    inline = struct.pack("<QQ", 0, 0) + leaf({key: (0, value) for key, value in ENTRIES.items()})
    top = leaf(
        {b"ctr": (1, struct.pack("<QQ", 0, 0) + leaf({})), b"runtime-config": (1, inline)}, 3
    )
    return bolt({0: meta(0, 3, 6), 1: meta(1, 3, 5), 3: top})


def large(size: int = PAGE) -> bytes:
    """A database with branch pages above the leaves, and with the bucket on separate pages."""
    names = [f"b{number:03}".encode() for number in range(40)]
    return bolt(
        {
            0: meta(0, 9, 4, size),
            1: meta(1, 3, 5, size),
            3: branch([(names[0], 4), (b"runtime-config", 5)], 3),
            4: leaf({name: (1, struct.pack("<QQ", 0, 0)) for name in names}, 4),
            5: leaf({b"runtime-config": (1, struct.pack("<QQ", 6, 0))}, 5),
            6: branch([(b"graph", 7), (b"run", 8)], 6),
            7: leaf({key: (0, value) for key, value in ENTRIES.items() if key < b"os"}, 7),
            8: leaf({key: (0, value) for key, value in ENTRIES.items() if key > b"os"}, 8),
        },
        size,
    )


@pytest.fixture
def graphroot(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "g" / "libpod").mkdir(parents=True)
    return tmp_path / "g"


def read_store(graphroot: pathlib.Path, transient: bool = False) -> t.Optional[PodmanStore]:
    return recorded(str(graphroot), str(graphroot.parent / "r"), transient)


@pytest.mark.parametrize("data", [small(), large(), large(16384)])
def test_bolt_database_is_read(graphroot: pathlib.Path, data: bytes) -> None:
    path = graphroot / "libpod" / "bolt_state.db"
    path.write_bytes(data)
    before = os.stat(path)
    assert read_store(graphroot) == PodmanStore(str(path), GRAPH, RUN, "vfs")
    assert os.stat(path).st_mtime_ns == before.st_mtime_ns


def test_half_written_meta_page_is_skipped(graphroot: pathlib.Path) -> None:
    """Of two intact meta pages, the newer page is used."""
    path = graphroot / "libpod" / "bolt_state.db"
    data = bytearray(small())
    data[16 + 40] ^= 0xFF
    path.write_bytes(bytes(data))
    found = read_store(graphroot)
    assert found is not None
    assert found.driver == "vfs"
    data[PAGE + 16 + 40] ^= 0xFF
    path.write_bytes(bytes(data))
    assert read_store(graphroot) is None


@given(st.data())
def test_damaged_bolt_database_is_read_or_ignored(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    graphroot = tmp_path_factory.mktemp("bolt")
    (graphroot / "libpod").mkdir()
    content = bytearray(data.draw(st.sampled_from([small(), large()])))
    for _round in range(data.draw(st.integers(0, 20))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(0, len(content))) :]
    (graphroot / "libpod" / "bolt_state.db").write_bytes(content)
    read_store(graphroot)


def test_database_with_a_page_after_its_end_is_ignored(graphroot: pathlib.Path) -> None:
    path = graphroot / "libpod" / "bolt_state.db"
    for page in (9, 2**63, 2**64 - 1):
        path.write_bytes(bolt({0: meta(0, 3, 1), 3: branch([(b"a", page)], 3)}))
        assert read_store(graphroot) is None


def test_database_with_cyclic_pages_is_ignored(graphroot: pathlib.Path) -> None:
    path = graphroot / "libpod" / "bolt_state.db"
    path.write_bytes(bolt({0: meta(0, 3, 1), 3: branch([(b"a", 3), (b"b", 3)], 3)}))
    assert read_store(graphroot) is None


def sqlite(
    path: pathlib.Path, row: t.Optional[t.Sequence[t.Any]] = (GRAPH, RUN, "overlay")
) -> None:
    connection = sqlite3.connect(path)
    connection.execute(
        "CREATE TABLE DBConfig(ID INTEGER PRIMARY KEY NOT NULL, SchemaVersion INTEGER NOT NULL,"
        " OS TEXT, StaticDir TEXT, TmpDir TEXT, GraphRoot TEXT, RunRoot TEXT, GraphDriver TEXT,"
        " VolumeDir TEXT, CHECK (ID IN (1)))"
    )
    if row is not None:
        connection.execute(
            "INSERT INTO DBConfig VALUES (1, 1, 'linux', '', '', ?, ?, ?, '')", tuple(row)
        )
    connection.commit()
    connection.close()


def test_sqlite_database_is_read(graphroot: pathlib.Path) -> None:
    path = graphroot / "db.sql"
    sqlite(path)
    assert read_store(graphroot) == PodmanStore(str(path), GRAPH, RUN, "overlay")
    assert sorted(os.listdir(graphroot)) == ["db.sql", "libpod"]
    # The file of older podman versions takes precedence.
    (graphroot / "libpod" / "bolt_state.db").write_bytes(small())
    found = read_store(graphroot)
    assert found is not None
    assert found.driver == "vfs"


def test_containers_of_both_databases_are_read(graphroot: pathlib.Path) -> None:
    """Which database podman uses depends on its version, so it may know a container from either of them."""

    def config(name: str) -> bytes:
        return json.dumps({"name": name}).encode()

    inline = struct.pack("<QQ", 0, 0)
    in_bolt = {
        name.encode(): (1, inline + leaf({b"config": (0, config(name))}))
        for name in ("old", "both")
    }
    top = leaf({b"ctr": (1, inline + leaf(in_bolt))}, 3)
    (graphroot / "libpod" / "bolt_state.db").write_bytes(bolt({0: meta(0, 3, 6), 3: top}))
    connection = sqlite3.connect(graphroot / "db.sql")
    connection.execute("CREATE TABLE ContainerConfig (ID TEXT, JSON TEXT)")
    rows = [(name, config(name).decode()) for name in ("new", "both")]
    connection.executemany("INSERT INTO ContainerConfig VALUES (?, ?)", rows)
    connection.commit()
    connection.close()

    def found() -> t.Tuple[t.Set[str], t.List[str]]:
        read = libpod_db.read_databases(str(graphroot), str(graphroot.parent / "r"))
        known = read.containers
        assert all(item.id == key == item.name for key, item in known.items())
        return set(known), sorted(os.path.basename(path) for path in read.unreadable)

    assert found() == ({"old", "new", "both"}, [])
    (graphroot / "libpod" / "bolt_state.db").write_bytes(b"damaged")
    assert found() == ({"new", "both"}, ["bolt_state.db"])
    (graphroot / "libpod" / "bolt_state.db").write_bytes(bolt({0: meta(0, 3, 6), 3: top}))
    (graphroot / "db.sql").write_bytes(b"damaged")
    assert found() == ({"old", "both"}, ["db.sql"])
    # podman has created the file, but not written to it yet.
    (graphroot / "db.sql").write_bytes(b"")
    assert found() == ({"old", "both"}, [])
    (graphroot / "db.sql").unlink()
    sqlite3.connect(graphroot / "db.sql").execute("PRAGMA user_version = 1")
    (graphroot / "libpod" / "bolt_state.db").write_bytes(bolt({0: meta(0, 3, 6), 3: leaf({})}))
    assert found() == (set(), [])
    (graphroot / "libpod" / "bolt_state.db").write_bytes(bolt({0: meta(0, 3, 6), 3: top}))
    (graphroot / "db.sql").unlink()
    os.mkfifo(graphroot / "db.sql")
    assert found() == ({"old", "both"}, ["db.sql"])


def test_database_written_during_the_read_is_read_again(
    graphroot: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = graphroot / "libpod" / "bolt_state.db"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"half written")
    complete = bolt(
        {0: meta(0, 3, 6), 3: leaf({b"ctr": (1, struct.pack("<QQ", 0, 0) + leaf({}))}, 3)}
    )

    def read(name: str, limit: int) -> bytes:
        monkeypatch.undo()
        content = path.read_bytes()
        path.write_bytes(complete)
        return content

    monkeypatch.setattr(files, "read_regular", read)
    assert libpod_db.read_databases(str(graphroot), "/none").unreadable == {}


def test_sqlite_database_in_use_is_read(graphroot: pathlib.Path) -> None:
    """Committed data in the journal is read, and no file is written."""
    path = graphroot / "db.sql"
    sqlite(path)
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("UPDATE DBConfig SET GraphDriver='btrfs'")
    connection.commit()
    before = {entry.name: entry.stat().st_mtime_ns for entry in os.scandir(graphroot)}
    assert "db.sql-wal" in before
    found = read_store(graphroot)
    assert found is not None
    assert found.driver == "btrfs"
    assert {entry.name: entry.stat().st_mtime_ns for entry in os.scandir(graphroot)} == before
    connection.close()


def test_database_of_a_transient_store_is_in_the_run_root(graphroot: pathlib.Path) -> None:
    sqlite(graphroot / "db.sql")
    assert read_store(graphroot, transient=True) is None
    runroot = graphroot.parent / "r"
    runroot.mkdir()
    sqlite(runroot / "db.sql", (GRAPH, RUN, "btrfs"))
    found = read_store(graphroot, transient=True)
    assert found is not None
    assert found.driver == "btrfs"


def test_missing_and_unusable_databases_are_ignored(
    graphroot: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    assert read_store(graphroot) is None
    assert read_store(tmp_path / "no") is None
    for data in (b"", b"x" * 10000, b"SQLite format 3\0"):
        (graphroot / "db.sql").write_bytes(data)
        assert read_store(graphroot) is None
    (graphroot / "db.sql").unlink()
    for row in (None, (None, RUN, "vfs"), (GRAPH, RUN, 5.5)):
        sqlite(graphroot / "db.sql", row)
        found = read_store(graphroot)
        assert found is None or found.driver == "5.5"
        (graphroot / "db.sql").unlink()


@pytest.mark.parametrize("kind", ["fifo", "link", "dir"])
def test_irregular_files_are_ignored(graphroot: pathlib.Path, kind: str) -> None:
    for path in (graphroot / "db.sql", graphroot / "libpod" / "bolt_state.db"):
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "link":
            path.symlink_to("/etc/passwd")
        else:
            path.mkdir()
        assert read_store(graphroot) is None


def test_sqlite_database_is_read_without_the_sqlite3_module(
    graphroot: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sqlite(graphroot / "db.sql")
    monkeypatch.setitem(sys.modules, "sqlite3", None)
    assert read_store(graphroot) == PodmanStore(str(graphroot / "db.sql"), GRAPH, RUN, "overlay")


# The first pages of the file that podman 4.3.1 wrote for `podman --root /tmp/x/g --runroot /tmp/x/r
# --storage-driver vfs info`.
_PODMAN = (
    "eNrt2s9u0zAcwPE03VhhQDdtEgcuHLiAsHrghIT2DDtx4hKSrLOUf3LcqvAOXHkGXoSX4LQXGJdJG9xwGrtzK6HkWJ"
    "XvR4qdn/NL2ripVNsNgtaera9/Pr4Om52j9XZn39YPbB3aunj7/M2X/M+vAAAAAAAAbJ1Bx/g/3Mgfboz/XTz++O32"
    "9d27M3oUAAAAAIDtE67qp6v5gCuzjcz2wsa/zXbgxWNTPPLiV4N2HsDF7wftfIKLz03x0IulKU69+KspDr34uymeeP"
    "GPjeNXG693Y4rm3Z8M2nhvuH782fD+/CjLRKxV3dUfJu+8TPqkfSizWZ52ZpoX7UpJF2ncnSO1iMsk7Z0otMxTUeso"
    "r7rOkYlQ6VTWWn3uSi0ic9HeyXXv1KpMulLUrFjeUlwWF3L67+yD1X5z48fB/WSVDtoHeGTjub26+3NLbo+NvLjJH3"
    "v5zdUPbbyw+82c2VRF1aVIlJynSjS9NL+o2zZVlnqi82qymEzLOpPFbGFuxW9W5lPSMhaJVC5xkslPpk9MtGw1J9iW"
    "+fKxE1WkL1e5bVttqq4+tGf3+SYAAAAA2BVuSHRkf++7/wHs0zUAAAAAAOwMN97fhfV/Fx+H68dfhqz//4fr/y0Www"
    "EAAABgya3zu/V/N9AZ0jUAAAAAAAAAAAAAAAAAAAAAAGyNvzxTvM8="
)


def test_database_that_podman_wrote_is_read(graphroot: pathlib.Path) -> None:
    path = graphroot / "libpod" / "bolt_state.db"
    path.write_bytes(zlib.decompress(base64.b64decode(_PODMAN)))
    assert read_store(graphroot) == PodmanStore(str(path), "/tmp/x/g", "/tmp/x/r", "vfs")
