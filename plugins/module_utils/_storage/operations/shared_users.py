# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This module util is PRIVATE to the userns.storage collection.
"""A user's own store, examined with the permissions of the user."""

from __future__ import annotations

import typing as t
from dataclasses import dataclass

from ..errors import (
    StoreUnwritten,
)
from ..idmap.mapping import Mapping
from ..idmap.ranges import IDMap
from ..store.config import Account, AutoUserns
from ..store.records import Image
from ..store.snapshot import Snapshot
from ..store.store import Store
from ..userns import running as userns
from ..userns.shapes import Items, Record, flag, text, whole
from .store_opening import StoreRequest, configured

_TEXTS = Items(text)
_LOOK = Record(
    {
        "graphroot": text,
        "driver": text,
        "mount_program": flag,
        "image_stores": _TEXTS,
        "auto_owner": text,
        "auto_minimum": whole,
        "auto_maximum": whole,
        "dependents": Items(Record({"kind": text, "name": text, "image": text, "layer": text})),
        "containers": Items(Record({"image": text, "uidmap": _TEXTS, "gidmap": _TEXTS})),
        "images": _TEXTS,
        "mapped": Items(Record({"layer": text, "image": text})),
    }
)


@userns.returns(_LOOK)
def look(request: StoreRequest) -> t.Dict[str, t.Any]:
    """The objects in a user's own store that use layers of other stores. Writes nothing.

    Must be called inside :func:`..userns.run`.

    :returns: ``graphroot``, ``driver``, ``mount_program``; ``image_stores``: the additional ones;
        ``dependents``: kind, name, image and layer
        of each container and image that needs a layer of another store; ``containers``: image and maps of
        all; ``images``: IDs of the user's own images; ``mapped``: their own layers that carry a map, each with the
        label of an image; ``auto_owner``, ``auto_minimum``, ``auto_maximum``: settings of automatic namespaces
    """
    config = configured(request)
    auto = config.auto_userns
    result: t.Dict[str, t.Any] = {
        "graphroot": config.graphroot,
        "driver": config.driver,
        "mount_program": bool(config.options.get("mount_program")),
        "image_stores": list(config.additional_image_stores),
        "auto_owner": auto.owner,
        "auto_minimum": auto.minimum,
        "auto_maximum": auto.maximum,
        "dependents": [],
        "containers": [],
        "images": [],
        "mapped": [],
    }
    try:
        snapshot = Store.open(config, request.lock_timeout).snapshot()
    except StoreUnwritten:
        return result
    result["dependents"] = list(_dependents(snapshot))
    result["containers"] = [
        {
            "image": container.image,
            "uidmap": container.mapping.uid.to_strings(),
            "gidmap": container.mapping.gid.to_strings(),
        }
        for container in snapshot.containers.values()
    ]
    own_images = [image for image in snapshot.images.values() if not image.store]
    result["images"] = [image.id for image in own_images]
    result["mapped"] = [
        {"layer": layer_id, "image": label}
        for layer_id, label in _mapped(snapshot, own_images).items()
    ]
    return result


def _mapped(snapshot: Snapshot, images: t.Iterable[Image]) -> t.Dict[str, str]:
    """The layers of the images' own chains that carry a map, each once, with an image that has it."""
    found: t.Dict[str, str] = {}
    for image in images:
        for layer_id in snapshot.known_chain(image.layer):
            layer = snapshot.layers.get(layer_id)
            if layer and not layer.read_only_store and not layer.mapping.identity:
                found.setdefault(layer_id, image.label)
    return found


def _dependents(snapshot: Snapshot) -> t.Iterator[t.Dict[str, str]]:
    own = {layer.id for layer in snapshot.layers.values() if not layer.read_only_store}
    for container in snapshot.containers.values():
        layer = snapshot.layers.get(container.layer)
        yield {
            "kind": "container",
            "name": container.name,
            "image": container.image,
            "layer": layer.parent if layer and layer.parent not in own else "",
        }
    for image in snapshot.images.values():
        if image.store:
            continue
        for layer_id in image.candidates:
            while layer_id in own:
                layer_id = snapshot.layers[layer_id].parent
            if layer_id:
                yield {
                    "kind": "image",
                    "name": image.names[0] if image.names else image.id[:12],
                    "image": "",
                    "layer": layer_id,
                }


@dataclass(frozen=True)
class UserStore:
    """The result of :func:`look`, with types."""

    graphroot: str
    driver: str
    mount_program: bool
    image_stores: t.Tuple[str, ...]
    auto: AutoUserns
    dependents: t.Tuple[t.Mapping[str, str], ...]
    maps: t.Tuple[t.Tuple[str, Mapping], ...]
    images: t.FrozenSet[str]
    mapped: t.Mapping[str, str]

    @classmethod
    def of(cls, account: Account, lock_timeout: float) -> UserStore:
        """The store of a user.

        :raises StorageError: it cannot be read
        """
        request = StoreRequest(account=account, lock_timeout=lock_timeout)
        found = userns.run(look, (request,), account)
        return cls(
            found["graphroot"],
            found["driver"],
            found["mount_program"],
            tuple(found["image_stores"]),
            AutoUserns(found["auto_minimum"], found["auto_maximum"], found["auto_owner"]),
            tuple(found["dependents"]),
            tuple(
                (
                    entry["image"],
                    Mapping(IDMap.parse(entry["uidmap"]), IDMap.parse(entry["gidmap"])),
                )
                for entry in found["containers"]
            ),
            frozenset(found["images"]),
            {entry["layer"]: entry["image"] for entry in found["mapped"]},
        )
