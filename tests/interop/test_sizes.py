# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What image_layers_info says that a removal frees, against what the filesystem has free afterwards."""

from __future__ import annotations

import os
import subprocess
import time
import typing as t

import pytest
from support import images
from support.images import Image
from support.lab import Lab
from support.stores import Store

MakeStore = t.Callable[..., Store]
RunModule = t.Callable[..., t.Dict[str, t.Any]]
MAP = "0:100000:65536"
MIB = 1 << 20


@pytest.fixture(scope="session")
def sized_images(lab: Lab) -> t.List[Image]:
    """Many small files, and a few large ones, on a common layer."""
    base = {"base": images.directory()}
    base.update({f"base/{n:03}": images.file(os.urandom(20000)) for n in range(100)})
    small: t.Dict[str, images.Entry] = {f"d{n}": images.directory() for n in range(50)}
    small.update(
        {f"d{n % 50}/{n:05}": images.file(os.urandom(500 + n % 5000)) for n in range(4500)}
    )
    large = {f"large{n}": images.file(os.urandom(8 * MIB)) for n in range(5)}
    return [
        images.build(lab.folder(), [base, layer], f"localhost/sized-{name}:1")
        for name, layer in (("small", small), ("large", large))
    ]


def free(store: Store) -> int:
    """Free bytes of the store's filesystem, once it has freed all that was deleted."""
    seen: t.List[int] = []
    while len(seen) < 5 or len(set(seen[-5:])) > 1:
        if store.kind.endswith("btrfs"):
            words = ["btrfs", "subvolume", "sync", str(store.graphroot)]
            subprocess.run(words, check=True, capture_output=True)
        subprocess.run(["sync", "-f", str(store.graphroot)], check=True)
        found = os.statvfs(store.graphroot)
        seen.append(found.f_bfree * found.f_frsize)
        time.sleep(0.3)
    return seen[-1]


def check(kind: str, what: str, said: t.Mapping[str, int], freed: int) -> None:
    """What was said, against what the filesystem has got; the records and the ledger change by some blocks."""
    low, best, high = (said[f"size_exclusive{end}"] for end in ("_min", "", "_max"))
    print(f"{kind} {what}: said {low} <= {best} <= {high}, freed {freed}")
    assert low * 0.98 - 65536 <= freed <= high * 1.02 + 65536, what
    if kind.endswith("ext4"):
        assert low == best == high, what
    if not kind.endswith("btrfs"):
        assert best == pytest.approx(freed, rel=0.02, abs=65536), what


@pytest.mark.parametrize(
    "kind", ["overlay-ext4", "overlay-xfs", "vfs-xfs", "overlay-btrfs", "btrfs"]
)
def test_a_removal_frees_the_reported_bytes(
    kind: str, make_store: MakeStore, run_module: RunModule, sized_images: t.List[Image]
) -> None:
    """Of a mapped layer of each image; and of whole images, the second while the first needs the common layer."""
    store = make_store(kind, *sized_images)
    words = {**store.module_args(), "measure": "exclusive"}
    all_layers = {**store.module_args(), "min_age": "0", "max_copies_per_image": 0}
    # The reserve is made before anything is measured.
    run_module("layer_gc", store.module_args())
    for image in sized_images:
        store.podman("rm", store.create(image.name, "--uidmap", MAP, "--gidmap", MAP))
        before = free(store)
        (found,) = run_module("image_layers_info", {**words, "images": image.name})["images"]
        (said,) = found["mapped_layers"]
        planned = run_module("layer_gc", all_layers, check=True)
        assert [item["id"] for item in planned["removed"]] == [said["id"]]
        run_module("layer_gc", all_layers)
        freed = free(store) - before
        check(kind, f"mapped layer of {image.name}", said, freed)
        promised = {
            f"size_exclusive{end}": planned[f"space_reclaimed{end}"] for end in ("_min", "", "_max")
        }
        check(kind, f"layer_gc of {image.name}", promised, freed)
    for image in reversed(sized_images):
        made = {"uidmap": [MAP], "gidmap": [MAP], "image": image.name, "force": True}
        run_module("layer_template", {**store.module_args(), **made})
        before = free(store)
        gone = {**store.module_args(), "images": [image.name], "state": "absent"}
        planned = run_module("image_layers", {**gone, "measure": "exclusive"}, check=True)
        said = planned["images"][0]["removal"]
        assert said["layers"] == planned["removed_layers"]
        assert len(said["layers"]) == (2 if image is sized_images[1] else 3)
        done = run_module("image_layers", gone)
        assert done["removed_layers"] == said["layers"]
        check(kind, f"image {image.name}", said, free(store) - before)
