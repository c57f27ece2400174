# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Test that layer_gc repairs damaged stores of podman, and removes orphans and leftovers."""

from __future__ import annotations

import os
import pathlib
import shutil
import typing as t

import pytest
from support.images import Image
from support.stores import Json, Store
from support.unused_layers import (
    KINDS,
    MAPS,
    Collect,
    assert_store_is_intact,
    create_unused_layers,
    edit_records,
    ids,
    only,
    options,
)

MakeStore = t.Callable[..., Store]
RunModule = t.Callable[..., Json]


def map_unmapped_owners(store: Store, layer_id: str, start: int) -> None:
    """Map the owners that old versions of podman do not map: those of directories with one letter."""
    for path in pathlib.Path(store.layer_folder(layer_id)).rglob("*"):
        status = path.lstat()
        if status.st_uid < start and path.name not in ("diff", "diff1", "work", "merged", "link"):
            os.chown(path, start + status.st_uid, start + status.st_gid, follow_symlinks=False)


class TestRepair:
    @pytest.fixture(params=KINDS)
    def damaged(
        self, request: pytest.FixtureRequest, make_store: MakeStore, small_image: Image
    ) -> t.Tuple[Store, str, str]:
        """A store with two mapped layers of one image, and without containers."""
        store = make_store(request.param, small_image)
        first, second = create_unused_layers(store, small_image, *MAPS[:2])
        for layer_id, text in ((first, MAPS[0]), (second, MAPS[1])):
            map_unmapped_owners(store, layer_id, int(text.split(":")[1]))
        return store, first, second

    def test_mapped_layer_without_record_is_removed_from_image(
        self, damaged: t.Tuple[Store, str, str], collect: Collect, small_image: Image
    ) -> None:
        store, first, second = damaged
        store.storage_cli("delete", first)
        store.assert_image_is_not_listed(small_image.name)
        report = collect(store)
        assert report["changed"] is False
        finding = only(report["findings"])
        assert (finding["kind"], finding["id"]) == ("entry", first)
        assert "broken=repair" in finding["reason"]
        predicted = collect(store, check=True, broken="repair")
        result = collect(store, broken="repair")
        assert ids(predicted["repaired"]) == ids(result["repaired"]) == [first]
        assert result["changed"] is True
        assert store.mapped_layers(small_image.name) == [second]
        assert_store_is_intact(store, first)
        assert collect(store, broken="repair")["changed"] is False

    def test_record_without_data_is_removed(
        self, damaged: t.Tuple[Store, str, str], collect: Collect, small_image: Image
    ) -> None:
        store, first, second = damaged
        shutil.rmtree(store.layer_folder(first))
        assert store.podman("create", *options(MAPS[0]), small_image.name, check=False).rc != 0
        result = collect(store, broken="repair")
        assert [(item["kind"], item["id"]) for item in result["repaired"]] == [("missing", first)]
        assert_store_is_intact(store)
        assert store.mapped_layers(small_image.name) == [second]
        store.create(small_image.name, *options(MAPS[0]))

    def test_copy_with_unmapped_owners_is_removed(
        self, make_store: MakeStore, collect: Collect, small_image: Image
    ) -> None:
        store = make_store("overlay-forced", small_image)
        (first,) = create_unused_layers(store, small_image, MAPS[0])
        assert collect(store)["findings"] == []
        store.empty_layer(first)
        result = collect(store, broken="repair")
        assert [(item["kind"], item["id"]) for item in result["repaired"]] == [("damaged", first)]
        assert_store_is_intact(store)
        assert store.mapped_layers(small_image.name) == []

    def test_incomplete_layer_is_removed(
        self, damaged: t.Tuple[Store, str, str], collect: Collect
    ) -> None:
        store, first, _second = damaged

        def mark_incomplete(records: t.List[Json]) -> None:
            for record in records:
                if record["id"] == first:
                    record["flags"] = {"incomplete": True}

        edit_records(store, "layers", mark_incomplete)
        result = collect(store, broken="repair")
        assert [(item["kind"], item["id"]) for item in result["repaired"]] == [
            ("incomplete", first)
        ]
        assert_store_is_intact(store, first)

    def test_damaged_image_layer_is_kept(
        self, damaged: t.Tuple[Store, str, str], collect: Collect, small_image: Image
    ) -> None:
        store, _first, _second = damaged
        own = store.image(small_image.name)["layer"]
        shutil.rmtree(store.layer_folder(own))
        result = collect(store, broken="repair", orphans="remove")
        assert own in store.layer_ids()
        assert own not in ids(result["repaired"])

    def test_old_directories_and_links_without_record_are_removed(
        self, damaged: t.Tuple[Store, str, str], run_module: RunModule
    ) -> None:
        store, first, second = damaged
        stray = store.layer_folder("e" * 64)
        (stray / "diff").mkdir(parents=True)
        (stray / "diff" / "file").write_bytes(b"x" * 50_000)
        if store.driver == "overlay":
            (store.graphroot / "overlay" / "l" / ("A" * 26)).symlink_to(f"../{'d' * 64}/diff")
        args = {**store.module_args(), "orphans": "remove"}
        young = run_module("layer_gc", args)
        assert young["changed"] is False
        assert {item["rule"] for item in young["findings"]} == {"min_age"}
        result = run_module("layer_gc", {**args, "min_age": "0"})
        kinds = sorted(item["kind"] for item in result["repaired"])
        assert kinds == (["directory", "link"] if store.driver == "overlay" else ["directory"])
        assert not stray.exists()
        assert sorted(item["id"] for item in result["kept"]) == sorted([first, second])
        assert_store_is_intact(store)
        assert run_module("layer_gc", {**args, "min_age": "0"})["changed"] is False

    def test_old_mapped_layer_without_image_is_removed(
        self, damaged: t.Tuple[Store, str, str], collect: Collect
    ) -> None:
        store, first, second = damaged

        def forget(records: t.List[Json]) -> None:
            records[0]["mapped-layers"] = [second]

        edit_records(store, "images", forget)
        young = collect(store, orphans="remove")
        assert young["changed"] is False
        assert only(young["findings"])["rule"] == "min_age"

        def age(records: t.List[Json]) -> None:
            for record in records:
                record["created"] = "2021-01-01T00:00:00Z"

        edit_records(store, "layers", age)
        result = collect(store, orphans="remove")
        assert [(item["kind"], item["id"]) for item in result["repaired"]] == [
            ("unreferenced", first)
        ]
        assert_store_is_intact(store, first)

    def test_leftovers_of_killed_run_are_removed_if_a_rule_is_set(
        self, damaged: t.Tuple[Store, str, str], collect: Collect
    ) -> None:
        store, _first, _second = damaged
        for kind in ("staging", "trash"):
            leftover = store.graphroot / "userns-storage" / kind / "old"
            leftover.mkdir(parents=True)
            (leftover / "file").write_bytes(b"x" * 50_000)
        report = collect(store)
        assert [item["kind"] for item in report["findings"]] == ["staging", "trash"]
        result = collect(store, unused_for="4w")
        assert [item["kind"] for item in result["repaired"]] == ["staging", "trash"]
        assert collect(store, unused_for="4w")["changed"] is False
