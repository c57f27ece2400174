# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Count the contents of a merged tree without building it."""

from __future__ import annotations

import os
import stat
import typing as t

from ..idmap.mapping import Shift
from ..kernel import xattrs
from . import owners
from .clone import as_result, raise_unmapped, unmapped_ids
from .merged import LayerStack, attribute_names
from .tree_tools import CloneResult
from .walk import (
    ALLOCATED,
    APPARENT,
    DIRECTORIES,
    FILES,
    INODES,
    SYMLINK,
    IDs,
    Progress,
    Token,
    Visitor,
    Walk,
)

_BLOCK = 512


def survey(
    stack: LayerStack,
    shift: t.Optional[Shift] = None,
    workers: t.Optional[int] = None,
    progress: t.Optional[Progress] = None,
) -> CloneResult:
    """Count the contents that ``clone`` would create; ``exclusive`` is the size of a plain copy.

    :param shift: also search for IDs that it cannot map
    :param progress: called with files and bytes seen, twice a second at most
    :raises NeedsMount: the layers cannot be read without an overlay mount
    :raises UnmappedIDs: as ``clone``
    :raises TreeError: the tree cannot be read
    """
    walk = Walk(_Surveyor(stack, shift), workers, progress)
    totals = walk.run()
    if shift is not None:
        raise_unmapped(stack, shift, walk.ids)
    return as_result(totals, "")


class _Surveyor(Visitor):
    def __init__(self, stack: LayerStack, shift: t.Optional[Shift]) -> None:
        super().__init__(stack, stack.labels[0])
        self._shift = shift
        self._looks = shift is not None or not stack.plain

    def ids(self) -> t.Optional[IDs]:
        return None if self._shift is None else unmapped_ids(self._shift)

    def init_worker(self) -> None:
        pass

    def enter(self, path: str, fd: int, attributes: t.List[str]) -> Token:
        self.totals[DIRECTORIES] += 1
        self.totals[INODES] += 1
        status = os.fstat(fd)
        self.totals[ALLOCATED] += status.st_blocks * _BLOCK
        self._find_ids(fd, None, status, attributes)
        return ()

    def reenter(self, path: str) -> None:
        pass

    def directory(self, fd: int, name: str) -> None:
        pass

    def entry(self, fd: int, name: str, kind: int, linked: bool) -> t.Optional[t.Tuple[int, int]]:
        status = os.lstat(name, dir_fd=fd)
        totals = self.totals
        if not linked:
            totals[FILES] += 1
            if status.st_nlink > 1:
                return status.st_dev, status.st_ino
        totals[INODES] += 1
        totals[APPARENT] += status.st_size
        if stat.S_ISREG(status.st_mode):
            totals[ALLOCATED] += status.st_blocks * _BLOCK
        if self._looks and kind != SYMLINK:
            attributes = self.stack.content(attribute_names(fd, name))
            self._find_ids(fd, name, status, attributes)
        elif self._shift is not None:
            self._find_ids(fd, name, status, ())
        return None

    def leave(self, whole: bool) -> None:
        pass

    def finish(self, path: str, fd: int, token: Token) -> None:
        pass

    def link(self, path: str, fd: int, links: t.List[t.Tuple[str, str, str]]) -> None:
        pass

    def _find_ids(
        self,
        fd: int,
        entry: t.Optional[str],
        status: os.stat_result,
        attributes: t.Iterable[str],
    ) -> None:
        shift = self._shift
        if shift is None:
            return
        shift.uid(status.st_uid)
        shift.gid(status.st_gid)
        for attribute in attributes:
            if attribute in owners.WITH_IDS:
                owners.translate(attribute, xattrs.get(fd, attribute, entry), shift)
