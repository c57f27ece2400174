# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The removal of an image with all its layers."""

from __future__ import annotations

import typing as t

from ..store.records import Container, Image
from ..store.snapshot import Snapshot
from ..store.transaction import Transaction
from .layer_removal import has_note, note_removal, remove_placeholder
from .store_opening import OpenStore

# Raises an error if the image may not be removed; called under the locks.
Check = t.Callable[[Snapshot, Image], None]


def users_of_image(snapshot: Snapshot, image: Image) -> t.List[Container]:
    """The containers on an image, or on layers that only this image has."""
    containers = {item.id: item for item in snapshot.containers_of(image.id)}
    for layer_id in image.candidates:
        if [item.id for item in snapshot.images_of_layer(layer_id)] == [image.id]:
            containers.update((item.id, item) for item in snapshot.containers_on(layer_id))
    return list(containers.values())


def layers_of_removal(snapshot: Snapshot, image: Image) -> t.List[str]:
    """The layers that are removed with an image: mapped layers before its own, without those that others need."""
    going: t.List[str] = []

    def free(layer_id: str) -> bool:
        layer = snapshot.layers.get(layer_id)
        if layer is None or layer.read_only_store or snapshot.containers_on(layer_id):
            return False
        # Called for each layer of the store, therefore without the list of users as in users_of.
        for item in snapshot.images_of_layer(layer_id):
            if item is not image and item.id != image.id:
                return False
        return not [child for child in snapshot.children(layer_id) if child.id not in going]

    for layer_id in image.mapped_layers:
        if layer_id != image.layer and layer_id not in going and free(layer_id):
            going.append(layer_id)
    layer_id = image.layer
    while layer_id and layer_id not in going and free(layer_id):
        going.append(layer_id)
        layer_id = snapshot.layers[layer_id].parent
    return going


def remove_image(store_ctx: OpenStore, image_id: str, check: Check) -> t.Optional[t.List[str]]:
    """Remove an image with its layers, except those that are needed elsewhere.

    :param check: raises an error if the image may not be removed
    :returns: the IDs of the layers, mapped layers first; None if the image was already removed
    :raises StorageError: the error of ``check``, or the records cannot be written
    """
    store = store_ctx.store
    with store.trash(image_id, store_ctx.destroy) as trash:
        try:
            with store.transaction(containers=True) as transaction:
                return _detach(store_ctx, transaction, image_id, trash, check)
        except BaseException:
            if has_note(trash):
                # The next run completes it.
                store.staging.leave(trash)
            raise


def _detach(
    store_ctx: OpenStore, transaction: Transaction, image_id: str, trash: str, check: Check
) -> t.Optional[t.List[str]]:
    """Remove the image's record first, then mapped layers, then its own layers from the top down."""
    image = transaction.snapshot.images.get(image_id)
    if image is None:
        return None
    check(transaction.snapshot, image)
    layers = layers_of_removal(transaction.snapshot, image)
    records = [transaction.snapshot.layer(layer) for layer in layers]
    note_removal(trash, records)
    transaction.remove_image(image_id, trash)
    # All at once, because a pull may reuse any complete layer, with or without an image.
    transaction.mark_incomplete(*layers)
    for layer_id in layers:
        store_ctx.driver.detach(layer_id, trash)
    transaction.remove_layers(layers, trash)
    remove_placeholder(store_ctx, layers)
    return layers
