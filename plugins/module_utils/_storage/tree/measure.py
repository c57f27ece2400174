# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Measure the space and the inodes that directory trees use."""

from __future__ import annotations

import array
import contextlib
import errno
import functools
import os
import stat
import typing as t

from ..errors import TreeError
from ..kernel import btrfs, files
from ..kernel.oserrors import translate_oserror

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_BLOCK = 512
# btrfs, in bytes of leaves: an inode with its reference and two directory entries, without its names; an extent's
# item; the checksum of a block. Files up to the last size are stored in leaves (the default of max_inline).
_INODE_ITEMS = 4 * 25 + 160 + 10 + 30 + 30
_EXTENT_ITEM = 25 + 53
_CHECKSUM = 4
_INLINE = 2048
# The usual ratio of leaves to their items, and the maximum size of roots and inner nodes (bytes).
_FILLED = 1.1
_SLACK = 1 << 20

# Filesystems on which files can share data; elsewhere all allocated bytes are exclusive.
_SHARING = frozenset(("btrfs", "xfs", "bcachefs", "ocfs2", "zfs"))

_GONE = frozenset((errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EXDEV))


class Parts:
    """The bytes that deleting trees frees, in parts that cannot simply be added for several trees.

    :ivar own: exclusive bytes, without the inodes of xfs and the metadata of btrfs
    :ivar extents: shared extents of xfs and btrfs, as pairs of position and length in bytes
    :ivar chunks: xfs: the number of inodes in each chunk of 64
    :ivar allocated: xfs: the number of inodes in use in these chunks; without chunks for which it is unknown
    :ivar inode_size: bytes of an inode of xfs; 0 elsewhere
    :ivar items: bytes of all copies of btrfs's items
    :ivar snapshot: whether snapshots may share the leaves of btrfs's trees
    """

    def __init__(self) -> None:
        self.snapshot = False
        self.own = self.inode_size = self.items = 0
        self.extents = array.array("Q")
        self.chunks: t.Dict[int, int] = {}
        self.allocated: t.Dict[int, int] = {}

    def add(self, other: Parts) -> None:
        """Add the parts of another tree."""
        self.own += other.own
        self.items += other.items
        self.snapshot = self.snapshot or other.snapshot
        self.inode_size = self.inode_size or other.inode_size
        self.extents.extend(other.extents)
        for chunk, number in other.chunks.items():
            self.chunks[chunk] = self.chunks.get(chunk, 0) + number
        self.allocated.update(other.allocated)

    def plus(self, on_disk: int) -> Parts:
        """The usage with this number of exclusive bytes added."""
        found = Parts()
        found.add(self)
        found.own += on_disk
        return found

    def freed(self, staying: t.Iterable[Parts] = ()) -> t.Tuple[int, int, int]:
        """The bytes that deleting everything frees: expected, minimum and maximum.

        :param staying: trees that are not deleted and may share data with it
        """
        exclusive = least = most = self.own
        lengths: t.Dict[int, int] = {}
        holders: t.Dict[int, int] = {}
        for position, length in _pairs(self.extents):
            lengths[position] = max(lengths.get(position, 0), length)
            holders[position] = holders.get(position, 0) + 1
        for item in staying:
            for position, length in _pairs(item.extents):
                if position in lengths:
                    lengths[position] = max(lengths[position] - length, 0)
        most += sum(lengths.values())
        # An extent that is marked as shared, and that only one of these files has, is shared with another file.
        exclusive += sum(length for position, length in lengths.items() if holders[position] > 1)
        for chunk, number in self.chunks.items():
            size = files.XFS_CHUNK * self.inode_size
            allocated = self.allocated.get(chunk)
            if allocated is None:
                # A chunk is freed when all its inodes are free.
                exclusive += number * self.inode_size
                most += size
                least += size * (number == files.XFS_CHUNK)
            elif allocated <= number:
                exclusive += size
                most += size
                least += size
        if self.chunks:
            # Other programs may create and delete inodes in the same chunks.
            least = max(least - 2 * files.XFS_CHUNK * self.inode_size, self.own)
            most += 2 * files.XFS_CHUNK * self.inode_size
        if self.items:
            # Leaves are at least half full; which of them snapshots share is unknown.
            exclusive += int(self.items * _FILLED)
            most += 2 * self.items + _SLACK
        if self.snapshot:
            least = 0
        return exclusive, least, most


def _pairs(extents: array.array[int]) -> t.Iterator[t.Tuple[int, int]]:
    numbers = iter(extents)
    return zip(numbers, numbers)


class Usage(t.NamedTuple):
    """Sizes in bytes; hard-linked files count once.

    * inodes: including directories
    * files: everything but directories
    * apparent: the apparent size of everything but directories
    * allocated: the space allocated to all inodes
    * exclusive: the space that deleting it frees, as precisely as the filesystem can tell: the unshared part of
      ``allocated``, with the metadata that the filesystem counts; 0 if not requested
    * least, most: the minimum and maximum of the space that deleting it frees; 0 if not requested
    * parts: the base of these values, to calculate them for several trees with :func:`together`; None
      if not requested
    """

    inodes: int
    files: int
    apparent: int
    allocated: int
    exclusive: int
    least: int = 0
    most: int = 0
    parts: t.Optional[Parts] = None

    def _freed(self, staying: t.Iterable[Usage] = (), more: t.Sequence[int] = (0, 0, 0)) -> Usage:
        kept = [item.parts for item in staying if item.parts]
        found = self.parts.freed(kept) if self.parts else (0, 0, 0)
        exclusive, least, most = (size + extra for size, extra in zip(found, more))
        return self._replace(exclusive=exclusive, least=least, most=most)

    def plus(self, on_disk: int) -> Usage:
        """The usage with one more file of this size (bytes) that shares nothing."""
        return self._replace(
            inodes=self.inodes + 1,
            allocated=self.allocated + on_disk,
            exclusive=self.exclusive + on_disk,
            least=self.least + on_disk,
            most=self.most + on_disk,
            parts=self.parts.plus(on_disk) if self.parts else None,
        )


class _Node(t.NamedTuple):
    above: t.Optional[_Node]
    name: str

    def path(self) -> str:
        parts = []
        node: t.Optional[_Node] = self
        while node is not None and node.name:
            parts.append(node.name)
            node = node.above
        return "/".join(reversed(parts))


def measure(paths: t.Iterable[t.Union[str, int]], exclusive: bool = False) -> Usage:
    """Measure several trees together, each inode once; files that disappear during the measurement are ignored.

    Mounts below the given paths are not entered.

    :param paths: directories or files, as paths or descriptors; missing paths are ignored
    :param exclusive: also determine shared data (FIEMAP), which requires opening every file
    :raises StorageError: a directory cannot be read
    """
    meter = _Meter(exclusive)
    with translate_oserror(kind=TreeError):
        for path in paths:
            meter.add(path)
    found = Usage(meter.inodes, meter.files, meter.apparent, meter.allocated, 0)
    return found._replace(parts=meter.parts)._freed() if exclusive else found


def together(going: t.Iterable[Usage], staying: t.Iterable[Usage] = ()) -> Usage:
    """The space that several trees use, and that deleting all of them frees, although they share data.

    :param going: usage of the trees to be deleted, measured with ``exclusive``
    :param staying: usage of trees that may share data with them and are not deleted
    """
    total = Usage(0, 0, 0, 0, 0, parts=Parts())
    bounds = [0, 0, 0]
    for item in going:
        total = total._replace(
            inodes=total.inodes + item.inodes,
            files=total.files + item.files,
            apparent=total.apparent + item.apparent,
            allocated=total.allocated + item.allocated,
        )
        if item.parts is not None and total.parts is not None:
            total.parts.add(item.parts)
        else:
            for index, size in enumerate((item.exclusive, item.least, item.most)):
                bounds[index] += size
    return total._freed(staying, bounds)


class _Meter:
    def __init__(self, exclusive: bool) -> None:
        self.inodes = self.files = self.apparent = self.allocated = 0
        self.parts = Parts()
        self._exclusive = exclusive
        self._extents = False
        self._copies = 0
        self._device = 0
        # Inodes with more than one name, and the given roots.
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
            filesystem = files.filesystem_type(root)
            self._extents = self._exclusive and filesystem in _SHARING
            if self._extents:
                self._look_at(root, filesystem)
            if not stat.S_ISDIR(status.st_mode):
                self._count(status, f"/proc/self/fd/{root}", None)
                return
            if (status.st_dev, status.st_ino) in self._seen:
                return
            self._seen.add((status.st_dev, status.st_ino))
            self._walk(root)
            if self.parts.chunks:
                self._ask_for_chunks(root)
        finally:
            os.close(root)

    def _look_at(self, root: int, filesystem: str) -> None:
        """Add the metadata that the filesystem counts as used."""
        with contextlib.suppress(OSError):
            flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
            opened = os.open(f"/proc/self/fd/{root}", flags)
            try:
                if filesystem == "xfs":
                    geometry = files.xfs_geometry(opened)
                    self.parts.inode_size = geometry.inode_size if geometry else 0
                elif filesystem == "btrfs":
                    self._copies = btrfs.metadata_copies(opened)
            finally:
                os.close(opened)

    def _ask_for_chunks(self, root: int) -> None:
        with contextlib.suppress(OSError):
            flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
            opened = os.open(f"/proc/self/fd/{root}", flags)
            try:
                for chunk in self.parts.chunks:
                    allocated = files.xfs_allocated_inodes(opened, chunk)
                    if allocated is None:
                        break
                    self.parts.allocated[chunk] = allocated
            finally:
                os.close(opened)

    def _count_inode(self, status: os.stat_result) -> None:
        self.inodes += 1
        self.allocated += status.st_blocks * _BLOCK
        if self.parts.inode_size:
            chunk = status.st_ino // files.XFS_CHUNK
            self.parts.chunks[chunk] = self.parts.chunks.get(chunk, 0) + 1

    def _count_items(self, status: os.stat_result, name: str) -> None:
        """Count the bytes of an entry in leaves of btrfs's trees, including headers."""
        size = _INODE_ITEMS + 3 * len(os.fsencode(name))
        if stat.S_ISREG(status.st_mode) and status.st_size:
            if status.st_size <= _INLINE:
                size += _EXTENT_ITEM + status.st_size
            else:
                size += 3 * _EXTENT_ITEM + status.st_blocks * _BLOCK // 4096 * _CHECKSUM
        elif stat.S_ISLNK(status.st_mode):
            size += _EXTENT_ITEM + status.st_size
        self.parts.items += size * self._copies

    def _walk(self, root: int) -> None:
        todo = [_Node(None, "")]
        while todo:
            node = todo.pop()
            try:
                fd = files.open_unnoticed(
                    functools.partial(files.open_beneath, root, node.path()), _DIRECTORY
                )
            except OSError as error:
                if error.errno in _GONE:
                    continue
                raise
            try:
                self._directory(fd, node, todo)
            finally:
                os.close(fd)

    def _directory(self, fd: int, node: _Node, todo: t.List[_Node]) -> None:
        status = os.fstat(fd)
        if status.st_dev != self._device:
            return
        self._count_inode(status)
        if self._copies:
            self._count_items(status, node.name)
        elif self._exclusive:
            self.parts.own += status.st_blocks * _BLOCK
        with os.scandir(fd) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    todo.append(_Node(node, entry.name))
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
        self._count_inode(status)
        self.files += 1
        self.apparent += status.st_size
        allocated = status.st_blocks * _BLOCK
        if not self._exclusive:
            return
        if self._copies:
            self._count_items(status, name)
            if not stat.S_ISREG(status.st_mode) or status.st_size <= _INLINE:
                # The data is in the leaves.
                return
        if allocated and self._extents and stat.S_ISREG(status.st_mode):
            allocated -= min(allocated, self._shared(name, dir_fd))
        self.parts.own += allocated

    def _shared(self, name: str, dir_fd: t.Optional[int]) -> int:
        flags = _READ if dir_fd is not None else _READ & ~os.O_NOFOLLOW
        try:
            fd = os.open(name, flags, dir_fd=dir_fd)
        except (FileNotFoundError, PermissionError):
            return 0
        try:
            shared = 0
            for position, length in files.shared_extents(fd):
                self.parts.extents.extend((position, length))
                shared += length
            return shared
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.ENOTTY):
                return 0
            raise
        finally:
            os.close(fd)
