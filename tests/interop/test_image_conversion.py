# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Images converted in place, and then used by the real runtimes."""

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
from support.stores import Json, Store

if t.TYPE_CHECKING:
    from support.hosts import Host

MakeStore = t.Callable[..., Store]
MAP = "0:100000:65536"
OTHER_MAP = "0:300000:65536"
KINDS = ("rootless-overlay", "overlay-forced", "vfs", "btrfs")
OWNERS = "stat -c '%u:%g %a %n' / /a /b /home/user /home/user/notes /usr/bin/suid /usr/bin/sgid /usr/lib/one"


def options(store: Store, text: str = MAP) -> t.List[str]:
    """podman's options for a map; in rootless stores the map is keep-id."""
    return ["--userns=keep-id"] if store.user else [f"--uidmap={text}", f"--gidmap={text}"]


def maps_of(store: Store, name: str, text: str = MAP) -> t.Tuple[t.List[str], t.List[str]]:
    """The map in the form of the runtime, from a container that is gone again."""
    container = store.container(store.create(name, *options(store, text)))
    store.podman("rm", container["id"])
    return texts(container, "uidmap"), texts(container, "gidmap")


def used(store: Store) -> int:
    """Bytes of all files of the store, each inode once."""
    found = {}
    for folder, _folders, names in os.walk(store.graphroot / store.driver):
        for name in names:
            status = os.lstat(os.path.join(folder, name))
            found[status.st_dev, status.st_ino] = status.st_size
    return sum(found.values())


def attributes(store: Store, name: str) -> t.Dict[str, t.Any]:
    """All that is to stay of the records of an image and its layers."""
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
def test_a_converted_image_serves_containers_without_a_copy(
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
    size, before = used(store), attributes(store, name)
    layers = store.layer_ids()
    uidmap, gidmap = maps_of(store, name)
    (copy,) = store.layer_ids() - layers

    foreseen = convert(store, [name], uidmap, gidmap, check=True)
    assert store.layer_ids() == {*layers, copy}
    done = convert(store, [name], uidmap, gidmap)
    for key in ("layers", "removed_layers", "inodes"):
        assert done[key] == foreseen[key], done
    assert (set(done["layers"]), done["removed_layers"]) == (layers, [copy])
    assert store.layer_ids() == layers
    assert attributes(store, name) == before
    for layer in store.layers():
        assert (texts(layer, "uidmap"), texts(layer, "gidmap")) == (uidmap, gidmap)
        assert "flags" not in layer or "incomplete" not in layer["flags"]
    assert convert(store, [name], uidmap, gidmap)["layers"] == []
    # The first start: no layer but the container's own, and all owners as before.
    assert store.shell(name, OWNERS, [*options(store), "--user=0"]) == plain
    kept = store.container(store.create(name, *options(store), "--name=kept"))
    assert store.layer_ids() - layers == {kept["layer"]}
    assert store.layer(kept["layer"])["parent"] == store.image(name)["layer"]
    if store.driver == "overlay":
        assert used(store) <= 1.02 * size
    refused = convert(store, [name], [])
    assert (refused["kind"], "kept" in refused["msg"]) == ("LayerInUse", True), refused
    store.podman("rm", "kept")
    _is_in_order(store)
    _is_exported_as_before(store, small_image)
    # A pull finds it in the store, and removing it leaves nothing.
    store.skopeo("copy", "-q", small_image.source, f"containers-storage:{name}")
    assert store.layer_ids() == layers
    # And back.
    back = convert(store, [name], [])
    assert set(back.get("layers", ())) == layers, back
    assert all("uidmap" not in layer and "gidmap" not in layer for layer in store.layers())
    assert attributes(store, name) == before
    assert store.shell(name, OWNERS) == plain
    _is_in_order(store)
    store.podman("rmi", name)
    assert (store.layer_ids(), store.images()) == (set(), [])


def _is_in_order(store: Store) -> None:
    if store.machine.version("podman") >= (5, 4):
        checked = store.storage_cli("check", check=False)
        assert checked.rc == 0, checked
        assert store.podman("system", "check", check=False).rc == 0


def _is_exported_as_before(store: Store, image: Image) -> None:
    """A push has the layers of the source: their digests are those of the archives."""
    target = store.base / "tmp" / "out"
    store.skopeo("copy", "-q", f"containers-storage:{image.name}", f"dir:{target}")
    pushed = {hashlib.sha256(path.read_bytes()).hexdigest() for path in target.iterdir()}
    shutil.rmtree(target)
    wanted = {hashlib.sha256(images.layer_tar(layer)).hexdigest() for layer in image.layers}
    assert wanted <= pushed


def _on_one_base(lab: Lab) -> t.Tuple[Image, Image]:
    """Two images that share a layer."""
    base: images.Layer = {**images.shell(), "etc": images.directory(), "etc/a": images.file("a")}
    one, two = (
        images.build(lab.folder(), [base, {f"etc/{name}": images.file("1")}], f"localhost/{name}:1")
        for name in ("one", "two")
    )
    return one, two


class TestRefused:
    """Nothing is changed, and the message names who needs the image as it is."""

    @pytest.fixture
    def base_and_two(self, lab: Lab, make_store: MakeStore) -> t.Tuple[Store, t.List[str]]:
        """A store with a base image and two that rest on it."""
        base: images.Layer = {
            **images.shell(),
            "etc": images.directory(),
            "etc/a": images.file("a"),
        }
        names = ["localhost/base:1", "localhost/one:1", "localhost/two:1"]
        made = [
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
        return make_store("overlay-forced", *made), names

    def test_images_that_share_layers_only_together(
        self, base_and_two: t.Tuple[Store, t.List[str]]
    ) -> None:
        store, (base, one, two) = base_and_two
        before = store.layers()
        refused = convert(store, [one], [MAP])
        assert refused["kind"] == "LayerInUse"
        assert {base in refused["msg"], two in refused["msg"]} == {True}
        assert convert(store, [base, one], [MAP], check=True)["kind"] == "LayerInUse"
        assert store.layers() == before
        done = convert(store, [base, one, two], [MAP])
        assert set(done["layers"]) == store.layer_ids()
        assert {item for layer in store.layers() for item in texts(layer, "uidmap")} == {MAP}
        for name in (base, one, two):
            store.podman("rm", store.create(name, *options(store)))
        assert set(done["layers"]) == store.layer_ids()
        # An image above a base that has the map already.
        assert convert(store, [one], [MAP])["layers"] == []

    @pytest.mark.parametrize("user", ["podman", "buildah", "other map"])
    def test_containers_of_every_program(
        self, user: str, make_store: MakeStore, small_image: Image
    ) -> None:
        store = make_store("overlay-forced", small_image)
        if user == "buildah":
            name = store.buildah("from", "--pull-never", small_image.name).stdout.split()[-1]
        else:
            name = "in-the-way"
            maps = options(store, OTHER_MAP) if user == "other map" else []
            store.create(small_image.name, *maps, f"--name={name}")
        before = store.snapshot_of_disk()
        for check in (True, False):
            refused = convert(store, [small_image.name], [MAP], check=check)
            assert (refused["kind"], name in refused["msg"]) == ("LayerInUse", True), refused
            assert before.changes(store.snapshot_of_disk()) == []

    def test_a_mounted_image(self, make_store: MakeStore, small_image: Image) -> None:
        store = make_store("vfs", small_image)
        store.podman("image", "mount", small_image.name)
        refused = convert(store, [small_image.name], [MAP])
        assert (refused["kind"], "is mounted" in refused["msg"]) == ("LayerInUse", True), refused
        store.podman("image", "unmount", "--all")
        assert convert(store, [small_image.name], [MAP])["changed"]

    def test_ids_outside_the_map(self, make_store: MakeStore, small_image: Image) -> None:
        store = make_store("overlay-forced", small_image)
        before = store.snapshot_of_disk()
        for check in (True, False):
            refused = convert(store, [small_image.name], ["0:100000:900"], check=check)
            assert refused["kind"] == "UnmappedIDs", refused
            assert (refused["facts"]["uids"], refused["facts"]["gids"]) == ([1000], [1000])
            assert before.changes(store.snapshot_of_disk()) == []

    def test_ids_outside_the_users_namespace(
        self, make_store: MakeStore, small_image: Image
    ) -> None:
        store = make_store("rootless-overlay", small_image)
        before = store.snapshot_of_disk()
        refused = convert(store, [small_image.name], [MAP])
        assert (refused["kind"], "UID 100000" in refused["msg"]) == ("MapError", True), refused
        assert before.changes(store.snapshot_of_disk()) == []

    def test_an_image_of_a_store_that_others_read(
        self, make_store: MakeStore, small_image: Image
    ) -> None:
        """A container of another store may rest on the layers, and no record here names it."""
        store = make_store("overlay-forced", small_image)
        folder = store.graphroot / "userns-storage"
        folder.mkdir(mode=0o700)
        (folder / "shared").touch()
        before = store.snapshot_of_disk()
        for check in (True, False):
            refused = convert(store, [small_image.name], [MAP], check=check)
            assert refused["kind"] == "LayerInUse", refused
            assert f"{folder}/shared" in refused["msg"]
            assert before.changes(store.snapshot_of_disk()) == []
        (folder / "shared").unlink()
        assert convert(store, [small_image.name], [MAP])["changed"]

    def test_an_image_in_a_read_only_store(self, make_store: MakeStore, small_image: Image) -> None:
        below = make_store("overlay-forced", small_image)
        store = make_store("overlay-forced", read_only=[str(below.graphroot)])
        store.podman("images")
        before = below.snapshot_of_disk()
        refused = convert(store, [below.image(small_image.name)["id"]], [MAP])
        assert refused["kind"] == "ReadOnlyStore", refused
        assert before.changes(below.snapshot_of_disk()) == []

    @pytest.mark.parametrize("other", ["image", "mapped layer"])
    def test_layers_that_an_additional_store_has_too(
        self, other: str, lab: Lab, make_store: MakeStore
    ) -> None:
        """A runtime mounts those of the store itself below the images of both."""
        one, two = _on_one_base(lab)
        below = make_store("overlay-forced", one if other == "mapped layer" else two)
        if other == "mapped layer":
            below.podman("rm", below.create(one.name, *options(below)))
        # Shown under its ID only, for a mapped layer belongs to the same image.
        name = one.name if other == "mapped layer" else two.name
        store = make_store("overlay-forced", one)
        store.add_read_only(below.graphroot)
        before = store.snapshot_of_disk()
        for check in (True, False):
            refused = convert(store, [one.name], [MAP], check=check)
            assert refused["kind"] == "LayerInUse", refused
            assert str(below.graphroot) in refused["msg"]
            assert name in refused["msg"]
            assert before.changes(store.snapshot_of_disk()) == []

    @pytest.mark.parametrize(("release", "owner"), [("trixie", 0), ("experimental", 100000)])
    def test_what_their_containers_would_see(
        self,
        release: str,
        owner: int,
        lab: Lab,
        make_store: MakeStore,
        host: t.Callable[[str], Host],
    ) -> None:
        """Why they are refused: since containers/storage 1.63 the store's own layers are mounted below both images."""
        machine = hosts.of_release(lab, release, host)
        one, two = _on_one_base(lab)
        below = make_store("overlay-forced", two, machine=machine)
        store = make_store("overlay-forced", one, machine=machine)
        assert convert(store, [one.name], [MAP])["changed"]
        store.add_read_only(below.graphroot)
        assert store.run(two.name, "stat", "-c", "%u", "/etc/a", "/etc/two").split() == [
            str(owner),
            "0",
        ]

    def test_an_image_that_an_additional_store_has_too_is_converted(
        self, make_store: MakeStore, small_image: Image
    ) -> None:
        below = make_store("overlay-forced", small_image)
        store = make_store("overlay-forced", small_image)
        store.add_read_only(below.graphroot)
        done = convert(store, [small_image.name], [MAP])
        assert len(done["layers"]) == len(below.layers())
        assert store.run(small_image.name, "id", "-u", args=options(store)).split() == ["0"]
        assert len(store.layers()) == len(below.layers())


@pytest.mark.parametrize("kind", ["overlay-forced", "vfs"])
def test_check_mode_writes_nothing_and_tells_how_long_the_store_will_be_locked(
    kind: str, make_store: MakeStore, many_files_image: t.Callable[[int], Image]
) -> None:
    image = many_files_image(3000)
    store = make_store(kind, image)
    before = store.snapshot_of_disk()
    foreseen = convert(store, [image.name], [MAP], check=True)
    assert before.changes(store.snapshot_of_disk()) == []
    assert foreseen["lock_seconds"] == 0 < foreseen["expected_lock_seconds"]
    assert foreseen["inodes"] >= 3000
    done = convert(store, [image.name], [MAP])
    assert done["inodes"] == foreseen["inodes"]
    assert done["lock_seconds"] > 0


def test_a_copy_that_is_whole_stays(
    make_store: MakeStore, small_image: Image, run_module: t.Any
) -> None:
    """layer_template copies the whole tree, so its layers for other maps are right afterwards as well."""
    store = make_store("overlay-forced", small_image)
    plain = store.shell(small_image.name, OWNERS)
    words = {"image": small_image.name, "uidmap": [OTHER_MAP], "gidmap": [OTHER_MAP]}
    environ = store.module_environ()
    (made,) = run_module("layer_template", {**store.module_args(), **words}, environ=environ)[
        "layers"
    ]
    done = convert(store, [small_image.name], [MAP])
    assert done["removed_layers"] == []
    assert store.mapped_layers(small_image.name) == [made["layer_id"]]
    for text in (MAP, OTHER_MAP):
        assert store.shell(small_image.name, OWNERS, options(store, text)) == plain
    assert store.layer_ids() == {*done["layers"], made["layer_id"]}


class TestModule:
    """image_layers with the option convert."""

    @pytest.fixture
    def declare(self, run_module: t.Any) -> t.Callable[..., Json]:
        def run(store: Store, *names: str, **options: t.Any) -> Json:
            check, fails = options.pop("check", False), options.pop("fails", False)
            maps = {"uidmap": [MAP], "gidmap": [MAP]} if not store.user else {"userns": "keep-id"}
            given = {key: value for key, value in {**maps, **options}.items() if value is not None}
            words = {**store.module_args(), "images": list(names), **given}
            environ = {key: value for key, value in store.env().items() if key.startswith("_CONT")}
            done: Json = run_module(
                "image_layers", words, check=check, diff=True, fails=fails, environ=environ
            )
            return done

        return run

    @pytest.mark.parametrize("kind", ["rootless-overlay", "vfs"])
    def test_asked_for_predicted_done_and_left_alone(
        self,
        kind: str,
        make_store: MakeStore,
        small_image: Image,
        declare: t.Callable[..., Json],
        run_module: t.Any,
    ) -> None:
        store = make_store(kind, small_image)
        before = store.snapshot_of_disk()
        told = declare(store, small_image.name, fails=True)
        assert "convert: true" in told["msg"], told
        foreseen = declare(store, small_image.name, convert=True, check=True)
        assert before.changes(store.snapshot_of_disk()) == []
        done = declare(store, small_image.name, convert=True)
        for result in (foreseen, done):
            assert (result["changed"], result["actions"]) == (True, ["converted"])
            (entry,) = result["mappings"]
            assert entry["status"] == "mapped"
            (conversion,) = result["conversions"]
            assert set(conversion["layers"]) == store.layer_ids()
            assert conversion["expected_lock_seconds"] > 0
            (was,), (now,) = (result["diff"][side]["images"] for side in ("before", "after"))
            assert (was["uidmap"], now["uidmap"]) == ([], entry["uidmap"])
        before = store.snapshot_of_disk()
        again = declare(store, small_image.name, convert=True)
        assert (again["changed"], again["conversions"]) == (False, [])
        assert before.changes(store.snapshot_of_disk()) == []
        layers = store.layer_ids()
        maps = {"uidmap": [MAP], "gidmap": [MAP]} if not store.user else {"userns": "keep-id"}
        words = {**store.module_args(), "image": small_image.name, **maps}
        (made,) = run_module("layer_template", words)["layers"]
        assert (made["action"], store.layer_ids()) == ("existing", layers)
        mapped = store.shell(small_image.name, OWNERS, [*options(store), "--user=0"])
        none = {"uidmap": None, "gidmap": None, "userns": "host"}
        back = declare(store, small_image.name, convert=True, **none)
        assert back["actions"] == ["converted"]
        assert all("uidmap" not in layer for layer in store.layers())
        assert store.shell(small_image.name, OWNERS) == mapped

    def test_images_that_share_a_base_and_one_that_is_pulled_onto_it(
        self, lab: Lab, make_store: MakeStore, declare: t.Callable[..., Json]
    ) -> None:
        base: images.Layer = {**images.shell(), "etc": images.directory()}
        one, two = (
            images.build(
                lab.folder(), [base, {f"etc/{name}": images.file(name)}], f"localhost/{name}:1"
            )
            for name in ("one", "two")
        )
        store = make_store("vfs", one)
        refused = declare(store, two.name, source=two.source, fails=True)
        assert one.name in refused["msg"], refused
        done = declare(store, one.name, convert=True, source=one.source)
        assert done["actions"] == ["converted"]
        pulled = declare(store, two.name, convert=True, source=two.source)
        assert (pulled["actions"], pulled["conversions"]) == (["pulled"], [])
        refused = declare(
            store, one.name, convert=True, uidmap=None, gidmap=None, userns="host", fails=True
        )
        assert two.name in refused["msg"], refused
        both = declare(
            store, one.name, two.name, convert=True, uidmap=None, gidmap=None, userns="host"
        )
        assert both["actions"] == ["converted", "converted"]
        assert len(both["conversions"]) == 1

    def test_a_map_is_needed(
        self, make_store: MakeStore, small_image: Image, run_module: t.Any
    ) -> None:
        store = make_store("vfs", small_image)
        words = {**store.module_args(), "image": small_image.name, "convert": True}
        assert "convert is True" in run_module("image_layers", words, fails=True)["msg"]
