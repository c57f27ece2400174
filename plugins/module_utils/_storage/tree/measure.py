# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This module util is PRIVATE to the userns.storage collection.
"""What directory trees take of their filesystem."""

from __future__ import annotations

import errno
import os
import stat
import typing as t

from ..errors import TreeError
from ..kernel import files
from ..kernel.refusals import explained

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_BLOCK = 512

# Where two files can share data; elsewhere all that is allocated is a file's own.
_SHARING = frozenset(("btrfs", "xfs", "bcachefs", "ocfs2", "zfs"))

_GONE = frozenset((errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EXDEV))


class Usage(t.NamedTuple):
    """Sizes in bytes; hard-linked files count once.

    * inodes: with directories
    * files: anything but directories
    * apparent: what all but directories claim
    * allocated: what all inodes have got
    * exclusive: the part of ``allocated`` that nothing else shares; 0 if it was not asked for
    """

    inodes: int
    files: int
    apparent: int
    allocated: int
    exclusive: int


class _Place(t.NamedTuple):
    above: t.Optional[_Place]
    name: str

    def path(self) -> str:
        parts = []
        place: t.Optional[_Place] = self
        while place is not None and place.name:
            parts.append(place.name)
            place = place.above
        return "/".join(reversed(parts))


def measure(paths: t.Iterable[t.Union[str, int]], exclusive: bool = False) -> Usage:
    """Measure separate trees together, each inode once; what vanishes meanwhile is left out.

    Mounts below the given paths are not entered.

    :param paths: directories or files, as paths or descriptors; a missing one counts as nothing
    :param exclusive: also find out what is shared (FIEMAP), at the price of opening every file
    :raises StorageError: a directory cannot be read
    """
    meter = _Meter(exclusive)
    with explained(kind=TreeError):
        for path in paths:
            meter.add(path)
    return Usage(
        inodes=meter.inodes,
        files=meter.files,
        apparent=meter.apparent,
        allocated=meter.allocated,
        exclusive=meter.exclusive,
    )


class _Meter:
    def __init__(self, exclusive: bool) -> None:
        self.inodes = self.files = self.apparent = self.allocated = self.exclusive = 0
        self._asked = exclusive
        self._extents = False
        self._device = 0
        # Inodes with more than one name, and given roots.
        self._seen: t.Set[t.Tuple[int, int]] = set()

    def add(self, path: t.Union[str, int]) -> None:
        try:
            if isinstance(path, int):
                root = os.open(".", _DIRECTORY, dir_fd=path)
            else:
                root = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            status = os.fstat(root)
            self._device = status.st_dev
            self._extents = self._asked and files.filesystem_type(root) in _SHARING
            if not stat.S_ISDIR(status.st_mode):
                self._count(status, f"/proc/self/fd/{root}", None)
                return
            if (status.st_dev, status.st_ino) in self._seen:
                return
            self._seen.add((status.st_dev, status.st_ino))
            self._walk(root)
        finally:
            os.close(root)

    def _walk(self, root: int) -> None:
        todo = [_Place(None, "")]
        while todo:
            place = todo.pop()
            try:
                fd = files.open_beneath(root, place.path(), _DIRECTORY)
            except OSError as error:
                if error.errno in _GONE:
                    continue
                raise
            try:
                self._directory(fd, place, todo)
            finally:
                os.close(fd)

    def _directory(self, fd: int, place: _Place, todo: t.List[_Place]) -> None:
        status = os.fstat(fd)
        if status.st_dev != self._device:
            return
        self.inodes += 1
        self.allocated += status.st_blocks * _BLOCK
        if self._asked:
            self.exclusive += status.st_blocks * _BLOCK
        with os.scandir(fd) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    todo.append(_Place(place, entry.name))
                    continue
                try:
                    found = os.lstat(entry.name, dir_fd=fd)
                    self._count(found, entry.name, fd)
                except FileNotFoundError:
                    continue

    def _count(self, status: os.stat_result, name: str, dir_fd: t.Optional[int]) -> None:
        if status.st_nlink > 1:
            key = (status.st_dev, status.st_ino)
            if key in self._seen:
                return
            self._seen.add(key)
        self.inodes += 1
        self.files += 1
        self.apparent += status.st_size
        allocated = status.st_blocks * _BLOCK
        self.allocated += allocated
        if not self._asked:
            return
        if allocated and self._extents and stat.S_ISREG(status.st_mode):
            allocated = max(0, allocated - self._shared(name, dir_fd))
        self.exclusive += allocated

    def _shared(self, name: str, dir_fd: t.Optional[int]) -> int:
        flags = _READ if dir_fd is not None else _READ & ~os.O_NOFOLLOW
        try:
            fd = os.open(name, flags, dir_fd=dir_fd)
        except (FileNotFoundError, PermissionError):
            return 0
        try:
            return files.shared_bytes(fd)[1]
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.ENOTTY):
                return 0
            raise
        finally:
            os.close(fd)
