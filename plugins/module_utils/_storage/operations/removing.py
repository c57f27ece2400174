# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This module util is PRIVATE to the userns.storage collection.
"""Taking one mapped layer out of a store: detached under the locks in milliseconds, deleted outside them."""

from __future__ import annotations

import os
import typing as t

from ..drivers.base import LAYER_ID
from ..errors import LayerInUse
from ..kernel.refusals import explained
from ..store.snapshot import Snapshot
from ..store.staging import TRASH
from .opening import OpenStore

# In a folder of the trash: the layers that go with an image, one a line.
_DOOMED = "doomed"
_LONGEST = 1024 * 1024


def users_of(snapshot: Snapshot, layer_id: str) -> t.List[t.Dict[str, t.Any]]:
    """Who rests on a layer, one entry for each container or other layer.

    Containers of every program are seen: podman's, buildah's and CRI-O's, running or not.
    """
    containers = {one.layer: one for one in snapshot.containers_on(layer_id)}
    users: t.List[t.Dict[str, t.Any]] = [
        {"kind": "container", "id": one.id, "name": one.name} for one in containers.values()
    ]
    users.extend(
        {"kind": "layer", "id": child.id, "name": ""}
        for child in snapshot.children(layer_id)
        if child.id not in containers
    )
    return users


def refuse_if_used(snapshot: Snapshot, layer_id: str) -> None:
    """Raise when a mapped layer cannot go.

    :raises LayerInUse: containers or layers rest on it, or it is some image's own layer
    """
    users = users_of(snapshot, layer_id)
    if users:
        names = ", ".join(f"{one['kind']} {one['name'] or one['id'][:12]}" for one in users)
        raise LayerInUse(
            f"layer {layer_id[:12]}",
            f"is in use by {names}",
            "Remove them first: podman ps --all --external shows those that podman did not make.",
            layer_id=layer_id,
            users=users,
        )
    for image in snapshot.images.values():
        if image.layer == layer_id:
            raise LayerInUse(
                f"layer {layer_id[:12]}",
                f"is the own layer of image {(image.names or [image.id[:12]])[0]}, no mapped one",
                "It goes with the image only.",
                layer_id=layer_id,
            )


def remove_mapped_layer(
    place: OpenStore, layer_id: str, condition: t.Optional[t.Callable[[Snapshot], None]] = None
) -> t.Optional[float]:
    """Take a mapped layer out of the store.

    The order leaves a valid store after a kill at any point: out of the images first, then marked incomplete (which
    every program cleans up by itself), its data renamed into trash, the record last.

    :param condition: called under the locks with the records as they are then; raises to stop
    :returns: for how long the store's locks were held, seconds; None when somebody else has taken the layer away
    :raises LayerInUse: somebody uses it by now
    :raises StorageError: whatever ``condition`` says
    """
    store, driver = place.store, place.driver
    with store.trash(layer_id, place.destroy) as trash, store.transaction(True) as transaction:
        if layer_id not in transaction.snapshot.layers:
            return None
        refuse_if_used(transaction.snapshot, layer_id)
        if condition is not None:
            condition(transaction.snapshot)
        transaction.drop_mapped_layer(layer_id)
        transaction.mark_incomplete(layer_id)
        driver.detach(layer_id, trash)
        transaction.remove_layer(layer_id, trash)
    return transaction.seconds_held


def condemned(place: OpenStore) -> t.Set[str]:
    """Layers and images whose removal a killed run had begun: its folder in the trash still bears their IDs.

    One of them may be whole and in no image, cut off between the two, and is nobody's any more.
    """
    found: t.Set[str] = set()
    for one in place.store.leftovers():
        if one.kind == TRASH:
            found.update((os.path.basename(one.path).partition("-")[0], *_told(one.path)))
    return {one for one in found if LAYER_ID.fullmatch(one)}


def condemn(trash: str, layer_ids: t.Sequence[str]) -> None:
    """Note in a folder of the trash which layers are about to go with an image, for who may have to end that.

    :raises StorageError: that cannot be written
    """
    path = os.path.join(trash, _DOOMED)
    with explained(path), open(path, "x", encoding="ascii") as stream:
        stream.write("\n".join(layer_ids))
        stream.flush()
        os.fsync(stream.fileno())


def is_condemning(trash: str) -> bool:
    """Whether a folder of the trash bears such a note."""
    return os.path.lexists(os.path.join(trash, _DOOMED))


def _told(trash: str) -> t.List[str]:
    path = os.path.join(trash, _DOOMED)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            return os.read(descriptor, _LONGEST).decode("ascii", "replace").split("\n")
        finally:
            os.close(descriptor)
    except OSError:
        return []
