# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Create unused mapped layers in stores of podman, and check a store after layer_gc has removed layers."""

from __future__ import annotations

import json
import os
import pathlib
import typing as t

from . import images
from .images import Image
from .lab import Lab
from .stores import Json, Store

Collect = t.Callable[..., Json]

MAPS = [f"0:{start}:65536" for start in (100000, 200000, 300000, 400000)]
MIB = 1 << 20
KINDS = ["vfs", "overlay-forced"]


def options(text: str) -> t.List[str]:
    """podman's options for a map."""
    return ["--uidmap", text, "--gidmap", text]


def only(items: t.Sequence[Json]) -> Json:
    """The only item."""
    (item,) = items
    return item


def ids(entries: t.List[Json]) -> t.List[str]:
    return [entry["id"] for entry in entries]


def build_heavy_image(lab: Lab) -> Image:
    """localhost/heavy:1: two layers, 30 MB in 63 files."""
    data = {"data": images.directory(), "data/large": images.file(os.urandom(20 * MIB))}
    more = {f"data/{number}": images.file(os.urandom(160 * 1024)) for number in range(62)}
    return images.build(lab.folder(), [data, more], "localhost/heavy:1")


def create_unused_layers(store: Store, image: Image, *maps: str) -> t.List[str]:
    """Let podman create mapped layers, and remove the containers; returns the IDs of the layers in order."""
    before = store.mapped_layers(image.name)
    for text in maps:
        store.podman("rm", store.create(image.name, *options(text)))
    return [
        mapped_layer
        for mapped_layer in store.mapped_layers(image.name)
        if mapped_layer not in before
    ]


def assert_store_is_intact(store: Store, *removed: str) -> None:
    """podman can list all objects, and the store contains nothing of the removed layers."""
    store.podman("images", "-a")
    store.podman("system", "df", "-v")
    for layer_id in removed:
        assert store.remaining_paths(layer_id) == []
        assert layer_id not in store.layer_ids()
    trash = store.graphroot / "userns-storage" / "trash"
    assert not trash.exists() or list(trash.iterdir()) == []


def edit_records(store: Store, kind: str, change: t.Callable[[t.List[Json]], None]) -> None:
    """Change a file of records, as a killed or faulty program may have done."""
    path = pathlib.Path(store.graphroot) / f"{store.driver}-{kind}" / f"{kind}.json"
    before = path.stat()
    records = json.loads(path.read_text())
    change(records)
    path.write_text(json.dumps(records))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
