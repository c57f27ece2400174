# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Remove leftovers of interrupted runs: staging, trash and incomplete layers."""

from __future__ import annotations

import contextlib
import os
import typing as t

from ..errors import StorageError, StoreError
from ..kernel import clock
from ..kernel.clock import Moment
from ..store.records import Layer
from ..store.snapshot import Snapshot
from .contradictions import examine
from .layer_flags import ORIGIN, ORIGIN_FLAG, REMOVAL_FLAG
from .layer_removal import (
    BegunRemoval,
    begun_removals,
    mark_of,
    may_be_needed,
    remove_mapped_layer,
)
from .store_opening import OpenStore

# During a pull, complete layers may have no image yet. The runtime's own check waits this long before it reports
# such a layer as unreferenced (seconds).
_LONGEST_PULL = 86400.0


class Abandoned:
    """The layers whose removal a killed run of this collection started.

    A layer is identified by its ID and its creation time, because a pull may create a new layer with the
    same ID. A complete layer without an image may have been reused by a running pull;
    it is kept until no such pull can be running any more.

    :param begun: the removals that were started
    :param now: the current time
    """

    def __init__(self, begun: t.Sequence[BegunRemoval], now: Moment) -> None:
        self.begun = begun
        self._now = now
        self._removals: t.Dict[str, BegunRemoval] = {
            mark: item for item in begun for mark in item.marks
        }

    def layers(self, snapshot: Snapshot) -> t.List[Layer]:
        """The layers that can be removed now, upper layers first."""
        return [
            layer
            for layer in snapshot.layers.values()
            if not layer.read_only_store
            and (layer.incomplete or snapshot.image_of_layer(layer.id) is None)
            and not snapshot.children(layer.id)
            and not snapshot.containers_on(layer.id)
            and self._may_go(snapshot, layer)
        ]

    def waits(self, snapshot: Snapshot, begun: BegunRemoval) -> bool:
        """Whether a removal still has to be completed, because a layer cannot be removed yet."""
        return any(
            mark_of(layer) in begun.marks
            and not layer.incomplete
            and snapshot.image_of_layer(layer.id) is None
            and not self._may_go(snapshot, layer)
            for layer in snapshot.layers.values()
        )

    def _may_go(self, snapshot: Snapshot, layer: Layer) -> bool:
        begun = self._removals.get(mark_of(layer))
        flagged = layer.flags.get(ORIGIN_FLAG) == ORIGIN or layer.flags.get(REMOVAL_FLAG)
        if begun is None and not flagged:
            return False
        if layer.incomplete:
            return True
        # Pulls do not search mapped layers by their random IDs, but may find them by their content.
        if (begun is None or not begun.image_id) and _has_twin(snapshot, layer):
            return True
        if begun is not None and begun.boot not in ("", self._now.boot):
            return True
        created = layer.created.timestamp() if layer.created else 0.0
        return self._now.wall - (begun.since if begun else created) > _LONGEST_PULL


def _has_twin(snapshot: Snapshot, layer: Layer) -> bool:
    """Whether another complete layer has the same content, or this layer cannot be found by its content."""
    digests = [layer.raw.get(key) for key in ("diff-digest", "compressed-diff-digest")]
    if not any(digests):
        return True
    return any(
        other.id != layer.id
        and not other.incomplete
        and [other.raw.get(key) for key in ("diff-digest", "compressed-diff-digest")] == digests
        for other in snapshot.layers.values()
    )


def clean_up(store_ctx: OpenStore, snapshot: Snapshot) -> t.List[str]:
    """Remove all leftovers. Without leftovers nothing is written, and nothing is removed from a
    store whose records contradict each other.

    If a program is newer than the tested versions, only folders of the collection that no removal needs are deleted;
    records, locks and the driver's folder are not changed.

    :returns: IDs of the removed layers and paths of the removed folders
    :raises StorageError: something cannot be removed
    """
    begun = begun_removals(store_ctx)
    abandoned = Abandoned(begun, clock.now()).layers(snapshot)
    if not begun and not abandoned and not store_ctx.store.leftovers():
        return []
    if store_ctx.store.untested() is not None:
        return store_ctx.store.staging.sweep(store_ctx.destroy, may_be_needed)
    if examine(store_ctx):
        return []
    return end_removals(store_ctx, snapshot) + sweep(store_ctx)


def sweep(store_ctx: OpenStore) -> t.List[str]:
    """Delete leftovers of killed runs, except the notes about removals that still have to be completed.

    :returns: the removed paths
    :raises StorageError: something cannot be deleted
    """
    waiting = waiting_removals(store_ctx)
    return store_ctx.store.sweep(store_ctx.destroy, waiting.__contains__)


def waiting_removals(store_ctx: OpenStore) -> t.FrozenSet[str]:
    """The directories in the trash with notes about removals that cannot be completed yet."""
    found = Abandoned(begun_removals(store_ctx), clock.now())
    if not found.begun:
        return frozenset()
    snapshot = store_ctx.store.snapshot()
    return frozenset(item.path for item in found.begun if found.waits(snapshot, item))


def keep_reserve(store_ctx: OpenStore) -> None:
    """Create the reserve for removals on a full disk, if there is enough space; failures are ignored."""
    with contextlib.suppress(StorageError):
        store_ctx.store.keep_reserve()


def end_removals(store_ctx: OpenStore, snapshot: Snapshot) -> t.List[str]:
    """Complete interrupted removals: layers, top layers first, and remaining files of images.

    :returns: their IDs
    :raises StorageError: something cannot be removed
    """
    found = Abandoned(begun_removals(store_ctx), clock.now())
    images = {item.image_id for item in found.begun if item.image_id}
    removed = [image for image in sorted(images) if _end_image(store_ctx, snapshot, image)]

    def condition(layer: Layer) -> t.Callable[[Snapshot], None]:
        def refuse_if_taken(now: Snapshot) -> None:
            if all(mark_of(item) != mark_of(layer) for item in found.layers(now)):
                raise StoreError(
                    f"layer {layer.id[:12]}", "came into use during the task", "Run the task again."
                )

        return refuse_if_taken

    while True:
        layers = [item for item in found.layers(snapshot) if item.id not in removed]
        for layer in layers:
            # Runtimes remove such layers too, whenever they open the store.
            if remove_mapped_layer(store_ctx, layer.id, condition(layer)) is not None:
                removed.append(layer.id)
        if not layers:
            return removed
        snapshot = store_ctx.store.snapshot()


def _end_image(store_ctx: OpenStore, snapshot: Snapshot, image_id: str) -> bool:
    """Whether data of an image without a record was removed."""
    store = store_ctx.store
    if image_id in snapshot.images or not os.path.lexists(store.image_data_dir(image_id)):
        return False
    with store.trash(image_id, store_ctx.destroy) as trash, store.transaction() as transaction:
        transaction.remove_image_data(image_id, trash)
    return True
