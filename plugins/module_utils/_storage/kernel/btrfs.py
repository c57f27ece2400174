# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This module util is PRIVATE to the userns.storage collection.
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

# struct btrfs_ioctl_vol_args and _v2 are 4096 bytes each, the name at the end.
_ARGS = struct.Struct("=q4088s")
_ARGS_V2 = struct.Struct("=qQQ32x4040s")
_LOOKUP = struct.Struct("=QQ4080x")

# struct btrfs_ioctl_search_key, the 4096 byte buffer's rest, and the header of each item in it.
_SEARCH_KEY = struct.Struct("=QQQQQQQLLLL4Q")
_SEARCH_SIZE = 4096
_SEARCH_HEADER = struct.Struct("=QQQLL")

_FIRST_FREE_INODE = 256
_QUOTA_TREE = 8
_QGROUP_INFO_KEY = 242
# struct btrfs_qgroup_info_item: generation, referenced, compressed, exclusive, compressed
_QGROUP_INFO = struct.Struct("<QQQQQ")

_LONGEST_NAME = 255


def is_subvolume(fd: int) -> bool:
    """Whether an open directory is the root of a subvolume."""
    return os.fstat(fd).st_ino == _FIRST_FREE_INODE and files.filesystem_type(fd) == "btrfs"


def sync(fd: int) -> None:
    """Write everything, and have the cleaner begin with subvolumes that were deleted.

    syncfs(2) does the first only, and leaves the second to the next commit of its own accord.

    :raises OSError: ENOTTY (no btrfs), EIO ...
    """
    fcntl.ioctl(fd, _SYNC)


def create_subvolume(parent_fd: int, name: str) -> None:
    """Make an empty subvolume ``name`` in an open directory.

    :raises OSError: EEXIST, ENOTTY (no btrfs), EPERM ...
    """
    _change(parent_fd, _SUBVOL_CREATE, _ARGS.pack(0, _name(name)), name)


def snapshot(src_dir_fd: int, parent_fd: int, name: str) -> None:
    """Make a writable snapshot of the subvolume ``src_dir_fd`` in an open directory.

    :raises OSError: EEXIST, EINVAL (no subvolume), EXDEV, EPERM ...
    """
    _change(parent_fd, _SNAP_CREATE_V2, _ARGS_V2.pack(src_dir_fd, 0, 0, _name(name)), name)


def delete_subvolume(parent_fd: int, name: str) -> None:
    """Delete the subvolume ``name`` of an open directory; its space comes back in the background.

    :raises OSError: ENOTEMPTY: it holds subvolumes; EPERM: without privileges only where the
        filesystem is mounted with user_subvol_rm_allowed
    """
    _change(parent_fd, _SNAP_DESTROY, _ARGS.pack(0, _name(name)), name)


def subvolume_id(fd: int) -> int:
    """The number of the subvolume that holds an open file.

    :raises OSError: ENOTTY: no btrfs
    """
    buffer = array.array("B", _LOOKUP.pack(0, _FIRST_FREE_INODE))
    fcntl.ioctl(fd, _INO_LOOKUP, buffer, True)
    number: int = _LOOKUP.unpack(buffer)[0]
    return number


def exclusive_bytes(fd: int) -> t.Optional[int]:
    """Bytes that nothing but this subvolume holds, as the quota groups count them.

    Accounting lags behind writes until the filesystem commits; sync first.

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
