# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Create records of layers, images and containers, and snapshots of them, without files."""

from __future__ import annotations

import typing as t

from ansible_collections.userns.storage.plugins.module_utils._storage.store.records import (
    Container,
    Image,
    Layer,
    new_record,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.store.snapshot import (
    Snapshot,
)

CREATED = "2026-01-01T00:00:00Z"


def padded_id(text: str) -> str:
    """An ID that begins with these hex digits."""
    return text.ljust(64, "0")


def layer_record(layer_id: str, parent: str = "", **more: t.Any) -> Layer:
    """A record of a layer, with additional or replaced fields."""
    raw = {"id": layer_id, "created": CREATED, **({"parent": parent} if parent else {}), **more}
    return new_record(Layer, raw, "layers.json")


def image_record(image_id: str, layer_id: str, **more: t.Any) -> Image:
    """A record of an image, with additional or replaced fields."""
    raw = {"id": image_id, "layer": layer_id, "created": CREATED, **more}
    return new_record(Image, raw, "images.json")


def container_record(container_id: str, image_id: str, layer_id: str, name: str) -> Container:
    """A record of a container."""
    raw = {"id": container_id, "image": image_id, "layer": layer_id, "names": [name]}
    return new_record(Container, {**raw, "created": CREATED}, "containers.json")


def snapshot_of(*records: t.Union[Layer, Image, Container]) -> Snapshot:
    """A snapshot of a store with these records."""
    return Snapshot(
        {record.id: record for record in records if isinstance(record, Layer)},
        {record.id: record for record in records if isinstance(record, Image)},
        {record.id: record for record in records if isinstance(record, Container)},
    )
