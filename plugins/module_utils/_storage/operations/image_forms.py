# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Compare the ID map of an image's own layers with the map that a task requests.

A new layer inherits the map of its parent (containers/storage, layerStore.create). An image that is pulled onto
existing layers therefore gets the map of these layers, regardless of the map of the pull.
"""

from __future__ import annotations

import hashlib
import typing as t
from dataclasses import dataclass, field

from ..errors import MapError, StoreUnwritten
from ..idmap.mapping import Mapping
from ..store.records import Image, Layer
from ..store.snapshot import Snapshot
from ..userns.declared import returns
from . import inventory_results
from .mapping_options import MappingOptions
from .mapping_resolver import ResolvedMapping, own_layers_mapping
from .store_opening import StoreRequest, configured, opened
from .usage_tracking import known_programs

MAPPED = "mapped"
NOT_NEEDED = "not_needed"
DIFFERENT = "different"

_MOST_NAMED = 5
# The maximum number of images in a result that share a layer.
_MOST_SHARING = 100


@dataclass(frozen=True)
class FormRequest:
    """A query about an image.

    :param options: the user namespace of its containers
    :param image: its ID; empty if unknown
    :param chain: the IDs of its own layers, lowest first; for an image that is not in the store
    :param programs: the versions that programs reported before; see ``detect``
    """

    store: StoreRequest
    options: MappingOptions
    image: str = ""
    chain: t.Tuple[str, ...] = ()
    programs: t.Mapping[str, str] = field(default_factory=dict)


@returns(inventory_results.IMAGE_FORM)
def examine(request: FormRequest) -> t.Dict[str, t.Any]:
    """The map that an image's own layers need, and the map that they carry, or will carry after a pull. Writes nothing.

    :returns: also, as ``programs``, the given versions and those of the programs that were run

    :raises StorageError: the map is not possible, or the store cannot be read
    """
    programs = dict(request.programs)
    try:
        with opened(request.store, read_only=True) as store_ctx:
            programs = {**known_programs(store_ctx), **programs}
            snapshot = store_ctx.store.snapshot()
            image = snapshot.images.get(request.image)
            present = (snapshot, image) if image else None
            resolved = own_layers_mapping(
                store_ctx.config, store_ctx.account, request.options, programs, present
            )
            layers = _own_layers(snapshot, image) if image else _reused(snapshot, request.chain)
            sharing = _images_by_layer(snapshot, request.image, layers)
            return {
                **_requested(resolved),
                "present": image is not None,
                "read_only_store": image.store if image else None,
                "layers": [
                    {"id": layer.id, **_maps(layer.mapping), "images": sharing.get(layer.id, [])}
                    for layer in layers
                ],
                "fits": all(layer.mapping.same_form(resolved.mapping) for layer in layers),
                "holders": {
                    name: item.id
                    for item in reversed(list(snapshot.images.values()))
                    for name in item.names
                },
                "programs": programs,
            }
    except StoreUnwritten:
        resolved = own_layers_mapping(
            configured(request.store), request.store.account, request.options, programs
        )
        return {
            **_requested(resolved),
            "present": False,
            "read_only_store": None,
            "layers": [],
            "fits": True,
            "holders": {},
            "programs": programs,
        }


def _requested(resolved: ResolvedMapping) -> t.Dict[str, t.Any]:
    mapping, answer = resolved.mapping, resolved.shifting
    reason = answer.reason if answer.shifts else "the user namespace changes no ID"
    return {**_maps(mapping), "reason": reason}


def _maps(mapping: Mapping) -> t.Dict[str, t.Any]:
    return {"uidmap": mapping.uid.to_strings(), "gidmap": mapping.gid.to_strings()}


def _own_layers(snapshot: Snapshot, image: Image) -> t.Sequence[Layer]:
    """The image's own layers, top first."""
    return snapshot.chain(image.layer) if image.layer else ()


def _reused(snapshot: Snapshot, chain: t.Sequence[str]) -> t.Sequence[Layer]:
    """The layers of a chain that a pull finds in the store, top first, without incomplete layers, which runtimes
    remove."""
    found: t.List[Layer] = []
    for layer_id in chain:
        layer = snapshot.layers.get(layer_id)
        if layer is None or layer.incomplete:
            break
        found.insert(0, layer)
    return found


def _images_by_layer(
    snapshot: Snapshot, image_id: str, layers: t.Iterable[Layer]
) -> t.Dict[str, t.List[str]]:
    """For each layer, the labels of the first other images that share it."""
    found = snapshot.images_above({layer.id for layer in layers}, _MOST_SHARING + 1)
    return {
        layer_id: [other.label for other in images if other.id != image_id][:_MOST_SHARING]
        for layer_id, images in found.items()
    }


def chain_ids(diff_ids: t.Sequence[str]) -> t.Tuple[str, ...]:
    """The IDs that an image's layers have in a store, lowest first (containers/image, storage_dest.go).

    :param diff_ids: ``rootfs.diff_ids`` of its configuration
    """
    chain: t.List[str] = []
    for diff_id in diff_ids:
        digest = diff_id.rpartition(":")[2]
        text = f"{chain[-1]}+{digest}" if chain else ""
        chain.append(hashlib.sha256(text.encode("ascii")).hexdigest() if text else digest)
    return tuple(chain)


def with_map(form: t.Mapping[str, t.Any], layers: t.Collection[str]) -> t.Dict[str, t.Any]:
    """The form after some layers got the requested map.

    :param layers: IDs
    """
    maps = {key: form[key] for key in _MAP_KEYS}
    found = [
        {**layer, **maps} if layer["id"] in layers else dict(layer) for layer in form["layers"]
    ]
    fits = all(layer[key] == maps[key] for layer in found for key in _MAP_KEYS)
    return {**form, "layers": found, "fits": fits}


def entry(form: t.Mapping[str, t.Any], image_id: str, names: t.Sequence[str]) -> t.Dict[str, t.Any]:
    """The result of a module for an image and the requested map of its layers."""
    status, reason = (
        MAPPED,
        "The layers carry this map, so containers with it start without a copy.",
    )
    if not form["fits"]:
        status, reason = DIFFERENT, str(other_form(form, names[0]))
    elif not (form["uidmap"] or form["gidmap"]):
        status, reason = NOT_NEEDED, f"The layers carry no map, because {form['reason']}."
    return {
        "image_id": image_id,
        "image_names": list(names),
        "uidmap": form["uidmap"],
        "gidmap": form["gidmap"],
        "status": status,
        "reason": reason,
        "layers": form["layers"],
    }


def other_form(form: t.Mapping[str, t.Any], name: str) -> MapError:
    """Why an image does not have, or would not get, the requested map, and what to do."""
    different = [
        layer for layer in form["layers"] if any(layer[key] != form[key] for key in _MAP_KEYS)
    ]
    current = " and ".join(dict.fromkeys(map_words(layer) for layer in different))
    sharing = list(dict.fromkeys(image for layer in different for image in layer["images"]))
    expected = map_words(form)
    others = ", ".join(sharing[:_MOST_NAMED])
    if len(sharing) > _MOST_NAMED:
        others += f" and {len(sharing) - _MOST_NAMED} more"
    if form["present"]:
        cause = f"is in the store with {current} instead of {expected}"
        if sharing:
            cause += f"; it shares {len(different)} layers with image {others}"
    else:
        cause = (
            f"would get {current} instead of {expected}, because its {len(different)} lowest layers are in the store "
            f"with {current} already"
        )
        cause += f" and belong to image {others}" if sharing else " and belong to no image"
    return MapError(f"image {name}", cause, _ways_out(form, sharing, different))


_MAP_KEYS = ("uidmap", "gidmap")


def _ways_out(
    form: t.Mapping[str, t.Any],
    sharing: t.Sequence[str],
    different: t.Sequence[t.Mapping[str, t.Any]],
) -> str:
    if form["read_only_store"]:
        return (
            f"It is in the read-only store {form['read_only_store']}. Change it there, or use "
            "userns.storage.layer_template in that store."
        )
    template = (
        " To keep it as it is, remove the mapping options from this task and create a mapped layer with "
        "userns.storage.layer_template."
    )
    if form["present"] and not sharing:
        return (
            "Set convert: true to change the image in place while no container uses it, or remove it with state: "
            f"absent and run the task again.{template}"
        )
    if form["present"]:
        return (
            "Set convert: true and list all these images in this task to change them in place while no container uses "
            f"them, or remove them with state: absent and run the task again.{template}"
        )
    if sharing:
        return (
            "Set convert: true and list these images in this task as well, or remove them with state: absent, then run "
            f"the task again.{template}"
        )
    return (
        "Remove these layers, top first, and run the task again: containers-storage delete-layer "
        f"{' '.join(layer['id'][:12] for layer in different[:_MOST_NAMED])}"
    )


def map_words(maps: t.Mapping[str, t.Any]) -> str:
    """Format maps for a message."""
    uid, gid = ",".join(maps["uidmap"]), ",".join(maps["gidmap"])
    if not uid and not gid:
        return "no map"
    if uid == gid:
        return f"the map {uid}"
    return f"the UID map {uid or 'none'} and the GID map {gid or 'none'}"
