# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""image_layers_info against the real podman: what the disk holds, and stores that are broken."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import typing as t

import pytest
from support import images, mounts
from support.images import Image
from support.lab import Lab
from support.stores import Store

MakeStore = t.Callable[..., Store]
RunModule = t.Callable[..., t.Dict[str, t.Any]]
Json = t.Dict[str, t.Any]

MAPS = [f"0:{start}:65536" for start in (100000, 200000, 300000, 400000)]
MIB = 1 << 20


def options(text: str) -> t.List[str]:
    """podman's options for one map."""
    return ["--uidmap", text, "--gidmap", text]


@pytest.fixture(scope="session")
def big_image(lab: Lab) -> Image:
    """E01's image: 20 MB, 5 MB and 3 bytes in three layers."""
    body = os.urandom(20 * MIB)
    return images.build(
        lab.folder(),
        [
            {
                **{name: images.directory() for name in ("etc", "data", "data/sub")},
                "data/large": images.file(body),
            },
            {"data/medium": images.file(body[: 5 * MIB], 0o644, 1000, 1000)},
            {"etc/small": images.file("abc")},
        ],
        "localhost/big:1",
    )


@pytest.fixture(scope="session")
def flat_image(lab: Lab) -> Image:
    """One layer with one file of 20 MB."""
    return images.build(
        lab.folder(),
        [{"data": images.directory(), "data/large": images.file(os.urandom(20 * MIB))}],
        "localhost/flat:1",
    )


@pytest.fixture
def look(run_module: RunModule) -> t.Callable[..., Json]:
    """Runs image_layers_info on a store."""

    def run(store: Store, **args: t.Any) -> Json:
        result = run_module("image_layers_info", {**store.module_args(), **args})
        assert result["changed"] is False
        return result

    return run


Look = t.Callable[..., Json]


def only(items: t.List[Json]) -> Json:
    (item,) = items
    return item


class TestRealCost:
    @pytest.mark.parametrize("kind", ["vfs", "overlay-forced"])
    def test_e01_podman_tells_a_fifth_of_what_the_disk_holds(
        self, kind: str, make_store: MakeStore, look: Look, big_image: Image
    ) -> None:
        store = make_store(kind, big_image)
        for number, text in enumerate(MAPS):
            store.create(big_image.name, "--name", f"c{number}", *options(text))
            store.podman("rm", f"c{number}")
        result = look(store)
        image = only(result["images"])
        assert len(image["layers"]) == 3
        assert [one["uidmap"] for one in image["mapped_layers"]] == [[text] for text in MAPS]
        for one in image["mapped_layers"]:
            # podman 4.3 leaves the root directory of vfs as it is (E05).
            assert one["problem"] in (None, "outside its map: / belongs to 0:0")
            assert one["recorded_size"] < 20_000
            assert one["size_apparent"] == pytest.approx(25 * MIB, rel=0.01)
            assert one["containers"] == []
        assert result["totals"]["mapped"]["apparent"] == pytest.approx(100 * MIB, rel=0.01)
        told = json.loads(store.podman("images", "--format", "json").stdout)
        assert only(told)["Size"] < 27 * MIB
        assert result["totals"]["recorded"] == pytest.approx(only(told)["Size"], rel=0.02)

    def test_containers_of_all_programs_are_told(
        self, make_store: MakeStore, look: Look, small_image: Image
    ) -> None:
        store = make_store("vfs", small_image)
        store.create(small_image.name, "--name", "web", *options(MAPS[0]))
        made = store.storage_cli(
            "create-container", "--uidmap", MAPS[0], "--gidmap", MAPS[0], "-n", "hidden",
            store.image(small_image.name)["id"],
        )  # fmt: skip
        assert made.rc == 0
        one = only(only(look(store, measure="none")["images"])["mapped_layers"])
        assert sorted((c["name"], c["known_to_podman"]) for c in one["containers"]) == [
            ("hidden", False),
            ("web", True),
        ]
        assert one["size_apparent"] is None
        assert one["inodes"] is None

    def test_e05_a_root_that_is_not_mapped_is_told(
        self, make_store: MakeStore, look: Look, big_image: Image
    ) -> None:
        store = make_store("vfs", big_image)
        store.create(big_image.name, *options(MAPS[0]))
        one = only(only(look(store)["images"])["mapped_layers"])
        mapped_root = store.layer_folder(one["id"]).stat()
        if mapped_root.st_uid == 100000:
            os.chown(store.layer_folder(one["id"]), 0, 0)
            one = only(only(look(store)["images"])["mapped_layers"])
        assert one["status"] == "foreign_root"
        assert "/ belongs to 0:0" in one["problem"]
        os.chown(store.layer_folder(one["id"]), 100000, 100000)
        assert only(only(look(store)["images"])["mapped_layers"])["status"] == "ok"

    @pytest.mark.parametrize("kind", ["vfs", "overlay-forced"])
    def test_names_that_podman_forgot_are_told(
        self, kind: str, make_store: MakeStore, look: Look, lab: Lab
    ) -> None:
        image = images.build(
            lab.folder(),
            [{name: images.file("x") for name in ("a", "b", "c", "long")}],
            "localhost/letters:1",
        )
        store = make_store(kind, image)
        store.create(image.name, *options(MAPS[0]))
        one = only(only(look(store)["images"])["mapped_layers"])
        if store.machine.version("podman") < (5, 5):
            assert one["status"] == "foreign_root"
            assert "/a belongs to 0:0" in one["problem"]
            assert "/long" not in one["problem"]

    def test_a_copy_to_which_podman_gave_no_owner_is_damaged(
        self, make_store: MakeStore, look: Look, small_image: Image
    ) -> None:
        store = make_store("overlay-forced", small_image)
        store.create(small_image.name, *options(MAPS[0]))
        (copy,) = store.mapped_layers(small_image.name)
        assert only(only(look(store)["images"])["mapped_layers"])["status"] != "damaged"
        store.forget_owners(copy)
        one = only(only(look(store)["images"])["mapped_layers"])
        assert one["status"] == "damaged"
        assert "its owners are still those of the image: /etc belongs to 0:0" in one["problem"]

    def test_e07_a_map_written_in_another_way_is_a_duplicate(
        self, make_store: MakeStore, look: Look, small_image: Image
    ) -> None:
        store = make_store("vfs", small_image)
        halves = ["0:100000:1000", "1000:101000:64536"]
        for parts in (["0:100000:65536"], halves, halves[::-1]):
            words = [word for part in parts for word in ("--uidmap", part, "--gidmap", part)]
            store.podman("rm", store.create(small_image.name, *words))
        mapped = only(look(store)["images"])["mapped_layers"]
        if store.machine.version("podman") < (4, 7):
            assert len(mapped) == 3
            assert [one["duplicate_of"] for one in mapped] == [
                None,
                mapped[0]["id"],
                mapped[0]["id"],
            ]
        else:
            assert only(mapped)["duplicate_of"] is None

    @pytest.mark.parametrize("kind", ["vfs", "overlay-forced"])
    def test_e10_a_read_only_store_costs_each_container_the_image(
        self, kind: str, make_store: MakeStore, look: Look, flat_image: Image
    ) -> None:
        shared = make_store(kind, flat_image)
        store = make_store(kind, read_only=[str(shared.graphroot)])
        containers = [store.create(flat_image.name, *options(MAPS[0])) for _round in range(3)]
        image = only(look(store)["images"])
        assert image["read_only_store"] == str(shared.graphroot)
        assert image["mapped_layers"] == []
        assert sorted(one["id"] for one in image["private_copies"]) == sorted(containers)
        for one in image["private_copies"]:
            assert one["size_apparent"] == pytest.approx(20 * MIB, rel=0.02)
            assert one["known_to_podman"] is True

    @pytest.mark.parametrize("kind", ["overlay-xfs", "btrfs"])
    def test_e11_shared_data_is_not_counted_as_a_layers_own(
        self, kind: str, make_store: MakeStore, look: Look, flat_image: Image
    ) -> None:
        store = make_store(kind, flat_image)
        store.create(flat_image.name, *options(MAPS[0]))
        one = only(only(look(store, measure="exclusive")["images"])["mapped_layers"])
        assert one["size_apparent"] == pytest.approx(20 * MIB, rel=0.02)
        assert one["size_exclusive"] < MIB

    def test_e12_a_metadata_only_copy_is_small_and_rests_on_its_template(
        self, make_store: MakeStore, look: Look, flat_image: Image
    ) -> None:
        store = make_store("overlay-forced", flat_image, options={"mountopt": "nodev,metacopy=on"})
        store.create(flat_image.name, *options(MAPS[0]))
        one = only(only(look(store, measure="exclusive")["images"])["mapped_layers"])
        assert one["recorded_size"] > 20 * MIB
        assert one["size_exclusive"] < MIB
        assert one["depends_on"][0] == store.image(flat_image.name)["layer"]

    def test_a_rootless_store_is_seen_by_root_and_by_its_user(
        self, make_store: MakeStore, look: Look, run_module: RunModule, small_image: Image
    ) -> None:
        store = make_store("rootless-overlay", small_image)
        store.create(small_image.name, "--name", "box", "--userns", "keep-id")
        from_outside = look(store, measure="exclusive")
        one = only(only(from_outside["images"])["mapped_layers"])
        assert one["status"] in ("ok", "foreign_root")
        assert only(one["containers"])["name"] == "box"
        assert one["uidmap"][0].startswith("0:1:")
        own = run_module(
            "image_layers_info", {"measure": "exclusive"}, user=store.user, environ=store.env()
        )
        assert own["images"][0]["mapped_layers"][0]["id"] == one["id"]
        assert own["totals"] == from_outside["totals"]


class TestOrigin:
    def test_ours_is_told_from_the_runtimes_and_podman_keeps_the_flags(
        self, make_store: MakeStore, look: Look, run_module: RunModule, small_image: Image
    ) -> None:
        store = make_store("vfs", small_image)
        run_module(
            "layer_template",
            {**store.module_args(), "images": [small_image.name], "uidmap": [MAPS[0]]},
        )
        # Each of these makes podman write the records anew.
        store.create(small_image.name, "--name", "one", *options(MAPS[0]))
        store.create(small_image.name, "--name", "two", *options(MAPS[1]))
        store.podman("tag", small_image.name, "localhost/other:1")
        store.podman("rm", "one")
        ours, theirs = only(look(store)["images"])["mapped_layers"]
        assert (ours["uidmap"], ours["origin"]) == ([MAPS[0]], "ours")
        assert (theirs["uidmap"], theirs["origin"]) == ([MAPS[1]], "runtime")

    def test_a_lease_survives_podmans_rewrites(
        self, make_store: MakeStore, look: Look, run_module: RunModule, small_image: Image
    ) -> None:
        store = make_store("vfs", small_image)
        run_module(
            "layer_template",
            {
                **store.module_args(),
                "images": [small_image.name],
                "uidmap": [MAPS[0]],
                "lease": "30d",
            },
        )
        before = only(only(look(store)["images"])["mapped_layers"])
        assert before["lease"] is not None
        store.create(small_image.name, "--name", "two", *options(MAPS[1]))
        store.podman("rm", "two")
        after = only(look(store)["images"])["mapped_layers"][0]
        assert (after["id"], after["lease"]) == (before["id"], before["lease"])


class TestChoice:
    def test_images_are_chosen_by_name_id_digest_and_pattern(
        self, make_store: MakeStore, look: Look, small_image: Image, flat_image: Image
    ) -> None:
        store = make_store("vfs", small_image, flat_image)
        small, flat = (store.image(one.name) for one in (small_image, flat_image))
        for reference in (
            "localhost/small:1",
            "small:1",
            small["id"],
            small["id"][:12],
            small["digest"],
            "*/small:*",
            "small*",
        ):
            result = look(store, images=[reference], measure="none")
            assert [one["id"] for one in result["images"]] == [small["id"]], reference
        both = look(store, images=["*:1"], measure="none")
        assert {one["id"] for one in both["images"]} == {small["id"], flat["id"]}
        assert look(store, images=["nothing"], measure="none")["images"] == []

    def test_nothing_is_written(
        self, make_store: MakeStore, look: Look, small_image: Image
    ) -> None:
        store = make_store("overlay-forced", small_image)
        store.create(small_image.name, *options(MAPS[0]))
        before = store.snapshot_of_disk()
        look(store, measure="exclusive")
        assert before.changes(store.snapshot_of_disk()) == []


class TestDamage:
    @pytest.fixture(params=["vfs", "overlay-forced"])
    def damaged(
        self, request: pytest.FixtureRequest, make_store: MakeStore, small_image: Image
    ) -> t.Tuple[Store, t.List[str]]:
        """A store with two mapped layers of one image, on which no container is."""
        store = make_store(request.param, small_image)
        for text in MAPS[:2]:
            store.podman("rm", store.create(small_image.name, *options(text)))
        return store, store.mapped_layers(small_image.name)

    def test_an_entry_without_a_layer(
        self, damaged: t.Tuple[Store, t.List[str]], look: Look
    ) -> None:
        store, (first, second) = damaged
        store.storage_cli("delete", first)
        assert store.podman("images", check=False).rc == 125
        mapped = only(look(store)["images"])["mapped_layers"]
        assert [one["id"] for one in mapped] == [first, second]
        assert mapped[0]["status"] == "missing"
        assert "no record" in mapped[0]["problem"]
        assert mapped[0]["recorded_size"] is None
        assert mapped[1]["status"] != "missing"

    def test_a_layer_without_data(self, damaged: t.Tuple[Store, t.List[str]], look: Look) -> None:
        store, (_first, second) = damaged
        shutil.rmtree(store.layer_folder(second))
        mapped = only(look(store, measure="exclusive")["images"])["mapped_layers"]
        assert mapped[1]["status"] == "missing"
        assert mapped[1]["size_exclusive"] is None
        assert mapped[0]["size_exclusive"] > 0

    def test_an_image_whose_own_layer_is_gone(
        self, damaged: t.Tuple[Store, t.List[str]], look: Look, small_image: Image
    ) -> None:
        store, _ids = damaged
        base = store.layer(store.image(small_image.name)["layer"])["parent"]
        shutil.rmtree(store.layer_folder(base))
        image = only(look(store)["images"])
        assert [one["status"] for one in image["layers"]].count("missing") == 1
        assert base[:12] in image["problem"]

    def test_a_chain_that_ends_nowhere(
        self, damaged: t.Tuple[Store, t.List[str]], look: Look, small_image: Image
    ) -> None:
        store, _ids = damaged
        base = store.layer(store.image(small_image.name)["layer"])["parent"]
        edit(store, "layers", lambda records: [one for one in records if one["id"] != base])
        image = only(look(store)["images"])
        assert [one["status"] for one in image["layers"]] == ["ok", "missing"]
        assert "no record" in image["problem"]

    def test_an_incomplete_layer(self, damaged: t.Tuple[Store, t.List[str]], look: Look) -> None:
        store, (first, _second) = damaged

        def half(records: t.List[Json]) -> t.List[Json]:
            for one in records:
                if one["id"] == first:
                    one["flags"] = {"incomplete": True}
            return records

        edit(store, "layers", half)
        mapped = only(look(store)["images"])["mapped_layers"]
        assert mapped[0]["status"] == "incomplete"

    def test_a_mapped_layer_that_no_image_lists(
        self, damaged: t.Tuple[Store, t.List[str]], look: Look
    ) -> None:
        store, (first, second) = damaged

        def forget(records: t.List[Json]) -> t.List[Json]:
            records[0]["mapped-layers"] = [second]
            return records

        edit(store, "images", forget)
        result = look(store)
        assert [one["id"] for one in only(result["images"])["mapped_layers"]] == [second]
        orphan = only(result["orphans"])
        assert (orphan["kind"], orphan["id"]) == ("layer", first)
        assert orphan["status"] == "unreferenced"
        assert orphan["size_apparent"] > 0

    def test_folders_and_links_without_a_record(
        self, damaged: t.Tuple[Store, t.List[str]], look: Look
    ) -> None:
        store, _ids = damaged
        stray = store.layer_folder("e" * 64)
        (stray / "diff").mkdir(parents=True)
        (stray / "diff" / "file").write_bytes(b"x" * 5000)
        leftover = store.graphroot / "userns-storage" / "staging" / "abc"
        leftover.mkdir(parents=True)
        (leftover / "file").write_bytes(b"y" * 700)
        expected = {("directory", "e" * 64): 5000, ("staging", "abc"): 700}
        if store.driver == "overlay":
            link = store.graphroot / "overlay" / "l" / ("A" * 26)
            link.symlink_to(f"../{'d' * 64}/diff")
            expected["link", "A" * 26] = 0
        found = {(one["kind"], one["id"]): one["size_apparent"] for one in look(store)["orphans"]}
        assert found == expected
        assert all(one["age"] < 600 for one in look(store)["orphans"])

    def test_records_that_cannot_be_read_are_an_error_with_a_name(
        self, damaged: t.Tuple[Store, t.List[str]], run_module: RunModule
    ) -> None:
        store, _ids = damaged
        path = store.graphroot / f"{store.driver}-images" / "images.json"
        path.write_text(path.read_text()[:-20])
        result = run_module("image_layers_info", store.module_args(), fails=True)
        assert str(path) in result["msg"]
        assert "exception" not in result


def edit(store: Store, kind: str, change: t.Callable[[t.List[Json]], t.List[Json]]) -> None:
    """Change a file of records as a killed or foolish program would have left it."""
    path = pathlib.Path(store.graphroot) / f"{store.driver}-{kind}" / f"{kind}.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def test_the_folder_of_the_driver_may_be_a_mount_of_its_own(
    make_store: MakeStore, look: Look, small_image: Image
) -> None:
    store = make_store("overlay-forced", small_image)
    store.create(small_image.name, *options(MAPS[0]))
    home = str(store.graphroot / "overlay")
    if home not in mounts.mount_points(str(store.graphroot)):
        mounts.mount("--bind", home, home)
    assert only(only(look(store)["images"])["mapped_layers"])["inodes"] > 10
