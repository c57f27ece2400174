# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Namespaces of the calling process: unshare(2), setns(2), ID maps, and termination together with the parent."""

from __future__ import annotations

import contextlib
import os
import signal
import typing as t

from . import libc, mounts

CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000

_mounts_are_private = False
# The root directory in the original mount namespace of this process.
_host_root = -1


def unshare(flags: int) -> None:
    """Move the calling process into new namespaces.

    :param flags: CLONE_* of this module, ORed
    :raises OSError: EPERM if it is forbidden, ENOSPC if a limit of the user is reached
    """
    global _host_root
    if flags & CLONE_NEWNS and _host_root < 0:
        _host_root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    libc.call("unshare", flags)


def open_on_host(path: str) -> int:
    """Open a directory through the host's mounts, which keeps them busy while it is open.

    :param path: absolute, without symbolic links
    :returns: a descriptor with O_PATH
    :raises OSError: as open(2)
    """
    flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    if _host_root < 0:
        return os.open(path, flags)
    return os.open(path.lstrip("/") or ".", flags, dir_fd=_host_root)


def setns(descriptor: int, flags: int = 0) -> None:
    """Enter the namespace of an open /proc/PID/ns/* file.

    :raises OSError: with the call's errno
    """
    libc.call("setns", descriptor, flags)


def isolate_mounts() -> None:
    """Stop mounts of a new mount namespace from propagating to the host.

    They become slaves instead of private, so that unmounts of the host propagate here, and
    this process does not keep the mounts of a stopped container busy.

    :raises OSError: EPERM or EACCES if mounting is forbidden in the namespace
    """
    global _mounts_are_private
    mounts.make_slave("/")
    _mounts_are_private = True


def mounts_are_private() -> bool:
    """Whether this process is in a mount namespace that it created itself."""
    return _mounts_are_private


def die_with_parent(parent: int, number: int = signal.SIGKILL) -> None:
    """Let the kernel send a signal when the parent ends; a change of credentials cancels it.

    :param parent: PID of the parent, read before the fork
    :raises OSError: with the call's errno
    """
    libc.call("prctl", libc.PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def unmapped_here(kind: str, ids: t.Iterable[int]) -> t.List[int]:
    """The IDs among these that are not mapped in the user namespace of this process, sorted.

    :param kind: "uid" or "gid"
    :raises OSError: /proc cannot be read
    """
    with open(f"/proc/self/{kind}_map", encoding="utf-8") as table:
        ranges = [tuple(map(int, line.split())) for line in table]
    return sorted(
        item
        for item in ids
        if not any(first <= item < first + count for first, _outside, count in ranges)
    )


def write_map(pid: int, kind: str, lines: t.Iterable[t.Tuple[int, int, int]]) -> None:
    """Write a user namespace's ID map, which is possible only once.

    :param pid: a process in the namespace
    :param kind: "uid" or "gid"
    :param lines: (ID in the namespace, ID in the parent namespace, number of IDs)
    :raises OSError: EPERM without the permission to map those IDs, EINVAL for a map that cannot be
    """
    text = "".join(f"{inside} {outside} {size}\n" for inside, outside, size in lines)
    descriptor = os.open(f"/proc/{pid}/{kind}_map", os.O_WRONLY | os.O_CLOEXEC)
    try:
        # The kernel accepts the map only in a single write.
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def user_namespace(
    lines: t.Sequence[t.Tuple[int, int, int]],
    gid_lines: t.Optional[t.Sequence[t.Tuple[int, int, int]]] = None,
) -> t.Iterator[int]:
    """A descriptor of a new user namespace.

    :param lines: (ID in the namespace, ID in the parent namespace, number of IDs)
    :param gid_lines: the same for GIDs, by default those for UIDs
    :raises OSError: EPERM or ENOSPC if namespaces are forbidden
    """
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            unshare(CLONE_NEWUSER)
            os.write(write_end, b"\n")
            signal.pause()
        except OSError as error:
            os.write(write_end, str(error.errno).encode())
        finally:
            os._exit(1)
    os.close(write_end)
    try:
        answer = os.read(read_end, 16).strip()
        if answer:
            raise OSError(int(answer), os.strerror(int(answer)), "user namespace")
        write_map(pid, "uid", lines)
        write_map(pid, "gid", lines if gid_lines is None else gid_lines)
        descriptor = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(read_end)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def idmap_probe(directory: str) -> bool:
    """Whether the kernel mounts an overlay on ID-mapped lower directories of this filesystem.

    A runtime runs the same test before it shifts owners at mount time (Linux 5.19, not in a
    user namespace). Nothing is written; the mounts are in a namespace of their own.

    :param directory: a directory of the store
    """
    pid = os.fork()
    if pid == 0:
        result = 1
        try:
            _try_idmapped_lower(directory)
            result = 0
        finally:
            os._exit(result)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _try_idmapped_lower(directory: str) -> None:
    unshare(CLONE_NEWNS)
    mounts.make_private("/")
    here = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    mounts.mount("tmpfs", directory, "tmpfs", 0, "mode=0700")
    os.chdir(directory)
    for name in ("mapped", "empty", "merged"):
        os.mkdir(name)
    with user_namespace([(0, 0, 1)]) as namespace:
        mounts.idmapped(here, "mapped", namespace)
    mounts.overlay("merged", [os.path.abspath("mapped"), os.path.abspath("empty")])
