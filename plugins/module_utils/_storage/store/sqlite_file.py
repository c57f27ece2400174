# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Read tables of an SQLite file and its journals without writing anything.

The SQLite library writes to a database that has a journal, and it executes code in the database:
views, computed columns, triggers. This reader only decodes rows of plain tables. The format is described at
https://www.sqlite.org/fileformat2.html.
"""

from __future__ import annotations

import contextlib
import os
import re
import struct
import typing as t

from ..kernel import files

Value = t.Union[None, int, float, str, bytes]

_MAGIC = b"SQLite format 3\0"
_NO_TEXT, _UTF_8 = 0, 1
_INTERIOR, _LEAF = 5, 13
_WAL_MAGIC = 0x377F0682  # plus 1 if its checksums are big-endian
_WAL_VERSION = 3007000
_WAL_HEADER = struct.Struct(">8I")  # magic, version, page size, sequence, two salts, two sums
_FRAME = struct.Struct(">6I")  # page, pages of the database after a commit, two salts, two sums
_JOURNAL_MAGIC = bytes.fromhex("d9d505f920a163d7")
_JOURNAL_HEADER = struct.Struct(">8s5I")  # magic, records, nonce, pages, sector size, page size
_ANY_NUMBER = 0xFFFFFFFF
_SUM_STEP = 200
_SIZES = frozenset(1 << power for power in range(9, 17))
_TOKEN = re.compile(
    r"""'(?:[^']|'')*'|"(?:[^"]|"")*"|`[^`]*`|\[[^]]*]|--[^\n]*|/\*.*?\*/|[(),]|[^\s'"`\[(),]+""",
    re.S,
)
# Bytes; a database with 1,000 containers has 20 MB. SQLite keeps journals below 4 MB, unless a reader is slow.
_READ_LIMIT = 256 * 1024 * 1024
_JOURNAL_LIMIT = 64 * 1024 * 1024
# Cells may overlap, so that a small file can have any number of rows.
_ROW_COST = 256
_DEPTH_LIMIT = 20
# Attempts to read a database that is being written.
_ATTEMPTS = 20
# Characters; podman writes about 500.
_SQL_LIMIT = 8000
_COLUMNS_LIMIT = 2000


class NoTables(ValueError):
    """The database was created, but has no table yet."""


def rows(path: str, table: str, columns: t.Sequence[str], most: int) -> t.List[t.Tuple[Value, ...]]:
    """The first rows of a table, as of the last committed transaction.

    :param path: the database; it is opened read-only and not locked
    :param most: the maximum number of rows
    :returns: for each row the values of the columns; text as str, with surrogates for invalid UTF-8
    :raises OSError: it cannot be read
    :raises ValueError: it is damaged, too large, or has no such plain table (also struct.error and IndexError)
    """
    for attempt in range(_ATTEMPTS):
        before = _state(path)
        try:
            found = _rows(path, before, table, columns, most)
        except (OSError, ValueError, IndexError, struct.error):
            # Concurrent writes may look like damage.
            if attempt == _ATTEMPTS - 1 or _state(path) == before:
                raise
        else:
            if _state(path) == before:
                return found
    raise ValueError("changes all the time")


class _State(t.NamedTuple):
    """The state that changes with each write: the first bytes of the database, with its change counter, and its
    journals."""

    status: t.Tuple[int, ...]
    header: bytes
    write_ahead: bytes
    rollback: bytes


def _state(path: str) -> _State:
    # The journals first, because later writes to the database are in them.
    write_ahead, rollback = _journal(f"{path}-wal"), _journal(f"{path}-journal")
    descriptor = files.open_regular(path)
    try:
        status = os.fstat(descriptor)
        numbers = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        return _State(numbers, os.pread(descriptor, 100, 0), write_ahead, rollback)
    finally:
        os.close(descriptor)


def _rows(
    path: str, state: _State, table: str, columns: t.Sequence[str], most: int
) -> t.List[t.Tuple[Value, ...]]:
    write_ahead, rollback = _wal_pages(state.write_ahead), _journal_pages(state.rollback)
    descriptor = files.open_regular(path)
    try:
        file = _File(descriptor, *(write_ahead if write_ahead[1] else rollback))
        root, places = _find(file, table, columns)
        found: t.List[t.Tuple[Value, ...]] = []
        for values in file.rows(root):
            if len(found) == most:
                break
            found.append(tuple(values[at] if at < len(values) else None for at in places))
        return found
    finally:
        os.close(descriptor)


def _journal(path: str) -> bytes:
    with contextlib.suppress(FileNotFoundError):
        return files.read_regular(path, _JOURNAL_LIMIT)
    return b""


class _File:
    """The pages of a database.

    :param size: the page size by a journal; 0 without a journal
    :param pages: pages of journals, which replace those of the file
    """

    def __init__(self, descriptor: int, size: int, pages: t.Mapping[int, bytes]) -> None:
        self._descriptor = descriptor
        self._pages = pages
        header = pages.get(1) or os.pread(descriptor, 100, 0)
        if not header.startswith(_MAGIC):
            raise ValueError("no SQLite file")
        own = int.from_bytes(header[16:18], "big")
        self._size = size or (65536 if own == 1 else own)
        if self._size not in _SIZES:
            raise ValueError("pages of an impossible size")
        # The end of each page may be reserved for extensions.
        self._usable = self._size - header[20]
        if self._usable < 480:
            raise ValueError("pages without room")
        if int.from_bytes(header[56:60], "big") not in (_NO_TEXT, _UTF_8):
            raise ValueError("text in another encoding")
        self._left = _READ_LIMIT

    def _spend(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise ValueError("too much to read, or pages in a cycle")

    def _page(self, number: int) -> bytes:
        self._spend(self._size)
        if not 0 < number < 1 << 32:
            raise ValueError("no such page")
        found = self._pages.get(number)
        if found is None:
            found = os.pread(self._descriptor, self._size, (number - 1) * self._size)
        if len(found) != self._size:
            raise ValueError("a page behind the end")
        return found[: self._usable]

    def rows(self, root: int, depth: int = 0) -> t.Iterator[t.List[Value]]:
        """The rows of the table with this root page."""
        if depth > _DEPTH_LIMIT:
            raise ValueError("pages too deep")
        page = self._page(root)
        # The first page starts with the header of the file.
        start = 100 if root == 1 else 0
        kind, count = page[start], int.from_bytes(page[start + 3 : start + 5], "big")
        if kind not in (_INTERIOR, _LEAF):
            raise ValueError("no page of a table")
        cells = start + (8 if kind == _LEAF else 12)
        for number in range(count):
            (at,) = struct.unpack_from(">H", page, cells + 2 * number)
            if kind == _LEAF:
                yield _record(self._payload(page, at))
            else:
                yield from self.rows(_page_number(page, at), depth + 1)
        if kind == _INTERIOR:
            yield from self.rows(_page_number(page, start + 8), depth + 1)

    def _payload(self, page: bytes, at: int) -> bytes:
        size, at = _varint(page, at)
        _row, at = _varint(page, at)
        self._spend(size + _ROW_COST)
        usable = self._usable
        local = size
        if size > usable - 35:
            least = (usable - 12) * 32 // 255 - 23
            local = least + (size - least) % (usable - 4)
            if local > usable - 35:
                local = least
        pieces, left = [page[at : at + local]], size - local
        following = _page_number(page, at + local) if left else 0
        while left:
            page = self._page(following)
            following = _page_number(page, 0)
            pieces.append(page[4 : 4 + left])
            left -= len(pieces[-1])
        return b"".join(pieces)


def _page_number(page: bytes, at: int) -> int:
    return int.from_bytes(page[at : at + 4], "big")


def _varint(data: bytes, at: int) -> t.Tuple[int, int]:
    """A number of one to nine bytes, and the position after it."""
    value = 0
    for index in range(8):
        byte = data[at + index]
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, at + index + 1
    return value << 8 | data[at + 8], at + 9


_RESERVED = frozenset((10, 11))
_INTEGERS = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8}


def _record(data: bytes) -> t.List[Value]:
    """The values of one row."""
    body, at = _varint(data, 0)
    kinds = []
    while at < body:
        kind, at = _varint(data, at)
        kinds.append(kind)
        if len(kinds) > _COLUMNS_LIMIT:
            raise ValueError("too many columns")
    found: t.List[Value] = []
    for kind in kinds:
        size = _INTEGERS.get(kind, 8 if kind == 7 else (kind - 12) // 2 if kind >= 12 else 0)
        piece = data[body : body + size]
        if len(piece) != size or kind in _RESERVED:
            raise ValueError("a damaged row")
        body += size
        if kind in _INTEGERS:
            found.append(int.from_bytes(piece, "big", signed=True))
        elif kind == 7:
            found.append(float(struct.unpack(">d", piece)[0]))
        elif kind < 12:
            found.append(None if kind == 0 else kind - 8)
        else:
            found.append(piece.decode("utf-8", "surrogateescape") if kind % 2 else piece)
    return found


def _find(file: _File, table: str, columns: t.Sequence[str]) -> t.Tuple[int, t.List[int]]:
    """The root page of a table, and the positions of columns in its rows."""
    has_tables = False
    for values in file.rows(1):
        kind, name, _table, root, sql = (*values, *(None,) * 5)[:5]
        has_tables = has_tables or kind == "table"
        if kind == "table" and name == table and isinstance(root, int) and root > 0:
            names = _columns(sql if isinstance(sql, str) else "")
            return root, [names.index(column.lower()) for column in columns]
    raise (ValueError if has_tables else NoTables)(f"no plain table {table}")


def _columns(sql: str) -> t.List[str]:
    """The names of all columns in CREATE TABLE, in lower case; constraints are ignored.

    :raises ValueError: a column is computed, and therefore not stored in rows
    """
    names: t.List[str] = []
    depth, first = 0, False
    for token in _TOKEN.findall(sql[:_SQL_LIMIT]):
        if token.startswith(("--", "/*")):
            continue
        if token == "(":
            depth += 1
            first = first or depth == 1
        elif token == ")":
            depth -= 1
        elif token == "," and depth == 1:
            first = True
        elif first:
            names.append(token.strip("\"'`[]").lower())
            first = False
        elif depth == 1 and token.upper() in ("AS", "GENERATED"):
            raise ValueError("computed columns")
    return names


def _wal_pages(data: bytes) -> t.Tuple[int, t.Dict[int, bytes]]:
    """The page size, and the pages of committed transactions in a write-ahead log."""
    pages: t.Dict[int, bytes] = {}
    if len(data) < _WAL_HEADER.size:
        return 0, pages
    magic, version, size, _sequence, *salts, one, two = _WAL_HEADER.unpack_from(data)
    order = ">" if magic & 1 else "<"
    sums = _checksum(order, data[:24], (0, 0))
    if magic & ~1 != _WAL_MAGIC or version != _WAL_VERSION or size not in _SIZES:
        return 0, pages
    if sums != (one, two):
        return 0, pages
    pending: t.Dict[int, bytes] = {}
    at = _WAL_HEADER.size
    while at + _FRAME.size + size <= len(data):
        number, committed, *own, one, two = _FRAME.unpack_from(data, at)
        page = data[at + _FRAME.size : at + _FRAME.size + size]
        sums = _checksum(order, page, _checksum(order, data[at : at + 8], sums))
        if own != salts or sums != (one, two):
            break
        pending[number] = page
        if committed:
            pages.update(pending)
            pending.clear()
        at += _FRAME.size + size
    return size, pages


def _checksum(order: str, data: bytes, sums: t.Tuple[int, int]) -> t.Tuple[int, int]:
    one, two = sums
    words = struct.unpack(f"{order}{len(data) // 4}I", data)
    for even, odd in zip(words[::2], words[1::2]):
        one = (one + even + two) & 0xFFFFFFFF
        two = (two + odd + one) & 0xFFFFFFFF
    return one, two


def _journal_pages(data: bytes) -> t.Tuple[int, t.Dict[int, bytes]]:
    """The page size, and the pages as they were before the transaction of a rollback journal."""
    pages: t.Dict[int, bytes] = {}
    found, at = 0, 0
    while data.startswith(_JOURNAL_MAGIC, at) and len(data) - at >= _JOURNAL_HEADER.size:
        _magic, count, nonce, _pages, sector, size = _JOURNAL_HEADER.unpack_from(data, at)
        if size not in _SIZES or found not in (0, size) or sector not in _SIZES:
            break
        found = size
        at += sector
        if count == _ANY_NUMBER or (count == 0 and at == sector):
            # The writer has not written the number yet.
            count = len(data)
        for _record in range(count):
            number, page = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 4 + size]
            own = data[at + 4 + size : at + 8 + size]
            total = nonce + sum(page[size - _SUM_STEP : 0 : -_SUM_STEP])
            if len(own) != 4 or total & 0xFFFFFFFF != int.from_bytes(own, "big"):
                return found, pages
            pages.setdefault(number, page)
            at += size + 8
        at += -at % sector
    return found, pages
