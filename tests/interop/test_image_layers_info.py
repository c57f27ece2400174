# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Test that image_layers_info reports sizes on disk, containers, and damage of stores written by podman."""

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
from support.unused_layers import MAPS, MIB, only, options

MakeStore = t.Callable[..., Store]
RunModule = t.Callable[..., t.Dict[str, t.Any]]
Json = t.Dict[str, t.Any]


@pytest.fixture(scope="session")
def big_image(lab: Lab) -> Image:
    """The image for E01 (test_podman_issues.py lists the cases): layers with 20 MB, 5 MB and 3 bytes."""
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
    """One layer that contains a file of 20 MB."""
    return images.build(
        lab.folder(),
        [{"data": images.directory(), "data/large": images.file(os.urandom(20 * MIB))}],
        "localhost/flat:1",
    )


@pytest.fixture
def get_info(run_module: RunModule) -> t.Callable[..., Json]:
    """Runs image_layers_info on a store."""

    def run(store: Store, **args: t.Any) -> Json:
        result = run_module("image_layers_info", {**store.module_args(), **args})
        assert result["changed"] is False
        return result

    return run


GetInfo = t.Callable[..., Json]


class TestSizesAndContainers:
    @pytest.mark.parametrize("kind", ["vfs", "overlay-forced"])
    def test_e01_podman_reports_a_fifth_of_size_on_disk(
        self, kind: str, make_store: MakeStore, get_info: GetInfo, big_image: Image
    ) -> None:
        store = make_store(kind, big_image)
        for number, text in enumerate(MAPS):
            store.create(big_image.name, "--name", f"c{number}", *options(text))
            store.podman("rm", f"c{number}")
        result = get_info(store)
        image = only(result["images"])
        assert len(image["layers"]) == 3
        assert [item["uidmap"] for item in image["mapped_layers"]] == [[text] for text in MAPS]
        for item in image["mapped_layers"]:
            # podman 4.3 does not change the owner of the root directory with vfs (E05).
            assert item["problem"] in (None, "outside its map: / belongs to 0:0")
            assert item["recorded_size"] < 20_000
            assert item["size_apparent"] == pytest.approx(25 * MIB, rel=0.01)
            assert item["containers"] == []
        assert result["totals"]["mapped"]["apparent"] == pytest.approx(100 * MIB, rel=0.01)
        listed = json.loads(store.podman("images", "--format", "json").stdout)
        assert only(listed)["Size"] < 27 * MIB
        assert result["totals"]["recorded"] == pytest.approx(only(listed)["Size"], rel=0.02)

    def test_containers_of_all_programs_are_listed(
        self, make_store: MakeStore, get_info: GetInfo, small_image: Image
    ) -> None:
        store = make_store("vfs", small_image)
        store.create(small_image.name, "--name", "web", *options(MAPS[0]))
        created = store.storage_cli(
            "create-container", "--uidmap", MAPS[0], "--gidmap", MAPS[0], "-n", "hidden",
            store.image(small_image.name)["id"],
        )  # fmt: skip
        assert created.rc == 0
        layer = only(only(get_info(store, measure="none")["images"])["mapped_layers"])
        assert sorted((c["name"], c["known_to_podman"]) for c in layer["containers"]) == [
            ("hidden", False),
            ("web", True),
        ]
        assert layer["size_apparent"] is None
        assert layer["inodes"] is None

    def test_e05_unmapped_root_directory_is_reported(
        self, make_store: MakeStore, get_info: GetInfo, big_image: Image
    ) -> None:
        store = make_store("vfs", big_image)
        store.create(big_image.name, *options(MAPS[0]))
        layer = only(only(get_info(store)["images"])["mapped_layers"])
        mapped_root = store.layer_folder(layer["id"]).stat()
        if mapped_root.st_uid == 100000:
            os.chown(store.layer_folder(layer["id"]), 0, 0)
            layer = only(only(get_info(store)["images"])["mapped_layers"])
        assert layer["status"] == "foreign_root"
        assert "/ belongs to 0:0" in layer["problem"]
        os.chown(store.layer_folder(layer["id"]), 100000, 100000)
        assert only(only(get_info(store)["images"])["mapped_layers"])["status"] == "ok"

    @pytest.mark.parametrize("kind", ["vfs", "overlay-forced"])
    def test_files_that_podman_did_not_map_are_reported(
        self, kind: str, make_store: MakeStore, get_info: GetInfo, lab: Lab
    ) -> None:
        image = images.build(
            lab.folder(),
            [{name: images.file("x") for name in ("a", "b", "c", "long")}],
            "localhost/letters:1",
        )
        store = make_store(kind, image)
        store.create(image.name, *options(MAPS[0]))
        layer = only(only(get_info(store)["images"])["mapped_layers"])
        if store.machine.version("podman") < (5, 5):
            assert layer["status"] == "foreign_root"
            assert "/a belongs to 0:0" in layer["problem"]
            assert "/long" not in layer["problem"]

    def test_copy_with_unmapped_owners_is_damaged(
        self, make_store: MakeStore, get_info: GetInfo, small_image: Image
    ) -> None:
        store = make_store("overlay-forced", small_image)
        store.create(small_image.name, *options(MAPS[0]))
        (copy,) = store.mapped_layers(small_image.name)
        assert only(only(get_info(store)["images"])["mapped_layers"])["status"] != "damaged"
        store.empty_layer(copy)
        layer = only(only(get_info(store)["images"])["mapped_layers"])
        assert layer["status"] == "damaged"
        assert (
            "its owners are still the owners of the image: /etc belongs to 0:0" in layer["problem"]
        )

    def test_e07_equivalent_map_is_a_duplicate(
        self, make_store: MakeStore, get_info: GetInfo, small_image: Image
    ) -> None:
        store = make_store("vfs", small_image)
        halves = ["0:100000:1000", "1000:101000:64536"]
        for parts in (["0:100000:65536"], halves, halves[::-1]):
            arguments = [
                argument for part in parts for argument in ("--uidmap", part, "--gidmap", part)
            ]
            store.podman("rm", store.create(small_image.name, *arguments))
        mapped = only(get_info(store)["images"])["mapped_layers"]
        if store.machine.version("podman") < (4, 7):
            assert len(mapped) == 3
            assert [layer["duplicate_of"] for layer in mapped] == [
                None,
                mapped[0]["id"],
                mapped[0]["id"],
            ]
        else:
            assert only(mapped)["duplicate_of"] is None

    @pytest.mark.parametrize("kind", ["vfs", "overlay-forced"])
    def test_e10_read_only_store_causes_private_copies(
        self, kind: str, make_store: MakeStore, get_info: GetInfo, flat_image: Image
    ) -> None:
        shared = make_store(kind, flat_image)
        store = make_store(kind, read_only=[str(shared.graphroot)])
        containers = [store.create(flat_image.name, *options(MAPS[0])) for _round in range(3)]
        image = only(get_info(store)["images"])
        assert image["read_only_store"] == str(shared.graphroot)
        assert image["mapped_layers"] == []
        assert sorted(item["id"] for item in image["private_copies"]) == sorted(containers)
        for item in image["private_copies"]:
            assert item["size_apparent"] == pytest.approx(20 * MIB, rel=0.02)
            assert item["known_to_podman"] is True

    @pytest.mark.parametrize("kind", ["overlay-xfs", "btrfs"])
    def test_e11_shared_data_is_not_in_exclusive_size(
        self, kind: str, make_store: MakeStore, get_info: GetInfo, flat_image: Image
    ) -> None:
        store = make_store(kind, flat_image)
        store.create(flat_image.name, *options(MAPS[0]))
        layer = only(only(get_info(store, measure="exclusive")["images"])["mapped_layers"])
        assert layer["size_apparent"] == pytest.approx(20 * MIB, rel=0.02)
        assert layer["size_exclusive"] < MIB

    def test_e12_metacopy_layer_is_small_and_depends_on_template(
        self, make_store: MakeStore, get_info: GetInfo, flat_image: Image
    ) -> None:
        store = make_store("overlay-forced", flat_image, options={"mountopt": "nodev,metacopy=on"})
        store.create(flat_image.name, *options(MAPS[0]))
        layer = only(only(get_info(store, measure="exclusive")["images"])["mapped_layers"])
        assert layer["recorded_size"] > 20 * MIB
        assert layer["size_exclusive"] < MIB
        assert layer["depends_on"][0] == store.image(flat_image.name)["layer"]

    def test_root_and_user_get_same_result_for_rootless_store(
        self, make_store: MakeStore, get_info: GetInfo, run_module: RunModule, small_image: Image
    ) -> None:
        store = make_store("rootless-overlay", small_image)
        store.create(small_image.name, "--name", "box", "--userns", "keep-id")
        from_outside = get_info(store, measure="exclusive")
        layer = only(only(from_outside["images"])["mapped_layers"])
        assert layer["status"] in ("ok", "foreign_root")
        assert only(layer["containers"])["name"] == "box"
        assert layer["uidmap"][0].startswith("0:1:")
        own = run_module(
            "image_layers_info", {"measure": "exclusive"}, user=store.user, environ=store.env()
        )
        assert own["images"][0]["mapped_layers"][0]["id"] == layer["id"]
        assert own["totals"] == from_outside["totals"]


class TestOrigin:
    def test_origin_is_kept_when_podman_rewrites_records(
        self, make_store: MakeStore, get_info: GetInfo, run_module: RunModule, small_image: Image
    ) -> None:
        store = make_store("vfs", small_image)
        run_module(
            "layer_template",
            {**store.module_args(), "images": [small_image.name], "uidmap": [MAPS[0]]},
        )
        # podman rewrites the records for each of these commands.
        store.create(small_image.name, "--name", "one", *options(MAPS[0]))
        store.create(small_image.name, "--name", "two", *options(MAPS[1]))
        store.podman("tag", small_image.name, "localhost/other:1")
        store.podman("rm", "one")
        by_collection, by_podman = only(get_info(store)["images"])["mapped_layers"]
        assert (by_collection["uidmap"], by_collection["origin"]) == ([MAPS[0]], "ours")
        assert (by_podman["uidmap"], by_podman["origin"]) == ([MAPS[1]], "runtime")

    def test_lease_is_kept_when_podman_rewrites_records(
        self, make_store: MakeStore, get_info: GetInfo, run_module: RunModule, small_image: Image
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
        before = only(only(get_info(store)["images"])["mapped_layers"])
        assert before["lease"] is not None
        store.create(small_image.name, "--name", "two", *options(MAPS[1]))
        store.podman("rm", "two")
        after = only(get_info(store)["images"])["mapped_layers"][0]
        assert (after["id"], after["lease"]) == (before["id"], before["lease"])


class TestSelection:
    def test_images_are_selected_by_name_id_digest_and_pattern(
        self, make_store: MakeStore, get_info: GetInfo, small_image: Image, flat_image: Image
    ) -> None:
        store = make_store("vfs", small_image, flat_image)
        small, flat = (store.image(item.name) for item in (small_image, flat_image))
        for reference in (
            "localhost/small:1",
            "small:1",
            small["id"],
            small["id"][:12],
            small["digest"],
            "*/small:*",
            "small*",
        ):
            result = get_info(store, images=[reference], measure="none")
            assert [item["id"] for item in result["images"]] == [small["id"]], reference
        both = get_info(store, images=["*:1"], measure="none")
        assert {item["id"] for item in both["images"]} == {small["id"], flat["id"]}
        assert get_info(store, images=["nothing"], measure="none")["images"] == []

    def test_nothing_is_written(
        self, make_store: MakeStore, get_info: GetInfo, small_image: Image
    ) -> None:
        store = make_store("overlay-forced", small_image)
        store.create(small_image.name, *options(MAPS[0]))
        before = store.disk_state()
        get_info(store, measure="exclusive")
        assert before.changes(store.disk_state()) == []


class TestDamage:
    @pytest.fixture(params=["vfs", "overlay-forced"])
    def damaged(
        self, request: pytest.FixtureRequest, make_store: MakeStore, small_image: Image
    ) -> t.Tuple[Store, t.List[str]]:
        """A store with two mapped layers of one image, and without containers."""
        store = make_store(request.param, small_image)
        for text in MAPS[:2]:
            store.podman("rm", store.create(small_image.name, *options(text)))
        return store, store.mapped_layers(small_image.name)

    def test_mapped_layer_without_record_is_missing(
        self, damaged: t.Tuple[Store, t.List[str]], get_info: GetInfo
    ) -> None:
        store, (first, second) = damaged
        store.storage_cli("delete", first)
        store.assert_image_is_not_listed("localhost/small:1")
        mapped = only(get_info(store)["images"])["mapped_layers"]
        assert [layer["id"] for layer in mapped] == [first, second]
        assert mapped[0]["status"] == "missing"
        assert "no record" in mapped[0]["problem"]
        assert mapped[0]["recorded_size"] is None
        assert mapped[1]["status"] != "missing"

    def test_layer_without_data_is_missing(
        self, damaged: t.Tuple[Store, t.List[str]], get_info: GetInfo
    ) -> None:
        store, (_first, second) = damaged
        shutil.rmtree(store.layer_folder(second))
        mapped = only(get_info(store, measure="exclusive")["images"])["mapped_layers"]
        assert mapped[1]["status"] == "missing"
        assert mapped[1]["size_exclusive"] is None
        assert mapped[0]["size_exclusive"] > 0

    def test_missing_image_layer_is_reported(
        self, damaged: t.Tuple[Store, t.List[str]], get_info: GetInfo, small_image: Image
    ) -> None:
        store, _ids = damaged
        base = store.layer(store.image(small_image.name)["layer"])["parent"]
        shutil.rmtree(store.layer_folder(base))
        image = only(get_info(store)["images"])
        assert [item["status"] for item in image["layers"]].count("missing") == 1
        assert base[:12] in image["problem"]

    def test_missing_parent_record_is_reported(
        self, damaged: t.Tuple[Store, t.List[str]], get_info: GetInfo, small_image: Image
    ) -> None:
        store, _ids = damaged
        base = store.layer(store.image(small_image.name)["layer"])["parent"]
        edit(
            store, "layers", lambda records: [record for record in records if record["id"] != base]
        )
        image = only(get_info(store)["images"])
        assert [item["status"] for item in image["layers"]] == ["ok", "missing"]
        assert "no record" in image["problem"]

    def test_incomplete_layer_is_reported(
        self, damaged: t.Tuple[Store, t.List[str]], get_info: GetInfo
    ) -> None:
        store, (first, _second) = damaged

        def mark_incomplete(records: t.List[Json]) -> t.List[Json]:
            for record in records:
                if record["id"] == first:
                    record["flags"] = {"incomplete": True}
            return records

        edit(store, "layers", mark_incomplete)
        mapped = only(get_info(store)["images"])["mapped_layers"]
        assert mapped[0]["status"] == "incomplete"

    def test_mapped_layer_without_image_is_an_orphan(
        self, damaged: t.Tuple[Store, t.List[str]], get_info: GetInfo
    ) -> None:
        store, (first, second) = damaged

        def forget(records: t.List[Json]) -> t.List[Json]:
            records[0]["mapped-layers"] = [second]
            return records

        edit(store, "images", forget)
        result = get_info(store)
        assert [item["id"] for item in only(result["images"])["mapped_layers"]] == [second]
        orphan = only(result["orphans"])
        assert (orphan["kind"], orphan["id"]) == ("layer", first)
        assert orphan["status"] == "unreferenced"
        assert orphan["size_apparent"] > 0

    def test_folders_and_links_without_record_are_orphans(
        self, damaged: t.Tuple[Store, t.List[str]], get_info: GetInfo
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
        found = {
            (item["kind"], item["id"]): item["size_apparent"] for item in get_info(store)["orphans"]
        }
        assert found == expected
        assert all(item["age"] < 600 for item in get_info(store)["orphans"])

    def test_unreadable_records_are_a_contradiction(
        self, damaged: t.Tuple[Store, t.List[str]], get_info: GetInfo
    ) -> None:
        store, _ids = damaged
        path = store.graphroot / f"{store.driver}-layers" / "layers.json"
        path.write_text(path.read_text()[:-20])
        result = get_info(store)
        unreadable = result["contradictions"][0]
        assert (unreadable["kind"], unreadable["path"]) == ("unreadable", str(path))
        assert "backup" in unreadable["hint"]
        assert only(only(result["images"])["layers"])["status"] == "missing"


class TestOtherRuntimes:
    def test_container_layer_with_map_is_not_a_copy(
        self, make_store: MakeStore, run_module: RunModule, host: t.Any, small_image: Image
    ) -> None:
        machine = host("sid")
        store = make_store("overlay", small_image, machine=machine)
        store.create(small_image.name, "--name", "box", *options(MAPS[0]))
        (container,) = store.containers()
        # containers/storage 1.64 records the map although the mount shifts the IDs.
        assert store.layer(container["layer"])["uidmap"]
        result = run_module("image_layers_info", store.module_args(), machine=machine)
        image = only(result["images"])
        assert image["mapped_layers"] == []
        assert image["private_copies"] == []
        assert result["contradictions"] == []

    def test_missing_short_name_is_no_damage_if_runtime_ignores_it(
        self, make_store: MakeStore, run_module: RunModule, host: t.Any, small_image: Image
    ) -> None:
        machine = host("sid")
        store = make_store("overlay-forced", small_image, machine=machine)
        store.podman("rm", store.create(small_image.name, *options(MAPS[0])))
        (layer,) = store.mapped_layers(small_image.name)
        link = store.layer_folder(layer) / "link"
        (store.graphroot / "overlay" / "l" / link.read_text()).unlink()

        def mapped_layer() -> Json:
            result = run_module("image_layers_info", store.module_args(), machine=machine)
            return only(only(result["images"])["mapped_layers"])

        assert mapped_layer()["status"] in ("ok", "foreign_root")
        store.podman("rm", store.create(small_image.name, *options(MAPS[0])))
        assert store.mapped_layers(small_image.name) == [layer]
        # Even new runtimes cannot create a container on a layer without this file.
        link.unlink()
        assert mapped_layer()["status"] == "damaged"
        assert store.podman("create", *options(MAPS[0]), small_image.name, check=False).rc != 0

    def test_store_with_imagestore_is_read_only(
        self, make_store: MakeStore, run_module: RunModule, host: t.Any, small_image: Image
    ) -> None:
        machine = host("trixie")
        store = make_store("overlay-forced", machine=machine)
        imagestore = store.base / "images"
        text = store.storage_conf.read_text()
        store.storage_conf.write_text(
            text.replace("[storage]\n", f'[storage]\nimagestore = "{imagestore}"\n')
        )
        store.skopeo("copy", "-q", small_image.source, f"containers-storage:{small_image.name}")
        store.create(small_image.name, "--name", "box")
        args = {"storage_conf": str(store.storage_conf)}
        result = run_module("image_layers_info", args, machine=machine)
        image = only(result["images"])
        assert {item["status"] for item in image["layers"]} == {"ok"}
        assert image["problem"] is None
        assert {item["status"] for item in image["mapped_layers"]} <= {"ok", "foreign_root"}
        assert result["contradictions"] == []
        for check in (True, False):
            result = run_module(
                "layer_gc",
                {**args, "min_age": "0", "created_before": "0", "orphans": "remove"},
                check=check,
                machine=machine,
            )
            assert (result["changed"], result["removed"], result["repaired"]) == (False, [], [])
            assert str(imagestore) in str(result["warnings"])
        failed = run_module(
            "layer_template",
            {**args, "images": [small_image.name], "uidmap": [MAPS[1]], "force": True},
            machine=machine,
            fails=True,
        )
        assert str(imagestore) in failed["msg"]
        assert f"remove `imagestore` from {store.storage_conf}" in failed["msg"]


def edit(store: Store, kind: str, change: t.Callable[[t.List[Json]], t.List[Json]]) -> None:
    """Change a file of records, as a killed or faulty program may have done."""
    path = pathlib.Path(store.graphroot) / f"{store.driver}-{kind}" / f"{kind}.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def test_folder_of_driver_may_be_a_mount(
    make_store: MakeStore, get_info: GetInfo, small_image: Image
) -> None:
    store = make_store("overlay-forced", small_image)
    store.create(small_image.name, *options(MAPS[0]))
    home = str(store.graphroot / "overlay")
    if home not in mounts.mount_points(str(store.graphroot)):
        mounts.mount("--bind", home, home)
    assert only(only(get_info(store)["images"])["mapped_layers"])["inodes"] > 10
