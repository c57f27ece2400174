# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This module util is PRIVATE to the userns.storage collection.
"""What a run of ours that was killed has left: staging, trash, and layers that never came to be."""

from __future__ import annotations

import functools
import os
import typing as t

from ..errors import StoreError
from ..store.records import Layer
from ..store.snapshot import Snapshot
from .opening import OpenStore
from .records import ORIGIN, ORIGIN_FLAG
from .removing import condemned, remove_mapped_layer


def abandoned(snapshot: Snapshot, begun: t.Container[str] = ()) -> t.List[Layer]:
    """Layers of ours that no image mentions, or that are marked incomplete.

    :param begun: IDs of layers, whoever made them, whose removal has begun

    While one is being put in place the store's locks are held, so what a reader sees like this belongs to nobody.
    """
    return [
        layer
        for layer in snapshot.layers.values()
        if (layer.flags.get(ORIGIN_FLAG) == ORIGIN or layer.id in begun)
        and not layer.read_only_store
        and (layer.incomplete or snapshot.image_of_layer(layer.id) is None)
        and not snapshot.children(layer.id)
    ]


def tidy(place: OpenStore, snapshot: Snapshot) -> t.List[str]:
    """Remove all of that. Nothing is written where there is nothing of the kind.

    :returns: IDs of the layers and paths of the folders that are gone
    :raises StorageError: something cannot be removed
    """
    return end_removals(place, snapshot) + place.store.sweep(place.destroy)


def end_removals(place: OpenStore, snapshot: Snapshot) -> t.List[str]:
    """Remove the layers of that kind, those on top first, and what is left of images.

    :returns: their IDs
    :raises StorageError: something cannot be removed
    """
    begun = condemned(place)
    removed = [one for one in sorted(begun) if _end_image(place, snapshot, one)]
    while True:
        found = [one for one in abandoned(snapshot, begun) if one.id not in removed]
        for layer in found:
            condition = functools.partial(_refuse_if_taken, layer.id, begun)
            # Runtimes remove such layers too, whenever they open the store.
            if remove_mapped_layer(place, layer.id, condition) is not None:
                removed.append(layer.id)
        if not found:
            return removed
        snapshot = place.store.snapshot()


def _end_image(place: OpenStore, snapshot: Snapshot, image_id: str) -> bool:
    """Whether an image without a record had data left, which is gone now."""
    store = place.store
    if image_id in snapshot.images or not os.path.lexists(store.image_data_dir(image_id)):
        return False
    with store.trash(image_id, place.destroy) as trash, store.transaction() as transaction:
        transaction.remove_image_data(image_id, trash)
    return True


def _refuse_if_taken(layer_id: str, begun: t.Container[str], snapshot: Snapshot) -> None:
    if all(layer.id != layer_id for layer in abandoned(snapshot, begun)):
        raise StoreError(
            f"layer {layer_id[:12]}", "was taken into use meanwhile", "Run the task again."
        )
