# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This module util is PRIVATE to the userns.storage collection.
"""What podman's own database says about its store, which podman puts above storage.conf.

Two forms exist: a bolt file (podman 4, and later ones that found it) and SQLite (new stores of
podman 5). Both are read as plain files, never opened for writing and never locked.
"""

from __future__ import annotations

import os
import shutil
import stat
import struct
import tempfile
import typing as t
from dataclasses import dataclass
from urllib.parse import quote

BOLT = os.path.join("libpod", "bolt_state.db")
SQLITE = "db.sql"

_SIZE_LIMIT = 1024 * 1024 * 1024


@dataclass(frozen=True)
class PodmanStore:
    """The paths and the driver podman has recorded; empty for what it has not.

    :ivar path: the database file
    """

    path: str
    graphroot: str = ""
    runroot: str = ""
    driver: str = ""


def recorded(graphroot: str, runroot: str, transient: bool) -> t.Optional[PodmanStore]:
    """What podman's database of this store says; None without one, or when it cannot be read.

    :param graphroot: where podman would look for its database
    :param transient: a transient store keeps it in the runroot
    """
    if not transient:
        path = os.path.join(graphroot, BOLT)
        if os.path.lexists(path):
            return _quietly(read_bolt, path)
    path = os.path.join(runroot if transient else graphroot, SQLITE)
    return _quietly(read_sqlite, path) if os.path.lexists(path) else None


def _quietly(read: t.Callable[[str], PodmanStore], path: str) -> t.Optional[PodmanStore]:
    """A database that is damaged, or in a form not known here, decides nothing."""
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return None
        return read(path)
    except (OSError, ValueError, KeyError, IndexError, struct.error):
        return None


# bolt: https://github.com/etcd-io/bbolt, file format 2. Little-endian on all that podman runs on.

_BOLT_MAGIC = 0xED0CDAED
_BOLT_VERSION = 2
_PAGE_HEADER = struct.Struct("<QHHI")  # page ID, flags, count, overflow pages
_META = struct.Struct("<IIIIQQQQQQ")  # magic ... root page, sequence, freelist, pages, txid, sum
_BRANCH = struct.Struct("<IIQ")  # position, key size, page ID
_LEAF = struct.Struct("<IIII")  # flags, position, key size, value size
_BUCKET = struct.Struct("<QQ")  # root page ID (0: the page follows), sequence
_IS_BRANCH, _IS_LEAF = 0x01, 0x02
_BUCKET_FLAG = 0x01
_DEPTH_LIMIT = 32
_PAGES_LIMIT = 100_000
_PAGE_SIZES = (4096, 8192, 16384, 32768, 65536, 1024, 2048)


class _Bolt:
    """One bolt file's bytes."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.pages = 0
        metas = [one for size in _PAGE_SIZES for one in (self._meta(0), self._meta(size)) if one]
        if not metas:
            raise ValueError("no meta page")
        _txid, self.page_size, self.root = max(metas)

    def _meta(self, offset: int) -> t.Optional[t.Tuple[int, int, int]]:
        start = offset + _PAGE_HEADER.size
        if start + _META.size > len(self.data):
            return None
        magic, version, size, _flags, root, _seq, _free, _high, txid, total = _META.unpack_from(
            self.data, start
        )
        if magic != _BOLT_MAGIC or version != _BOLT_VERSION:
            return None
        if _fnv(self.data[start : start + _META.size - 8]) != total:
            return None
        return txid, size, root

    def bucket(self, name: bytes) -> t.Dict[bytes, bytes]:
        """The plain entries of a top-level bucket."""
        for flags, key, value in self._entries(self.data, self.root * self.page_size, 0):
            if key == name and flags & _BUCKET_FLAG:
                root, _sequence = _BUCKET.unpack_from(value)
                if root:
                    entries = self._entries(self.data, root * self.page_size, 0)
                else:
                    entries = self._entries(value[_BUCKET.size :], 0, 0)
                return {one: text for kind, one, text in entries if not kind & _BUCKET_FLAG}
        raise KeyError(name)

    def _entries(
        self, data: bytes, offset: int, depth: int
    ) -> t.Iterator[t.Tuple[int, bytes, bytes]]:
        self.pages += 1
        if depth > _DEPTH_LIMIT or self.pages > _PAGES_LIMIT:
            raise ValueError("pages in a circle")
        if offset > len(data):
            # Python counts on, where C's numbers end.
            raise ValueError("a page behind the end")
        _id, flags, count, _overflow = _PAGE_HEADER.unpack_from(data, offset)
        start = offset + _PAGE_HEADER.size
        if flags & _IS_BRANCH:
            for index in range(count):
                page = _BRANCH.unpack_from(data, start + index * _BRANCH.size)[2]
                yield from self._entries(self.data, page * self.page_size, depth + 1)
        elif flags & _IS_LEAF:
            for index in range(count):
                at = start + index * _LEAF.size
                kind, position, key_size, value_size = _LEAF.unpack_from(data, at)
                key = data[at + position : at + position + key_size]
                at += position + key_size
                yield kind, key, data[at : at + value_size]
        else:
            raise ValueError("a page of no known kind")


def _fnv(data: bytes) -> int:
    """FNV-1a, 64 bits: bolt's checksum of its meta pages."""
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return value


def read_bolt(path: str) -> PodmanStore:
    """Read podman's bolt_state.db.

    :raises OSError: it cannot be read
    :raises ValueError: it is no bolt file (also KeyError, IndexError and struct.error)
    """
    bucket = _Bolt(_bytes_of(path)).bucket(b"runtime-config")

    def text(key: bytes) -> str:
        return bucket.get(key, b"").decode("utf-8", "surrogateescape")

    return PodmanStore(path, text(b"graph-root"), text(b"run-root"), text(b"graph-driver-name"))


def _bytes_of(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        return file.read(_SIZE_LIMIT)


def read_sqlite(path: str) -> PodmanStore:
    """Read podman's db.sql.

    A journal beside it belongs to it and would be written to on opening, so both are copied then.

    :raises OSError: it cannot be read
    :raises ValueError: it is no SQLite file, holds no configuration, or Python lacks ``sqlite3``
    """
    journals = [f"{path}{end}" for end in ("-wal", "-journal")]
    journals = [one for one in journals if os.path.isfile(one) and os.path.getsize(one)]
    if not journals:
        return _query(path, path, "mode=ro&immutable=1")
    with tempfile.TemporaryDirectory(prefix="userns-storage-") as folder:
        copy = os.path.join(folder, SQLITE)
        shutil.copyfile(path, copy)
        for journal in journals:
            shutil.copyfile(journal, f"{copy}{journal[len(path) :]}")
        return _query(copy, path, "mode=rw")


def _query(file: str, path: str, options: str) -> PodmanStore:
    # Not every Python is built with it, and only stores of podman 5 need it.
    try:
        import sqlite3
    except ImportError as error:
        raise ValueError(str(error)) from error

    try:
        connection = sqlite3.connect(f"file:{quote(file)}?{options}", uri=True)
        try:
            row = connection.execute(
                "SELECT GraphRoot, RunRoot, GraphDriver FROM DBConfig LIMIT 1"
            ).fetchone()
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise ValueError(str(error)) from error
    if row is None or not all(isinstance(one, str) for one in row):
        raise ValueError("no configuration")
    return PodmanStore(path, *row)
