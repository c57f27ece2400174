# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The store settings in podman's own database, which take precedence over storage.conf.

There are two formats: a bolt file (podman 4, and later versions if it exists) and SQLite (new stores of
podman 5). Both are read as plain files, never opened for writing and never locked.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import struct
import typing as t
from dataclasses import dataclass

from ..kernel import files
from . import sqlite_file

BOLT = os.path.join("libpod", "bolt_state.db")
SQLITE = "db.sql"

# Bytes; a database with 1,000 containers has 20 MB.
_SIZE_LIMIT = 256 * 1024 * 1024
_PATH_LIMIT = 4096
_MOST_CONTAINERS = 100_000
# Attempts to read a bolt file that is being written.
_ATTEMPTS = 5
# Exceptions of the parsers for files of any content.
_UNREADABLE = (OSError, ValueError, KeyError, IndexError, struct.error, RecursionError)

_Read = t.TypeVar("_Read")


@dataclass(frozen=True)
class PodmanStore:
    """The paths and the driver that podman recorded; empty if not recorded.

    :ivar path: the database file
    """

    path: str
    graphroot: str = ""
    runroot: str = ""
    driver: str = ""


@dataclass(frozen=True)
class PodmanContainer:
    """A container that podman's database names.

    :ivar name: empty if the database does not contain it
    :ivar rootfs: whether it runs on a directory (``podman run --rootfs``, and the
        infrastructure containers of new versions), without a record in containers/storage
    """

    id: str
    name: str = ""
    rootfs: bool = False


def database(
    graphroot: str, runroot: str, transient: bool, sqlite_first: bool = False
) -> t.Optional[str]:
    """The path of podman's database of a store; None if there is none; parameters as :func:`recorded`."""
    paths = [os.path.join(runroot if transient else graphroot, SQLITE)]
    if not transient:
        paths.insert(len(paths) if sqlite_first else 0, os.path.join(graphroot, BOLT))
    return next((path for path in paths if os.path.lexists(path)), None)


def databases(graphroot: str, runroot: str) -> t.List[str]:
    """The paths of all podman databases of a store, including those that podman would not use."""
    paths = [os.path.join(graphroot, BOLT)]
    paths += [os.path.join(base, SQLITE) for base in dict.fromkeys((graphroot, runroot))]
    return [path for path in paths if os.path.lexists(path)]


@dataclass(frozen=True)
class Databases:
    """The contents of podman's databases of a store.

    :ivar containers: the containers that any database names, by ID
    :ivar unreadable: the errors of databases that cannot be read, by path
    """

    containers: t.Mapping[str, PodmanContainer]
    unreadable: t.Mapping[str, str]


def read_databases(graphroot: str, runroot: str) -> Databases:
    """The containers that podman's databases name. Invalid content is no exception."""
    found: t.Dict[str, PodmanContainer] = {}
    unreadable: t.Dict[str, str] = {}
    for path in databases(graphroot, runroot):
        read = _settled_bolt_containers if path.endswith(BOLT) else _sqlite_containers
        try:
            for key, container in read(path).items():
                found.setdefault(key, container)
        except (FileNotFoundError, sqlite_file.NoTables):
            continue
        except _UNREADABLE as error:
            if not _is_new(path):
                unreadable[path] = str(error) or type(error).__name__
    return Databases(found, unreadable)


def _is_new(path: str) -> bool:
    """Whether podman created the file and has not written to it yet."""
    with contextlib.suppress(OSError):
        status = os.lstat(path)
        return stat.S_ISREG(status.st_mode) and status.st_size == 0
    return False


def _settled_bolt_containers(path: str) -> t.Dict[str, PodmanContainer]:
    """The containers in a bolt file that podman may be writing; sqlite_file.py retries by itself."""
    for _attempt in range(_ATTEMPTS - 1):
        before = _signature(path)
        try:
            return _bolt_containers(path)
        except _UNREADABLE:
            if _signature(path) == before:
                raise
    return _bolt_containers(path)


def _signature(path: str) -> t.Tuple[int, ...]:
    status = os.lstat(path)
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _container(container_id: str, config: t.Union[str, bytes]) -> PodmanContainer:
    try:
        content = json.loads(config)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        return PodmanContainer(container_id)
    name = content.get("name")
    return PodmanContainer(
        container_id, name if isinstance(name, str) else "", bool(content.get("rootfs"))
    )


def recorded(
    graphroot: str, runroot: str, transient: bool, sqlite_first: bool = False
) -> t.Optional[PodmanStore]:
    """The settings in podman's database of this store; None if it does not exist or cannot be read.

    :param graphroot: where podman would look for its database
    :param transient: whether the store is transient, with the database in the runroot
    :param sqlite_first: which file is used if both exist: SQLite, or bolt if false
    """
    path = database(graphroot, runroot, transient, sqlite_first)
    if path is None:
        return None
    return _quietly(read_bolt if path.endswith(BOLT) else read_sqlite, path)


def ambiguous(graphroot: str) -> bool:
    """Whether both databases exist, so that the version of podman decides which is used."""
    return all(os.path.lexists(os.path.join(graphroot, name)) for name in (BOLT, SQLITE))


def _quietly(read: t.Callable[[str], _Read], path: str) -> t.Optional[_Read]:
    """Ignore a database that is damaged or of an unknown format."""
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return None
        return read(path)
    except _UNREADABLE:
        return None


# bolt: https://github.com/etcd-io/bbolt, file format 2. Little-endian on all platforms of podman.

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
    """The bytes of a bolt file."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.pages = 0
        metas = [item for size in _PAGE_SIZES for item in (self._meta(0), self._meta(size)) if item]
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
        return self._plain(self._top(name))

    def buckets(self, name: bytes) -> t.Dict[bytes, t.Dict[bytes, bytes]]:
        """The buckets in a top-level bucket, each with its plain entries."""
        return {
            key: self._plain(value)
            for flags, key, value in self._inside(self._top(name))
            if flags & _BUCKET_FLAG
        }

    def _top(self, name: bytes) -> bytes:
        for flags, key, value in self._entries(self.data, self.root * self.page_size, 0):
            if key == name and flags & _BUCKET_FLAG:
                return value
        raise ValueError(f"no bucket {name.decode('ascii')}")

    @property
    def is_new(self) -> bool:
        """Whether podman created the file, but no bucket yet."""
        return not any(True for _entry in self._entries(self.data, self.root * self.page_size, 0))

    def _inside(self, value: bytes) -> t.Iterator[t.Tuple[int, bytes, bytes]]:
        root, _sequence = _BUCKET.unpack_from(value)
        if root:
            return self._entries(self.data, root * self.page_size, 0)
        return self._entries(value[_BUCKET.size :], 0, 0)

    def _plain(self, value: bytes) -> t.Dict[bytes, bytes]:
        return {key: text for kind, key, text in self._inside(value) if not kind & _BUCKET_FLAG}

    def _entries(
        self, data: bytes, offset: int, depth: int
    ) -> t.Iterator[t.Tuple[int, bytes, bytes]]:
        self.pages += 1
        if depth > _DEPTH_LIMIT or self.pages > _PAGES_LIMIT:
            raise ValueError("pages in a circle")
        if offset > len(data):
            # Python's integers do not overflow.
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
    bucket = _Bolt(files.read_regular(path, _SIZE_LIMIT)).bucket(b"runtime-config")

    def text(key: bytes) -> str:
        return bucket.get(key, b"").decode("utf-8", "surrogateescape")

    return PodmanStore(path, text(b"graph-root"), text(b"run-root"), text(b"graph-driver-name"))


def _bolt_containers(path: str) -> t.Dict[str, PodmanContainer]:
    """As :func:`read_bolt`; the bucket ``ctr`` has one bucket for each container, with its config."""
    found = {}
    database = _Bolt(files.read_regular(path, _SIZE_LIMIT))
    if database.is_new:
        return {}
    for key, entries in database.buckets(b"ctr").items():
        container_id = key.decode("ascii", "replace")
        found[container_id] = _container(container_id, entries.get(b"config", b""))
    return found


def read_sqlite(path: str) -> PodmanStore:
    """Read podman's db.sql.

    :raises OSError: it cannot be read
    :raises ValueError: it is no SQLite file, or holds no configuration (also struct.error and IndexError)
    """
    rows = sqlite_file.rows(path, "DBConfig", ("GraphRoot", "RunRoot", "GraphDriver"), 1)
    paths = [item for item in rows[0] if isinstance(item, str) and len(item) < _PATH_LIMIT]
    graphroot, runroot, driver = paths
    return PodmanStore(path, graphroot, runroot, driver)


def _sqlite_containers(path: str) -> t.Dict[str, PodmanContainer]:
    """As :func:`read_sqlite`."""
    rows = sqlite_file.rows(path, "ContainerConfig", ("ID", "JSON"), _MOST_CONTAINERS)
    return {
        key: _container(key, config)
        for key, config in rows
        if isinstance(key, str) and isinstance(config, (str, bytes))
    }
