# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The btrfs driver. Each layer is a subvolume, and a mapped layer starts as a snapshot of its template.

Runtimes remove a layer whose record is flagged as incomplete when they open the store, and on btrfs
they fail, for the whole store, if there is no subvolume of that name. Therefore a subvolume exists as long
as such a record may exist: before the layer is in place and after it was removed, an empty subvolume with a
mark of this collection is its placeholder.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
import typing as t

from ..errors import StoreError
from ..idmap.mapping import Shift
from ..kernel import btrfs, files, renames, xattrs
from ..store.removal import empty_tree
from ..tree.measure import Usage
from ..tree.merged import LayerStack
from ..tree.own_tree import OwnTree
from .base import (
    DIRECTORY,
    LAYER_ID,
    SNAPSHOT,
    Driver,
    Orphan,
    Progress,
    Staged,
    Strategy,
    Trace,
)

# Marks the root of a placeholder.
_MARK = "trusted.userns.storage.placeholder"
_MARK_OF_USERS = "user.userns.storage.placeholder"
# Its name before it is renamed to the layer's ID.
_NEW_PLACEHOLDER = "place"
# The longest time between the record of a layer and its data (seconds).
_LONGEST_WAIT = 86400.0
_NO_EXCHANGE = frozenset((errno.ENOSYS, errno.EINVAL))


class BtrfsDriver(Driver):
    """GRAPHROOT/btrfs/subvolumes/ID is the layer's tree and a subvolume."""

    name = "btrfs"
    folders = ("btrfs", "subvolumes")

    def damage(self, layer_id: str, chain: t.Sequence[str] = ()) -> t.Optional[str]:
        """See the base class; a plain directory instead of a subvolume is damage as well."""
        found = super().damage(layer_id, chain)
        if found is not None:
            return found
        with self._explained(layer_id), contextlib.ExitStack() as undo:
            if not btrfs.is_subvolume(self._need_layer(undo, layer_id)):
                return f"layer {layer_id[:12]} is a directory, not a subvolume"
            folder = undo.enter_context(self._opened_folder())
            if self._is_placeholder(folder, layer_id):
                return f"the subvolume of layer {layer_id[:12]} is missing, only its placeholder exists"
        return None

    def measure(self, layer_id: str, exclusive: bool = False) -> Usage:
        """As in the base class. If quotas are enabled, btrfs provides the exclusive bytes."""
        with self._explained(layer_id), contextlib.ExitStack() as undo:
            counted: t.Optional[int] = None
            if exclusive:
                counted = btrfs.exclusive_bytes(self._need_layer(undo, layer_id))
            usage = super().measure(layer_id, exclusive and counted is None)
            if counted is not None:
                copies = btrfs.metadata_copies(self._need_layer(undo, layer_id))
                return usage._replace(exclusive=counted, least=counted, most=counted * copies)
            if not exclusive:
                return usage
            # Without quotas it is unknown which leaves snapshots share.
            if usage.parts is not None:
                usage.parts.snapshot = True
            return usage._replace(least=0)

    def traces(self, layer_ids: t.Iterable[str]) -> t.Dict[str, Trace]:
        """The generation of the subvolume, which grows with each snapshot of it."""
        found = {}
        with self._explained(self.folder), self._opened_folder() as folder:
            for layer_id in layer_ids:
                with contextlib.suppress(OSError):
                    if not LAYER_ID.fullmatch(layer_id):
                        continue
                    descriptor = os.open(layer_id, DIRECTORY, dir_fd=folder)
                    try:
                        if btrfs.is_subvolume(descriptor):
                            found[layer_id] = Trace(str(btrfs.generation(descriptor)))
                    finally:
                        os.close(descriptor)
        return found

    def _settle(self, directory: int) -> None:
        super()._settle(directory)
        btrfs.sync(directory)

    def strategies(self, chain: t.Sequence[str]) -> t.List[Strategy]:
        """A snapshot if the template is a subvolume, then the strategies of all drivers."""
        with self._explained(chain[0]), contextlib.ExitStack() as undo:
            template = self._need_layer(undo, chain[0])
            strategies = self._copying()
            if btrfs.is_subvolume(template):
                reason = "btrfs snapshots share everything but the owners"
                strategies.insert(0, Strategy(SNAPSHOT, reason))
            return strategies

    def exists(self, layer_id: str) -> bool:
        """See the base class; a placeholder is no layer."""
        if not super().exists(layer_id):
            return False
        with self._explained(layer_id), self._opened_folder() as folder:
            return not self._is_placeholder(folder, layer_id)

    def stage(
        self,
        chain: t.Sequence[str],
        shift: Shift,
        strategy: str,
        into: str,
        layer_id: str,
        progress: t.Optional[Progress] = None,
    ) -> Staged:
        """See the base class; also creates the placeholder."""
        staged = super().stage(chain, shift, strategy, into, layer_id, progress)
        with self._explained(layer_id), contextlib.ExitStack() as undo:
            folder = undo.enter_context(self._opened_folder())
            staging = os.open(into, DIRECTORY)
            undo.callback(os.close, staging)
            # It must have its mark before it gets its name.
            self._make_placeholder(staging, _NEW_PLACEHOLDER)
            os.rename(_NEW_PLACEHOLDER, layer_id, src_dir_fd=staging, dst_dir_fd=folder)
        return staged

    def _orphans(
        self, folder: int, names: t.Set[str], known_ids: t.Collection[str], thorough: bool
    ) -> t.List[Orphan]:
        """See the base class; placeholders of layers that are being created are left out."""
        now = time.time()
        return [
            orphan
            for orphan in super()._orphans(folder, names, known_ids, thorough)
            if now - orphan.changed > _LONGEST_WAIT or not self._is_placeholder(folder, orphan.name)
        ]

    def destroy(self, parent: int, name: str) -> bool:
        """Delete a subvolume in one piece; as an ordinary user only where the mount allows it."""
        return _delete(parent, name)

    def is_placeholder(self, name: str) -> bool:
        """Whether there is an empty subvolume as the placeholder of that layer."""
        if not LAYER_ID.fullmatch(name):
            return False
        with self._explained(name), self._opened_folder() as folder:
            return self._is_placeholder(folder, name)

    def remove_placeholder(self, layer_id: str) -> bool:
        """Delete the empty subvolume that is a layer's placeholder."""
        with self._explained(layer_id), self._opened_folder() as folder:
            held = self._is_placeholder(folder, self._checked(layer_id))
            return held and _delete(folder, layer_id)

    def erase(self, layer_id: str) -> None:
        """Empty the subvolume, which is then the placeholder of the layer until ``remove_placeholder``."""
        with self._explained(layer_id), contextlib.ExitStack() as undo:
            folder = undo.enter_context(self._opened_folder())
            layer = os.open(self._checked(layer_id), DIRECTORY, dir_fd=folder)
            undo.callback(os.close, layer)
            if not btrfs.is_subvolume(layer):
                super().erase(layer_id)
                return
            empty_tree(self._path(layer_id), lambda: False)
            xattrs.put(layer, self._mark, b"1")

    def _staged_name(self, layer_id: str) -> str:
        return layer_id

    def _install(self, staging: int, folder: int, layer_id: str) -> None:
        try:
            if self._is_placeholder(folder, layer_id):
                renames.exchange(staging, layer_id, folder, layer_id)
                return
        except OSError as error:
            if error.errno not in _NO_EXCHANGE:
                raise
            _delete(folder, layer_id)
        super()._install(staging, folder, layer_id)

    def _uninstall(self, folder: int, layer_id: str, trash: int) -> None:
        os.stat(layer_id, dir_fd=folder, follow_symlinks=False)
        try:
            with contextlib.suppress(FileExistsError):
                # It contains the layer's ID, with which the placeholder is found and removed in the end.
                self._make_placeholder(trash, layer_id)
            if self._is_placeholder(folder, layer_id):
                return
            renames.exchange(folder, layer_id, trash, layer_id)
        except OSError as error:
            if error.errno not in _NO_EXCHANGE:
                raise
            _delete(trash, layer_id)
            super()._uninstall(folder, layer_id, trash)

    @property
    def _mark(self) -> str:
        return _MARK_OF_USERS if self.home.rootless else _MARK

    def _make_placeholder(self, parent: int, name: str) -> None:
        btrfs.create_subvolume(parent, name)
        with contextlib.ExitStack() as undo:
            made = os.open(name, DIRECTORY, dir_fd=parent)
            undo.callback(os.close, made)
            xattrs.put(made, self._mark, b"1")

    def _is_placeholder(self, parent: int, name: str) -> bool:
        with contextlib.ExitStack() as undo:
            try:
                found = os.open(name, DIRECTORY, dir_fd=parent)
            except OSError:
                return False
            undo.callback(os.close, found)
            try:
                xattrs.get(found, self._mark)
            except OSError:
                return False
            return btrfs.is_subvolume(found) and not os.listdir(found)

    def _own_tree(self, undo: contextlib.ExitStack, layer_id: str) -> OwnTree:
        damage = self.damage(layer_id)
        if damage is not None:
            raise StoreError(f"layer {layer_id[:12]}", damage, "Pull or load its image again.")
        return super()._own_tree(undo, layer_id)

    def _readable(self, chain: t.Sequence[str]) -> t.ContextManager[LayerStack]:
        return self._whole_layer(chain)

    def _build(
        self,
        strategy: Strategy,
        chain: t.Sequence[str],
        shift: Shift,
        staging: int,
        target: str,
        progress: t.Optional[Progress],
    ) -> Staged:
        name = os.path.basename(target)
        if strategy.name != SNAPSHOT:
            again = os.path.lexists(target)
            if not again:
                btrfs.create_subvolume(staging, name)
            with self._readable(chain) as stack:
                return self._cloned(stack, target, shift, strategy, progress, again)
        with contextlib.ExitStack() as undo:
            template = self._need_layer(undo, chain[0])
            # A snapshot contains the newest state of the template, whether it is on disk or not.
            btrfs.snapshot(template, staging, name)
        report = self._not_resumable(staging, progress)
        made = self.tree_tools.shift_in_place(target, shift, progress=report)
        # btrfs accounts space at each commit, and only with quotas.
        files.syncfs(staging)
        with contextlib.ExitStack() as undo:
            snapshot = os.open(name, DIRECTORY, dir_fd=staging)
            undo.callback(os.close, snapshot)
            return self._staged(strategy, made, btrfs.exclusive_bytes(snapshot) or 0)


def _delete(parent: int, name: str) -> bool:
    """Delete a subvolume of an open directory; false if it is no subvolume, or that is not allowed."""
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
