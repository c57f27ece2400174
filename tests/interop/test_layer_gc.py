# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Test which layers layer_gc removes and keeps in stores of podman, and how much space this frees."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import time
import typing as t

import pytest
from support import images
from support.images import Image
from support.lab import Lab
from support.stores import Store
from support.waiting import wait_until

MakeStore = t.Callable[..., Store]
RunModule = t.Callable[..., t.Dict[str, t.Any]]
Json = t.Dict[str, t.Any]
Collect = t.Callable[..., Json]

MAPS = [f"0:{start}:65536" for start in (100000, 200000, 300000, 400000)]
MIB = 1 << 20
DAY = 86400
KINDS = ["vfs", "overlay-forced"]


def options(text: str) -> t.List[str]:
    """podman's options for a map."""
    return ["--uidmap", text, "--gidmap", text]


def only(items: t.List[Json]) -> Json:
    (item,) = items
    return item


def ids(entries: t.List[Json]) -> t.List[str]:
    return [entry["id"] for entry in entries]


@pytest.fixture(scope="session")
def heavy_image(lab: Lab) -> Image:
    """Two layers, 30 MB in 63 files."""
    data = {"data": images.directory(), "data/large": images.file(os.urandom(20 * MIB))}
    more = {f"data/{number}": images.file(os.urandom(160 * 1024)) for number in range(62)}
    return images.build(lab.folder(), [data, more], "localhost/heavy:1")


@pytest.fixture
def collect(run_module: RunModule) -> Collect:
    """Runs layer_gc on a store, by default without a minimum age."""

    def run(store: Store, *, check: bool = False, fails: bool = False, **args: t.Any) -> Json:
        all_args = {**store.module_args(), "min_age": "0", **args}
        return run_module("layer_gc", all_args, check=check, fails=fails)

    return run


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
        assert store.leftovers(layer_id) == []
        assert layer_id not in store.layer_ids()
    trash = store.graphroot / "userns-storage" / "trash"
    assert not trash.exists() or list(trash.iterdir()) == []


def edit(store: Store, kind: str, change: t.Callable[[t.List[Json]], None]) -> None:
    """Change a file of records, as a killed or faulty program may have done."""
    path = pathlib.Path(store.graphroot) / f"{store.driver}-{kind}" / f"{kind}.json"
    before = path.stat()
    records = json.loads(path.read_text())
    change(records)
    path.write_text(json.dumps(records))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def set_ledger(store: Store, seconds: float, unused: t.Dict[str, float]) -> None:
    """Set in the ledger for how long the store was inspected, and for how long layers were unused, in seconds."""
    path = store.graphroot / "userns-storage" / "ledger.json"
    content = json.loads(path.read_text())
    content["watched"] = seconds
    for layer_id, duration in unused.items():
        content["layers"][layer_id]["idle_from"] = seconds - duration
    path.write_text(json.dumps(content))


def map_unmapped_owners(store: Store, layer_id: str, start: int) -> None:
    """Map the owners that old versions of podman do not map: those of directories with one letter."""
    for path in pathlib.Path(store.layer_folder(layer_id)).rglob("*"):
        status = path.lstat()
        if status.st_uid < start and path.name not in ("diff", "diff1", "work", "merged", "link"):
            os.chown(path, start + status.st_uid, start + status.st_gid, follow_symlinks=False)


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

        before = store.snapshot_of_disk()
        repeated = collect(store, created_before="0")
        assert repeated["changed"] is False
        assert repeated["removed"] == []
        assert (repeated["space_reclaimed"], repeated["inodes_reclaimed"]) == (0, 0)
        assert before.changes(store.snapshot_of_disk()) == []

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
        before = store.snapshot_of_disk()
        predicted = collect(store, check=True, max_copies_per_image=1)
        assert before.changes(store.snapshot_of_disk()) == []
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
        before = shared.snapshot_of_disk()
        result = collect(store, max_copies_per_image=0)
        assert result["changed"] is False
        assert only(result["kept"])["rule"] == "read_only"
        assert before.changes(shared.snapshot_of_disk()) == []

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

        edit(store, "layers", make_maps_equal)
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


class TestSpace:
    @pytest.mark.parametrize("data", ["as it was made", "rewritten"])
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
        store.forget_owners(first)
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

        edit(store, "layers", mark_incomplete)
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

        edit(store, "images", forget)
        young = collect(store, orphans="remove")
        assert young["changed"] is False
        assert only(young["findings"])["rule"] == "min_age"

        def age(records: t.List[Json]) -> None:
            for record in records:
                record["created"] = "2021-01-01T00:00:00Z"

        edit(store, "layers", age)
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
        before = store.snapshot_of_disk()
        result = collect(store, fails=True, **args)
        assert message in result["msg"]
        assert "exception" not in result
        assert before.changes(store.snapshot_of_disk()) == []


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
