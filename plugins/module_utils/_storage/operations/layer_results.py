# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Images, layers and containers as the modules return them."""

from __future__ import annotations

import typing as t

from ..idmap.mapping import UNMAPPED
from ..store.records import Container
from ..tree.compare import Comparison
from ..tree.measure import Usage
from .inventory import ImageState, Inventory, LayerState, Orphan
from .time_formats import format_time

_NO_SIZES: t.Dict[str, t.Optional[int]] = dict.fromkeys(
    ("size_apparent", "size_exclusive", "size_exclusive_min", "size_exclusive_max", "inodes")
)


def image_result(found: ImageState) -> t.Dict[str, t.Any]:
    """An image as image_layers_info and image_layers return it."""
    image = found.image
    created = image.created
    return {
        "id": image.id,
        "names": list(image.names),
        "digests": list(image.digests),
        "created": format_time(created.timestamp()) if created else None,
        "read_only_store": image.store,
        "problem": found.problem or None,
        **_own_maps(found),
        "layers": [layer_result(item) for item in found.chain],
        "mapped_layers": [mapped_result(layer) for layer in found.mapped],
        "removal": (
            {"layers": found.removal.layers, **_sizes(found.removal.usage)}
            if found.removal
            else None
        ),
        "private_copies": [
            {**container_result(container), "layer": container.layer, **_sizes(usage)}
            for container, usage in found.private_copies
        ],
    }


def _own_maps(found: ImageState) -> t.Dict[str, t.Any]:
    """The map that the image's own layers carry, and the copy for containers without a map."""
    mapping = found.chain[0].mapping if found.chain else UNMAPPED
    if mapping.identity:
        return {"uidmap": [], "gidmap": [], "identity_copy": None}
    copies = [item.layer_id for item in found.mapped if item.layer and item.mapping.identity]
    return {
        "uidmap": mapping.uid.to_strings(),
        "gidmap": mapping.gid.to_strings(),
        "identity_copy": copies[0] if copies else None,
    }


def layer_result(found: LayerState) -> t.Dict[str, t.Any]:
    """A layer as the modules return it."""
    layer, containers = found.layer, found.containers
    mapping = layer.mapping if layer and layer.mapping is not UNMAPPED else None
    return {
        "id": found.layer_id,
        "uidmap": mapping.uid.to_strings() if mapping else [],
        "gidmap": mapping.gid.to_strings() if mapping else [],
        "created": found.created_text,
        "recorded_size": layer.diff_size if layer else None,
        **_sizes(found.usage),
        "status": found.status,
        "problem": found.problem or None,
        "containers": [container_result(container) for container in containers]
        if containers
        else [],
    }


def mapped_result(found: LayerState) -> t.Dict[str, t.Any]:
    """A mapped layer as the modules return it."""
    return {
        **layer_result(found),
        "duplicate_of": found.duplicate_of,
        "depends_on": list(found.dependencies),
        "origin": "ours" if found.ours else "runtime",
        "last_used": None if found.last_used is None else format_time(found.last_used),
        "lease": None if found.lease is None else format_time(found.lease),
        "verification": _verification(found.comparison),
    }


def _verification(found: t.Optional[Comparison]) -> t.Optional[t.Dict[str, t.Any]]:
    if found is None:
        return None
    return {
        "entries": found.entries,
        "different": found.different,
        "times_only": found.times,
        "differences": [
            {"path": item.path, "problems": list(item.problems)} for item in found.shown
        ],
    }


def container_result(container: Container) -> t.Dict[str, t.Any]:
    """A container as the modules return it."""
    return {
        "id": container.id,
        "name": container.name,
        "known_to_podman": bool(container.podman_name) and not container.from_crio,
    }


def orphan_result(found: Orphan, now: float) -> t.Dict[str, t.Any]:
    """Data without a record, as the modules return it."""
    return {
        "kind": found.kind,
        "id": found.name,
        "path": found.path,
        "age": max(int(now - found.changed), 0),
        **_sizes(found.usage),
    }


def unreferenced_result(found: LayerState, now: float) -> t.Dict[str, t.Any]:
    """A mapped layer of no image, among the orphans."""
    return {
        "kind": "layer",
        "path": None,
        "age": None if found.created is None else max(int(now - found.created), 0),
        **mapped_result(found),
    }


def totals(inventory: Inventory) -> t.Dict[str, t.Any]:
    """Sums over all layers of the images without duplicates; bytes and inodes."""
    every, mapped = inventory.layers(), inventory.mapped_layers()
    own = {image.image.layer for image in inventory.images}
    free = [layer for layer in mapped if not layer.in_use and layer.layer_id not in own]
    return {
        **_sum(every),
        "mapped": {"layers": len(mapped), **_sum(mapped)},
        "reclaimable": sum(candidate.usage.exclusive for candidate in free if candidate.usage),
        "reclaimable_inodes": sum(candidate.usage.inodes for candidate in free if candidate.usage),
    }


def _sum(layers: t.Sequence[LayerState]) -> t.Dict[str, int]:
    measured = [layer.usage for layer in layers if layer.usage]
    return {
        "recorded": sum((layer.layer.diff_size or 0) if layer.layer else 0 for layer in layers),
        "apparent": sum(layer.apparent for layer in measured),
        "exclusive": sum(layer.exclusive for layer in measured),
        "inodes": sum(layer.inodes for layer in measured),
    }


def _sizes(usage: t.Optional[Usage]) -> t.Dict[str, t.Optional[int]]:
    if usage is None:
        return _NO_SIZES
    return {
        "size_apparent": usage.apparent,
        "size_exclusive": usage.exclusive,
        "size_exclusive_min": usage.least,
        "size_exclusive_max": usage.most,
        "inodes": usage.inodes,
    }
