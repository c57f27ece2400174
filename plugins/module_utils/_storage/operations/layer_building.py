# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Predict a mapped layer, or build it without holding the locks of the store and commit it under them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
import typing as t
from dataclasses import dataclass

from ..drivers.base import COPY, Staged
from ..errors import (
    ImageUnknown,
    LayerInUse,
    NoSpace,
    StorageError,
    StoreChanged,
    StoreError,
    UnmappedIDs,
    size_text,
)
from ..idmap.mapping import Mapping, Shift
from ..kernel import files
from ..kernel.oserrors import translate_oserror
from ..printable import command
from ..store.records import Image, Layer, recorded_size
from ..store.snapshot import Snapshot
from ..tree.clone import can_reflink, clone
from ..tree.shift import shift_in_place
from ..tree.survey import survey
from ..tree.tree_tools import Suspended, TreeTools
from .contradictions import refuse_contradictions
from .layer_flags import mapped_record, new_layer_id
from .layer_removal import remove_mapped_layer, users_of
from .root_owners import top_owners
from .store_opening import OpenStore
from .work_budget import WorkBudget, in_order

# The functions that make the trees of layers, for drivers.
TREE_TOOLS = TreeTools(
    clone=clone, survey=survey, shift_in_place=shift_in_place, can_reflink=can_reflink
)
_ATTEMPTS = 3
_WORK = "work.json"
# Bytes; a chain may have 500 layers.
_WORK_LIMIT = 1024 * 1024
_MOST_IDS_NAMED = 20
# The usual block size, for the directory or inode of each entry (bytes).
_BYTES_PER_INODE = 4096
# From this number of free inodes down, a walk counts the inodes of the tree first.
_FEW_INODES = 500_000


@dataclass(frozen=True)
class Outcome:
    """The layer with the map; ``staged`` is None if another program created it.

    :param lock_seconds: the time for which the store's locks were held
    """

    layer_id: str
    staged: t.Optional[Staged]
    lock_seconds: float = 0.0


class _Moved(Exception):
    """The image or its template changed while the tree was built."""


class _Work(t.NamedTuple):
    """The description of the work in a staging directory, for the run that resumes it.

    :param how: the maps and all other inputs that determine the tree
    :param chain: the template and its parents, each with its time of creation in this store
    :param files: the number of existing files and directories
    :param size: their size in bytes
    """

    layer_id: str
    how: str
    chain: t.Tuple[str, ...]
    files: int = 0
    size: int = 0

    @classmethod
    def read(cls, folder: str) -> t.Optional[_Work]:
        """Read from a staging folder; None if it is missing or incomplete."""
        try:
            data = files.read_regular(os.path.join(folder, _WORK), _WORK_LIMIT)
            layer_id, how, chain, made, size = json.loads(data.decode("utf-8"))
            return cls(str(layer_id), str(how), tuple(chain), int(made), int(size))
        except (OSError, ValueError, TypeError, OverflowError, RecursionError):
            return None

    def write(self, folder: str) -> None:
        """Write to a staging folder."""
        path = os.path.join(folder, _WORK)
        with translate_oserror(path), open(path, "w", encoding="utf-8") as stream:
            json.dump(self, stream)


class Building:
    """The mapped layer of an image for a map.

    :param mapping: in the literal form that the runtime requests
    :param overflow: map IDs outside the map to the overflow ID
    :param budget: called with the files and bytes created during ``make``; may raise Suspended
    """

    def __init__(
        self,
        store_ctx: OpenStore,
        image: Image,
        mapping: Mapping,
        strategy: str = "auto",
        overflow: bool = False,
        lease: t.Optional[float] = None,
        budget: t.Optional[WorkBudget] = None,
    ) -> None:
        self._store_ctx = store_ctx
        self._image = image
        self._mapping = mapping
        self._strategy = strategy
        self._overflow = overflow
        self._lease = lease
        self._budget = budget or WorkBudget()

    def equal_layer(self, snapshot: Snapshot) -> t.Optional[Layer]:
        """The layer of the image with this map, complete or not."""
        image = snapshot.images.get(self._image.id)
        for layer_id in image.candidates if image else ():
            layer = snapshot.layers.get(layer_id)
            if layer is not None and layer.mapping.same_form(self._mapping):
                return layer
        return None

    def damage(self, snapshot: Snapshot, layer: Layer) -> t.Optional[str]:
        """Why runtimes cannot use the layer; None if they can. See also :meth:`wrong`."""
        if layer.incomplete:
            return "its record is marked as incomplete"
        template = template_of(snapshot, self._image)
        if layer.id == template.id:
            return None
        driver, chain = self._store_ctx.driver, snapshot.chain(template.id)
        found = driver.damage(layer.id, _ids(chain))
        if found is not None or layer.read_only_store:
            return found
        try:
            return top_owners(driver, layer, chain).kept or None
        except StorageError:
            # If it cannot be read here, only the runtime can decide.
            return None

    def wrong(self, snapshot: Snapshot, layer: Layer) -> t.Optional[str]:
        """A known fault of a layer that runtimes do not detect: entries that do not belong to IDs of
        its map. None if there is none.
        """
        template = template_of(snapshot, self._image)
        if layer.id == template.id or layer.read_only_store:
            return None
        try:
            found = top_owners(self._store_ctx.driver, layer, snapshot.chain(template.id))
        except StorageError:
            return None
        return found.outside if found.wrong else None

    def predict(self, snapshot: Snapshot) -> Staged:
        """Predict the result of ``make`` without writing.

        :raises UnmappedIDs: the image contains IDs that the map does not cover
        :raises NoSpace: there is not enough space
        """
        return self._survey(self._chain(snapshot))

    def make(self) -> Outcome:
        """Build the layer and commit it, unless an equal layer was created in the meantime.

        :raises StorageError: it cannot be created; the store is unchanged
        :raises Suspended: raised by ``budget``; the next call resumes the work
        """
        chain = self._chain(self._store_ctx.store.snapshot())
        if not self._store_ctx.store.staging.suspended(self._key):
            self._check(chain)
        for _attempt in range(_ATTEMPTS):
            try:
                return self._attempt()
            except _Moved:
                continue
        raise StoreChanged(
            f"image {self._image.label}",
            f"changed {_ATTEMPTS} times while its layer was being created",
            "Run the task again when no program pulls the image.",
        )

    # One attempt

    def _attempt(self) -> Outcome:
        store_ctx = self._store_ctx
        with store_ctx.store.staging.claim(
            self._key, destroy=store_ctx.destroy, fits=self._fits
        ) as workspace:
            snapshot = store_ctx.store.snapshot()
            if self._image.id not in snapshot.images:
                raise self._gone()
            found = self.equal_layer(snapshot)
            if found is not None:
                used = bool(users_of(snapshot, found.id))
                damage = self.damage(snapshot, found)
                if damage is None and (used or self.wrong(snapshot, found) is None):
                    return Outcome(found.id, None)
                refuse_contradictions(store_ctx)
                try:
                    remove_mapped_layer(store_ctx, found.id)
                except LayerInUse:
                    if damage is None:
                        # A container was just created on it.
                        return Outcome(found.id, None)
                    raise
                snapshot = store_ctx.store.snapshot()
            chain = self._chain(snapshot)
            work = _Work.read(workspace.path) if workspace.resumed else None
            if work is None:
                work = self._work(new_layer_id(snapshot.layers), chain)
                work.write(workspace.path)
            self._budget.resume(work.files, work.size)
            tar_split = self._stage_tar_split(chain[0].id, workspace.path)
            try:
                with in_order():
                    staged = store_ctx.driver.stage(
                        _ids(chain),
                        self._shift(chain[0]),
                        self._strategy,
                        workspace.path,
                        work.layer_id,
                        self._budget,
                    )
            except Suspended:
                made = max(work.files, self._budget.files), max(work.size, self._budget.bytes)
                work._replace(files=made[0], size=made[1]).write(workspace.path)
                workspace.suspended = True
                raise
            return self._commit(chain, work.layer_id, workspace.path, staged, tar_split)

    @property
    def _key(self) -> str:
        return f"{self._image.id} {self._mapping}"

    def _work(self, layer_id: str, chain: t.Sequence[Layer]) -> _Work:
        old, new = chain[0].mapping, self._mapping
        how = f"{old} {new} {self._strategy} {self._overflow}"
        return _Work(layer_id, how, tuple(_layer_identity(item) for item in chain))

    def _fits(self, folder: str) -> bool:
        """Whether the suspended work is a part of the requested layer."""
        found = _Work.read(folder)
        if found is None:
            return False
        snapshot = self._store_ctx.store.snapshot()
        if self._image.id not in snapshot.images or found.layer_id in snapshot.layers:
            return False
        expected = self._work(found.layer_id, self._chain(snapshot))
        return found._replace(files=0, size=0) == expected

    def _stage_tar_split(self, template_id: str, folder: str) -> t.Optional[str]:
        target = os.path.join(folder, "tar-split.gz")
        with (
            translate_oserror(self._store_ctx.config.graphroot),
            contextlib.suppress(FileNotFoundError),
        ):
            shutil.copyfile(self._store_ctx.store.tar_split_path(template_id), target)
            return target
        return None

    def _commit(
        self,
        chain: t.Sequence[Layer],
        layer_id: str,
        folder: str,
        staged: Staged,
        tar_split: t.Optional[str],
    ) -> Outcome:
        store_ctx = self._store_ctx
        record = mapped_record(layer_id, chain[0], self._mapping, time.time_ns(), self._lease)
        with store_ctx.store.transaction() as transaction:
            found = self._changes(transaction.snapshot, chain)
            if found is not None:
                return Outcome(found.id, None)
            try:
                transaction.begin_layer(record)
                store_ctx.driver.commit(folder, layer_id)
                if tar_split is not None:
                    transaction.install_tar_split(layer_id, tar_split)
                transaction.finish_layer(layer_id)
                transaction.append_mapped_layer(self._image.id, layer_id)
            except BaseException:
                # After any error: first remove it from the images, then move its data to the trash, then remove the
                # record.
                if layer_id in transaction.snapshot.layers:
                    transaction.drop_mapped_layer(layer_id)
                    transaction.mark_incomplete(layer_id)
                    store_ctx.driver.detach(layer_id, folder)
                    transaction.remove_layer(layer_id, folder)
                raise
        return Outcome(layer_id, staged, transaction.seconds_held)

    def _changes(self, snapshot: Snapshot, chain: t.Sequence[Layer]) -> t.Optional[Layer]:
        """An equal layer that another program created in the meantime, or None. Called under the locks."""
        template = chain[0]
        image = snapshot.images.get(self._image.id)
        if image is None:
            raise self._gone()
        now = snapshot.layers.get(template.id)
        if (
            now is None
            or template.id not in image.candidates
            or now.parent != template.parent
            or now.mapping != template.mapping
            # After a removal and a new pull it has the same ID, but other short names than those in staging.
            or any(
                _layer_identity(snapshot.layers.get(item.id)) != _layer_identity(item)
                for item in chain
            )
        ):
            raise _Moved
        return self.equal_layer(snapshot)

    # Checks before anything is built

    def _shift(self, template: Layer) -> Shift:
        return Shift(template.mapping, self._mapping, self._overflow)

    def _chain(self, snapshot: Snapshot) -> t.List[Layer]:
        """The template and its parents, after a check that the map covers their recorded IDs."""
        chain = snapshot.chain(template_of(snapshot, self._image).id)
        self._check_recorded_ids(chain)
        return chain

    def _check(self, chain: t.Sequence[Layer]) -> None:
        """Check that the layer can be created before anything is written, with a walk only if the records are not
        enough."""
        silent = any(not layer.uidset or not layer.gidset for layer in chain)
        if (silent and not self._overflow) or self._room_may_be_short(chain):
            self._survey(chain)

    def _check_recorded_ids(self, chain: t.Sequence[Layer]) -> None:
        """Check the ID sets of the records; the tree itself is checked while it is read."""
        if self._overflow:
            return
        uids = self._mapping.uid.missing(item for layer in chain for item in layer.uidset)
        gids = self._mapping.gid.missing(item for layer in chain for item in layer.gidset)
        if uids or gids:
            raise unmapped(self._image.label, uids, gids)

    def _room_may_be_short(self, chain: t.Sequence[Layer]) -> bool:
        """Whether, by the recorded sizes and the free space, a walk to determine the size is necessary."""
        recorded = recorded_size(chain)
        space = os.statvfs(self._store_ctx.config.graphroot)
        if space.f_bavail * space.f_frsize < recorded * 2:
            return True
        return space.f_files > 0 and space.f_favail < _FEW_INODES

    def _survey(self, chain: t.Sequence[Layer]) -> Staged:
        """Read the whole tree to predict the size of the layer and whether it can be created."""
        shift = self._shift(chain[0])
        strategy, found = self._store_ctx.driver.predict(
            _ids(chain), shift, self._strategy, self._budget.look_only
        )
        if not shift.complete:
            raise unmapped(
                self._image.label, sorted(shift.unmapped_uids), sorted(shift.unmapped_gids)
            )
        exclusive = found.apparent if strategy.name == COPY else 0
        self._check_room(exclusive, found.inodes)
        return Staged(strategy.name, strategy.reason, found.files, found.apparent, exclusive)

    def _check_room(self, size: int, inodes: int) -> None:
        graphroot = self._store_ctx.config.graphroot
        space = os.statvfs(graphroot)
        free = space.f_bavail * space.f_frsize
        needed = size + inodes * _BYTES_PER_INODE if size else 0
        if needed > free:
            raise NoSpace(
                graphroot,
                f"has {size_text(free)} free, but the layer of image {self._image.label} may need "
                f"{size_text(needed)}",
                "Free space, for example with userns.storage.layer_gc: "
                f"{command('df', '-h', graphroot)}",
                needed=needed,
                free=free,
            )
        if space.f_files and inodes > space.f_favail:
            raise NoSpace(
                graphroot,
                f"has {space.f_favail} inodes free, but the layer of image {self._image.label} needs {inodes}",
                "Free inodes, for example with userns.storage.layer_gc: "
                f"{command('df', '-i', graphroot)}",
                needed_inodes=inodes,
                free_inodes=space.f_favail,
            )

    def _gone(self) -> ImageUnknown:
        return ImageUnknown(
            f"image {self._image.label}",
            "was removed while its layer was being created",
            "Pull it again.",
        )


def template_of(snapshot: Snapshot, image: Image) -> Layer:
    """The layer to copy: the image's own layer, or else the first existing mapped layer.

    :raises StoreError: none of them exists
    """
    for layer_id in image.candidates:
        layer = snapshot.layers.get(layer_id)
        if layer is not None and not layer.incomplete:
            return layer
    raise StoreError(
        f"image {image.label}",
        f"its layer {image.layer[:12]} is not in the store",
        "Remove the image and pull it again.",
    )


def unmapped(subject: str, uids: t.Sequence[int], gids: t.Sequence[int]) -> UnmappedIDs:
    """The error about IDs of an image that a map does not cover."""
    owners = " and ".join(
        f"{kind}s {', '.join(str(identifier) for identifier in ids[:_MOST_IDS_NAMED])}"
        + (f" and {len(ids) - _MOST_IDS_NAMED} more" if len(ids) > _MOST_IDS_NAMED else "")
        for kind, ids in (("UID", uids), ("GID", gids))
        if ids
    )
    return UnmappedIDs(
        f"image {subject}",
        f"has files of {owners}, which are not covered by the map",
        "Map more IDs, or set unmapped_ids: overflow to change the owner of those files to ID "
        "65534 as the runtimes do.",
        uids=list(uids),
        gids=list(gids),
    )


def _ids(chain: t.Sequence[Layer]) -> t.List[str]:
    return [layer.id for layer in chain]


def _layer_identity(layer: t.Optional[Layer]) -> str:
    """A layer's ID and its time of creation in the store."""
    return f"{layer.id} {layer.raw.get('created')}" if layer else ""
