# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""File contents and filesystems: reflinks, sparse copies, shared extents, and opening paths without leaving a
directory.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import fcntl
import functools
import os
import stat
import struct
import typing as t

from . import libc, mounts, steps

# ioctl(2) numbers of linux/fs.h, made with _IOW/_IOWR; x86, ARM, RISC-V and s390 agree on them.
_FICLONE = 0x40049409
_FS_IOC_FIEMAP = 0xC020660B

_SYNC_FILE_RANGE_WRITE = 2

_FIEMAP_FLAG_SYNC = 0x1
_FIEMAP_EXTENT_LAST = 0x1
_FIEMAP_EXTENT_SHARED = 0x2000
_FIEMAP_HEADER = struct.Struct("=QQLLLL")
_FIEMAP_EXTENT = struct.Struct("=QQQQQLLLL")
_FIEMAP_BATCH = 256

# struct xfs_fsop_geom_v4 of linux/xfs_fs.h: the size of inodes and the flags; _IOR('X', 124).
_XFS_IOC_FSGEOMETRY = 0x8070587C
_XFS_GEOMETRY = struct.Struct("=24xL64xL16x")
_XFS_REFLINK = 1 << 20
# struct xfs_fsop_bulkreq (last inode, how many, where to, how many there were), and xfs_inogrp.
_XFS_IOC_FSINUMBERS = 0xC0205867
_XFS_BULKREQ = struct.Struct("=Qi4xQQ")
_XFS_INOGRP = struct.Struct("=Qi4x8x")
# xfs allocates and frees inodes in chunks of 64.
XFS_CHUNK = 64

# linux/openat2.h
_SYS_OPENAT2 = 437
_RESOLVE_NO_XDEV = 0x01
_RESOLVE_NO_SYMLINKS = 0x04
_RESOLVE_BENEATH = 0x08
_RESOLVE = _RESOLVE_NO_XDEV | _RESOLVE_NO_SYMLINKS | _RESOLVE_BENEATH

# A path argument must end within PATH_MAX, its NUL included.
_LONGEST_PATH = 4095
_STEP = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

_COPY_STEP = 1 << 26
# The null device, as in admin-guide/devices.txt of Linux.
_NULL = os.makedev(1, 3)
_BUFFER = 1 << 18
_SMALL = 1 << 14

# Errors that mean that the kernel cannot copy here, although reading and writing may work.
_NO_KERNEL_COPY = frozenset(
    (
        errno.EXDEV,
        errno.ENOSYS,
        errno.EOPNOTSUPP,
        errno.EINVAL,
        errno.EPERM,
        errno.EBADF,
        errno.ETXTBSY,
    )
)

_SAME_FAMILY = {"nfs4": "nfs", "fuseblk": "fuse"}


class _OpenHow(ctypes.Structure):
    _fields_ = (
        ("flags", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("resolve", ctypes.c_uint64),
    )


def open_unnoticed(open_it: t.Callable[[int], int], flags: int) -> int:
    """Open a file or directory for reading without changing its access time, if that is allowed.

    :param open_it: opens it with the flags it is given
    :raises OSError: as ``open_it``
    """
    try:
        return open_it(flags | os.O_NOATIME)
    except PermissionError:
        # Only the owner may use O_NOATIME.
        return open_it(flags)


def read_regular(
    path: str,
    limit: int,
    follow: bool = False,
    dir_fd: t.Optional[int] = None,
    null: bool = False,
) -> bytes:
    """The content of a regular file that an untrusted user may have created.

    A pipe, a device or a socket is opened without blocking and not read. A file that grows is not read beyond the
    limit.

    :param limit: bytes
    :param follow: whether the path may end in a symbolic link
    :param dir_fd: the directory to which a relative path belongs
    :param null: whether the null device counts as an empty file, because administrators link to it to mask a file
    :raises OSError: EINVAL: not a regular file; EFBIG: larger than the limit; else as open(2) and read(2)
    """
    descriptor = open_regular(path, follow, dir_fd, null)
    try:
        pieces, left = [], limit + 1
        while left:
            piece = os.read(descriptor, min(left, _BUFFER))
            if not piece:
                break
            pieces.append(piece)
            left -= len(piece)
    finally:
        os.close(descriptor)
    if not left:
        raise OSError(errno.EFBIG, f"is larger than {limit} bytes", path)
    return b"".join(pieces)


def open_regular(
    path: str, follow: bool = False, dir_fd: t.Optional[int] = None, null: bool = False
) -> int:
    """Open a file as :func:`read_regular` does.

    :returns: a descriptor to read from
    :raises OSError: EINVAL: not a regular file; else as open(2)
    """
    steps.begin(f"reading {path}")
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    if not follow:
        flags |= os.O_NOFOLLOW
    try:
        descriptor = open_unnoticed(functools.partial(os.open, path, dir_fd=dir_fd), flags)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        # A socket, or a device without a driver.
        raise OSError(errno.EINVAL, "is not a regular file", path) from None
    status = os.fstat(descriptor)
    is_null = stat.S_ISCHR(status.st_mode) and status.st_rdev == _NULL
    if not stat.S_ISREG(status.st_mode) and not (null and is_null):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is not a regular file", path)
    return descriptor


def reflink(dst_fd: int, src_fd: int) -> None:
    """Share all data of ``src_fd`` with ``dst_fd``, see ioctl_ficlone(2).

    :raises OSError: EOPNOTSUPP, EXDEV, ENOTTY: not on this filesystem; EINVAL: not this file
    """
    fcntl.ioctl(dst_fd, _FICLONE, src_fd)


def copy_data(
    dst_fd: int,
    src_fd: int,
    size: int,
    sparse: bool = True,
    start: int = 0,
    tell: t.Optional[t.Callable[[int], None]] = None,
) -> None:
    """Copy ``size`` bytes to an empty file, from start to end; holes are kept.

    :param size: the source's size by fstat, in bytes
    :param sparse: whether to look for holes at all
    :param start: the number of bytes that were copied before
    :param tell: called from time to time with the number of bytes copied
    :raises OSError: ENOSPC, EDQUOT, EIO ... of either file
    """
    if not sparse:
        _copy_range(dst_fd, src_fd, start, size, tell)
        return
    position = start
    while position < size:
        try:
            start = os.lseek(src_fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                break
            if error.errno != errno.EINVAL:
                raise
            # The filesystem does not support holes.
            start, end = position, size
        else:
            end = min(os.lseek(src_fd, start, os.SEEK_HOLE), size)
        if start < end:
            _copy_range(dst_fd, src_fd, start, end, tell)
        position = max(end, start)
    os.ftruncate(dst_fd, size)


def _copy_range(
    dst_fd: int, src_fd: int, start: int, end: int, tell: t.Optional[t.Callable[[int], None]]
) -> None:
    """Copy the bytes from ``start`` to ``end`` to the same offset; ends early if the source became shorter."""
    if end - start > _SMALL:
        kernel_copy = getattr(os, "copy_file_range", None)
        if kernel_copy is not None:
            while start < end:
                try:
                    done = kernel_copy(src_fd, dst_fd, min(end - start, _COPY_STEP), start, start)
                except OSError as error:
                    if error.errno not in _NO_KERNEL_COPY:
                        raise
                    break
                if done == 0:
                    break
                start += done
                if tell is not None:
                    tell(start)
    while start < end:
        data = os.pread(src_fd, min(end - start, _BUFFER), start)
        if not data:
            return
        view = memoryview(data)
        while view:
            done = os.pwrite(dst_fd, view, start)
            view = view[done:]
            start += done


def shared_extents(fd: int) -> t.Iterator[t.Tuple[int, int]]:
    """The extents of a file that other files may share: position on the disk and length, in bytes.

    Source: the kernel's Documentation/filesystems/fiemap.rst.

    :raises OSError: EOPNOTSUPP, ENOTTY: the filesystem does not support it
    """
    position = 0
    while True:
        buffer = array.array("B", bytes(_FIEMAP_HEADER.size + _FIEMAP_BATCH * _FIEMAP_EXTENT.size))
        _FIEMAP_HEADER.pack_into(
            buffer, 0, position, (1 << 64) - 1 - position, _FIEMAP_FLAG_SYNC, 0, _FIEMAP_BATCH, 0
        )
        fcntl.ioctl(fd, _FS_IOC_FIEMAP, buffer, True)
        mapped = _FIEMAP_HEADER.unpack_from(buffer, 0)[3]
        if not mapped:
            return
        for index in range(mapped):
            extent = _FIEMAP_EXTENT.unpack_from(
                buffer, _FIEMAP_HEADER.size + index * _FIEMAP_EXTENT.size
            )
            logical, physical, length, flags = extent[0], extent[1], extent[2], extent[5]
            if flags & _FIEMAP_EXTENT_SHARED:
                yield physical, length
            position = logical + length
            if flags & _FIEMAP_EXTENT_LAST:
                return


class Geometry(t.NamedTuple):
    """The geometry of an xfs filesystem.

    :ivar inode_size: bytes of an inode
    :ivar shares: whether files can share their data (reflink)
    """

    inode_size: int
    shares: bool


def xfs_geometry(fd: int) -> t.Optional[Geometry]:
    """The geometry of the xfs filesystem of an open file; None for other filesystems. See linux/xfs_fs.h."""
    buffer = array.array("B", bytes(_XFS_GEOMETRY.size))
    try:
        fcntl.ioctl(fd, _XFS_IOC_FSGEOMETRY, buffer, True)
    except OSError:
        return None
    fields = _XFS_GEOMETRY.unpack(buffer)
    return Geometry(inode_size=fields[0], shares=bool(fields[1] & _XFS_REFLINK))


def xfs_allocated_inodes(fd: int, number: int) -> t.Optional[int]:
    """The number of inodes in use of a chunk of 64 on xfs. See linux/xfs_fs.h.

    :param fd: an open file of the filesystem
    :param number: an inode's number divided by 64
    :returns: None if there is no such chunk, or the caller may not ask (CAP_SYS_ADMIN)
    """
    last = array.array("Q", [max(number * XFS_CHUNK - 1, 0)])
    count = array.array("i", [0])
    group = array.array("B", bytes(_XFS_INOGRP.size))
    request = _XFS_BULKREQ.pack(
        last.buffer_info()[0], 1, group.buffer_info()[0], count.buffer_info()[0]
    )
    try:
        fcntl.ioctl(fd, _XFS_IOC_FSINUMBERS, request)
    except OSError:
        return None
    start, allocated = _XFS_INOGRP.unpack(group)
    return allocated if count[0] and start // XFS_CHUNK == number else None


def syncfs(fd: int) -> None:
    """Write all data of the filesystem of ``fd`` to disk, see syncfs(2).

    :raises OSError: EIO, ENOSPC, EDQUOT: something could not be written
    """
    libc.call("syncfs", fd)


def start_writing(fd: int) -> None:
    """Let the kernel start to write a file's data to disk, without waiting; see sync_file_range(2)."""
    with contextlib.suppress(OSError):
        libc.call("sync_file_range", fd, 0, 0, _SYNC_FILE_RANGE_WRITE)


def filesystem_type(path: t.Union[str, int]) -> str:
    """The filesystem's name as in /proc/self/mountinfo: "ext4", "xfs", "overlay", "fuse" ...

    Variants count as their family: "fuse.fuse-overlayfs" is "fuse", "nfs4" is "nfs".

    :param path: a path, or an open file's descriptor
    :returns: an empty string if this mount namespace does not contain the mount
    :raises OSError: the path cannot be opened
    """
    if isinstance(path, int):
        return _type_of_mount(path)
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        return _type_of_mount(fd)
    finally:
        os.close(fd)


def _type_of_mount(fd: int) -> str:
    entry = mounts.entry_of(fd)
    name = entry.fstype.partition(".")[0] if entry else ""
    return _SAME_FAMILY.get(name, name)


def open_beneath(root_fd: int, path: str, flags: int) -> int:
    """Open ``path`` below a directory; symbolic links are not followed and other mounts not entered.

    The path may be longer than PATH_MAX and of any depth, because it is opened in pieces.

    :param path: relative, without "." or ".."; empty for the directory itself
    :param flags: for open(2); O_NOFOLLOW and O_CLOEXEC are added
    :raises OSError: ELOOP or ENOTDIR: a component is a symbolic link; EXDEV: a mount point
    """
    flags |= os.O_NOFOLLOW | os.O_CLOEXEC
    if not path:
        return os.open(".", flags, dir_fd=root_fd)
    raw = os.fsencode(path)
    if not _have_openat2():
        return _open_stepwise(root_fd, raw, flags)
    current = root_fd
    try:
        while len(raw) > _LONGEST_PATH:
            cut = raw.rindex(b"/", 0, _LONGEST_PATH)
            following = _openat2(current, raw[:cut], _STEP)
            if current != root_fd:
                os.close(current)
            current = following
            raw = raw[cut + 1 :]
        return _openat2(current, raw, flags)
    finally:
        if current != root_fd:
            os.close(current)


def _open_stepwise(root_fd: int, raw: bytes, flags: int) -> int:
    """The same for kernels before 5.6, component by component."""
    *parents, last = raw.split(b"/")
    current = root_fd
    try:
        for name in parents:
            following = os.open(name, _STEP, dir_fd=current)
            if current != root_fd:
                os.close(current)
            current = following
        return os.open(last, flags, dir_fd=current)
    finally:
        if current != root_fd:
            os.close(current)


def _openat2(dir_fd: int, path: bytes, flags: int) -> int:
    how = _OpenHow(flags, 0, _RESOLVE)
    while True:
        try:
            return libc.syscall(_SYS_OPENAT2, dir_fd, path, ctypes.byref(how), ctypes.sizeof(how))
        except OSError as error:
            # EAGAIN: something was renamed or mounted at the same time, see openat2(2).
            if error.errno not in (errno.EAGAIN, errno.EINTR):
                raise OSError(error.errno, error.strerror, os.fsdecode(path)) from None


_openat2_works: t.Optional[bool] = None


def _have_openat2() -> bool:
    """Whether the kernel supports openat2(2) and no seccomp filter forbids it (EPERM)."""
    global _openat2_works
    if _openat2_works is None:
        root = os.open("/", _STEP)
        try:
            os.close(_openat2(root, b".", _STEP))
            _openat2_works = True
        except OSError:
            _openat2_works = False
        finally:
            os.close(root)
    return _openat2_works
