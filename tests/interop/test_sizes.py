# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Compare the sizes that modules report with the space that removals free on the filesystem."""

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
    """An image of many small files and an image of a few large files, with a common base layer."""
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
    """The free bytes of the store's filesystem after it has freed all deleted files."""
    seen: t.List[int] = []
    while len(seen) < 5 or len(set(seen[-5:])) > 1:
        if store.kind.endswith("btrfs"):
            command = ["btrfs", "subvolume", "sync", str(store.graphroot)]
            subprocess.run(command, check=True, capture_output=True)
        subprocess.run(["sync", "-f", str(store.graphroot)], check=True)
        status = os.statvfs(store.graphroot)
        seen.append(status.f_bfree * status.f_frsize)
        time.sleep(0.3)
    return seen[-1]


def assert_freed_as_reported(
    kind: str, subject: str, reported: t.Mapping[str, int], freed: int
) -> None:
    """Assert that the freed bytes are within the reported limits; records and ledger may change by some blocks."""
    low, best, high = (reported[f"size_exclusive{end}"] for end in ("_min", "", "_max"))
    print(f"{kind} {subject}: reported {low} <= {best} <= {high}, freed {freed}")
    assert low * 0.98 - 65536 <= freed <= high * 1.02 + 65536, subject
    if kind.endswith("ext4"):
        assert low == best == high, subject
    if not kind.endswith("btrfs"):
        assert best == pytest.approx(freed, rel=0.02, abs=65536), subject


@pytest.mark.parametrize(
    "kind", ["overlay-ext4", "overlay-xfs", "vfs-xfs", "overlay-btrfs", "btrfs"]
)
def test_removal_frees_reported_bytes(
    kind: str, make_store: MakeStore, run_module: RunModule, sized_images: t.List[Image]
) -> None:
    """Mapped layers are removed first, then the images; the common layer is freed with the last image."""
    store = make_store(kind, *sized_images)
    info_args = {**store.module_args(), "measure": "exclusive"}
    all_layers = {**store.module_args(), "min_age": "0", "max_copies_per_image": 0}
    # The first run creates the reserve, before the measurements.
    run_module("layer_gc", store.module_args())
    for image in sized_images:
        store.podman("rm", store.create(image.name, "--uidmap", MAP, "--gidmap", MAP))
        before = free(store)
        (found,) = run_module("image_layers_info", {**info_args, "images": image.name})["images"]
        (reported,) = found["mapped_layers"]
        planned = run_module("layer_gc", all_layers, check=True)
        assert [item["id"] for item in planned["removed"]] == [reported["id"]]
        run_module("layer_gc", all_layers)
        freed = free(store) - before
        assert_freed_as_reported(kind, f"mapped layer of {image.name}", reported, freed)
        planned_sizes = {
            f"size_exclusive{end}": planned[f"space_reclaimed{end}"] for end in ("_min", "", "_max")
        }
        assert_freed_as_reported(kind, f"layer_gc of {image.name}", planned_sizes, freed)
    for image in reversed(sized_images):
        template_args = {"uidmap": [MAP], "gidmap": [MAP], "image": image.name, "force": True}
        run_module("layer_template", {**store.module_args(), **template_args})
        before = free(store)
        removal_args = {**store.module_args(), "images": [image.name], "state": "absent"}
        planned = run_module("image_layers", {**removal_args, "measure": "exclusive"}, check=True)
        reported = planned["images"][0]["removal"]
        assert reported["layers"] == planned["removed_layers"]
        assert len(reported["layers"]) == (2 if image is sized_images[1] else 3)
        done = run_module("image_layers", removal_args)
        assert done["removed_layers"] == reported["layers"]
        assert_freed_as_reported(kind, f"image {image.name}", reported, free(store) - before)
