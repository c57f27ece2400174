# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Subvolumes and snapshots of btrfs, see btrfs-ioctl(2) and linux/btrfs.h."""

from __future__ import annotations

import array
import errno
import fcntl
import os
import struct
import typing as t

from . import files

_SYNC = 0x9408
_SUBVOL_CREATE = 0x5000940E
_SNAP_DESTROY = 0x5000940F
_SNAP_CREATE_V2 = 0x50009417
_TREE_SEARCH = 0xD0009411
_INO_LOOKUP = 0xD0009412
_GET_SUBVOL_INFO = 0x81F8943C

# struct btrfs_ioctl_vol_args and _v2 are 4096 bytes each, the name at the end.
_ARGS = struct.Struct("=q4088s")
_ARGS_V2 = struct.Struct("=qQQ32x4040s")
_LOOKUP = struct.Struct("=QQ4080x")

# struct btrfs_ioctl_search_key, the 4096 byte buffer's rest, and the header of each item in it.
_SEARCH_KEY = struct.Struct("=QQQQQQQLLLL4Q")
_SEARCH_SIZE = 4096
_SEARCH_HEADER = struct.Struct("=QQQLL")

# struct btrfs_ioctl_get_subvol_info_args: number, name, parent, inode of the directory, generation.
_SUBVOL_INFO_SIZE = 504
_SUBVOL_INFO = struct.Struct("=Q256sQQQ")

_FIRST_FREE_INODE = 256
_QUOTA_TREE = 8
_QGROUP_INFO_KEY = 242
# struct btrfs_qgroup_info_item: generation, referenced, compressed, exclusive, compressed
_QGROUP_INFO = struct.Struct("<QQQQQ")

_LONGEST_NAME = 255

# BTRFS_IOC_SPACE_INFO: struct btrfs_ioctl_space_args (slots, number) and the spaces (flags, total, used).
_SPACE_INFO = 0xC0109414
_SPACE_ARGS = struct.Struct("=QQ")
_SPACE = struct.Struct("=QQQ")
_METADATA = 1 << 2
# RAID1, DUP, RAID10, RAID1C3, RAID1C4
_COPIES = ((1 << 4, 2), (1 << 5, 2), (1 << 6, 2), (1 << 9, 3), (1 << 10, 4))


def is_subvolume(fd: int) -> bool:
    """Whether an open directory is the root of a subvolume."""
    return os.fstat(fd).st_ino == _FIRST_FREE_INODE and files.filesystem_type(fd) == "btrfs"


def sync(fd: int) -> None:
    """Write everything to disk, and let the cleaner start with deleted subvolumes.

    syncfs(2) only does the former; the cleaner then waits for the next regular commit.

    :raises OSError: ENOTTY (no btrfs), EIO ...
    """
    fcntl.ioctl(fd, _SYNC)


def create_subvolume(parent_fd: int, name: str) -> None:
    """Create an empty subvolume ``name`` in an open directory.

    :raises OSError: EEXIST, ENOTTY (no btrfs), EPERM ...
    """
    _change(parent_fd, _SUBVOL_CREATE, _ARGS.pack(0, _name(name)), name)


def snapshot(src_dir_fd: int, parent_fd: int, name: str) -> None:
    """Create a writable snapshot of the subvolume ``src_dir_fd`` in an open directory.

    :raises OSError: EEXIST, EINVAL (no subvolume), EXDEV, EPERM ...
    """
    _change(parent_fd, _SNAP_CREATE_V2, _ARGS_V2.pack(src_dir_fd, 0, 0, _name(name)), name)


def delete_subvolume(parent_fd: int, name: str) -> None:
    """Delete the subvolume ``name`` of an open directory. Its space is freed in the background.

    :raises OSError: ENOTEMPTY: it contains subvolumes; EPERM: without privileges only where the
        filesystem is mounted with user_subvol_rm_allowed
    """
    _change(parent_fd, _SNAP_DESTROY, _ARGS.pack(0, _name(name)), name)


def subvolume_id(fd: int) -> int:
    """The number of the subvolume that contains an open file.

    :raises OSError: ENOTTY: no btrfs
    """
    buffer = array.array("B", _LOOKUP.pack(0, _FIRST_FREE_INODE))
    fcntl.ioctl(fd, _INO_LOOKUP, buffer, True)
    number: int = _LOOKUP.unpack(buffer)[0]
    return number


def generation(fd: int) -> int:
    """The generation of the subvolume that contains an open file. It grows with each commit that changed the
    subvolume, or in which a snapshot of it was created.

    :raises OSError: ENOTTY: no btrfs, or a kernel before 4.18
    """
    buffer = array.array("B", bytes(_SUBVOL_INFO_SIZE))
    fcntl.ioctl(fd, _GET_SUBVOL_INFO, buffer, True)
    number: int = _SUBVOL_INFO.unpack_from(buffer, 0)[4]
    return number


def exclusive_bytes(fd: int) -> t.Optional[int]:
    """The bytes that only this subvolume uses, as counted by quota groups.

    The counts are updated when the filesystem commits; sync first.

    :returns: None if quotas are off, or the caller may not ask
    :raises OSError: ENOTTY: no btrfs
    """
    number = subvolume_id(fd)
    key = _SEARCH_KEY.pack(
        *(_QUOTA_TREE, 0, 0, number, number, 0, (1 << 64) - 1),
        *(_QGROUP_INFO_KEY, _QGROUP_INFO_KEY, 1, 0),
        *(0, 0, 0, 0),
    )
    buffer = array.array("B", key.ljust(_SEARCH_SIZE, b"\0"))
    try:
        fcntl.ioctl(fd, _TREE_SEARCH, buffer, True)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EPERM):
            return None
        raise
    found = _SEARCH_KEY.unpack_from(buffer, 0)[9]
    if not found:
        return None
    exclusive: int = _QGROUP_INFO.unpack_from(buffer, _SEARCH_KEY.size + _SEARCH_HEADER.size)[3]
    return exclusive


def metadata_copies(fd: int) -> int:
    """The number of copies of the filesystem's metadata: 2 for DUP, RAID1 and RAID10.

    :raises OSError: ENOTTY: no btrfs
    """
    buffer = array.array("B", _SPACE_ARGS.pack(0, 0))
    fcntl.ioctl(fd, _SPACE_INFO, buffer, True)
    total = _SPACE_ARGS.unpack(buffer)[1]
    buffer = array.array("B", _SPACE_ARGS.pack(total, 0) + bytes(total * _SPACE.size))
    fcntl.ioctl(fd, _SPACE_INFO, buffer, True)
    found = _SPACE_ARGS.unpack_from(buffer, 0)[1]
    copies = 1
    for number in range(min(found, total)):
        flags = _SPACE.unpack_from(buffer, _SPACE_ARGS.size + number * _SPACE.size)[0]
        if flags & _METADATA:
            copies = max([copies] + [times for flag, times in _COPIES if flags & flag])
    return copies


def _change(parent_fd: int, request: int, arguments: bytes, name: str) -> None:
    try:
        fcntl.ioctl(parent_fd, request, array.array("B", arguments), True)
    except OSError as error:
        raise OSError(error.errno, error.strerror, name) from None


def _name(name: str) -> bytes:
    raw = os.fsencode(name)
    if not raw or b"/" in raw or raw in (b".", b"..") or len(raw) > _LONGEST_NAME:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), name)
    return raw
