# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Reserved space for the writes that a removal needs on a full disk.

Replacing a file of records needs an inode and some blocks, on xfs a whole chunk of inodes, and on btrfs even
the token in a lock file needs a block. A few reserve files keep that space allocated. One of them becomes the
temporary file and is overwritten in place, so that no other program can allocate the space in between. On
filesystems that cannot overwrite in place, it is deleted instead.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import typing as t

from ..kernel import btrfs, files, renames

# The errors of a full filesystem or quota.
FULL = frozenset((errno.ENOSPC, errno.EDQUOT))

_NAMES = ("reserve-0", "reserve-1", "reserve-2")
_SPARES = tuple(f".tmp-spare-{number}userns-storage" for number in range(8))
_LINK = ".tmp-linkuserns-storage"
_UNIT = 1 << 16
_LEAST = 1 << 18
_MOST = 1 << 24
# The reserve is only created if its size times this factor is free.
_AMPLE = 32
_COMPARED = 1 << 20
# The free space that a regular removal needs (bytes, inodes).
_ROOM = 4 << 20
_INODES = 64
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class Reserve:
    """The reserve files of one store.

    :param root: the collection's folder in the store, which contains them
    :param records: the folder of the layers' records, which contains spare files while the disk is full
    """

    def __init__(self, root: str, records: str) -> None:
        self.root = root
        self.records = records
        # Whether a file that was lent was deleted, because it was too small.
        self._lent = ""

    def has_room(self) -> bool:
        """Whether the filesystem has space for a few files without the reserve."""
        space = os.statvfs(self.records)
        inodes = not space.f_files or space.f_favail >= _INODES
        return inodes and space.f_bavail * space.f_frsize >= _ROOM

    def keep(self, size: int) -> None:
        """Create missing reserve files, unless the filesystem has too little free space.

        :param size: bytes of the largest file of records
        :raises OSError: a file cannot be created
        """
        reserved = min(max(2 * size + _UNIT - 1, _LEAST), _MOST) // _UNIT * _UNIT
        space = os.statvfs(os.path.dirname(self.root))
        if space.f_bavail * space.f_frsize < _AMPLE * len(_NAMES) * reserved:
            return
        if space.f_files and space.f_favail < _AMPLE * len(_NAMES):
            return
        self.discard_spares()
        with contextlib.suppress(FileExistsError):
            os.mkdir(self.root, 0o700)
        for name in _NAMES:
            path = os.path.join(self.root, name)
            if _size(path) >= reserved // 2:
                continue
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            descriptor = os.open(path, _NEW, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, reserved)
            except BaseException:
                os.unlink(path)
                raise
            finally:
                os.close(descriptor)

    def lend(self, path: str) -> bool:
        """Move a reserve file to ``path``, on the same filesystem, to be overwritten there.

        :returns: whether there was a reserve file
        :raises OSError: it cannot be moved
        """
        for found in self._found():
            with contextlib.suppress(FileNotFoundError):
                os.rename(found, path)
                self._lent = path
                return True
        return False

    def adopt(self, path: str) -> bool:
        """Turn a file that a killed run left into a spare, under the exclusive lock.

        :returns: whether that was done
        """
        if _size(path) < 0:
            return False
        spare = next(
            (spare_path for spare_path in self._spare_paths() if not os.path.lexists(spare_path)),
            None,
        )
        try:
            if spare is not None:
                os.rename(path, spare)
        except OSError:
            return False
        return spare is not None

    def swap(self, path: str, records: str) -> bool:
        """Replace the old file of records with a new one. The old file becomes a spare.

        :returns: whether that was done; false if the kernel cannot exchange files, or there is no old file
        """
        self._lent = ""
        taken = self.spares()
        spare = next(
            (spare_path for spare_path in self._spare_paths() if spare_path not in taken), None
        )
        if spare is None:
            return False
        with contextlib.ExitStack() as undo:
            folder = os.open(os.path.dirname(records), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            undo.callback(os.close, folder)
            names = os.path.basename(path), os.path.basename(records)
            try:
                renames.exchange(folder, names[0], folder, names[1])
            except OSError:
                return False
        try:
            os.rename(path, spare)
        except OSError:
            os.unlink(path)
        return True

    def release(self) -> bool:
        """Delete a reserve file, and make the filesystem free its space at once.

        :returns: whether a reserve file, or a file that was lent before, was deleted
        """
        if self._lent:
            self._lent = ""
            give_back(self.records)
            return True
        for found in self._found():
            with contextlib.suppress(FileNotFoundError):
                os.unlink(found)
                give_back(self.records)
                return True
        return False

    def share(self, first: str, second: str) -> bool:
        """Replace the second of two files with equal content by a hard link to the first; the second becomes a spare.

        Called under the exclusive lock, so that no program writes either of them.

        :returns: whether there is a new spare
        """
        try:
            if not _equal(first, second):
                return False
            taken = self.spares()
            spare = next(path for path in self._spare_paths() if path not in taken)
            link = os.path.join(self.records, _LINK)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(link)
            # First another name of the content, so that the second file exists at any moment.
            os.link(second, spare)
            os.link(first, link)
            os.rename(link, second)
        except (OSError, StopIteration):
            return False
        return True

    def spares(self) -> t.List[str]:
        """The paths of the existing spares."""
        return [path for path in self._spare_paths() if os.path.lexists(path)]

    def _spare_paths(self) -> t.List[str]:
        return [os.path.join(self.records, name) for name in _SPARES]

    def discard_spares(self) -> None:
        """Delete the spares, which are not needed on a filesystem with free space."""
        for path in (*self.spares(), os.path.join(self.records, _LINK)):
            with contextlib.suppress(OSError):
                os.unlink(path)

    def _found(self) -> t.List[str]:
        own = [os.path.join(self.root, name) for name in _NAMES]
        return [path for path in (*own, *self.spares()) if _size(path) >= 0]


def give_back(path: str) -> None:
    """Make the filesystem of an existing directory free the space of deleted files."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            files.syncfs(descriptor)
            if files.filesystem_type(descriptor) == "btrfs":
                btrfs.sync(descriptor)
        finally:
            os.close(descriptor)


def _size(path: str) -> int:
    """The bytes allocated to a regular file with a single name; -1 for anything else."""
    try:
        found = os.lstat(path)
    except OSError:
        return -1
    if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
        return -1
    return found.st_blocks * 512


def _equal(first: str, second: str) -> bool:
    """Whether two different regular files have the same content."""
    with contextlib.ExitStack() as undo:
        streams = []
        for path in (first, second):
            streams.append(undo.enter_context(open(os.open(path, _READ), "rb", buffering=0)))
        left, right = (os.fstat(stream.fileno()) for stream in streams)
        if not (stat.S_ISREG(left.st_mode) and stat.S_ISREG(right.st_mode)):
            return False
        if (left.st_dev, left.st_size) != (
            right.st_dev,
            right.st_size,
        ) or left.st_ino == right.st_ino:
            return False
        if (left.st_uid, left.st_gid, left.st_mode) != (
            right.st_uid,
            right.st_gid,
            right.st_mode,
        ):
            return False
        while True:
            pieces = [stream.read(_COMPARED) for stream in streams]
            if pieces[0] != pieces[1]:
                return False
            if not pieces[0]:
                return True
