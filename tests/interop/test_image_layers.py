# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Test image_layers with skopeo and podman."""

from __future__ import annotations

import shutil
import typing as t

import pytest
from support import images
from support.images import Image
from support.lab import Lab
from support.store_cases import namespace_args
from support.stores import Store
from support.unused_layers import only

MakeStore = t.Callable[..., Store]
RunModule = t.Callable[..., t.Dict[str, t.Any]]
Json = t.Dict[str, t.Any]
Declare = t.Callable[..., Json]

MAP = "0:100000:65536"
OTHER_MAP = "0:200000:65536"
KINDS = ["vfs", "overlay-forced", "rootless-overlay"]


@pytest.fixture
def declare(run_module: RunModule) -> Declare:
    """Runs image_layers on a store."""

    def run(store: Store, *, check: bool = False, fails: bool = False, **args: t.Any) -> Json:
        all_args = {**store.module_args(), **args}
        return run_module("image_layers", all_args, check=check, fails=fails)

    return run


@pytest.fixture
def make_empty_store(make_store: MakeStore) -> t.Callable[[str], Store]:
    """Creates a store that podman has initialized, without images."""

    def make(kind: str) -> Store:
        store = make_store(kind)
        store.podman("images")
        return store

    return make


class TestPresent:
    @pytest.mark.parametrize("kind", KINDS)
    def test_image_is_pulled_and_tagged_once(
        self,
        kind: str,
        make_empty_store: t.Callable[[str], Store],
        declare: Declare,
        small_image: Image,
    ) -> None:
        store = make_empty_store(kind)
        args: Json = {
            "images": ["localhost/app:1", "app:stable"],
            "source": small_image.source,
        }
        before = store.disk_state()
        predicted = declare(store, check=True, **args)
        assert before.changes(store.disk_state()) == []
        assert (predicted["changed"], predicted["actions"]) == (True, ["pulled", "tagged"])
        result = declare(store, **args)
        assert (result["changed"], result["actions"]) == (True, ["pulled", "tagged"])
        image = only(result["images"])
        assert image["names"] == ["localhost/app:1", "localhost/app:stable"]
        assert len(image["layers"]) == 4
        assert image["layers"][0]["size_apparent"] > 0
        listed = store.podman("images", "--no-trunc", "--quiet").stdout.split()
        assert set(listed) == {f"sha256:{image['id']}"}
        store.create("localhost/app:stable", *namespace_args(store))

        before = store.disk_state()
        repeated = declare(store, **args)
        assert (repeated["changed"], repeated["actions"]) == (False, [])
        assert only(repeated["images"])["id"] == image["id"]
        assert before.changes(store.disk_state()) == []

    @pytest.mark.parametrize(
        "name", ["docker.io/nextcloud:stable", "index.docker.io/nextcloud:stable"]
    )
    def test_short_docker_hub_name_matches_recorded_name(
        self,
        name: str,
        make_empty_store: t.Callable[[str], Store],
        declare: Declare,
        run_module: RunModule,
        small_image: Image,
    ) -> None:
        store = make_empty_store("vfs")
        args: Json = {"images": [name], "source": small_image.source}
        assert declare(store, check=True, **args)["changed"]
        result = declare(store, **args)
        assert result["changed"]
        assert only(result["images"])["names"] == ["docker.io/library/nextcloud:stable"]
        assert not declare(store, **args)["changed"]
        layer_args = {**store.module_args(), "images": [name], "uidmap": [MAP], "gidmap": [MAP]}
        assert only(run_module("layer_template", layer_args)["layers"])["action"] == "created"
        info = run_module("image_layers_info", {**store.module_args(), "images": [name]})
        assert len(only(info["images"])["mapped_layers"]) == 1
        removed = declare(store, images=[name], state="absent")
        assert (removed["changed"], removed["actions"]) == (True, ["removed"])
        assert store.images() == []

    @pytest.mark.parametrize("kind", KINDS)
    def test_pull_into_uninitialized_store(
        self, kind: str, make_store: MakeStore, declare: Declare, small_image: Image
    ) -> None:
        store = make_store(kind)
        args: Json = {"images": "localhost/app:1", "source": small_image.source}
        assert not declare(store, images="localhost/app:1", state="absent")["changed"]
        before = store.disk_state()
        predicted = declare(store, check=True, **args)
        assert before.changes(store.disk_state()) == []
        assert (predicted["changed"], predicted["images"]) == (True, [])
        assert predicted["store"]["graphroot"] == str(store.graphroot)
        result = declare(store, **args)
        assert only(result["images"])["names"] == ["localhost/app:1"]
        store.create("localhost/app:1", *namespace_args(store))
        assert not declare(store, **args)["changed"]

    @pytest.mark.parametrize("transport", ["oci-archive", "docker-archive", "dir"])
    def test_image_is_pulled_from_any_transport(
        self,
        transport: str,
        lab: Lab,
        make_empty_store: t.Callable[[str], Store],
        declare: Declare,
        small_image: Image,
    ) -> None:
        store = make_empty_store("vfs")
        source = f"{transport}:{lab.folder()}/image"
        store.skopeo("copy", "-q", small_image.source, source)
        for pull in ("missing", "newer", "always"):
            result = declare(store, image="localhost/app:1", source=source, pull=pull)
            assert result["changed"] is (pull == "missing"), pull

    def test_newer_pulls_different_image_and_missing_does_not(
        self, lab: Lab, make_empty_store: t.Callable[[str], Store], declare: Declare
    ) -> None:
        store = make_empty_store("vfs")
        folder = lab.folder()
        first = images.build(folder, [{"etc/release": images.file("1\n")}], "localhost/app:1")
        args: Json = {"image": "localhost/app:1", "source": first.source}
        old = only(declare(store, **args)["images"])["id"]
        shutil.rmtree(folder / "blobs")
        images.build(folder, [{"etc/release": images.file("2\n")}], "localhost/app:1")
        assert declare(store, **args)["changed"] is False
        predicted = declare(store, check=True, **args, pull="newer")
        assert predicted["changed"] is True
        assert only(declare(store, **args)["images"])["id"] == old
        result = declare(store, **args, pull="newer")
        assert (result["changed"], result["actions"]) == (True, ["pulled"])
        new = only(result["images"])["id"]
        assert new != old
        assert store.image("localhost/app:1")["id"] == new
        assert declare(store, **args, pull="newer")["changed"] is False
        assert declare(store, **args, pull="always")["changed"] is False

    def test_missing_name_is_added_to_image_with_existing_name(
        self,
        lab: Lab,
        make_empty_store: t.Callable[[str], Store],
        declare: Declare,
        small_image: Image,
    ) -> None:
        store = make_empty_store("vfs")
        other = images.build(lab.folder(), [{"x": images.file("y")}], "localhost/other:1")
        store.load(other)
        store.podman("tag", "localhost/other:1", "localhost/app:stable")
        result = declare(
            store, images=["localhost/app:1", "localhost/app:stable"], source=small_image.source
        )
        assert result["changed"] is True
        # The missing name is added to the image that has the existing name.
        assert store.image("localhost/app:1")["id"] == store.image("localhost/app:stable")["id"]
        store.podman("images")

    def test_podman_pulls_image_without_skopeo(
        self,
        lab: Lab,
        make_empty_store: t.Callable[[str], Store],
        run_module: RunModule,
        small_image: Image,
    ) -> None:
        store = make_empty_store("vfs")
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
        ("args", "message"),
        [
            ({"image": "localhost/app:1", "source": "oci:/nowhere:1"}, "/nowhere"),
            ({"image": "localhost/app:1", "source": "carrier-pigeon:x"}, "carrier-pigeon"),
            ({"image": "sha256:" + "0" * 64, "source": "oci:/nowhere:1"}, "is an ID"),
        ],
    )
    def test_invalid_input_is_reported_and_changes_nothing(
        self, args: Json, message: str, make_empty_store: t.Callable[[str], Store], declare: Declare
    ) -> None:
        store = make_empty_store("vfs")
        result = declare(store, fails=True, **args)
        assert message in result["msg"]
        assert "exception" not in result
        assert store.images() == []


class TestAbsent:
    @pytest.mark.parametrize("kind", KINDS)
    def test_image_is_removed_with_all_its_layers(
        self, kind: str, make_store: MakeStore, declare: Declare, small_image: Image
    ) -> None:
        store = make_store(kind, small_image)
        store.podman("rm", store.create(small_image.name, *namespace_args(store)))
        (mapped,) = store.mapped_layers(small_image.name)
        layers = store.layer_ids()
        before = store.disk_state()
        predicted = declare(store, check=True, image=small_image.name, state="absent")
        assert before.changes(store.disk_state()) == []
        result = declare(store, image=small_image.name, state="absent")
        assert (result["changed"], result["actions"]) == (True, ["removed"])
        assert result["removed_layers"] == predicted["removed_layers"]
        assert result["removed_layers"][0] == mapped
        assert set(result["removed_layers"]) == layers
        assert only(only(result["images"])["mapped_layers"])["id"] == mapped
        assert store.layer_ids() == set()
        assert store.images() == []
        for layer_id in layers:
            assert store.remaining_paths(layer_id) == []
        store.podman("images", "-a")
        store.podman("system", "df")
        assert declare(store, image=small_image.name, state="absent")["changed"] is False

    def test_layers_shared_with_other_images_are_kept(
        self, lab: Lab, make_store: MakeStore, declare: Declare
    ) -> None:
        base: images.Layer = {"base": images.file("b" * 5000)}
        first = images.build(lab.folder(), [base, {"one": images.file("1")}], "localhost/one:1")
        second = images.build(lab.folder(), [base, {"two": images.file("2")}], "localhost/two:1")
        store = make_store("overlay-forced", first, second)
        assert len(store.layer_ids()) == 3
        result = declare(store, image="localhost/one:1", state="absent")
        assert len(result["removed_layers"]) == 1
        assert len(store.layer_ids()) == 2
        store.create("localhost/two:1", "--uidmap", MAP, "--gidmap", MAP)

    def test_image_used_by_containers_is_not_removed(
        self, make_store: MakeStore, declare: Declare, small_image: Image
    ) -> None:
        store = make_store("vfs", small_image)
        store.create(small_image.name, "--name", "plain")
        store.create(small_image.name, "--name", "mapped", *namespace_args(store))
        store.storage_cli("create-container", "-n", "hidden", store.image(small_image.name)["id"])
        before = store.disk_state()
        for check in (True, False):
            result = declare(store, check=check, fails=True, image=small_image.name, state="absent")
            for name in ("plain", "mapped", "hidden"):
                assert name in result["msg"]
            assert len(result["users"]) == 3
        assert before.changes(store.disk_state()) == []

    def test_only_name_is_removed_if_image_has_other_names(
        self, make_store: MakeStore, declare: Declare, small_image: Image
    ) -> None:
        store = make_store("vfs", small_image)
        store.podman("tag", small_image.name, "localhost/other:1")
        result = declare(store, image="other:1", state="absent")
        assert (result["actions"], result["removed_layers"]) == (["untagged"], [])
        assert store.image(small_image.name)["names"] == [small_image.name]
        store.podman("tag", small_image.name, "localhost/other:1")
        result = declare(store, image=store.image(small_image.name)["id"], state="absent")
        assert result["actions"] == ["removed"]
        assert store.images() == []

    @pytest.mark.parametrize("setup", ["vfs", "rootless-as-root"])
    def test_missing_store_of_source_is_not_created(
        self, make_case: t.Callable[..., t.Any], setup: str
    ) -> None:
        case = make_case(setup)
        missing = case.store.base / "missing"
        case.store.base.chmod(0o777)
        for check in (True, False):
            # The last path is a directory that is not a store.
            for specifier in (
                f"[vfs@{missing}+{missing}-run]",
                f"[{missing}]",
                f"[{case.store.base}]",
            ):
                failed = case.call(
                    "image_layers",
                    {"images": ["localhost/new:1"], "source": f"containers-storage:{specifier}x:1"},
                    check=check,
                    fails=True,
                )
                assert "there is no container store in " in failed["msg"]
                assert not missing.exists()
            specifier = f"[{case.store.driver}@{case.store.graphroot}+{missing}]"
            failed = case.call(
                "image_layers",
                {"images": ["localhost/new:1"], "source": f"containers-storage:{specifier}x:1"},
                check=check,
                fails=True,
            )
            assert f"the runroot {missing} does not exist" in failed["msg"]
            assert not missing.exists()

    def test_image_of_read_only_store_is_not_removed(
        self, make_store: MakeStore, declare: Declare, small_image: Image
    ) -> None:
        shared = make_store("vfs", small_image)
        store = make_store("vfs", read_only=[str(shared.graphroot)])
        store.podman("images")
        result = declare(store, fails=True, image=small_image.name, state="absent")
        assert "read-only" in result["msg"]

    def test_layers_that_additional_store_also_has_are_removed(
        self, make_store: MakeStore, declare: Declare, small_image: Image
    ) -> None:
        below = make_store("overlay-forced", small_image)
        below.podman("rm", below.create(small_image.name, "--uidmap=0:100000:65536"))
        before = below.disk_state()
        store = make_store("overlay-forced", small_image)
        layers = store.layer_ids()
        store.add_read_only(below.graphroot)
        result = declare(store, image=small_image.name, state="absent")
        assert (result["actions"], set(result["removed_layers"])) == (["removed"], layers)
        assert (store.layers(), store.images()) == ([], [])
        assert before.changes(below.disk_state()) == []
