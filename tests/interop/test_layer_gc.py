# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Test which mapped layers layer_gc removes and keeps in stores of podman."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import time
import typing as t

import pytest
from support.images import Image
from support.stores import Json, Store
from support.unused_layers import (
    KINDS,
    MAPS,
    MIB,
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

DAY = 86400


def set_ledger(store: Store, seconds: float, unused: t.Dict[str, float]) -> None:
    """Set in the ledger for how long the store was inspected, and for how long layers were unused, in seconds."""
    path = store.graphroot / "userns-storage" / "ledger.json"
    content = json.loads(path.read_text())
    content["watched"] = seconds
    for layer_id, duration in unused.items():
        content["layers"][layer_id]["idle_from"] = seconds - duration
    path.write_text(json.dumps(content))


class TestRules:
    @pytest.mark.parametrize("kind", KINDS)
    def test_e02_only_unused_layer_is_removed(
        self, kind: str, make_store: MakeStore, collect: Collect, small_image: Image
    ) -> None:
        store = make_store(kind, small_image)
        store.create(small_image.name, "--name", "k", *options(MAPS[0]))
        (kept,) = store.mapped_layers(small_image.name)
        (unused,) = create_unused_layers(store, small_image, MAPS[1])
        result = collect(store, created_before="0")
        assert result["changed"] is True
        entry = only(result["removed"])
        assert entry["id"] == unused
        assert entry["uidmap"] == [MAPS[1]]
        assert entry["image_names"] == [small_image.name]
        assert entry["rule"] == "created_before"
        assert entry["size"] > 2 * MIB
        kept_entry = only(result["kept"])
        assert (kept_entry["id"], kept_entry["rule"]) == (kept, "in_use")
        assert "container k" in kept_entry["reason"]
        assert store.mapped_layers(small_image.name) == [kept]
        assert_store_is_intact(store, unused)
        store.podman("rm", "k")
        store.create(small_image.name, "--name", "k", *options(MAPS[0]))
        assert store.mapped_layers(small_image.name) == [kept]

        before = store.disk_state()
        repeated = collect(store, created_before="0")
        assert repeated["changed"] is False
        assert repeated["removed"] == []
        assert (repeated["space_reclaimed"], repeated["inodes_reclaimed"]) == (0, 0)
        assert before.changes(store.disk_state()) == []

    def test_without_rule_only_predictions_for_rules_are_returned(
        self, make_store: MakeStore, collect: Collect, small_image: Image
    ) -> None:
        store = make_store("vfs", small_image)
        create_unused_layers(store, small_image, *MAPS[:3])
        result = collect(store)
        assert result["changed"] is False
        assert len(result["kept"]) == 3
        assert {item["reason"] for item in result["kept"]} == {"no rule is set"}
        predictions = {(item["rule"], item["value"]): item for item in result["would_free"]}
        assert predictions["max_copies_per_image", 1]["layers"] == 2
        assert predictions["max_copies_per_image", 0]["bytes"] > 6 * MIB
        # A rule that would free nothing is not listed.
        assert "created_before" not in [rule for rule, _value in predictions]
        assert len(store.mapped_layers(small_image.name)) == 3

    @pytest.mark.parametrize("kind", KINDS)
    def test_check_mode_predicts_removal_and_writes_nothing(
        self, kind: str, make_store: MakeStore, collect: Collect, heavy_image: Image
    ) -> None:
        store = make_store(kind, heavy_image)
        create_unused_layers(store, heavy_image, *MAPS[:3])
        before = store.disk_state()
        predicted = collect(store, check=True, max_copies_per_image=1)
        assert before.changes(store.disk_state()) == []
        result = collect(store, max_copies_per_image=1)
        assert predicted["changed"] is result["changed"] is True
        assert ids(predicted["removed"]) == ids(result["removed"])
        assert ids(predicted["kept"]) == ids(result["kept"])
        assert predicted["inodes_reclaimed"] >= 2 * 64
        assert predicted["space_reclaimed"] == pytest.approx(60 * MIB, rel=0.05)

    def test_diff_contains_mapped_layers_before_and_after(
        self, make_store: MakeStore, run_module: RunModule, small_image: Image
    ) -> None:
        store = make_store("vfs", small_image)
        first, second = create_unused_layers(store, small_image, *MAPS[:2])
        result = run_module(
            "layer_gc",
            {**store.module_args(), "min_age": "0", "max_copies_per_image": 1},
            check=True,
            diff=True,
        )
        assert sorted(ids(result["diff"]["before"]["mapped_layers"])) == sorted([first, second])
        assert len(result["diff"]["after"]["mapped_layers"]) == 1

    def test_min_age_keeps_new_layer(
        self, make_store: MakeStore, run_module: RunModule, small_image: Image
    ) -> None:
        store = make_store("vfs", small_image)
        create_unused_layers(store, small_image, MAPS[0])
        result = run_module("layer_gc", {**store.module_args(), "max_copies_per_image": 0})
        assert only(result["kept"])["rule"] == "min_age"

    def test_keep_options_and_selection(
        self, make_store: MakeStore, collect: Collect, small_image: Image, heavy_image: Image
    ) -> None:
        store = make_store("vfs", small_image, heavy_image)
        (small_one, small_two) = create_unused_layers(store, small_image, *MAPS[:2])
        (heavy,) = create_unused_layers(store, heavy_image, MAPS[0])
        rule: Json = {"max_copies_per_image": 0, "check": True}
        assert ids(collect(store, keep_images=["*/small:*"], **rule)["removed"]) == [heavy]
        assert ids(collect(store, keep_images=["small:1"], **rule)["removed"]) == [heavy]
        assert ids(collect(store, images=["heavy:1"], **rule)["removed"]) == [heavy]
        assert ids(collect(store, keep_mappings=["0:100000:*"], **rule)["removed"]) == [small_two]
        result = collect(store, images=["small:1"], keep_mappings=[MAPS[1]], **rule)
        assert ids(result["removed"]) == [small_one]
        assert collect(store, origin="ours", **rule)["removed"] == []

    def test_layer_of_container_unknown_to_podman_is_kept(
        self, make_store: MakeStore, collect: Collect, small_image: Image
    ) -> None:
        store = make_store("vfs", small_image)
        store.storage_cli(
            "create-container", "--uidmap", MAPS[0], "--gidmap", MAPS[0], "-n", "hidden",
            store.image(small_image.name)["id"],
        )  # fmt: skip
        result = collect(store, max_copies_per_image=0)
        assert result["changed"] is False
        assert "hidden" in only(result["kept"])["reason"]

    def test_layer_is_kept_until_lease_expires(
        self,
        make_store: MakeStore,
        collect: Collect,
        run_module: RunModule,
        small_image: Image,
    ) -> None:
        store = make_store("vfs", small_image)
        args = {**store.module_args(), "images": [small_image.name]}
        for text, lease in ((MAPS[0], "30d"), (MAPS[1], "1s")):
            run_module("layer_template", {**args, "uidmap": [text], "lease": lease})
        leased, expired = store.mapped_layers(small_image.name)
        time.sleep(1.1)
        result = collect(store, max_copies_per_image=0, origin="ours")
        assert ids(result["removed"]) == [expired]
        assert only(result["kept"])["rule"] == "lease"
        assert only(result["kept"])["id"] == leased
        repeated = run_module("layer_template", {**args, "uidmap": [MAPS[0]], "lease": "60d"})
        assert repeated["changed"] is False

    def test_layer_in_read_only_store_is_kept(
        self, make_store: MakeStore, collect: Collect, small_image: Image
    ) -> None:
        shared = make_store("vfs", small_image)
        create_unused_layers(shared, small_image, MAPS[0])
        store = make_store("vfs", read_only=[str(shared.graphroot)])
        store.podman("info")
        before = shared.disk_state()
        result = collect(store, max_copies_per_image=0)
        assert result["changed"] is False
        assert only(result["kept"])["rule"] == "read_only"
        assert before.changes(shared.disk_state()) == []

    def test_rule_duplicates_removes_duplicate(
        self, make_store: MakeStore, collect: Collect, small_image: Image
    ) -> None:
        store = make_store("vfs", small_image)
        (first, second) = create_unused_layers(store, small_image, *MAPS[:2])

        def make_maps_equal(records: t.List[Json]) -> None:
            maps = {record["id"]: record.get("uidmap") for record in records}
            for record in records:
                if record["id"] == second:
                    record["uidmap"] = record["gidmap"] = maps[first]

        edit_records(store, "layers", make_maps_equal)
        result = collect(store, duplicates=True)
        assert ids(result["removed"]) == [second]
        assert first in only(result["removed"])["reason"]
        assert_store_is_intact(store, second)

    def test_rule_unusable_maps_removes_layer(
        self, make_store: MakeStore, collect: Collect, small_image: Image
    ) -> None:
        store = make_store("rootless-overlay", small_image)
        user = store.user
        assert user is not None
        store.podman("rm", store.create(small_image.name, "--userns", "keep-id"))
        assert collect(store, unusable_maps=True)["changed"] is False
        for path in map(store.machine.path, ("/etc/subuid", "/etc/subgid")):
            with open(path, encoding="utf-8") as stream:
                lines = stream.read().splitlines()
            shrunk = [
                f"{user.name}:{user.subuid_start}:2000"
                if line.startswith(f"{user.name}:")
                else line
                for line in lines
            ]
            with open(path, "w", encoding="utf-8") as stream:
                stream.write("\n".join(shrunk) + "\n")
        predicted = collect(store, check=True, unusable_maps=True)
        assert "is no longer a subordinate range" in only(predicted["removed"])["reason"]


class TestUnusedFor:
    def test_unused_for_depends_on_ledger(
        self, make_store: MakeStore, collect: Collect, small_image: Image
    ) -> None:
        store = make_store("vfs", small_image)
        fresh, stale = create_unused_layers(store, small_image, *MAPS[:2])
        first = collect(store, unused_for="1w")
        assert first["changed"] is False
        assert "unused_for has no effect before" in first["notes"][0]
        assert {item["rule"] for item in first["kept"]} == {"unused_for"}
        assert {item["unused_seconds"] for item in first["kept"]} == {0}

        set_ledger(store, 30 * DAY, {fresh: 7 * DAY, stale: 9 * DAY})
        second = collect(store, unused_for="1w")
        assert ids(second["removed"]) == [stale]
        assert second["notes"] == []
        kept = only(second["kept"])
        assert kept["id"] == fresh
        # Access times can lag behind by a day.
        assert kept["unused_seconds"] // DAY == 6

    def test_layer_of_recreated_container_is_kept(
        self, make_store: MakeStore, collect: Collect, small_image: Image
    ) -> None:
        store = make_store("vfs", small_image)
        (layer,) = create_unused_layers(store, small_image, MAPS[0])
        collect(store)
        set_ledger(store, 30 * DAY, {layer: 30 * DAY})
        for _round in range(3):
            name = store.create(small_image.name, *options(MAPS[0]))
            assert collect(store, unused_for="1d")["removed"] == []
            store.podman("rm", name)
            # At this moment no container uses the layer.
            assert collect(store, unused_for="1d")["removed"] == []
        assert store.mapped_layers(small_image.name) == [layer]


class TestSharedStores:
    """A container of another store uses a layer, and this store has no record of the container."""

    @pytest.fixture
    def pair(self, make_store: MakeStore, small_image: Image) -> t.Tuple[Store, Store, str]:
        """A store, a store that reads it, and the layer of the first that a container of the second uses."""
        shared = make_store("overlay-forced", small_image)
        (layer,) = create_unused_layers(shared, small_image, MAPS[0])
        reader = make_store("overlay-forced", read_only=[str(shared.graphroot)])
        reader.create(small_image.name, "--name", "far", *options(MAPS[0]))
        own = reader.container("far")["layer"]
        assert reader.layer(own)["parent"] == layer
        return shared, reader, layer

    RULES: t.ClassVar[Json] = {
        "max_copies_per_image": 0,
        "created_before": "0",
        "max_used_space": "0",
        "orphans": "remove",
    }

    @pytest.mark.parametrize("declaration", ["marker", "/etc", "drop-in", "option"])
    def test_layers_of_shared_store_are_kept(
        self, declaration: str, pair: t.Tuple[Store, Store, str], collect: Collect
    ) -> None:
        shared, reader, layer = pair
        args = dict(self.RULES)
        path, original = pathlib.Path("/nowhere"), None
        if declaration == "marker":
            (shared.graphroot / "userns-storage").mkdir(exist_ok=True)
            (shared.graphroot / "userns-storage" / "shared").touch()
        elif declaration == "option":
            args["shared"] = True
        else:
            name = (
                "storage.conf" if declaration == "/etc" else "storage.rootless.conf.d/shared.conf"
            )
            path = shared.machine.path(f"/etc/containers/{name}")
            path.parent.mkdir(parents=True, exist_ok=True)
            original = path.read_bytes() if path.exists() else None
            text = f'[storage.options]\nadditionalimagestores = ["/x", "{shared.graphroot}/"]\n'
            path.write_text(f'[storage]\ndriver = "overlay"\n{text}')
        try:
            result = collect(shared, **args)
        finally:
            if path.exists():
                path.unlink()
                if original is not None:
                    path.write_bytes(original)
        assert result["removed"] == []
        assert only(result["kept"])["rule"] == "shared"
        reader.podman("mount", "far")
        reader.podman("umount", "far")

        assert ids(collect(shared, layers=[layer])["removed"]) == [layer]

    def test_mounted_container_of_other_store_is_detected(
        self, pair: t.Tuple[Store, Store, str], collect: Collect
    ) -> None:
        shared, reader, layer = pair
        reader.podman("mount", "far")
        kept = only(collect(shared, **self.RULES)["kept"])
        assert kept["rule"] == "shared"
        assert "belongs to another store" in kept["reason"]
        reader.podman("umount", "far")
        # With shared=false the rules apply.
        assert ids(collect(shared, **self.RULES, shared=False)["removed"]) == [layer]


class TestFailure:
    @pytest.mark.parametrize("kind", KINDS)
    def test_failed_removal_does_not_stop_other_removals(
        self, kind: str, make_store: MakeStore, collect: Collect, small_image: Image
    ) -> None:
        store = make_store(kind, small_image)
        stuck, first, second = create_unused_layers(store, small_image, *MAPS[:3])
        folder = str(store.layer_folder(stuck))
        subprocess.run(["chattr", "+i", folder], check=True)
        try:
            result = collect(store, fails=True, max_copies_per_image=0)
        finally:
            subprocess.run(["chattr", "-i", folder], check=True)
        assert only(result["failures"])["id"] == stuck
        assert "1 of 3" in result["msg"]
        assert sorted(ids(result["removed"])) == sorted([first, second])
        assert result["changed"] is True
        store.podman("images", "-a")
        collect(store, max_copies_per_image=0, broken="repair")
        assert_store_is_intact(store, stuck, first, second)
        assert store.mapped_layers(small_image.name) == []

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            ({"unused_for": "soon"}, "unused_for"),
            ({"unused_for": "-2w"}, "cannot be negative"),
            ({"max_freed": "10Kib"}, "max_freed"),
            ({"min_free_space": "120%"}, "between 0 and 100"),
            ({"high_threshold": 80, "low_threshold": 85}, "not below high_threshold"),
            ({"high_threshold": 80}, "required together"),
            ({"max_copies_per_image": -1}, "max_copies_per_image"),
            ({"created_before": "2027-15-01"}, "created_before"),
            ({"min_age": "young"}, "min_age"),
        ],
    )
    def test_invalid_input_is_rejected_with_name_of_option(
        self,
        args: Json,
        message: str,
        make_store: MakeStore,
        collect: Collect,
        small_image: Image,
    ) -> None:
        store = make_store("vfs", small_image)
        before = store.disk_state()
        result = collect(store, fails=True, **args)
        assert message in result["msg"]
        assert "exception" not in result
        assert before.changes(store.disk_state()) == []


class TestRootless:
    def test_root_and_user_remove_the_same_layers(
        self, make_store: MakeStore, collect: Collect, run_module: RunModule, small_image: Image
    ) -> None:
        store = make_store("rootless-overlay", small_image)
        store.create(small_image.name, "--name", "box", "--userns", "keep-id")
        store.podman("rm", store.create(small_image.name, "--userns", "keep-id:uid=200,gid=210"))
        kept, unused = store.mapped_layers(small_image.name)
        predicted = run_module(
            "layer_gc",
            {"min_age": "0", "max_copies_per_image": 0},
            check=True,
            user=store.user,
            environ=store.env(),
        )
        assert ids(predicted["removed"]) == [unused]
        result = collect(store, max_copies_per_image=0)
        assert ids(result["removed"]) == [unused]
        assert only(result["kept"])["id"] == kept
        assert_store_is_intact(store, unused)
        info = os.stat(store.graphroot / "userns-storage")
        assert store.user is not None
        assert info.st_uid == store.user.uid


def test_layer_of_newer_format_is_listed_as_kept(
    make_store: MakeStore, small_image: Image, collect: Collect
) -> None:
    store = make_store("overlay-forced", small_image)
    kept, gone = create_unused_layers(store, small_image, *MAPS[:2])
    unknown = store.graphroot / "overlay" / kept / "future"
    unknown.write_text("written by a later version\n")
    for check in (True, False):
        result = collect(store, check=check, layers=[kept, gone], max_copies_per_image=0)
        assert ids(result["removed"]) == [gone]
        entry = only(result["kept"])
        assert (entry["id"], entry["rule"]) == (kept, "newer_format")
        assert "has future, which" in entry["reason"]
        assert result["findings"] == []
    assert unknown.parent.is_dir()
    unknown.unlink()
    assert ids(collect(store, max_copies_per_image=0)["removed"]) == [kept]
    assert_store_is_intact(store, kept, gone)
