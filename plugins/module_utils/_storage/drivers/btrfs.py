# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This module util is PRIVATE to the userns.storage collection.
"""The btrfs driver: each layer is a subvolume; a mapped one starts as a snapshot of its template."""

from __future__ import annotations

import contextlib
import errno
import os
import typing as t

from ..idmap.mapping import Shift
from ..kernel import btrfs, files
from ..tree.measure import Usage
from ..tree.merged import PLAIN, LayerStack
from ..tree.shift import shift_in_place
from .base import (
    DIRECTORY,
    SNAPSHOT,
    STAGED,
    Driver,
    Progress,
    Staged,
    Strategy,
)


class BtrfsDriver(Driver):
    """GRAPHROOT/btrfs/subvolumes/ID is the layer's tree and a subvolume."""

    name = "btrfs"
    places = ("btrfs", "subvolumes")

    def damage(self, layer_id: str, chain: t.Sequence[str] = ()) -> t.Optional[str]:
        """As for every driver; a plain directory in a subvolume's place is damage as well."""
        found = super().damage(layer_id, chain)
        if found is not None:
            return found
        with self._explained(layer_id), contextlib.ExitStack() as undo:
            if not btrfs.is_subvolume(self._need_layer(undo, layer_id)):
                return f"layer {layer_id[:12]} is a directory, not a subvolume"
        return None

    def measure(self, layer_id: str, exclusive: bool = False) -> Usage:
        """As for every driver; the exclusive bytes come from btrfs where quotas are on."""
        with self._explained(layer_id), contextlib.ExitStack() as undo:
            counted: t.Optional[int] = None
            if exclusive:
                counted = btrfs.exclusive_bytes(self._need_layer(undo, layer_id))
            usage = super().measure(layer_id, exclusive and counted is None)
            return usage if counted is None else usage._replace(exclusive=counted)

    def strategies(self, chain: t.Sequence[str]) -> t.List[Strategy]:
        """A snapshot, where the template is a subvolume; then what works everywhere."""
        with self._explained(chain[0]), contextlib.ExitStack() as undo:
            template = self._need_layer(undo, chain[0])
            ways = self._copying()
            if btrfs.is_subvolume(template):
                reason = "btrfs snapshots share everything but the owners"
                ways.insert(0, Strategy(SNAPSHOT, reason))
            return ways

    def destroy(self, parent: int, name: str) -> bool:
        """Delete a subvolume in one piece; as an ordinary user only where the mount allows it."""
        try:
            descriptor = os.open(name, DIRECTORY, dir_fd=parent)
        except OSError:
            return False
        try:
            if not btrfs.is_subvolume(descriptor):
                return False
        finally:
            os.close(descriptor)
        try:
            btrfs.delete_subvolume(parent, name)
        except OSError as error:
            if error.errno in (errno.EPERM, errno.EACCES, errno.ENOTEMPTY):
                return False
            raise
        return True

    @contextlib.contextmanager
    def _readable(self, chain: t.Sequence[str]) -> t.Iterator[LayerStack]:
        with contextlib.ExitStack() as undo:
            template = self._need_layer(undo, chain[0])
            yield undo.enter_context(LayerStack([template], PLAIN))

    def _build(
        self,
        strategy: Strategy,
        chain: t.Sequence[str],
        shift: Shift,
        staging: int,
        into: str,
        progress: t.Optional[Progress],
    ) -> Staged:
        target = os.path.join(into, STAGED)
        if strategy.name != SNAPSHOT:
            btrfs.create_subvolume(staging, STAGED)
            with self._readable(chain) as stack:
                return self._cloned(stack, target, shift, strategy, progress)
        with contextlib.ExitStack() as undo:
            template = self._need_layer(undo, chain[0])
            # What is not on disk yet is not in a snapshot.
            files.syncfs(template)
            btrfs.snapshot(template, staging, STAGED)
        made = shift_in_place(target, shift, progress=progress)
        # Space is counted when the filesystem commits, and known only where quotas are on.
        files.syncfs(staging)
        with contextlib.ExitStack() as undo:
            snapshot = os.open(STAGED, DIRECTORY, dir_fd=staging)
            undo.callback(os.close, snapshot)
            return self._told(strategy, made, btrfs.exclusive_bytes(snapshot) or 0)
