# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Test images that are converted in place, and their use by podman, buildah and skopeo."""

from __future__ import annotations

import hashlib
import os
import shutil
import typing as t

import pytest
from support import hosts, images, matrix
from support.conversions import convert, texts
from support.images import Image
from support.lab import Lab
from support.store_cases import namespace_args
from support.stores import Json, Store

if t.TYPE_CHECKING:
    from support.hosts import Host

MakeStore = t.Callable[..., Store]
MAP = "0:100000:65536"
OTHER_MAP = "0:300000:65536"
KINDS = ("rootless-overlay", "overlay-forced", "vfs", "btrfs")
OWNERS = "stat -c '%u:%g %a %n' / /a /b /home/user /home/user/notes /usr/bin/suid /usr/bin/sgid /usr/lib/one"


def maps_of(store: Store, name: str, text: str = MAP) -> t.Tuple[t.List[str], t.List[str]]:
    """The map in the form that the runtime records, from a container that is then removed."""
    container = store.container(store.create(name, *namespace_args(store, text)))
    store.podman("rm", container["id"])
    return texts(container, "uidmap"), texts(container, "gidmap")


def used_bytes(store: Store) -> int:
    """Bytes of all files in the driver's directory, each inode once."""
    found = {}
    for folder, _folders, names in os.walk(store.graphroot / store.driver):
        for name in names:
            status = os.lstat(os.path.join(folder, name))
            found[status.st_dev, status.st_ino] = status.st_size
    return sum(found.values())


def attributes(store: Store, name: str) -> t.Dict[str, t.Any]:
    """The parts of the records of an image and its layers that a conversion must keep."""
    image = store.image(name)
    found: t.Dict[str, t.Any] = {"image": {**image, "mapped-layers": None}}
    layer = image["layer"]
    while layer:
        record = dict(store.layer(layer))
        for key in ("uidmap", "gidmap"):
            record.pop(key, None)
        found[layer] = record
        layer = record.get("parent", "")
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("release", matrix.RELEASES)
def test_containers_use_converted_image_without_copy(
    release: str,
    kind: str,
    make_store: MakeStore,
    small_image: Image,
    lab: Lab,
    host: t.Callable[[str], Host],
) -> None:
    store = make_store(kind, small_image, machine=hosts.of_release(lab, release, host))
    name = small_image.name
    plain = store.shell(name, OWNERS)
    size, before = used_bytes(store), attributes(store, name)
    layers = store.layer_ids()
    uidmap, gidmap = maps_of(store, name)
    (copy,) = store.layer_ids() - layers

    predicted = convert(store, [name], uidmap, gidmap, check=True)
    assert store.layer_ids() == {*layers, copy}
    converted = convert(store, [name], uidmap, gidmap)
    for key in ("layers", "removed_layers", "inodes"):
        assert converted[key] == predicted[key], converted
    assert (set(converted["layers"]), converted["removed_layers"]) == (layers, [copy])
    assert store.layer_ids() == layers
    assert attributes(store, name) == before
    for layer in store.layers():
        assert (texts(layer, "uidmap"), texts(layer, "gidmap")) == (uidmap, gidmap)
        assert "flags" not in layer or "incomplete" not in layer["flags"]
    assert convert(store, [name], uidmap, gidmap)["layers"] == []
    # A start creates only the container's layer, and the container sees the same owners.
    assert store.shell(name, OWNERS, [*namespace_args(store), "--user=0"]) == plain
    container = store.container(store.create(name, *namespace_args(store), "--name=kept"))
    assert store.layer_ids() - layers == {container["layer"]}
    assert store.layer(container["layer"])["parent"] == store.image(name)["layer"]
    if store.driver == "overlay":
        assert used_bytes(store) <= 1.02 * size
    failed = convert(store, [name], [])
    assert (failed["kind"], "kept" in failed["msg"]) == ("LayerInUse", True), failed
    store.podman("rm", "kept")
    _assert_checks_succeed(store)
    _assert_push_has_original_layers(store, small_image)
    # A pull finds the image in the store and adds no layers.
    store.skopeo("copy", "-q", small_image.source, f"containers-storage:{name}")
    assert store.layer_ids() == layers
    # The reverse conversion; a removal afterwards leaves no records.
    reverted = convert(store, [name], [])
    assert set(reverted.get("layers", ())) == layers, reverted
    assert all("uidmap" not in layer and "gidmap" not in layer for layer in store.layers())
    assert attributes(store, name) == before
    assert store.shell(name, OWNERS) == plain
    _assert_checks_succeed(store)
    store.podman("rmi", name)
    assert (store.layer_ids(), store.images()) == (set(), [])


def _assert_checks_succeed(store: Store) -> None:
    if store.machine.version("podman") >= (5, 4):
        checked = store.storage_cli("check", check=False)
        assert checked.rc == 0, checked
        assert store.podman("system", "check", check=False).rc == 0


def _assert_push_has_original_layers(store: Store, image: Image) -> None:
    """A push contains the layers of the source: the digests are those of the archives."""
    target = store.base / "tmp" / "out"
    store.skopeo("copy", "-q", f"containers-storage:{image.name}", f"dir:{target}")
    pushed = {hashlib.sha256(path.read_bytes()).hexdigest() for path in target.iterdir()}
    shutil.rmtree(target)
    expected = {hashlib.sha256(images.layer_tar(layer)).hexdigest() for layer in image.layers}
    assert expected <= pushed


def _images_with_shared_base(lab: Lab) -> t.Tuple[Image, Image]:
    """Two images that share a layer."""
    base: images.Layer = {**images.shell(), "etc": images.directory(), "etc/a": images.file("a")}
    first, second = (
        images.build(lab.folder(), [base, {f"etc/{name}": images.file("1")}], f"localhost/{name}:1")
        for name in ("one", "two")
    )
    return first, second


class TestRefusal:
    """A refused conversion changes nothing, and the message names the images or containers that prevent it."""

    @pytest.fixture
    def base_and_two(self, lab: Lab, make_store: MakeStore) -> t.Tuple[Store, t.List[str]]:
        """A store with a base image, and two images with additional layers."""
        base: images.Layer = {
            **images.shell(),
            "etc": images.directory(),
            "etc/a": images.file("a"),
        }
        names = ["localhost/base:1", "localhost/one:1", "localhost/two:1"]
        built = [
            images.build(lab.folder(), layers, name)
            for name, layers in zip(
                names,
                (
                    [base],
                    [base, {"etc/one": images.file("1", uid=1000)}],
                    [base, {"etc/two": images.file("2", uid=1000)}],
                ),
            )
        ]
        return make_store("overlay-forced", *built), names

    def test_images_with_shared_layers_are_converted_only_together(
        self, base_and_two: t.Tuple[Store, t.List[str]]
    ) -> None:
        store, (base, first, second) = base_and_two
        before = store.layers()
        failed = convert(store, [first], [MAP])
        assert failed["kind"] == "LayerInUse"
        assert {base in failed["msg"], second in failed["msg"]} == {True}
        assert convert(store, [base, first], [MAP], check=True)["kind"] == "LayerInUse"
        assert store.layers() == before
        converted = convert(store, [base, first, second], [MAP])
        assert set(converted["layers"]) == store.layer_ids()
        assert {item for layer in store.layers() for item in texts(layer, "uidmap")} == {MAP}
        for name in (base, first, second):
            store.podman("rm", store.create(name, *namespace_args(store)))
        assert set(converted["layers"]) == store.layer_ids()
        # The image and its base already have the map.
        assert convert(store, [first], [MAP])["layers"] == []

    @pytest.mark.parametrize("container_kind", ["podman", "buildah", "other map"])
    def test_image_with_containers_is_refused(
        self, container_kind: str, make_store: MakeStore, small_image: Image
    ) -> None:
        store = make_store("overlay-forced", small_image)
        if container_kind == "buildah":
            name = store.buildah("from", "--pull-never", small_image.name).stdout.split()[-1]
        else:
            name = "in-the-way"
            maps = namespace_args(store, OTHER_MAP) if container_kind == "other map" else []
            store.create(small_image.name, *maps, f"--name={name}")
        before = store.disk_state()
        for check in (True, False):
            failed = convert(store, [small_image.name], [MAP], check=check)
            assert (failed["kind"], name in failed["msg"]) == ("LayerInUse", True), failed
            assert before.changes(store.disk_state()) == []

    def test_mounted_image_is_refused(self, make_store: MakeStore, small_image: Image) -> None:
        store = make_store("vfs", small_image)
        store.podman("image", "mount", small_image.name)
        failed = convert(store, [small_image.name], [MAP])
        assert (failed["kind"], "is mounted" in failed["msg"]) == ("LayerInUse", True), failed
        store.podman("image", "unmount", "--all")
        assert convert(store, [small_image.name], [MAP])["changed"]

    def test_ids_outside_map_are_refused(self, make_store: MakeStore, small_image: Image) -> None:
        store = make_store("overlay-forced", small_image)
        before = store.disk_state()
        for check in (True, False):
            failed = convert(store, [small_image.name], ["0:100000:900"], check=check)
            assert failed["kind"] == "UnmappedIDs", failed
            assert (failed["facts"]["uids"], failed["facts"]["gids"]) == ([1000], [1000])
            assert before.changes(store.disk_state()) == []

    def test_host_ids_outside_user_namespace_are_refused(
        self, make_store: MakeStore, small_image: Image
    ) -> None:
        store = make_store("rootless-overlay", small_image)
        before = store.disk_state()
        failed = convert(store, [small_image.name], [MAP])
        assert (failed["kind"], "UID 100000" in failed["msg"]) == ("MapError", True), failed
        assert before.changes(store.disk_state()) == []

    def test_image_of_shared_store_is_refused(
        self, make_store: MakeStore, small_image: Image
    ) -> None:
        """A container of another store may use the layers, and this store has no record of it."""
        store = make_store("overlay-forced", small_image)
        folder = store.graphroot / "userns-storage"
        folder.mkdir(mode=0o700)
        (folder / "shared").touch()
        before = store.disk_state()
        for check in (True, False):
            failed = convert(store, [small_image.name], [MAP], check=check)
            assert failed["kind"] == "LayerInUse", failed
            assert f"{folder}/shared" in failed["msg"]
            assert before.changes(store.disk_state()) == []
        (folder / "shared").unlink()
        assert convert(store, [small_image.name], [MAP])["changed"]

    def test_image_in_read_only_store_is_refused(
        self, make_store: MakeStore, small_image: Image
    ) -> None:
        below = make_store("overlay-forced", small_image)
        store = make_store("overlay-forced", read_only=[str(below.graphroot)])
        store.podman("images")
        before = below.disk_state()
        failed = convert(store, [below.image(small_image.name)["id"]], [MAP])
        assert failed["kind"] == "ReadOnlyStore", failed
        assert before.changes(below.disk_state()) == []

    @pytest.mark.parametrize("other", ["image", "mapped layer"])
    def test_layers_that_additional_store_also_uses_are_refused(
        self, other: str, lab: Lab, make_store: MakeStore
    ) -> None:
        """A runtime mounts the layers of this store for the images of both stores."""
        first, second = _images_with_shared_base(lab)
        below = make_store("overlay-forced", first if other == "mapped layer" else second)
        if other == "mapped layer":
            below.podman("rm", below.create(first.name, *namespace_args(below)))
        # A mapped layer in the additional store belongs to the image itself.
        name = first.name if other == "mapped layer" else second.name
        store = make_store("overlay-forced", first)
        store.add_read_only(below.graphroot)
        before = store.disk_state()
        for check in (True, False):
            failed = convert(store, [first.name], [MAP], check=check)
            assert failed["kind"] == "LayerInUse", failed
            assert str(below.graphroot) in failed["msg"]
            assert name in failed["msg"]
            assert before.changes(store.disk_state()) == []

    @pytest.mark.parametrize(("release", "owner"), [("trixie", 0), ("experimental", 100000)])
    def test_runtime_uses_converted_layers_for_other_image(
        self,
        release: str,
        owner: int,
        lab: Lab,
        make_store: MakeStore,
        host: t.Callable[[str], Host],
    ) -> None:
        """The reason for the refusal: containers/storage 1.63 and later mount this store's layers for both images."""
        machine = hosts.of_release(lab, release, host)
        first, second = _images_with_shared_base(lab)
        below = make_store("overlay-forced", second, machine=machine)
        store = make_store("overlay-forced", first, machine=machine)
        assert convert(store, [first.name], [MAP])["changed"]
        store.add_read_only(below.graphroot)
        assert store.run(second.name, "stat", "-c", "%u", "/etc/a", "/etc/two").split() == [
            str(owner),
            "0",
        ]

    def test_image_that_additional_store_also_has_is_converted(
        self, make_store: MakeStore, small_image: Image
    ) -> None:
        below = make_store("overlay-forced", small_image)
        store = make_store("overlay-forced", small_image)
        store.add_read_only(below.graphroot)
        converted = convert(store, [small_image.name], [MAP])
        assert len(converted["layers"]) == len(below.layers())
        assert store.run(small_image.name, "id", "-u", args=namespace_args(store)).split() == ["0"]
        assert len(store.layers()) == len(below.layers())


@pytest.mark.parametrize("kind", ["overlay-forced", "vfs"])
def test_check_mode_writes_nothing_and_predicts_lock_time(
    kind: str, make_store: MakeStore, many_files_image: t.Callable[[int], Image]
) -> None:
    image = many_files_image(3000)
    store = make_store(kind, image)
    before = store.disk_state()
    predicted = convert(store, [image.name], [MAP], check=True)
    assert before.changes(store.disk_state()) == []
    assert predicted["lock_seconds"] == 0 < predicted["expected_lock_seconds"]
    assert predicted["inodes"] >= 3000
    converted = convert(store, [image.name], [MAP])
    assert converted["inodes"] == predicted["inodes"]
    assert converted["lock_seconds"] > 0


def test_independent_mapped_layer_is_kept(
    make_store: MakeStore, small_image: Image, run_module: t.Any
) -> None:
    """layer_template copies the whole tree, so its layers for other maps remain correct after the conversion."""
    store = make_store("overlay-forced", small_image)
    plain = store.shell(small_image.name, OWNERS)
    args = {"image": small_image.name, "uidmap": [OTHER_MAP], "gidmap": [OTHER_MAP]}
    environ = store.module_environ()
    (mapped_layer,) = run_module(
        "layer_template", {**store.module_args(), **args}, environ=environ
    )["layers"]
    converted = convert(store, [small_image.name], [MAP])
    assert converted["removed_layers"] == []
    assert store.mapped_layers(small_image.name) == [mapped_layer["layer_id"]]
    for text in (MAP, OTHER_MAP):
        assert store.shell(small_image.name, OWNERS, namespace_args(store, text)) == plain
    assert store.layer_ids() == {*converted["layers"], mapped_layer["layer_id"]}


class TestModule:
    """The option convert of image_layers."""

    @pytest.fixture
    def declare(self, run_module: t.Any) -> t.Callable[..., Json]:
        def run(store: Store, *names: str, **options: t.Any) -> Json:
            check, fails = options.pop("check", False), options.pop("fails", False)
            maps = {"uidmap": [MAP], "gidmap": [MAP]} if not store.user else {"userns": "keep-id"}
            given = {key: value for key, value in {**maps, **options}.items() if value is not None}
            args = {**store.module_args(), "images": list(names), **given}
            environ = {key: value for key, value in store.env().items() if key.startswith("_CONT")}
            result: Json = run_module(
                "image_layers", args, check=check, diff=True, fails=fails, environ=environ
            )
            return result

        return run

    @pytest.mark.parametrize("kind", ["rootless-overlay", "vfs"])
    def test_conversion_is_required_predicted_done_and_idempotent(
        self,
        kind: str,
        make_store: MakeStore,
        small_image: Image,
        declare: t.Callable[..., Json],
        run_module: t.Any,
    ) -> None:
        store = make_store(kind, small_image)
        before = store.disk_state()
        failed = declare(store, small_image.name, fails=True)
        assert "convert: true" in failed["msg"], failed
        predicted = declare(store, small_image.name, convert=True, check=True)
        assert before.changes(store.disk_state()) == []
        converted = declare(store, small_image.name, convert=True)
        for result in (predicted, converted):
            assert (result["changed"], result["actions"]) == (True, ["converted"])
            (entry,) = result["mappings"]
            assert entry["status"] == "mapped"
            (conversion,) = result["conversions"]
            assert set(conversion["layers"]) == store.layer_ids()
            assert conversion["expected_lock_seconds"] > 0
            (was,), (now,) = (result["diff"][side]["images"] for side in ("before", "after"))
            assert (was["uidmap"], now["uidmap"]) == ([], entry["uidmap"])
        before = store.disk_state()
        repeated = declare(store, small_image.name, convert=True)
        assert (repeated["changed"], repeated["conversions"]) == (False, [])
        assert before.changes(store.disk_state()) == []
        layers = store.layer_ids()
        maps = {"uidmap": [MAP], "gidmap": [MAP]} if not store.user else {"userns": "keep-id"}
        args = {**store.module_args(), "image": small_image.name, **maps}
        (mapped_layer,) = run_module("layer_template", args)["layers"]
        assert (mapped_layer["action"], store.layer_ids()) == ("existing", layers)
        mapped = store.shell(small_image.name, OWNERS, [*namespace_args(store), "--user=0"])
        none = {"uidmap": None, "gidmap": None, "userns": "host"}
        reverted = declare(store, small_image.name, convert=True, **none)
        assert reverted["actions"] == ["converted"]
        assert all("uidmap" not in layer for layer in store.layers())
        assert store.shell(small_image.name, OWNERS) == mapped

    def test_conversion_of_image_whose_base_is_shared(
        self, lab: Lab, make_store: MakeStore, declare: t.Callable[..., Json]
    ) -> None:
        base: images.Layer = {**images.shell(), "etc": images.directory()}
        first, second = (
            images.build(
                lab.folder(), [base, {f"etc/{name}": images.file(name)}], f"localhost/{name}:1"
            )
            for name in ("one", "two")
        )
        store = make_store("vfs", first)
        failed = declare(store, second.name, source=second.source, fails=True)
        assert first.name in failed["msg"], failed
        result = declare(store, first.name, convert=True, source=first.source)
        assert result["actions"] == ["converted"]
        pulled = declare(store, second.name, convert=True, source=second.source)
        assert (pulled["actions"], pulled["conversions"]) == (["pulled"], [])
        failed = declare(
            store, first.name, convert=True, uidmap=None, gidmap=None, userns="host", fails=True
        )
        assert second.name in failed["msg"], failed
        both = declare(
            store, first.name, second.name, convert=True, uidmap=None, gidmap=None, userns="host"
        )
        assert both["actions"] == ["converted", "converted"]
        assert len(both["conversions"]) == 1

    def test_convert_requires_map(
        self, make_store: MakeStore, small_image: Image, run_module: t.Any
    ) -> None:
        store = make_store("vfs", small_image)
        args = {**store.module_args(), "image": small_image.name, "convert": True}
        assert "convert is True" in run_module("image_layers", args, fails=True)["msg"]
