# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Create and remove mapped layers in vfs stores with transactions of the store code."""

from __future__ import annotations

import dataclasses
import os
import secrets
import shutil
import subprocess
import typing as t

from ansible_collections.userns.storage.plugins.module_utils._storage.store.config import (
    StoreConfig,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.store.store import Store

from .stores import Store as RealStore
from .waiting import LIMIT

MAP = [{"container_id": 0, "host_id": 100000, "size": 65536}]
MAP_OPTIONS = ("--uidmap=0:100000:65536", "--gidmap=0:100000:65536")


def open_store(real: RealStore, **changes: t.Any) -> Store:
    """Open a store with the store code, with changed fields of its configuration."""
    config = StoreConfig(str(real.graphroot), str(real.runroot), real.driver)
    return Store.open(dataclasses.replace(config, **changes), lock_timeout=LIMIT)


def copy_tree(source: t.Any, target: t.Any) -> None:
    """Copy a file or directory with its attributes."""
    subprocess.run(["cp", "-a", "--reflink=auto", str(source), str(target)], check=True)


def mapped_record(store: Store, template: str) -> t.Dict[str, t.Any]:
    """The record that a runtime writes for a mapped copy of a layer."""
    raw = dict(store.snapshot().layers[template].raw)
    raw.pop("names", None)
    raw.update(id=secrets.token_hex(32), uidmap=MAP, gidmap=MAP, created="2026-01-02T03:04:05Z")
    return raw


def add_mapped_layer(store: Store, image_name: str) -> str:
    """Create a mapped layer in a vfs store; the data is a plain copy, so its owners are wrong."""
    image = store.snapshot().resolve_image(image_name)
    record = mapped_record(store, image.layer)
    layer_id = record["id"]
    folder = os.path.join(store.config.graphroot, "vfs", "dir")
    with store.staging.claim(f"{image.id} map") as workspace:
        copy_tree(os.path.join(folder, image.layer), f"{workspace.path}/tree")
        split = f"{workspace.path}/split"
        shutil.copyfile(store.tar_split_path(image.layer), split)
        with store.transaction() as transaction:
            transaction.begin_layer(record)
            os.rename(f"{workspace.path}/tree", os.path.join(folder, layer_id))
            transaction.install_tar_split(layer_id, split)
            transaction.finish_layer(layer_id)
            transaction.append_mapped_layer(image.id, layer_id)
    return str(layer_id)


def remove_mapped_layer(store: Store, layer_id: str) -> None:
    """Remove a mapped layer from a vfs store."""
    folder = os.path.join(store.config.graphroot, "vfs", "dir")
    with store.trash(layer_id) as trash, store.transaction(containers=True) as transaction:
        transaction.drop_mapped_layer(layer_id)
        transaction.mark_incomplete(layer_id)
        if os.path.exists(os.path.join(folder, layer_id)):
            os.rename(os.path.join(folder, layer_id), os.path.join(trash, layer_id))
        transaction.remove_layer(layer_id, trash)
