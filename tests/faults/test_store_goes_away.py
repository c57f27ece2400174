# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The filesystem of a store is unmounted while a module works in the store."""

from __future__ import annotations

import subprocess
import time
import typing as t

from support import mounts
from support.images import Image
from support.lab import Lab
from support.modules import finish_module, start_module
from support.stores import Store

MakeStore = t.Callable[..., Store]
MAP = "0:100000:65536"


def start_in_store(
    lab: Lab, make_store: MakeStore, image: Image
) -> t.Tuple[Store, subprocess.Popen[bytes]]:
    """A store on its own disk, and a run of layer_template that has begun to create a layer in it."""
    store = make_store("overlay-ext4", image)
    # podman keeps a mount there, which would also make the filesystem busy.
    mounts.detach_all(str(store.graphroot / "overlay"))
    options = {"image": image.name, "uidmap": [MAP], "gidmap": [MAP], "force": True}
    module = start_module(lab, "layer_template", {**store.module_args(), **options})
    staging = store.graphroot / "userns-storage" / "staging"
    until = time.monotonic() + 60
    while not list(staging.glob("*/layer/diff/*")):
        assert module.poll() is None, module.communicate()
        assert time.monotonic() < until
        time.sleep(0.01)
    return store, module


def test_filesystem_in_use_by_module_cannot_be_unmounted(
    lab: Lab, make_store: MakeStore, many_files_image: t.Callable[[int], Image]
) -> None:
    image = many_files_image(20000)
    store, module = start_in_store(lab, make_store, image)
    done = subprocess.run(
        ["umount", str(store.graphroot.parent)], capture_output=True, text=True, check=False
    )
    assert "busy" in done.stderr
    result = finish_module(module)
    assert result["layers"][0]["action"] == "created"
    assert store.mapped_layers(image.name) == [result["layers"][0]["layer_id"]]


def test_no_success_is_reported_for_detached_store(
    lab: Lab, make_store: MakeStore, many_files_image: t.Callable[[int], Image]
) -> None:
    store, module = start_in_store(lab, make_store, many_files_image(20000))
    subprocess.run(["umount", "--lazy", str(store.graphroot.parent)], check=True)
    result = finish_module(module)
    assert result["failed"] is True
    assert "unmounted" in result["msg"]
    assert "created" not in [item["action"] for item in result["layers"]]
