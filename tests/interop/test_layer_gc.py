# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""layer_gc against the real podman: what goes, what stays, and what the disk gets back."""

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
    """podman's options for one map."""
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
    """Runs layer_gc on a store, by default with nothing too young to go."""

    def run(store: Store, *, check: bool = False, fails: bool = False, **args: t.Any) -> Json:
        words = {**store.module_args(), "min_age": "0", **args}
        return run_module("layer_gc", words, check=check, fails=fails)

    return run


def unused(store: Store, image: Image, *maps: str) -> t.List[str]:
    """Make podman map an image, and remove the containers; IDs of the mapped layers, in order."""
    before = store.mapped_layers(image.name)
    for text in maps:
        store.podman("rm", store.create(image.name, *options(text)))
    return [
        mapped_layer
        for mapped_layer in store.mapped_layers(image.name)
        if mapped_layer not in before
    ]


def assert_well(store: Store, *gone: str) -> None:
    """podman can list everything, and nothing speaks of the layers that are gone."""
    store.podman("images", "-a")
    store.podman("system", "df", "-v")
    for layer_id in gone:
        assert store.leftovers(layer_id) == []
        assert layer_id not in store.layer_ids()
    trash = store.graphroot / "userns-storage" / "trash"
    assert not trash.exists() or list(trash.iterdir()) == []


def edit(store: Store, kind: str, change: t.Callable[[t.List[Json]], None]) -> None:
    """Change a file of records as a killed or foolish program would have left it."""
    path = pathlib.Path(store.graphroot) / f"{store.driver}-{kind}" / f"{kind}.json"
    before = path.stat()
    records = json.loads(path.read_text())
    change(records)
    path.write_text(json.dumps(records))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def watched(store: Store, seconds: float, idle: t.Dict[str, float]) -> None:
    """Let the ledger have watched for so long, with layers that were idle for so long; all in seconds."""
    path = store.graphroot / "userns-storage" / "ledger.json"
    content = json.loads(path.read_text())
    content["watched"] = seconds
    for layer_id, length in idle.items():
        content["layers"][layer_id]["idle_from"] = seconds - length
    path.write_text(json.dumps(content))


def right_owners(store: Store, layer_id: str, start: int) -> None:
    """Map what an old podman has left to the host's root: directories of one letter."""
    for path in pathlib.Path(store.layer_folder(layer_id)).rglob("*"):
        status = path.lstat()
        if status.st_uid < start and path.name not in ("diff", "diff1", "work", "merged", "link"):
            os.chown(path, start + status.st_uid, start + status.st_gid, follow_symlinks=False)


class TestWhatGoes:
    @pytest.mark.parametrize("kind", KINDS)
    def test_e02_just_the_layer_that_no_container_uses(
        self, kind: str, make_store: MakeStore, collect: Collect, small_image: Image
    ) -> None:
        store = make_store(kind, small_image)
        store.create(small_image.name, "--name", "k", *options(MAPS[0]))
        (kept,) = store.mapped_layers(small_image.name)
        (gone,) = unused(store, small_image, MAPS[1])
        result = collect(store, created_before="0")
        assert result["changed"] is True
        entry = only(result["removed"])
        assert entry["id"] == gone
        assert entry["uidmap"] == [MAPS[1]]
        assert entry["image_names"] == [small_image.name]
        assert entry["rule"] == "created_before"
        assert entry["size"] > 2 * MIB
        stays = only(result["kept"])
        assert (stays["id"], stays["rule"]) == (kept, "in_use")
        assert "container k" in stays["reason"]
        assert store.mapped_layers(small_image.name) == [kept]
        assert_well(store, gone)
        store.podman("rm", "k")
        store.create(small_image.name, "--name", "k", *options(MAPS[0]))
        assert store.mapped_layers(small_image.name) == [kept]

        before = store.snapshot_of_disk()
        again = collect(store, created_before="0")
        assert again["changed"] is False
        assert again["removed"] == []
        assert (again["space_reclaimed"], again["inodes_reclaimed"]) == (0, 0)
        assert before.changes(store.snapshot_of_disk()) == []

    def test_without_a_rule_nothing_is_removed_and_the_yield_of_each_rule_is_returned(
        self, make_store: MakeStore, collect: Collect, small_image: Image
    ) -> None:
        store = make_store("vfs", small_image)
        unused(store, small_image, *MAPS[:3])
        result = collect(store)
        assert result["changed"] is False
        assert len(result["kept"]) == 3
        assert {item["reason"] for item in result["kept"]} == {"no rule is set"}
        yields = {(item["rule"], item["value"]): item for item in result["would_free"]}
        assert yields["max_copies_per_image", 1]["layers"] == 2
        assert yields["max_copies_per_image", 0]["bytes"] > 6 * MIB
        # A rule that would free nothing is not listed.
        assert "created_before" not in [rule for rule, _value in yields]
        assert len(store.mapped_layers(small_image.name)) == 3

    @pytest.mark.parametrize("kind", KINDS)
    def test_check_mode_foresees_and_writes_nothing(
        self, kind: str, make_store: MakeStore, collect: Collect, heavy_image: Image
    ) -> None:
        store = make_store(kind, heavy_image)
        unused(store, heavy_image, *MAPS[:3])
        before = store.snapshot_of_disk()
        foreseen = collect(store, check=True, max_copies_per_image=1)
        assert before.changes(store.snapshot_of_disk()) == []
        done = collect(store, max_copies_per_image=1)
        assert foreseen["changed"] is done["changed"] is True
        assert ids(foreseen["removed"]) == ids(done["removed"])
        assert ids(foreseen["kept"]) == ids(done["kept"])
        assert foreseen["inodes_reclaimed"] >= 2 * 64
        assert foreseen["space_reclaimed"] == pytest.approx(60 * MIB, rel=0.05)

    def test_diff_shows_the_mapped_layers_before_and_after(
        self, make_store: MakeStore, run_module: RunModule, small_image: Image
    ) -> None:
        store = make_store("vfs", small_image)
        first, second = unused(store, small_image, *MAPS[:2])
        result = run_module(
            "layer_gc",
            {**store.module_args(), "min_age": "0", "max_copies_per_image": 1},
            check=True,
            diff=True,
        )
        assert sorted(ids(result["diff"]["before"]["mapped_layers"])) == sorted([first, second])
        assert len(result["diff"]["after"]["mapped_layers"]) == 1

    def test_min_age_covers_what_was_just_made(
        self, make_store: MakeStore, run_module: RunModule, small_image: Image
    ) -> None:
        store = make_store("vfs", small_image)
        unused(store, small_image, MAPS[0])
        result = run_module("layer_gc", {**store.module_args(), "max_copies_per_image": 0})
        assert only(result["kept"])["rule"] == "min_age"

    def test_pins_and_choices(
        self, make_store: MakeStore, collect: Collect, small_image: Image, heavy_image: Image
    ) -> None:
        store = make_store("vfs", small_image, heavy_image)
        (small_one, small_two) = unused(store, small_image, *MAPS[:2])
        (heavy,) = unused(store, heavy_image, MAPS[0])
        rule: Json = {"max_copies_per_image": 0, "check": True}
        assert ids(collect(store, keep_images=["*/small:*"], **rule)["removed"]) == [heavy]
        assert ids(collect(store, keep_images=["small:1"], **rule)["removed"]) == [heavy]
        assert ids(collect(store, images=["heavy:1"], **rule)["removed"]) == [heavy]
        assert ids(collect(store, keep_mappings=["0:100000:*"], **rule)["removed"]) == [small_two]
        result = collect(store, images=["small:1"], keep_mappings=[MAPS[1]], **rule)
        assert ids(result["removed"]) == [small_one]
        assert collect(store, origin="ours", **rule)["removed"] == []

    def test_containers_that_podman_does_not_show_protect_their_layer(
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

    def test_a_lease_holds_until_it_is_over(
        self,
        make_store: MakeStore,
        collect: Collect,
        run_module: RunModule,
        small_image: Image,
    ) -> None:
        store = make_store("vfs", small_image)
        asked = {**store.module_args(), "images": [small_image.name]}
        for text, lease in ((MAPS[0], "30d"), (MAPS[1], "1s")):
            run_module("layer_template", {**asked, "uidmap": [text], "lease": lease})
        leased, expired = store.mapped_layers(small_image.name)
        time.sleep(1.1)
        result = collect(store, max_copies_per_image=0, origin="ours")
        assert ids(result["removed"]) == [expired]
        assert only(result["kept"])["rule"] == "lease"
        assert only(result["kept"])["id"] == leased
        again = run_module("layer_template", {**asked, "uidmap": [MAPS[0]], "lease": "60d"})
        assert again["changed"] is False

    def test_a_layer_in_a_read_only_store_stays(
        self, make_store: MakeStore, collect: Collect, small_image: Image
    ) -> None:
        shared = make_store("vfs", small_image)
        unused(shared, small_image, MAPS[0])
        store = make_store("vfs", read_only=[str(shared.graphroot)])
        store.podman("info")
        before = shared.snapshot_of_disk()
        result = collect(store, max_copies_per_image=0)
        assert result["changed"] is False
        assert only(result["kept"])["rule"] == "read_only"
        assert before.changes(shared.snapshot_of_disk()) == []

    def test_duplicates_are_a_rule_of_their_own(
        self, make_store: MakeStore, collect: Collect, small_image: Image
    ) -> None:
        store = make_store("vfs", small_image)
        (one, other) = unused(store, small_image, *MAPS[:2])

        def same(records: t.List[Json]) -> None:
            maps = {record["id"]: record.get("uidmap") for record in records}
            for record in records:
                if record["id"] == other:
                    record["uidmap"] = record["gidmap"] = maps[one]

        edit(store, "layers", same)
        result = collect(store, duplicates=True)
        assert ids(result["removed"]) == [other]
        assert one in only(result["removed"])["reason"]
        assert_well(store, other)

    def test_the_rule_for_unusable_maps(
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
        foreseen = collect(store, check=True, unusable_maps=True)
        assert "is no longer a subordinate range" in only(foreseen["removed"])["reason"]


class TestUse:
    def test_unused_for_rests_on_the_ledger(
        self, make_store: MakeStore, collect: Collect, small_image: Image
    ) -> None:
        store = make_store("vfs", small_image)
        fresh, stale = unused(store, small_image, *MAPS[:2])
        first = collect(store, unused_for="1w")
        assert first["changed"] is False
        assert "unused_for has no effect before" in first["notes"][0]
        assert {item["rule"] for item in first["kept"]} == {"unused_for"}
        assert {item["unused_seconds"] for item in first["kept"]} == {0}

        watched(store, 30 * DAY, {fresh: 7 * DAY, stale: 9 * DAY})
        second = collect(store, unused_for="1w")
        assert ids(second["removed"]) == [stale]
        assert second["notes"] == []
        stays = only(second["kept"])
        assert stays["id"] == fresh
        # Access times may be a day behind.
        assert stays["unused_seconds"] // DAY == 6

    def test_recreating_a_container_again_and_again_does_not_lose_its_layer(
        self, make_store: MakeStore, collect: Collect, small_image: Image
    ) -> None:
        store = make_store("vfs", small_image)
        (layer,) = unused(store, small_image, MAPS[0])
        collect(store)
        watched(store, 30 * DAY, {layer: 30 * DAY})
        for _round in range(3):
            name = store.create(small_image.name, *options(MAPS[0]))
            assert collect(store, unused_for="1d")["removed"] == []
            store.podman("rm", name)
            # No container holds it right now.
            assert collect(store, unused_for="1d")["removed"] == []
        assert store.mapped_layers(small_image.name) == [layer]


class TestStoresThatOthersRead:
    """A container of another store is on a layer, and no record here knows of it."""

    @pytest.fixture
    def pair(self, make_store: MakeStore, small_image: Image) -> t.Tuple[Store, Store, str]:
        """A store, another one that reads it, and the layer here that a container there is on."""
        shared = make_store("overlay-forced", small_image)
        (layer,) = unused(shared, small_image, MAPS[0])
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

    @pytest.mark.parametrize("way", ["marker", "/etc", "drop-in", "option"])
    def test_their_layers_stay(
        self, way: str, pair: t.Tuple[Store, Store, str], collect: Collect
    ) -> None:
        shared, reader, layer = pair
        words = dict(self.RULES)
        written, kept = pathlib.Path("/nowhere"), None
        if way == "marker":
            (shared.graphroot / "userns-storage").mkdir(exist_ok=True)
            (shared.graphroot / "userns-storage" / "shared").touch()
        elif way == "option":
            words["shared"] = True
        else:
            name = "storage.conf" if way == "/etc" else "storage.rootless.conf.d/shared.conf"
            written = shared.machine.path(f"/etc/containers/{name}")
            written.parent.mkdir(parents=True, exist_ok=True)
            kept = written.read_bytes() if written.exists() else None
            text = f'[storage.options]\nadditionalimagestores = ["/x", "{shared.graphroot}/"]\n'
            written.write_text(f'[storage]\ndriver = "overlay"\n{text}')
        try:
            result = collect(shared, **words)
        finally:
            if written.exists():
                written.unlink()
                if kept is not None:
                    written.write_bytes(kept)
        assert result["removed"] == []
        assert only(result["kept"])["rule"] == "shared"
        reader.podman("mount", "far")
        reader.podman("umount", "far")

        assert ids(collect(shared, layers=[layer])["removed"]) == [layer]

    def test_a_mounted_container_of_theirs_is_seen(
        self, pair: t.Tuple[Store, Store, str], collect: Collect
    ) -> None:
        shared, reader, layer = pair
        reader.podman("mount", "far")
        kept = only(collect(shared, **self.RULES)["kept"])
        assert kept["rule"] == "shared"
        assert "belongs to another store" in kept["reason"]
        reader.podman("umount", "far")
        # Told that nobody reads it, the rules act.
        assert ids(collect(shared, **self.RULES, shared=False)["removed"]) == [layer]


class TestSpace:
    @pytest.mark.parametrize("data", ["as it was made", "rewritten"])
    @pytest.mark.parametrize("kind", ["overlay-ext4", "overlay-xfs", "vfs-xfs", "btrfs"])
    def test_exclusive_bytes_are_what_df_gains(
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
            # So that nothing is shared any more.
            for path in store.layer_folder(store.mapped_layers(heavy_image.name)[0]).rglob("*"):
                if path.is_file() and path.stat().st_size > 100_000:
                    path.write_bytes(path.read_bytes())
        collect(store)
        report = run_module("image_layers_info", {**store.module_args(), "measure": "exclusive"})
        told = report["images"][0]["mapped_layers"][0]
        assert report["totals"]["reclaimable"] == told["size_exclusive"]
        before = free(store)
        result = collect(store, max_copies_per_image=0)
        gained = free(store) - before
        allowed = 0.02 * told["size_apparent"]
        assert only(result["removed"])["size"] == told["size_exclusive"]
        assert abs(gained - told["size_exclusive"]) <= allowed, (gained, told)
        assert abs(gained - result["space_reclaimed"]) <= allowed
        if data == "rewritten" or kind == "overlay-ext4":
            assert gained > 29 * MIB
        else:
            assert gained < 3 * MIB
        assert_well(store)

    def test_podmans_own_copies_are_measured_as_well(
        self, make_store: MakeStore, collect: Collect, heavy_image: Image
    ) -> None:
        store = make_store("overlay-ext4", heavy_image)
        unused(store, heavy_image, *MAPS[:2])
        # The first run makes the ledger.
        collect(store)
        before, inodes = free(store), free_inodes(store)
        result = collect(store, max_copies_per_image=0)
        gained = free(store) - before
        assert sum(item["size"] for item in result["removed"]) == pytest.approx(gained, rel=0.02)
        assert result["space_reclaimed"] == pytest.approx(gained, rel=0.02)
        assert result["inodes_reclaimed"] == free_inodes(store) - inodes
        assert sum(item["inodes"] for item in result["removed"]) == pytest.approx(
            result["inodes_reclaimed"], abs=6
        )

    def test_e12_a_metadata_only_copy_goes_and_its_template_stays(
        self, make_store: MakeStore, collect: Collect, heavy_image: Image
    ) -> None:
        store = make_store("overlay-forced", heavy_image, options={"mountopt": "nodev,metacopy=on"})
        (gone,) = unused(store, heavy_image, MAPS[0])
        result = collect(store, max_copies_per_image=0)
        assert ids(result["removed"]) == [gone]
        assert only(result["removed"])["size"] < 2 * MIB
        assert_well(store, gone)
        store.create(heavy_image.name, *options(MAPS[0]))

    def test_rules_of_space_stop_at_their_target(
        self, make_store: MakeStore, collect: Collect, heavy_image: Image
    ) -> None:
        store = make_store("overlay-ext4", heavy_image)
        unused(store, heavy_image, *MAPS)
        result = collect(store, check=True, max_used_space="70MiB")
        assert len(result["removed"]) == 2
        assert result["target_met"] is True
        total = os.statvfs(store.graphroot)
        wanted = total.f_bavail * total.f_frsize + 40 * MIB
        result = collect(store, min_free_space=str(wanted))
        assert len(result["removed"]) == 2
        assert result["target_met"] is True
        assert collect(store, min_free_space=str(wanted))["changed"] is False

    def test_an_unreachable_target_is_reported(
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


def free(store: Store) -> int:
    """Free bytes of the store's filesystem, once it has freed all that was deleted."""
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

    wait_until(at_rest, describe=lambda: f"the filesystem does not come to rest: {seen}", pause=0.3)
    return seen[-1]


def free_inodes(store: Store) -> int:
    return os.statvfs(store.graphroot).f_ffree


class TestRepair:
    @pytest.fixture(params=KINDS)
    def damaged(
        self, request: pytest.FixtureRequest, make_store: MakeStore, small_image: Image
    ) -> t.Tuple[Store, str, str]:
        """A store with two mapped layers of one image, on which no container is."""
        store = make_store(request.param, small_image)
        first, second = unused(store, small_image, *MAPS[:2])
        for layer_id, text in ((first, MAPS[0]), (second, MAPS[1])):
            right_owners(store, layer_id, int(text.split(":")[1]))
        return store, first, second

    def test_an_entry_without_a_layer_is_dropped_and_podman_works_again(
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
        foreseen = collect(store, check=True, broken="repair")
        done = collect(store, broken="repair")
        assert ids(foreseen["repaired"]) == ids(done["repaired"]) == [first]
        assert done["changed"] is True
        assert store.mapped_layers(small_image.name) == [second]
        assert_well(store, first)
        assert collect(store, broken="repair")["changed"] is False

    def test_a_record_without_data_goes(
        self, damaged: t.Tuple[Store, str, str], collect: Collect, small_image: Image
    ) -> None:
        store, first, second = damaged
        shutil.rmtree(store.layer_folder(first))
        assert store.podman("create", *options(MAPS[0]), small_image.name, check=False).rc != 0
        done = collect(store, broken="repair")
        assert [(item["kind"], item["id"]) for item in done["repaired"]] == [("missing", first)]
        assert_well(store)
        assert store.mapped_layers(small_image.name) == [second]
        store.create(small_image.name, *options(MAPS[0]))

    def test_a_copy_to_which_podman_gave_no_owner_goes(
        self, make_store: MakeStore, collect: Collect, small_image: Image
    ) -> None:
        store = make_store("overlay-forced", small_image)
        (first,) = unused(store, small_image, MAPS[0])
        assert collect(store)["findings"] == []
        store.forget_owners(first)
        done = collect(store, broken="repair")
        assert [(item["kind"], item["id"]) for item in done["repaired"]] == [("damaged", first)]
        assert_well(store)
        assert store.mapped_layers(small_image.name) == []

    def test_an_incomplete_layer_goes(
        self, damaged: t.Tuple[Store, str, str], collect: Collect
    ) -> None:
        store, first, _second = damaged

        def half(records: t.List[Json]) -> None:
            for record in records:
                if record["id"] == first:
                    record["flags"] = {"incomplete": True}

        edit(store, "layers", half)
        done = collect(store, broken="repair")
        assert [(item["kind"], item["id"]) for item in done["repaired"]] == [("incomplete", first)]
        assert_well(store, first)

    def test_an_images_own_layers_are_never_touched(
        self, damaged: t.Tuple[Store, str, str], collect: Collect, small_image: Image
    ) -> None:
        store, _first, _second = damaged
        own = store.image(small_image.name)["layer"]
        shutil.rmtree(store.layer_folder(own))
        done = collect(store, broken="repair", orphans="remove")
        assert own in store.layer_ids()
        assert own not in ids(done["repaired"])

    def test_what_no_record_accounts_for_goes_once_it_is_old_enough(
        self, damaged: t.Tuple[Store, str, str], run_module: RunModule
    ) -> None:
        store, first, second = damaged
        stray = store.layer_folder("e" * 64)
        (stray / "diff").mkdir(parents=True)
        (stray / "diff" / "file").write_bytes(b"x" * 50_000)
        if store.driver == "overlay":
            (store.graphroot / "overlay" / "l" / ("A" * 26)).symlink_to(f"../{'d' * 64}/diff")
        asked = {**store.module_args(), "orphans": "remove"}
        young = run_module("layer_gc", asked)
        assert young["changed"] is False
        assert {item["rule"] for item in young["findings"]} == {"min_age"}
        done = run_module("layer_gc", {**asked, "min_age": "0"})
        kinds = sorted(item["kind"] for item in done["repaired"])
        assert kinds == (["directory", "link"] if store.driver == "overlay" else ["directory"])
        assert not stray.exists()
        assert sorted(item["id"] for item in done["kept"]) == sorted([first, second])
        assert_well(store)
        assert run_module("layer_gc", {**asked, "min_age": "0"})["changed"] is False

    def test_a_mapped_layer_of_no_image_goes_after_a_day(
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
        done = collect(store, orphans="remove")
        assert [(item["kind"], item["id"]) for item in done["repaired"]] == [
            ("unreferenced", first)
        ]
        assert_well(store, first)

    def test_leftovers_of_a_killed_run_go_in_a_run_that_may_remove(
        self, damaged: t.Tuple[Store, str, str], collect: Collect
    ) -> None:
        store, _first, _second = damaged
        for kind in ("staging", "trash"):
            rubbish = store.graphroot / "userns-storage" / kind / "old"
            rubbish.mkdir(parents=True)
            (rubbish / "file").write_bytes(b"x" * 50_000)
        report = collect(store)
        assert [item["kind"] for item in report["findings"]] == ["staging", "trash"]
        done = collect(store, unused_for="4w")
        assert [item["kind"] for item in done["repaired"]] == ["staging", "trash"]
        assert collect(store, unused_for="4w")["changed"] is False


class TestFailure:
    @pytest.mark.parametrize("kind", KINDS)
    def test_one_layer_that_cannot_go_does_not_stop_the_others(
        self, kind: str, make_store: MakeStore, collect: Collect, small_image: Image
    ) -> None:
        store = make_store(kind, small_image)
        stuck, free_one, other = unused(store, small_image, *MAPS[:3])
        folder = str(store.layer_folder(stuck))
        subprocess.run(["chattr", "+i", folder], check=True)
        try:
            result = collect(store, fails=True, max_copies_per_image=0)
        finally:
            subprocess.run(["chattr", "-i", folder], check=True)
        assert only(result["failures"])["id"] == stuck
        assert "1 of 3" in result["msg"]
        assert sorted(ids(result["removed"])) == sorted([free_one, other])
        assert result["changed"] is True
        store.podman("images", "-a")
        collect(store, max_copies_per_image=0, broken="repair")
        assert_well(store, stuck, free_one, other)
        assert store.mapped_layers(small_image.name) == []

    @pytest.mark.parametrize(
        ("args", "words"),
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
    def test_bad_input_is_refused_by_name(
        self,
        args: Json,
        words: str,
        make_store: MakeStore,
        collect: Collect,
        small_image: Image,
    ) -> None:
        store = make_store("vfs", small_image)
        before = store.snapshot_of_disk()
        result = collect(store, fails=True, **args)
        assert words in result["msg"]
        assert "exception" not in result
        assert before.changes(store.snapshot_of_disk()) == []


class TestRootless:
    def test_root_and_the_user_collect_alike(
        self, make_store: MakeStore, collect: Collect, run_module: RunModule, small_image: Image
    ) -> None:
        store = make_store("rootless-overlay", small_image)
        store.create(small_image.name, "--name", "box", "--userns", "keep-id")
        store.podman("rm", store.create(small_image.name, "--userns", "keep-id:uid=200,gid=210"))
        kept, gone = store.mapped_layers(small_image.name)
        foreseen = run_module(
            "layer_gc",
            {"min_age": "0", "max_copies_per_image": 0},
            check=True,
            user=store.user,
            environ=store.env(),
        )
        assert ids(foreseen["removed"]) == [gone]
        done = collect(store, max_copies_per_image=0)
        assert ids(done["removed"]) == [gone]
        assert only(done["kept"])["id"] == kept
        assert_well(store, gone)
        info = os.stat(store.graphroot / "userns-storage")
        assert store.user is not None
        assert info.st_uid == store.user.uid
