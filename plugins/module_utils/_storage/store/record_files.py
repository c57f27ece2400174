# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The files of a store that hold records, and their locks. Files are read under the lock and replaced atomically.

Power loss and kills: every change writes the lock's token first, then a temporary file beside the
JSON, syncs its data, renames it over the JSON and syncs the directory before the next change
begins. A record can therefore never be on disk without the records that it refers to.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
import typing as t
from dataclasses import dataclass

from ..errors import (
    RecordError,
)
from ..kernel import files
from .locks import LockFile
from .records import (
    SIZE_LIMIT,
    STABLE,
    Container,
    Image,
    Layer,
    R,
    parse,
    serialise,
)
from .reserve import Reserve

# The collection's folder in a store.
OWN_FOLDER = "userns-storage"

_Version = t.Tuple[bytes, int, int, int]
_ABSENT: _Version = (b"", 0, 0, 0)


class LockedDirectory:
    """A directory of records and its lock file.

    :ivar read_only: the directory is part of an additional store
    :ivar creates: whether a missing lock file is created for an exclusive lock
    """

    def __init__(
        self, directory: str, lock_name: str, read_only: bool = False, creates: bool = False
    ) -> None:
        self.directory = directory
        self.read_only = read_only
        self.creates = creates
        self.lock = LockFile(os.path.join(directory, lock_name), read_only)

    def enter(
        self, stack: contextlib.ExitStack, deadline: float, allowed: float, *, exclusive: bool
    ) -> bool:
        """Take the lock until the stack ends; false if there is no lock file.

        A missing lock file is only created for an exclusive lock of a directory that ``creates`` it.

        :param deadline: on the monotonic clock
        :param allowed: the seconds that end at the deadline, for the error
        """
        left = max(deadline - time.monotonic(), 0)
        try:
            if exclusive and self.creates:
                self.lock.create()
            if exclusive:
                stack.enter_context(self.lock.exclusive(left, allowed))
            else:
                stack.enter_context(self.lock.shared(left, allowed))
        except FileNotFoundError:
            if exclusive and self.creates:
                raise
            return False
        return True


class RecordFile(t.Generic[R]):
    """A JSON file of records, with the content that was last read or written.

    :ivar area: the directory whose lock guards the file
    :ivar kind: ``layers``, ``images`` or ``containers``
    :ivar read_only_store: the additional store that the file is part of; None for the store's own files
    :ivar blank: the file contains only blanks or ``null`` instead of a list, which no runtime writes
    :ivar generation: grows whenever the records change
    """

    def __init__(
        self,
        area: LockedDirectory,
        path: str,
        record_type: t.Type[R],
        location: str = STABLE,
        read_only_store: t.Optional[str] = None,
    ) -> None:
        self.area = area
        self.path = path
        self.record_type = record_type
        self.kind = record_type.kind
        self.location = location
        self.read_only_store = read_only_store
        self.records: t.List[R] = []
        self.blank = False
        self.generation = 0
        self._key: t.Optional[_Version] = None
        self._fresh: t.Optional[bytes] = None
        self._fresh_key: _Version = _ABSENT

    @property
    def size(self) -> int:
        """The file's size in bytes when it was last read or written."""
        return self._key[3] if self._key else 0

    @property
    def temporary(self) -> str:
        """The temporary file. Only the holder of the lock writes it, so that the name is unique."""
        directory, name = os.path.split(self.path)
        return os.path.join(directory, f".tmp-{name}{OWN_FOLDER}")

    def load(self) -> int:
        """Read the file under the lock if it may have changed; returns the number of bytes read.

        Without a lock file (see :meth:`LockedDirectory.enter`), the file is read without a lock, and again each time.
        Runtimes create the lock file before they write records, so this is the case for a store that no runtime has
        opened for writing, such as a copy that is an additional store. If a runtime creates the lock file in the
        meantime, the content is still complete, because runtimes replace the file by a rename, but it may be outdated.
        Such a file is never written: :meth:`LockFile.touch` requires the lock.
        """
        token = self.area.lock.token() if self.area.lock.held else b""
        try:
            descriptor = files.open_regular(self.path)
        except FileNotFoundError:
            if self._key != _ABSENT:
                self.records, self._key, self._fresh, self.blank = [], _ABSENT, None, False
                self.generation += 1
            return 0
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise RecordError(
                    self.path, "is not a regular file", "Move it elsewhere."
                ) from error
            raise
        try:
            found = os.fstat(descriptor)
            if found.st_size > SIZE_LIMIT:
                raise RecordError(self.path, f"is larger than {SIZE_LIMIT} bytes")
            key = (token, found.st_ino, found.st_mtime_ns, found.st_size)
            if key == self._key and token:
                return 0
            self._key = None
            pieces, size = [], 0
            while True:
                piece = os.read(descriptor, max(found.st_size + 1, 65536))
                if not piece:
                    break
                pieces.append(piece)
                size += len(piece)
                # The file may grow while it is read.
                if size > SIZE_LIMIT:
                    raise RecordError(self.path, f"is larger than {SIZE_LIMIT} bytes")
        finally:
            os.close(descriptor)
        self._fresh = b"".join(pieces)
        self._fresh_key = key
        return len(self._fresh)

    def parse(self) -> None:
        """Parse the bytes that ``load`` read, if any; needs no lock."""
        if self._fresh is None:
            return
        data, self._fresh = self._fresh, None
        self.records = parse(data, self.record_type, self.path, self.location, self.read_only_store)
        self.blank = data.strip() in (b"", b"null")
        self._key = self._fresh_key
        self.generation += 1

    def forget(self) -> None:
        """Drop the records of a file that cannot be read; the next load reads it again."""
        self.records, self._key, self._fresh, self.blank = [], None, None, False
        self.generation += 1

    @property
    def exists(self) -> bool:
        """Whether the file existed when it was last read."""
        return self._key != _ABSENT

    def write(self, records: t.List[R], reserve: t.Optional[Reserve] = None) -> None:
        """Replace the file, under the exclusive lock: token, data, rename, directory.

        :param reserve: for a full disk: lends a file to overwrite, and receives the file that is replaced
        """
        self._key = None
        directory, temporary = os.path.dirname(self.path), self.temporary
        data = serialise(records)
        token = self.area.lock.touch()
        discard(temporary)
        flags = os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW
        if reserve is None or not reserve.lend(temporary):
            flags |= os.O_CREAT | os.O_EXCL
        descriptor = os.open(temporary, flags, 0o600)
        try:
            try:
                os.fchmod(descriptor, 0o600)
                view = memoryview(data)
                while view:
                    view = view[os.write(descriptor, view) :]
                if not flags & os.O_CREAT:
                    os.ftruncate(descriptor, len(data))
                os.fdatasync(descriptor)
                found = os.fstat(descriptor)
            finally:
                os.close(descriptor)
            if reserve is None or not reserve.swap(temporary, self.path):
                os.rename(temporary, self.path)
        except BaseException as error:
            if isinstance(error, OSError) and error.filename is None:
                error.filename = self.path
            discard(temporary)
            raise
        # Other programs now see the new file, even if syncing the directory fails.
        self.records, self.blank = records, False
        self.generation += 1
        self._key = (token, found.st_ino, found.st_mtime_ns, found.st_size)
        sync_directory(directory)

    def discard_leftovers(self, reserve: t.Optional[Reserve] = None) -> None:
        """Remove leftovers of a killed writer of this collection, under the exclusive lock.

        :param reserve: receives them instead, if given
        """
        if reserve is None or not reserve.adopt(self.temporary):
            discard(self.temporary)


@dataclass
class StoreFiles:
    """All files of records of a store, each kind in the order in which records take precedence.

    :ivar areas: the locked directories by kind of record, in the order in which their locks are taken
    """

    # Locks are taken in the order layers, images, containers, as by containers/storage. The section "Locks" of
    # docs/architecture.md describes the order of all locks.

    areas: t.Dict[str, t.List[LockedDirectory]]
    layers: t.List[RecordFile[Layer]]
    images: t.List[RecordFile[Image]]
    containers: t.List[RecordFile[Container]]


def discard(path: str) -> None:
    """Remove a file that may not exist."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def sync_directory(path: str) -> None:
    """Make renames in a directory durable, if the filesystem supports it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
