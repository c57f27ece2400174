# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Mounts of the calling process's mount namespace; see mount(2), mount_setattr(2)."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import typing as t

from . import libc

MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_REMOUNT = 0x20
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 0x40000
MS_SLAVE = 0x80000
MNT_DETACH = 0x2
UMOUNT_NOFOLLOW = 0x8

# A path, or an open directory: a descriptor cannot be swapped for a symbolic link.
PathOrFd = t.Union[str, int]

_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_OPEN_TREE_CLONE = 0x1
_MOVE_MOUNT_F_EMPTY_PATH = 0x4
MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4
_MOUNT_ATTR_IDMAP = 0x00100000
_MAX_DATA = 4095
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class MountEntry(t.NamedTuple):
    """A line of /proc/self/mountinfo, see proc(5)."""

    mount_id: int
    root: str
    mount_point: str
    fstype: str
    source: str
    super_options: t.Tuple[str, ...]


def mount(
    source: t.Optional[str],
    target: PathOrFd,
    fstype: t.Optional[str],
    flags: int = 0,
    data: t.Optional[str] = None,
) -> None:
    """Call mount(2).

    :param flags: MS_* of this module, ORed
    :raises OSError: with the call's errno and the target
    """
    name = path_of(target)
    libc.call(
        "mount",
        None if source is None else os.fsencode(source),
        os.fsencode(name),
        None if fstype is None else fstype.encode(),
        flags,
        None if data is None else os.fsencode(data),
        path=name,
    )


def umount(target: PathOrFd, flags: int = 0) -> None:
    """Call umount2(2).

    :param flags: MNT_DETACH, UMOUNT_NOFOLLOW, ORed
    :raises OSError: with the call's errno and the target
    """
    name = path_of(target)
    libc.call("umount2", os.fsencode(name), flags, path=name)


def bind(
    source: PathOrFd, target: PathOrFd, recursive: bool = False, read_only: bool = False
) -> None:
    """Bind-mount a directory; with its submounts only if `recursive` is set.

    :raises OSError: EINVAL if a foreign user namespace locks mounts below the source
    """
    mount(path_of(source), target, None, MS_BIND | (MS_REC if recursive else 0))
    if read_only:
        mount(None, target, None, MS_BIND | MS_REMOUNT | MS_RDONLY)


def make_private(target: PathOrFd = "/") -> None:
    """Make a mount and all mounts below it private.

    :raises OSError: with the call's errno and the target
    """
    mount(None, target, None, MS_REC | MS_PRIVATE)


def make_slave(target: PathOrFd = "/") -> None:
    """Make a mount and all mounts below it slaves, which receive the mounts and unmounts of others.

    :raises OSError: with the call's errno and the target
    """
    mount(None, target, None, MS_REC | MS_SLAVE)


@contextlib.contextmanager
def mounted(
    source: t.Optional[str],
    target: PathOrFd,
    fstype: t.Optional[str],
    flags: int = 0,
    data: t.Optional[str] = None,
) -> t.Iterator[None]:
    """Context manager: mount, and unmount at the end.

    :raises OSError: with the call's errno and the target
    """
    mount(source, target, fstype, flags, data)
    try:
        yield
    finally:
        unmount_surely(target)


def unmount_surely(target: PathOrFd) -> None:
    """Unmount, or detach a busy mount.

    :raises OSError: with the call's errno and the target
    """
    try:
        umount(target)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        umount(target, MNT_DETACH)


def overlay(
    target: PathOrFd,
    lowers: t.Sequence[PathOrFd],
    upper: t.Optional[PathOrFd] = None,
    work: t.Optional[PathOrFd] = None,
    options: t.Sequence[str] = (),
) -> None:
    """Mount an overlay; see the kernel's Documentation/filesystems/overlayfs.rst.

    The layers are passed as descriptor numbers, so that many layers fit into the limit of one page, and
    paths may contain colons. The current directory changes during the call.

    :param lowers: lower directories, topmost first; at least two without an upper directory
    :param upper: upper directory; without it the mount is read-only
    :param work: work directory, on the same mount as the upper directory
    :param options: further mount options
    :raises OSError: with the call's errno and the target; ELOOP if a layer is a symbolic link
    """
    with contextlib.ExitStack() as opened:

        def number(target: PathOrFd) -> str:
            if isinstance(target, int):
                return str(target)
            descriptor = os.open(target, _DIRECTORY)
            opened.callback(os.close, descriptor)
            return str(descriptor)

        data = ["lowerdir=" + ":".join([number(lower) for lower in lowers])]
        if upper is not None and work is not None:
            data += ["upperdir=" + number(upper), "workdir=" + number(work)]
        joined = ",".join(data + list(options))
        if len(joined) > _MAX_DATA:
            raise OSError(errno.E2BIG, os.strerror(errno.E2BIG), path_of(target))
        absolute = path_of(target)
        if not os.path.isabs(absolute):
            absolute = os.path.join(os.getcwd(), absolute)
        here = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        opened.callback(os.close, here)
        os.chdir("/proc/self/fd")
        try:
            mount("overlay", absolute, "overlay", MS_RDONLY if upper is None else 0, joined)
        finally:
            os.fchdir(here)


def overlay_view(
    parent: int, name: str, lowers: t.Sequence[PathOrFd], options: t.Sequence[str] = ()
) -> int:
    """Open the merged view of layers read-only, without leaving a mount or a directory.

    :param parent: an open directory
    :param name: a directory in it, used as mount point for a moment; nothing is written to it
    :param lowers: lower directories, topmost first; opened descriptors or paths
    :returns: a descriptor of the view's root; the view ends when its last descriptor is closed
    :raises OSError: with the call's errno; ESTALE if the name was replaced at the same time
    """
    with contextlib.ExitStack() as undo:

        def open_name(below: t.Optional[int]) -> int:
            descriptor = os.open(name, _DIRECTORY, dir_fd=parent)
            undo.callback(os.close, descriptor)
            if below is not None and os.fstat(descriptor).st_dev == os.fstat(below).st_dev:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), name)
            return descriptor

        layers: t.List[PathOrFd] = []
        for lower in lowers:
            # Opened before the mounts below: the mount point may be one of the layers.
            if isinstance(lower, str):
                lower = os.open(lower, _DIRECTORY)
                undo.callback(os.close, lower)
            layers.append(lower)
        point = open_name(None)
        # An empty tmpfs is the second layer that the kernel requires.
        mount("tmpfs", point, "tmpfs", MS_NODEV | MS_NOSUID, "mode=0755")
        empty = open_name(point)
        undo.callback(umount, empty, MNT_DETACH)
        overlay(empty, [*layers, empty] if len(layers) == 1 else layers, options=options)
        view = open_name(empty)
        umount(view, MNT_DETACH)
        return os.dup(view)


def path_of(target: PathOrFd) -> str:
    """The path itself, or the magic link of a descriptor."""
    return f"/proc/self/fd/{target}" if isinstance(target, int) else target


def mount_id(descriptor: int) -> int:
    """The number, in mountinfo, of the mount that an open file was reached through.

    :raises OSError: /proc is not mounted
    """
    with open(f"/proc/self/fdinfo/{descriptor}", encoding="utf-8") as lines:
        for line in lines:
            name, _colon, value = line.partition(":")
            if name == "mnt_id":
                return int(value)
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), f"/proc/self/fdinfo/{descriptor}")


def entry_of(descriptor: int) -> t.Optional[MountEntry]:
    """The mount that an open file was reached through; None if this mount namespace does not contain it.

    :raises OSError: /proc is not mounted
    """
    number = str(mount_id(descriptor))
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        return next((_entry(line) for line in lines if line.split(" ", 1)[0] == number), None)


def entries() -> t.List[MountEntry]:
    """All mounts of the calling process, in the order of mounting."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        return [_entry(line) for line in lines]


def _entry(line: str) -> MountEntry:
    before, _dash, after = line.rstrip("\n").partition(" - ")
    fields, rest = before.split(" "), after.split(" ")
    return MountEntry(
        int(fields[0]),
        _unescape(fields[3]),
        _unescape(fields[4]),
        rest[0],
        _unescape(rest[1]) if len(rest) > 1 else "",
        tuple(rest[2].split(",")) if len(rest) > 2 else (),
    )


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found.group(1), 8)), text)


class _MountAttr(ctypes.Structure):
    """struct mount_attr of <linux/mount.h>."""

    _fields_ = [
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    ]


def without_submounts(directory: str) -> int:
    """Open a directory of a filesystem without the mounts below it.

    :returns: a descriptor, below which files that mounts cover can be opened
    :raises OSError: with the call's errno
    """
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC
    return libc.syscall(
        libc.SYS_OPEN_TREE, _AT_FDCWD, os.fsencode(directory), flags, path=directory
    )


def idmapped(source: PathOrFd, target: PathOrFd, namespace: int, attributes: int = 0) -> None:
    """Bind-mount a directory with its owners mapped by a user namespace.

    :param namespace: descriptor of a /proc/PID/ns/user
    :param attributes: MOUNT_ATTR_* of this module, ORed
    :raises OSError: EINVAL if the filesystem does not support it, EPERM in a user namespace, ENOSYS before
        Linux 5.12
    """
    path = os.fsencode(path_of(source))
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC
    tree = libc.syscall(libc.SYS_OPEN_TREE, _AT_FDCWD, path, flags, path=path_of(source))
    try:
        settings = _MountAttr(_MOUNT_ATTR_IDMAP | attributes, 0, 0, namespace)
        size = ctypes.sizeof(settings)
        reference = ctypes.byref(settings)
        number = libc.SYS_MOUNT_SETATTR
        libc.syscall(number, tree, b"", _AT_EMPTY_PATH, reference, size, path=path_of(source))
        where = os.fsencode(path_of(target))
        number, flags = libc.SYS_MOVE_MOUNT, _MOVE_MOUNT_F_EMPTY_PATH
        libc.syscall(number, tree, b"", _AT_FDCWD, where, flags, path=path_of(target))
    finally:
        os.close(tree)
