# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests that the SQLite reader returns the same rows from databases and journals as the SQLite library."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import sqlite3
import struct
import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.store import sqlite_file
from hypothesis import given, settings
from hypothesis import strategies as st

COLUMNS = ("a", "b", "c", "d")
Row = t.Tuple[t.Any, ...]


@contextlib.contextmanager
def database(path: pathlib.Path, size: int = 4096) -> t.Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute(f"PRAGMA page_size = {size}")
    connection.execute("CREATE TABLE other (x); -- a comment, (with) signs")
    connection.execute(
        "CREATE TABLE kept (a, [b] BLOB DEFAULT ('x, y'), /* no c, */ \"c\" NUMERIC(5, 2) CHECK (c IN (1, c)),\n"
        "  -- d, too\n  d, PRIMARY KEY (a, b))"
    )
    yield connection
    connection.close()


def insert(connection: sqlite3.Connection, rows: t.Iterable[Row]) -> None:
    connection.executemany("INSERT OR REPLACE INTO kept VALUES (?, ?, ?, ?)", rows)


def read_rows(path: pathlib.Path, limit: int = 10**6) -> t.List[Row]:
    return sqlite_file.rows(str(path), "kept", COLUMNS, limit)


def library_rows(path: pathlib.Path, folder: pathlib.Path) -> t.List[Row]:
    """The rows that the library reads from a copy, since it may write to the files."""
    folder.mkdir()
    for end in ("", "-wal", "-journal"):
        if os.path.exists(f"{path}{end}"):
            shutil.copy(f"{path}{end}", folder / f"{path.name}{end}")
    connection = sqlite3.connect(folder / path.name)
    found = connection.execute("SELECT a, b, c, d FROM kept ORDER BY rowid").fetchall()
    connection.close()
    return found


VALUES = st.one_of(
    st.none(),
    st.integers(-(2**63), 2**63 - 1),
    st.integers(-300, 300),
    st.floats(allow_nan=False),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=50),
    st.binary(max_size=50),
    st.integers(1, 20_000).map(lambda size: "ä" * size),
)


@settings(deadline=None, max_examples=40)
@given(
    rows=st.lists(st.tuples(*[VALUES] * 4), max_size=60),
    size=st.sampled_from([512, 1024, 4096, 65536]),
    later_rows=st.lists(st.tuples(*[VALUES] * 4), max_size=20),
)
def test_any_rows_are_read_as_by_the_library(
    rows: t.List[Row], size: int, later_rows: t.List[Row], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Tests rows in the database file and in the write-ahead log."""
    folder = tmp_path_factory.mktemp("db")
    path = folder / "db.sql"
    with database(path, size) as connection:
        insert(connection, rows)
        assert read_rows(path) == library_rows(path, folder / "1")
        connection.execute("PRAGMA journal_mode = WAL")
        insert(connection, later_rows)
        connection.execute("DELETE FROM kept WHERE rowid % 3 = 1")
        connection.execute("BEGIN")
        connection.execute("DELETE FROM kept")
        assert read_rows(path) == library_rows(path, folder / "2")


@pytest.mark.parametrize("count", [0, 1, 5000])
def test_rows_are_read_up_to_a_limit(count: int, tmp_path: pathlib.Path) -> None:
    rows = [(str(number), b"x", number, None) for number in range(count)]
    with database(tmp_path / "db.sql", 512) as connection:
        connection.execute("BEGIN")
        insert(connection, rows)
        connection.execute("COMMIT")
    assert read_rows(tmp_path / "db.sql") == rows
    assert read_rows(tmp_path / "db.sql", 3) == rows[:3]


def test_interrupted_transaction_is_rolled_back(tmp_path: pathlib.Path) -> None:
    """The database already contains the new pages, and the rollback journal contains the old pages."""
    path = tmp_path / "db.sql"
    rows = [(str(number), b"x" * 100, number, "old") for number in range(500)]
    with database(path, 512) as connection:
        insert(connection, rows)
        connection.execute("PRAGMA cache_size = 2")
        connection.execute("PRAGMA cache_spill = 1")
        connection.execute("BEGIN")
        connection.execute("UPDATE kept SET d = 'new and longer'")
        before = {entry.name: entry.stat().st_mtime_ns for entry in os.scandir(tmp_path)}
        assert b"new and longer" in path.read_bytes()
        assert read_rows(path) == rows
        assert {entry.name: entry.stat().st_mtime_ns for entry in os.scandir(tmp_path)} == before
        crashed = tmp_path / "crashed"
        assert library_rows(path, crashed) == rows
        connection.execute("ROLLBACK")


def test_incomplete_transactions_of_the_log_are_ignored(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "db.sql"
    with database(path) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        insert(connection, [("1", "", 1, "kept")])
        insert(connection, [("2", "", 2, "cut off")])
        log = path.with_name("db.sql-wal")
        complete = log.read_bytes()
        for cut in (1, 2000, 4096):
            log.write_bytes(complete[:-cut])
            assert [row[0] for row in read_rows(path)] == ["1"]
        damaged = bytearray(complete)
        damaged[-5] ^= 1
        log.write_bytes(damaged)
        assert [row[0] for row in read_rows(path)] == ["1"]
        log.write_bytes(complete)
        assert [row[0] for row in read_rows(path)] == ["1", "2"]


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE VIEW kept AS SELECT 1 a, 2 b, 3 c, 4 d",
        "CREATE TABLE kept (a, b, c, d AS (a || b))",
        "CREATE TABLE kept (a, b, c, d GENERATED ALWAYS AS (a) STORED)",
        "CREATE TABLE kept (a PRIMARY KEY, b, c, d) WITHOUT ROWID",
        "CREATE TABLE kept (a, b, c)",
        "CREATE VIRTUAL TABLE kept USING fts4(a, b, c, d)",
        "CREATE TABLE others (a, b, c, d)",
    ],
)
def test_only_plain_tables_are_read(statement: str, tmp_path: pathlib.Path) -> None:
    connection = sqlite3.connect(tmp_path / "db.sql")
    connection.execute(statement)
    connection.close()
    with pytest.raises(ValueError, match="."):
        read_rows(tmp_path / "db.sql")


def test_added_column_is_null_in_older_rows(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "db.sql"
    with database(path) as connection:
        insert(connection, [("1", "2", 3, "4")])
        connection.execute("ALTER TABLE kept ADD COLUMN e TEXT")
    assert sqlite_file.rows(str(path), "kept", ("E", "a"), 9) == [(None, "1")]


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> t.Dict[str, bytes]:
    """A database with both kinds of journal."""
    path = tmp_path_factory.mktemp("seed") / "db.sql"
    found = {}
    with database(path, 512) as connection:
        insert(connection, [(str(number), "y" * number, number, None) for number in range(300)])
        found[""] = path.read_bytes()
        connection.execute("PRAGMA cache_size = 2")
        connection.execute("BEGIN")
        connection.execute("UPDATE kept SET d = 'new'")
        found["-journal"] = path.with_name("db.sql-journal").read_bytes()
        connection.execute("ROLLBACK")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("UPDATE kept SET d = 'newer'")
        found["-wal"] = path.with_name("db.sql-wal").read_bytes()
    return found


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_any_damaged_database_is_read_or_rejected(
    seeds: t.Dict[str, bytes], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Reading ends with rows, or with an exception that callers treat as damage."""
    folder = tmp_path_factory.mktemp("db")
    for end in data.draw(st.sampled_from([("",), ("", "-wal"), ("", "-journal")])):
        content = bytearray(seeds[end])
        for _round in range(data.draw(st.integers(0, 8))):
            # Most changes outside of headers have no effect.
            at = data.draw(
                st.integers(0, data.draw(st.sampled_from([120, 2000, len(content) - 1])))
            )
            content[at % len(content)] = data.draw(st.integers(0, 255))
        del content[data.draw(st.integers(0, len(content) * 4)) :]
        (folder / f"db.sql{end}").write_bytes(content)
    with contextlib.suppress(ValueError, OSError, IndexError, struct.error):
        read_rows(folder / "db.sql")


def test_overlapping_rows_are_rejected(tmp_path: pathlib.Path) -> None:
    """4,000 cells in each of 500 pages refer to the same row."""
    path = tmp_path / "db.sql"
    with database(path, 65536) as connection:
        insert(connection, [(str(number), b"y" * 32_000, number, None) for number in range(1000)])
    content = bytearray(path.read_bytes())
    for page in range(65536, len(content), 65536):
        if content[page] == 13:
            cell = content[page + 8 : page + 10]
            content[page + 3 : page + 5] = (4000).to_bytes(2, "big")
            content[page + 8 : page + 8 + 8000] = cell * 4000
    path.write_bytes(content)
    with pytest.raises(ValueError, match="too much to read"):
        read_rows(path)


def test_cycle_of_pages_is_rejected(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "db.sql"
    with database(path, 512) as connection:
        insert(connection, [(str(number), "y" * 400, number, None) for number in range(300)])
        root = connection.execute(
            "SELECT rootpage FROM sqlite_master WHERE name = 'kept'"
        ).fetchone()[0]
    content = bytearray(path.read_bytes())
    # The last child page of the root is the root itself.
    content[(root - 1) * 512 + 8 : (root - 1) * 512 + 12] = root.to_bytes(4, "big")
    path.write_bytes(content)
    with pytest.raises(ValueError, match="deep|cycle"):
        read_rows(path)


def written_while_read(
    path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> t.Callable[[], t.List[t.Tuple[t.Any, ...]]]:
    """A function that reads a table, to which another program writes during the first `times` reads."""
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE found (number INTEGER, text TEXT)")
    connection.executemany("INSERT INTO found VALUES (?, ?)", [(n, "x" * 500) for n in range(300)])
    connection.commit()
    pages = sqlite_file._journal_pages
    remaining = [times]

    def write_first(data: bytes) -> t.Any:
        if remaining[0]:
            remaining[0] -= 1
            connection.execute("DELETE FROM found WHERE number = (SELECT MIN(number) FROM found)")
            connection.execute("INSERT INTO found SELECT MAX(number) + 1, 'y' FROM found")
            connection.commit()
        return pages(data)

    monkeypatch.setattr(sqlite_file, "_journal_pages", write_first)
    return lambda: sqlite_file.rows(str(path), "found", ["number"], 1000)


def test_database_written_during_the_read_is_read_again(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = written_while_read(tmp_path / "db.sql", monkeypatch, 3)
    assert sorted(number for (number,) in read()) == list(range(3, 303))


def test_database_that_changes_all_the_time_is_an_error(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = written_while_read(tmp_path / "db.sql", monkeypatch, 1000)
    with pytest.raises(ValueError, match="changes all the time"):
        read()
