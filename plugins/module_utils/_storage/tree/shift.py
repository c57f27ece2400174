# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Change the owners of a tree in place: a snapshot, a copy, or a layer mounted for writing."""

from __future__ import annotations

import errno
import os
import stat
import typing as t

from ..errors import TreeError
from ..idmap.mapping import Shift
from ..kernel import files
from ..kernel.oserrors import shown, translate_oserror
from . import owners
from .clone import as_result, raise_unmapped, unmapped_ids
from .merged import PLAIN, LayerStack
from .tree_tools import CloneResult
from .walk import (
    APPARENT,
    DIRECTORIES,
    FILE,
    FILES,
    INODES,
    IDs,
    Progress,
    Token,
    Visitor,
    Walk,
)

IN_PLACE = "in place"

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_LOOK = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


def shift_in_place(
    directory: t.Union[str, int],
    shift: Shift,
    relink: bool = False,
    workers: t.Optional[int] = None,
    progress: t.Optional[Progress] = None,
) -> CloneResult:
    """Translate the owners of a whole tree, including its root.

    Only inodes whose owner, ACL or capability changes are modified, each of them once; all times
    except ctime are kept. After an error a part of the tree has new owners and must be removed.

    :param directory: path or descriptor of the tree's root; other mounts below it are an error
    :param relink: restore hard links that a change of owner broke, as on overlay without index
    :param workers: number of processes; None for one per processor
    :param progress: called with files and bytes seen, twice a second at most
    :returns: counts of the whole tree; ``exclusive`` is 0
    :raises UnmappedIDs: the facts ``uids`` and ``gids`` name container IDs
    :raises TreeError: the tree cannot be read or changed
    :raises NoSpace: copying up filled the filesystem
    :raises PermissionDenied: an owner may not be changed
    """
    with translate_oserror(kind=TreeError):
        stack = LayerStack([directory], PLAIN)
    with stack:
        walk = Walk(_Shifter(stack, shift, relink), workers, progress)
        totals = walk.run()
        raise_unmapped(stack, shift, walk.ids)
        return as_result(totals, IN_PLACE)


class _Shifter(Visitor):
    """Changes each entry when its directory is listed, including subdirectories.

    All entries that a copy-up creates in a directory exist before the directory's times are
    restored, so that the times are not changed again.
    """

    def __init__(self, stack: LayerStack, shift: Shift, relink: bool) -> None:
        super().__init__(stack, stack.labels[0])
        self._shift = shift
        self._relink = relink
        self._device = os.fstat(stack.fds[0]).st_dev
        self._fd = -1
        self._times: Token = ()

    def ids(self) -> t.Optional[IDs]:
        return unmapped_ids(self._shift)

    def init_worker(self) -> None:
        pass

    def enter(self, path: str, fd: int, attributes: t.List[str]) -> Token:
        status = os.fstat(fd)
        self.totals[DIRECTORIES] += 1
        self.totals[INODES] += 1
        if not path:
            owners.apply_owner(fd, status, self._shift)
        self._fd = fd
        self._times = (status.st_atime_ns, status.st_mtime_ns)
        return self._times

    def reenter(self, path: str) -> None:
        pass

    def directory(self, fd: int, name: str) -> None:
        child = os.open(name, _DIRECTORY, dir_fd=fd)
        try:
            status = os.fstat(child)
            if status.st_dev != self._device:
                raise TreeError(
                    shown(name),
                    "is another filesystem's mount point, or a subvolume of its own",
                    "Unmount it.",
                )
            owners.apply_owner(child, status, self._shift)
        finally:
            os.close(child)

    def entry(self, fd: int, name: str, kind: int, linked: bool) -> t.Optional[t.Tuple[int, int]]:
        source = os.open(name, _READ if kind == FILE else _LOOK, dir_fd=fd)
        try:
            status = os.fstat(source)
            totals = self.totals
            if not linked:
                totals[FILES] += 1
                if status.st_nlink > 1:
                    # It may already have its new owner, through another name.
                    return status.st_dev, status.st_ino
            totals[INODES] += 1
            totals[APPARENT] += status.st_size
            if kind == FILE:
                if not stat.S_ISREG(status.st_mode):
                    raise OSError(errno.ESTALE, "changed its type while it was read", name)
                owners.apply_owner(source, status, self._shift)
            else:
                owners.apply_owner(source, status, self._shift, "")
        finally:
            os.close(source)
        return None

    def leave(self, whole: bool) -> None:
        if whole:
            _restore(self._fd, self._times)
        self._fd = -1

    def finish(self, path: str, fd: int, token: Token) -> None:
        _restore(fd, token)

    def link(self, path: str, fd: int, links: t.List[t.Tuple[str, str, str]]) -> None:
        if not self._relink:
            return
        status = os.fstat(fd)
        root = self.stack.fds[0]
        for name, other_path, other in links:
            there = files.open_beneath(root, other_path, _DIRECTORY)
            try:
                mine = os.lstat(name, dir_fd=fd)
                first = os.lstat(other, dir_fd=there)
                if (mine.st_dev, mine.st_ino) == (first.st_dev, first.st_ino):
                    continue
                os.unlink(name, dir_fd=fd)
                os.link(other, name, src_dir_fd=there, dst_dir_fd=fd, follow_symlinks=False)
            finally:
                os.close(there)
        _restore(fd, (status.st_atime_ns, status.st_mtime_ns))


def _restore(fd: int, times: Token) -> None:
    """Restore a directory's times, if they changed."""
    accessed, modified = times
    if os.fstat(fd).st_mtime_ns != modified:
        os.utime(fd, ns=(accessed, modified))
