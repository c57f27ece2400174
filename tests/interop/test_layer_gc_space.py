# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Test that the sizes that layer_gc returns are the space that a removal frees, and the rules for space."""

from __future__ import annotations

import os
import subprocess
import typing as t

import pytest
from support.images import Image
from support.stores import Json, Store
from support.unused_layers import (
    MAPS,
    MIB,
    Collect,
    assert_store_is_intact,
    create_unused_layers,
    ids,
    only,
    options,
)
from support.waiting import wait_until

MakeStore = t.Callable[..., Store]
RunModule = t.Callable[..., Json]


def free_bytes(store: Store) -> int:
    """Free bytes of the store's filesystem, after it has freed all deleted files."""
    seen: t.List[int] = []

    def at_rest() -> bool:
        if store.driver == "btrfs":
            subprocess.run(
                ["btrfs", "subvolume", "sync", str(store.graphroot)],
                check=True,
                capture_output=True,
            )
        subprocess.run(["sync", "-f", str(store.graphroot)], check=True)
        found = os.statvfs(store.graphroot)
        seen.append(found.f_bfree * found.f_frsize)
        return len(seen) > 4 and len(set(seen[-5:])) == 1

    wait_until(at_rest, describe=lambda: f"the free space still changes: {seen}", pause=0.3)
    return seen[-1]


def free_inodes(store: Store) -> int:
    return os.statvfs(store.graphroot).f_ffree


class TestSpace:
    @pytest.mark.parametrize("data", ["original", "rewritten"])
    @pytest.mark.parametrize("kind", ["overlay-ext4", "overlay-xfs", "vfs-xfs", "btrfs"])
    def test_exclusive_size_equals_increase_of_free_space(
        self,
        kind: str,
        data: str,
        make_store: MakeStore,
        collect: Collect,
        run_module: RunModule,
        heavy_image: Image,
    ) -> None:
        store = make_store(kind, heavy_image)
        run_module(
            "layer_template",
            {
                **store.module_args(),
                "images": [heavy_image.name],
                "uidmap": [MAPS[0]],
            },
            environ=store.env(),
        )
        if data == "rewritten":
            # The layer then shares no data.
            for path in store.layer_folder(store.mapped_layers(heavy_image.name)[0]).rglob("*"):
                if path.is_file() and path.stat().st_size > 100_000:
                    path.write_bytes(path.read_bytes())
        collect(store)
        report = run_module("image_layers_info", {**store.module_args(), "measure": "exclusive"})
        layer = report["images"][0]["mapped_layers"][0]
        assert report["totals"]["reclaimable"] == layer["size_exclusive"]
        before = free_bytes(store)
        result = collect(store, max_copies_per_image=0)
        increase = free_bytes(store) - before
        tolerance = 0.02 * layer["size_apparent"]
        assert only(result["removed"])["size"] == layer["size_exclusive"]
        assert abs(increase - layer["size_exclusive"]) <= tolerance, (increase, layer)
        assert abs(increase - result["space_reclaimed"]) <= tolerance
        if data == "rewritten" or kind == "overlay-ext4":
            assert increase > 29 * MIB
        else:
            assert increase < 3 * MIB
        assert_store_is_intact(store)

    def test_copies_by_podman_are_measured(
        self, make_store: MakeStore, collect: Collect, heavy_image: Image
    ) -> None:
        store = make_store("overlay-ext4", heavy_image)
        create_unused_layers(store, heavy_image, *MAPS[:2])
        # The first run creates the ledger.
        collect(store)
        before, inodes = free_bytes(store), free_inodes(store)
        result = collect(store, max_copies_per_image=0)
        increase = free_bytes(store) - before
        assert sum(item["size"] for item in result["removed"]) == pytest.approx(increase, rel=0.02)
        assert result["space_reclaimed"] == pytest.approx(increase, rel=0.02)
        assert result["inodes_reclaimed"] == free_inodes(store) - inodes
        assert sum(item["inodes"] for item in result["removed"]) == pytest.approx(
            result["inodes_reclaimed"], abs=6
        )

    def test_e12_metacopy_layer_is_removed_and_template_kept(
        self, make_store: MakeStore, collect: Collect, heavy_image: Image
    ) -> None:
        store = make_store("overlay-forced", heavy_image, options={"mountopt": "nodev,metacopy=on"})
        (unused,) = create_unused_layers(store, heavy_image, MAPS[0])
        result = collect(store, max_copies_per_image=0)
        assert ids(result["removed"]) == [unused]
        assert only(result["removed"])["size"] < 2 * MIB
        assert_store_is_intact(store, unused)
        store.create(heavy_image.name, *options(MAPS[0]))

    def test_space_rules_stop_at_target(
        self, make_store: MakeStore, collect: Collect, heavy_image: Image
    ) -> None:
        store = make_store("overlay-ext4", heavy_image)
        create_unused_layers(store, heavy_image, *MAPS)
        result = collect(store, check=True, max_used_space="70MiB")
        assert len(result["removed"]) == 2
        assert result["target_met"] is True
        total = os.statvfs(store.graphroot)
        target = total.f_bavail * total.f_frsize + 40 * MIB
        result = collect(store, min_free_space=str(target))
        assert len(result["removed"]) == 2
        assert result["target_met"] is True
        assert collect(store, min_free_space=str(target))["changed"] is False

    def test_unreachable_target_is_reported(
        self, make_store: MakeStore, run_module: RunModule, small_image: Image
    ) -> None:
        store = make_store("vfs", small_image)
        store.create(small_image.name, "--name", "k", *options(MAPS[0]))
        result = run_module(
            "layer_gc", {**store.module_args(), "min_age": "0", "max_used_space": "1MiB"}
        )
        assert result["changed"] is False
        assert result["target_met"] is False
        assert "max_used_space" in str(result["warnings"])
