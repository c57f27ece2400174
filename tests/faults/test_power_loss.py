# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""After a power loss at any call, no record refers to data that may be lost. See docs/durability.md."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import typing as t

import pytest
from support import mounts
from support.images import Image
from support.injection import KILL, Call, ModuleServer
from support.lab import Lab
from support.power_loss_model import PowerLoss
from support.power_loss_mount import mount_after_power_loss
from support.stores import Store
from support.task_stops import MAP, OTHER_IMAGE, tiny_image

PRESENT = {"images": ["localhost/tiny:1"], "uidmap": [MAP]}
ABSENT = {**PRESENT, "state": "absent"}
GC = {"min_age": "0", "max_copies_per_image": 0}
SYNCS = ("fdatasync", "fsync", "syncfs")

MakeStore = t.Callable[..., Store]


class Recorded:
    """A store, and the system calls of consecutive tasks in it."""

    def __init__(self, store: Store, modules: ModuleServer) -> None:
        self.store, self.modules = store, modules
        self.losses: t.Dict[str, PowerLoss] = {}
        for name, module, args in (
            ("present", "layer_template", PRESENT),
            ("absent", "layer_template", ABSENT),
            ("repeated", "layer_template", PRESENT),
            ("gc", "layer_gc", GC),
            ("other", "layer_template", {**PRESENT, "images": [OTHER_IMAGE]}),
            ("image", "image_layers", {"images": [OTHER_IMAGE], "state": "absent"}),
        ):
            self.losses[name] = self._record(module, args)

    def _record(self, module: str, args: t.Mapping[str, t.Any]) -> PowerLoss:
        root = str(self.store.graphroot)
        before = {str(path): path.read_text() for path in self.store.graphroot.glob("*-*/*.json")}
        run = self.modules.run(
            module, {**self.store.module_args(), **args}, below=root, record=True
        )
        assert run.result["changed"], run.output
        return PowerLoss(root, self.store.driver, before, run.calls)


@pytest.fixture
def modules(lab: Lab) -> t.Iterator[ModuleServer]:
    """A server that runs modules and can kill them at a system call."""
    server = ModuleServer(lab)
    yield server
    server.close()


@pytest.mark.parametrize("kind", ["vfs-tmpfs", "overlay-tmpfs"])
def test_records_never_refer_to_data_that_may_be_lost(
    kind: str, lab: Lab, make_store: MakeStore, modules: ModuleServer
) -> None:
    store = make_store(kind, tiny_image(lab), tiny_image(lab, OTHER_IMAGE))
    store.create("localhost/tiny:1", "--uidmap=0:300000:65536", "--gidmap=0:300000:65536")
    recorded = Recorded(store, modules)
    for name, loss in recorded.losses.items():
        assert loss.check() == [], name
        if name in ("repeated", "other"):
            # The first task has the same calls.
            continue
        needed = needed_syncs(loss)
        print(name, len(loss.calls), "calls;", len(needed), "syncs that cannot be left out")
        # The model detects that a sync is missing.
        described = [describe(call, loss.graphroot) for call in needed]
        if name == "present":
            assert described[0] == "syncfs userns-storage"
            assert f"fsync {os.path.relpath(loss.layers, loss.graphroot)}" in described
        assert described.count(f"fdatasync {store.driver}-images") == 1
        removes = name in ("absent", "gc", "image")
        assert described.count(f"fsync {store.driver}-images") == removes


def needed_syncs(loss: PowerLoss) -> t.List[Call]:
    """The syncs without which data could be lost, found by omitting each of them."""
    found = []
    for number, call in enumerate(loss.calls):
        if call.name in SYNCS:
            fewer = [*loss.calls[:number], *loss.calls[number + 1 :]]
            if PowerLoss(loss.graphroot, loss.driver, loss.records, fewer).check():
                found.append(call)
    return found


def describe(call: Call, graphroot: str) -> str:
    """The name of a call and the folder of the store that it concerns."""
    path = os.path.relpath(call.paths[0], graphroot)
    folder = os.path.dirname(path) if call.name == "fdatasync" else path
    return f"{call.name} {'userns-storage' if folder.startswith('userns-storage') else folder}"


@pytest.mark.parametrize("kind", ["overlay-ext4", "btrfs"])
def test_real_filesystem_keeps_recorded_data_after_power_loss(
    kind: str, lab: Lab, make_store: MakeStore, modules: ModuleServer
) -> None:
    """The test mounts a copy of the disk without the data that the kernel has not written yet."""
    image = tiny_image(lab)
    store = make_store(kind, image, mib=64 if kind == "overlay-ext4" else 256)
    # The filesystem writes nothing by itself while its disk is being copied.
    mounts.mount("-o", "remount,commit=600", str(store.base / "disk"))
    below = str(store.graphroot)
    args = store.module_args()
    tried = 0
    for task, opposite in ((PRESENT, ABSENT), (ABSENT, PRESENT)):
        modules.run("layer_template", {**args, **opposite})
        done = modules.run("layer_template", {**args, **task}, below=below, record=True)
        modules.run("layer_template", {**args, **opposite})
        # Kill the module just after each call that changes names or syncs.
        for at in [
            number + 2
            for number, call in enumerate(done.calls[:-1])
            if changes_names_or_syncs(call)
        ]:
            # Begin with a synced disk: Linux 6.18 cannot mount a btrfs whose log contains files that were
            # replaced repeatedly, regardless of the program.
            subprocess.run(["sync", "-f", below], check=True)
            run = modules.run("layer_template", {**args, **task}, below=below, at=at, fault=KILL)
            assert run.at is not None
            with mount_after_power_loss(store) as graphroot:
                assert missing_data(graphroot, store.driver, image) == [], run.at
            modules.run("layer_template", {**args, **opposite})
            tried += 1
    print(f"{kind}: cut off at {tried} points")


def changes_names_or_syncs(call: Call) -> bool:
    """Whether a call syncs a filesystem, or changes or syncs names outside the folder of the collection."""
    path = call.paths[-1] if call.paths else ""
    return call.name.startswith(
        ("rename", "symlink", "unlink", "fsync", "fdatasync", "syncfs")
    ) and (call.name == "syncfs" or "/userns-storage" not in path)


def missing_data(graphroot: pathlib.Path, driver: str, image: Image) -> t.List[str]:
    """Descriptions of data that the records of a store refer to and that is missing or wrong."""
    records = {
        kind: json.loads((graphroot / f"{driver}-{kind}" / f"{kind}.json").read_text())
        for kind in ("layers", "images")
    }
    layers = {item["id"]: item for item in records["layers"]}
    found = []
    for record in records["images"]:
        for layer_id in record.get("mapped-layers") or ():
            layer = layers.get(layer_id)
            if layer is None or (layer.get("flags") or {}).get("incomplete"):
                found.append(f"the image names the layer {layer_id[:12]}: {layer}")
    for layer_id, layer in layers.items():
        if not layer.get("uidmap") or (layer.get("flags") or {}).get("incomplete"):
            continue
        if not (graphroot / f"{driver}-layers" / f"{layer_id}.tar-split.gz").stat().st_size:
            found.append(f"the tar-split file of {layer_id[:12]}")
        folder = graphroot / driver / ("subvolumes" if driver == "btrfs" else "") / layer_id
        tree = folder / "diff" if driver == "overlay" else folder
        for path, entry in image.tree().items():
            if not os.path.lexists(tree / path):
                found.append(f"{path} of {layer_id[:12]}")
            elif entry.kind == "file" and (tree / path).read_bytes() != entry.content:
                found.append(f"the content of {path} of {layer_id[:12]}")
        if driver == "overlay":
            name = (folder / "link").read_text()
            if os.readlink(graphroot / "overlay" / "l" / name) != f"../{layer_id}/diff":
                found.append(f"the short name of {layer_id[:12]}")
    return found
