# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The filesystem of a store that is unmounted while a module works in it."""

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


def at_work(
    lab: Lab, make_store: MakeStore, image: Image
) -> t.Tuple[Store, subprocess.Popen[bytes]]:
    """A store on a disk of its own, and layer_template that has begun to make a layer in it."""
    store = make_store("overlay-ext4", image)
    # What podman keeps mounted there is none of ours.
    mounts.detach_all(str(store.graphroot / "overlay"))
    words = {"image": image.name, "uidmap": [MAP], "gidmap": [MAP], "force": True}
    module = start_module(lab, "layer_template", {**store.module_args(), **words})
    staging = store.graphroot / "userns-storage" / "staging"
    until = time.monotonic() + 60
    while not list(staging.glob("*/layer/diff/*")):
        assert module.poll() is None, module.communicate()
        assert time.monotonic() < until
        time.sleep(0.01)
    return store, module


def test_unmounting_is_refused_meanwhile(
    lab: Lab, make_store: MakeStore, many_files_image: t.Callable[[int], Image]
) -> None:
    image = many_files_image(20000)
    store, module = at_work(lab, make_store, image)
    done = subprocess.run(
        ["umount", str(store.graphroot.parent)], capture_output=True, text=True, check=False
    )
    assert "busy" in done.stderr
    result = finish_module(module)
    assert result["layers"][0]["action"] == "created"
    assert store.mapped_layers(image.name) == [result["layers"][0]["layer_id"]]


def test_a_detached_store_is_not_reported_to_contain_the_layer(
    lab: Lab, make_store: MakeStore, many_files_image: t.Callable[[int], Image]
) -> None:
    store, module = at_work(lab, make_store, many_files_image(20000))
    subprocess.run(["umount", "--lazy", str(store.graphroot.parent)], check=True)
    result = finish_module(module)
    assert result["failed"] is True
    assert "unmounted" in result["msg"]
    assert "created" not in [item["action"] for item in result["layers"]]
