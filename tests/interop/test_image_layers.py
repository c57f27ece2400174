# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""image_layers against the real skopeo and podman."""

from __future__ import annotations

import shutil
import typing as t

import pytest
from support import images
from support.images import Image
from support.lab import Lab
from support.stores import Store

MakeStore = t.Callable[..., Store]
RunModule = t.Callable[..., t.Dict[str, t.Any]]
Json = t.Dict[str, t.Any]
Declare = t.Callable[..., Json]

MAP = "0:100000:65536"
OTHER_MAP = "0:200000:65536"
KINDS = ["vfs", "overlay-forced", "rootless-overlay"]


def options(store: Store, text: str = MAP) -> t.List[str]:
    """podman's options for a map; in rootless stores the map is keep-id."""
    return ["--userns", "keep-id"] if store.user else ["--uidmap", text, "--gidmap", text]


def only(items: t.List[Json]) -> Json:
    (item,) = items
    return item


@pytest.fixture
def declare(run_module: RunModule) -> Declare:
    """Runs image_layers on a store."""

    def run(store: Store, *, check: bool = False, fails: bool = False, **args: t.Any) -> Json:
        words = {**store.module_args(), **args}
        return run_module("image_layers", words, check=check, fails=fails)

    return run


@pytest.fixture
def empty(make_store: MakeStore) -> t.Callable[[str], Store]:
    """Makes a store that podman has written, without images."""

    def make(kind: str) -> Store:
        store = make_store(kind)
        store.podman("images")
        return store

    return make


class TestPresent:
    @pytest.mark.parametrize("kind", KINDS)
    def test_brought_tagged_and_then_left_alone(
        self, kind: str, empty: t.Callable[[str], Store], declare: Declare, small_image: Image
    ) -> None:
        store = empty(kind)
        asked: Json = {
            "images": ["localhost/app:1", "app:stable"],
            "source": small_image.source,
        }
        before = store.snapshot_of_disk()
        foreseen = declare(store, check=True, **asked)
        assert before.changes(store.snapshot_of_disk()) == []
        assert (foreseen["changed"], foreseen["actions"]) == (True, ["pulled", "tagged"])
        done = declare(store, **asked)
        assert (done["changed"], done["actions"]) == (True, ["pulled", "tagged"])
        image = only(done["images"])
        assert image["names"] == ["localhost/app:1", "localhost/app:stable"]
        assert len(image["layers"]) == 4
        assert image["layers"][0]["size_apparent"] > 0
        told = store.podman("images", "--no-trunc", "--quiet").stdout.split()
        assert set(told) == {f"sha256:{image['id']}"}
        store.create("localhost/app:stable", *options(store))

        before = store.snapshot_of_disk()
        again = declare(store, **asked)
        assert (again["changed"], again["actions"]) == (False, [])
        assert only(again["images"])["id"] == image["id"]
        assert before.changes(store.snapshot_of_disk()) == []

    @pytest.mark.parametrize(
        "name", ["docker.io/nextcloud:stable", "index.docker.io/nextcloud:stable"]
    )
    def test_a_name_of_docker_hub_is_the_one_that_is_recorded(
        self,
        name: str,
        empty: t.Callable[[str], Store],
        declare: Declare,
        run_module: RunModule,
        small_image: Image,
    ) -> None:
        store = empty("vfs")
        asked: Json = {"images": [name], "source": small_image.source}
        assert declare(store, check=True, **asked)["changed"]
        done = declare(store, **asked)
        assert done["changed"]
        assert only(done["images"])["names"] == ["docker.io/library/nextcloud:stable"]
        assert not declare(store, **asked)["changed"]
        words = {**store.module_args(), "images": [name], "uidmap": [MAP], "gidmap": [MAP]}
        assert only(run_module("layer_template", words)["layers"])["action"] == "created"
        info = run_module("image_layers_info", {**store.module_args(), "images": [name]})
        assert len(only(info["images"])["mapped_layers"]) == 1
        gone = declare(store, images=[name], state="absent")
        assert (gone["changed"], gone["actions"]) == (True, ["removed"])
        assert store.images() == []

    @pytest.mark.parametrize("kind", KINDS)
    def test_pull_into_a_store_that_no_runtime_has_written(
        self, kind: str, make_store: MakeStore, declare: Declare, small_image: Image
    ) -> None:
        store = make_store(kind)
        asked: Json = {"images": "localhost/app:1", "source": small_image.source}
        assert not declare(store, images="localhost/app:1", state="absent")["changed"]
        before = store.snapshot_of_disk()
        foreseen = declare(store, check=True, **asked)
        assert before.changes(store.snapshot_of_disk()) == []
        assert (foreseen["changed"], foreseen["images"]) == (True, [])
        assert foreseen["store"]["graphroot"] == str(store.graphroot)
        done = declare(store, **asked)
        assert only(done["images"])["names"] == ["localhost/app:1"]
        store.create("localhost/app:1", *options(store))
        assert not declare(store, **asked)["changed"]

    @pytest.mark.parametrize("transport", ["oci-archive", "docker-archive", "dir"])
    def test_any_transport(
        self,
        transport: str,
        lab: Lab,
        empty: t.Callable[[str], Store],
        declare: Declare,
        small_image: Image,
    ) -> None:
        store = empty("vfs")
        source = f"{transport}:{lab.folder()}/image"
        store.skopeo("copy", "-q", small_image.source, source)
        for pull in ("missing", "newer", "always"):
            result = declare(store, image="localhost/app:1", source=source, pull=pull)
            assert result["changed"] is (pull == "missing"), pull

    def test_newer_brings_what_differs_and_missing_does_not(
        self, lab: Lab, empty: t.Callable[[str], Store], declare: Declare
    ) -> None:
        store = empty("vfs")
        folder = lab.folder()
        first = images.build(folder, [{"etc/release": images.file("1\n")}], "localhost/app:1")
        asked: Json = {"image": "localhost/app:1", "source": first.source}
        old = only(declare(store, **asked)["images"])["id"]
        shutil.rmtree(folder / "blobs")
        images.build(folder, [{"etc/release": images.file("2\n")}], "localhost/app:1")
        assert declare(store, **asked)["changed"] is False
        foreseen = declare(store, check=True, **asked, pull="newer")
        assert foreseen["changed"] is True
        assert only(declare(store, **asked)["images"])["id"] == old
        done = declare(store, **asked, pull="newer")
        assert (done["changed"], done["actions"]) == (True, ["pulled"])
        new = only(done["images"])["id"]
        assert new != old
        assert store.image("localhost/app:1")["id"] == new
        assert declare(store, **asked, pull="newer")["changed"] is False
        assert declare(store, **asked, pull="always")["changed"] is False

    def test_a_name_moves_from_another_image(
        self,
        lab: Lab,
        empty: t.Callable[[str], Store],
        declare: Declare,
        small_image: Image,
    ) -> None:
        store = empty("vfs")
        other = images.build(lab.folder(), [{"x": images.file("y")}], "localhost/other:1")
        store.load(other)
        store.podman("tag", "localhost/other:1", "localhost/app:stable")
        result = declare(
            store, images=["localhost/app:1", "localhost/app:stable"], source=small_image.source
        )
        assert result["changed"] is True
        # The name that was found is the image's; the one that was missing is added to it.
        assert store.image("localhost/app:1")["id"] == store.image("localhost/app:stable")["id"]
        store.podman("images")

    def test_without_skopeo_podman_brings_it(
        self,
        lab: Lab,
        empty: t.Callable[[str], Store],
        run_module: RunModule,
        small_image: Image,
    ) -> None:
        store = empty("vfs")
        programs = lab.folder()
        for name in ("podman", "crun", "runc", "conmon", "python3"):
            found = shutil.which(name)
            if found:
                (programs / name).symlink_to(found)
        result = run_module(
            "image_layers",
            {**store.module_args(), "image": "localhost/app:1", "source": small_image.source},
            environ={"PATH": str(programs), "CONTAINERS_CONF": str(store.containers_conf)},
        )
        assert result["changed"] is True
        assert "localhost/app:1" in only(result["images"])["names"]

    @pytest.mark.parametrize(
        ("args", "words"),
        [
            ({"image": "localhost/app:1", "source": "oci:/nowhere:1"}, "/nowhere"),
            ({"image": "localhost/app:1", "source": "carrier-pigeon:x"}, "carrier-pigeon"),
            ({"image": "sha256:" + "0" * 64, "source": "oci:/nowhere:1"}, "is an ID"),
        ],
    )
    def test_bad_input_is_reported_and_nothing_changed(
        self, args: Json, words: str, empty: t.Callable[[str], Store], declare: Declare
    ) -> None:
        store = empty("vfs")
        result = declare(store, fails=True, **args)
        assert words in result["msg"]
        assert "exception" not in result
        assert store.images() == []


class TestAbsent:
    @pytest.mark.parametrize("kind", KINDS)
    def test_the_image_goes_with_all_its_layers(
        self, kind: str, make_store: MakeStore, declare: Declare, small_image: Image
    ) -> None:
        store = make_store(kind, small_image)
        store.podman("rm", store.create(small_image.name, *options(store)))
        (mapped,) = store.mapped_layers(small_image.name)
        every = store.layer_ids()
        before = store.snapshot_of_disk()
        foreseen = declare(store, check=True, image=small_image.name, state="absent")
        assert before.changes(store.snapshot_of_disk()) == []
        done = declare(store, image=small_image.name, state="absent")
        assert (done["changed"], done["actions"]) == (True, ["removed"])
        assert done["removed_layers"] == foreseen["removed_layers"]
        assert done["removed_layers"][0] == mapped
        assert set(done["removed_layers"]) == every
        assert only(only(done["images"])["mapped_layers"])["id"] == mapped
        assert store.layer_ids() == set()
        assert store.images() == []
        for layer_id in every:
            assert store.leftovers(layer_id) == []
        store.podman("images", "-a")
        store.podman("system", "df")
        assert declare(store, image=small_image.name, state="absent")["changed"] is False

    def test_layers_that_other_images_share_stay(
        self, lab: Lab, make_store: MakeStore, declare: Declare
    ) -> None:
        base: images.Layer = {"base": images.file("b" * 5000)}
        one = images.build(lab.folder(), [base, {"one": images.file("1")}], "localhost/one:1")
        two = images.build(lab.folder(), [base, {"two": images.file("2")}], "localhost/two:1")
        store = make_store("overlay-forced", one, two)
        assert len(store.layer_ids()) == 3
        done = declare(store, image="localhost/one:1", state="absent")
        assert len(done["removed_layers"]) == 1
        assert len(store.layer_ids()) == 2
        store.create("localhost/two:1", "--uidmap", MAP, "--gidmap", MAP)

    def test_refused_while_containers_use_it(
        self, make_store: MakeStore, declare: Declare, small_image: Image
    ) -> None:
        store = make_store("vfs", small_image)
        store.create(small_image.name, "--name", "plain")
        store.create(small_image.name, "--name", "mapped", *options(store))
        store.storage_cli("create-container", "-n", "hidden", store.image(small_image.name)["id"])
        before = store.snapshot_of_disk()
        for check in (True, False):
            result = declare(store, check=check, fails=True, image=small_image.name, state="absent")
            for name in ("plain", "mapped", "hidden"):
                assert name in result["msg"]
            assert len(result["users"]) == 3
        assert before.changes(store.snapshot_of_disk()) == []

    def test_a_name_goes_alone_while_there_are_others(
        self, make_store: MakeStore, declare: Declare, small_image: Image
    ) -> None:
        store = make_store("vfs", small_image)
        store.podman("tag", small_image.name, "localhost/other:1")
        done = declare(store, image="other:1", state="absent")
        assert (done["actions"], done["removed_layers"]) == (["untagged"], [])
        assert store.image(small_image.name)["names"] == [small_image.name]
        store.podman("tag", small_image.name, "localhost/other:1")
        done = declare(store, image=store.image(small_image.name)["id"], state="absent")
        assert done["actions"] == ["removed"]
        assert store.images() == []

    @pytest.mark.parametrize("setup", ["vfs", "rootless-as-root"])
    def test_a_source_in_a_store_that_does_not_exist_is_not_created(
        self, make_case: t.Callable[..., t.Any], setup: str
    ) -> None:
        case = make_case(setup)
        missing = case.store.base / "missing"
        case.store.base.chmod(0o777)
        for check in (True, False):
            # The last one is a directory, but no store.
            for inside in (
                f"[vfs@{missing}+{missing}-run]",
                f"[{missing}]",
                f"[{case.store.base}]",
            ):
                refused = case.call(
                    "image_layers",
                    {"images": ["localhost/new:1"], "source": f"containers-storage:{inside}x:1"},
                    check=check,
                    fails=True,
                )
                assert "there is no container store in " in refused["msg"]
                assert not missing.exists()
            inside = f"[{case.store.driver}@{case.store.graphroot}+{missing}]"
            refused = case.call(
                "image_layers",
                {"images": ["localhost/new:1"], "source": f"containers-storage:{inside}x:1"},
                check=check,
                fails=True,
            )
            assert f"the runroot {missing} does not exist" in refused["msg"]
            assert not missing.exists()

    def test_an_image_of_a_read_only_store_stays(
        self, make_store: MakeStore, declare: Declare, small_image: Image
    ) -> None:
        shared = make_store("vfs", small_image)
        store = make_store("vfs", read_only=[str(shared.graphroot)])
        store.podman("images")
        result = declare(store, fails=True, image=small_image.name, state="absent")
        assert "read-only" in result["msg"]

    def test_all_layers_go_that_an_additional_store_has_too(
        self, make_store: MakeStore, declare: Declare, small_image: Image
    ) -> None:
        below = make_store("overlay-forced", small_image)
        below.podman("rm", below.create(small_image.name, "--uidmap=0:100000:65536"))
        before = below.snapshot_of_disk()
        store = make_store("overlay-forced", small_image)
        layers = store.layer_ids()
        store.add_read_only(below.graphroot)
        done = declare(store, image=small_image.name, state="absent")
        assert (done["actions"], set(done["removed_layers"])) == (["removed"], layers)
        assert (store.layers(), store.images()) == ([], [])
        assert before.changes(below.snapshot_of_disk()) == []
