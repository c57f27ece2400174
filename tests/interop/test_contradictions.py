# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Damaged stores of the real podman: nothing is removed from them, and what is wrong is described."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import typing as t

import pytest
from support.images import Image
from support.stores import Store

MakeStore = t.Callable[..., Store]
RunModule = t.Callable[..., t.Dict[str, t.Any]]
Json = t.Dict[str, t.Any]
Damage = t.Callable[[Store], None]

MAP = ["--uidmap", "0:100000:65536", "--gidmap", "0:100000:65536"]
OTHER_MAP = ["--uidmap", "0:200000:65536", "--gidmap", "0:200000:65536"]
KINDS = ["vfs", "overlay-forced", "btrfs"]


def records(store: Store, kind: str) -> pathlib.Path:
    return pathlib.Path(store.graphroot) / f"{store.driver}-{kind}" / f"{kind}.json"


def rewritten(kind: str, change: t.Callable[[t.List[Json]], t.List[Json]]) -> Damage:
    """A damage that leaves valid JSON."""

    def damage(store: Store) -> None:
        path = records(store, kind)
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return damage


def replaced(kind: str, text: str) -> Damage:
    return lambda store: t.cast(None, records(store, kind).write_text(text))


def cut_off(kind: str) -> Damage:
    def damage(store: Store) -> None:
        path = records(store, kind)
        path.write_text(path.read_text()[: path.stat().st_size // 2])

    return damage


def gone(kind: str) -> Damage:
    return lambda store: records(store, kind).unlink()


def all_of(*damages: Damage) -> Damage:
    def damage(store: Store) -> None:
        for damage in damages:
            damage(store)

    return damage


def without_mapped(found: t.List[Json]) -> t.List[Json]:
    return [item for item in found if not item.get("uidmap")]


def older(*kinds: str) -> Damage:
    """Records restored from a backup that was made when the store had just its image."""

    def damage(store: Store) -> None:
        for kind in kinds:
            backup = records(store, kind).with_suffix(".backup")
            if backup.exists():
                shutil.copyfile(backup, records(store, kind))
            else:
                records(store, kind).unlink()

    return damage


def swapped(text: str, other: str) -> Damage:
    def damage(store: Store) -> None:
        first, second = records(store, text), records(store, other)
        texts = first.read_text(), second.read_text()
        first.write_text(texts[1])
        second.write_text(texts[0])

    return damage


def misnamed(kind: str, key: str) -> Damage:
    """A flipped bit in a field's name."""

    def damage(store: Store) -> None:
        path = records(store, kind)
        path.write_text(path.read_text().replace(f'"{key}"', f'"{key[:-1]}_"'))

    return damage


def database(store: Store) -> pathlib.Path:
    """podman's database of the store."""
    found = [store.graphroot / "libpod/bolt_state.db", store.graphroot / "db.sql"]
    return next(path for path in found if path.exists())


def database_with(content: bytes) -> Damage:
    return lambda store: t.cast(None, database(store).write_bytes(content))


DAMAGES: t.Dict[str, Damage] = {
    "layers.json cut to nothing": replaced("layers", ""),
    "layers.json is an empty list": replaced("layers", "[]"),
    "layers.json is null": replaced("layers", "null"),
    "layers.json is half": cut_off("layers"),
    "layers.json is gone": gone("layers"),
    "layers.json without one record": rewritten("layers", lambda found: found[:-1]),
    "layers.json without the first record": rewritten("layers", lambda found: found[1:]),
    "layers.json without mapped layers": rewritten("layers", without_mapped),
    "layers.json is an object": replaced("layers", "{}"),
    "images.json cut to nothing": replaced("images", ""),
    "images.json is an empty list": replaced("images", "[]"),
    "images.json is half": cut_off("images"),
    "images.json is gone": gone("images"),
    "containers.json cut to nothing": replaced("containers", ""),
    "containers.json is an empty list": replaced("containers", "[]"),
    "containers.json is half": cut_off("containers"),
    "containers.json is gone": gone("containers"),
    "all cut to nothing": all_of(
        *(replaced(item, "") for item in ("layers", "images", "containers"))
    ),
    "all are empty lists": all_of(
        *(replaced(item, "[]") for item in ("layers", "images", "containers"))
    ),
    "all are gone": all_of(*(gone(item) for item in ("layers", "images", "containers"))),
    "layers.json and containers.json are empty lists": all_of(
        replaced("layers", "[]"), replaced("containers", "[]")
    ),
    "layers.json is older": older("layers"),
    "images.json is older": older("images"),
    "containers.json is older": older("containers"),
    "layers.json and images.json are older": older("layers", "images"),
    "layers.json and containers.json are older": older("layers", "containers"),
    "all are older": older("layers", "images", "containers"),
    "images.json and layers.json are swapped": swapped("images", "layers"),
    "containers.json and layers.json are swapped": swapped("containers", "layers"),
    "containers.json and images.json are swapped": swapped("containers", "images"),
    "images.json has no mapped layers": misnamed("images", "mapped-layers"),
    "images.json names no layer": misnamed("images", "layer"),
    "containers.json names no layer": misnamed("containers", "layer"),
    "layers.json names no parent": misnamed("layers", "parent"),
    "podman's database is something else": database_with(b"something else " * 5000),
    "podman's database is cut off": database_with(b"SQLite format 3\0"),
}
MAIN_DAMAGES = (
    "layers.json cut to nothing",
    "layers.json is an empty list",
    "layers.json without one record",
    "images.json cut to nothing",
    "containers.json is gone",
    "all are gone",
    "layers.json and containers.json are older",
    "podman's database is something else",
)

EVERYTHING: Json = {
    "min_age": "0",
    "orphans": "remove",
    "broken": "repair",
    "max_copies_per_image": 0,
    "duplicates": True,
    "created_before": "0",
}


def age(store: Store) -> None:
    """Make all that the records describe old enough to go."""
    for kind in ("layers", "images"):
        path = records(store, kind)
        before = path.stat()
        found = json.loads(path.read_text())
        for item in found:
            item["created"] = "2021-01-01T00:00:00Z"
        path.write_text(json.dumps(found))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.fixture(params=KINDS)
def in_use(
    request: pytest.FixtureRequest,
    make_store: MakeStore,
    small_image: Image,
    tmp_path: pathlib.Path,
) -> t.Tuple[Store, str, str]:
    """A store with an image, a container that holds a file of its own, and an unused mapped layer."""
    store = make_store(request.param, small_image)
    for kind in ("layers", "images"):
        path = records(store, kind)
        shutil.copyfile(path, path.with_suffix(".backup"))
    container = store.create(small_image.name, "--name", "db", *MAP)
    (tmp_path / "precious").write_text("the only copy")
    store.podman("cp", tmp_path / "precious", "db:/precious")
    store.podman("rm", store.create(small_image.name, *OTHER_MAP))
    age(store)
    layer = next(item["layer"] for item in store.containers() if item["id"] == container)
    return store, container, layer


def folders(store: Store) -> t.Set[str]:
    """Every folder and link of the driver, and all big data."""
    found = set()
    top = pathlib.Path(store.graphroot)
    for pattern in (
        f"{store.driver}*/*", "overlay/l/*", "vfs/dir/*", "btrfs/subvolumes/*",
    ):  # fmt: skip
        found |= {str(path) for path in top.glob(pattern) if len(path.name) > 20}
    return found


def data_of(store: Store, layer: str) -> str:
    """The file that the container alone holds."""
    found = list(pathlib.Path(store.layer_folder(layer)).rglob("precious"))
    return found[0].read_text() if found else ""


def keep(store: Store, folder: pathlib.Path) -> t.Callable[[], None]:
    """Copy all records and podman's database; what is returned puts them back."""
    folder.mkdir()
    paths = [
        database(store),
        *(records(store, kind) for kind in ("layers", "images", "containers")),
    ]
    for path in paths:
        shutil.copy2(path, folder / path.name)

    def restore() -> None:
        for path in paths:
            shutil.copy2(folder / path.name, path)

    return restore


def test_nothing_goes_from_a_damaged_store(
    in_use: t.Tuple[Store, str, str],
    run_module: RunModule,
    small_image: Image,
    tmp_path: pathlib.Path,
) -> None:
    store, _container, layer = in_use
    restore = keep(store, tmp_path / "kept")
    names = DAMAGES if store.driver == "overlay" else MAIN_DAMAGES
    for name in names:
        DAMAGES[name](store)
        before = folders(store)
        told = run_module("image_layers_info", store.module_args())["contradictions"]
        assert told, f"{name}: not described"
        assert all(item["problem"] and item["hint"] for item in told)
        done = run_module("layer_gc", {**store.module_args(), **EVERYTHING}, fails=True)
        assert str(store.graphroot) in done["msg"], name
        assert not any(done.get(item) for item in ("removed", "repaired", "changed")), name
        if name in MAIN_DAMAGES:
            words = {**store.module_args(), "images": [small_image.name]}
            absent = {**words, "state": "absent", "uidmap": [OTHER_MAP[1]]}
            more = {**words, "uidmap": ["0:500000:65536"]}
            foreseen = run_module(
                "layer_gc", {**store.module_args(), **EVERYTHING}, check=True, fails=True
            )
            assert not any(foreseen.get(item) for item in ("removed", "repaired", "changed")), name
            run_module("image_layers", {**words, "state": "absent"}, fails=None)
            run_module("layer_template", absent, fails=None)
            # Tidies up as well, where it may.
            run_module("layer_template", more, fails=None)
        assert before <= folders(store), name
        assert data_of(store, layer) == "the only copy", name
        restore()
    store.podman("start", "db", check=False)
    mounted = store.machine.path(store.podman("mount", "db").stdout.strip())
    assert (mounted / "precious").read_text() == "the only copy"


@pytest.mark.parametrize("suite", ["", "trixie", "sid"])
@pytest.mark.parametrize("kind", ["overlay", "vfs"])
def test_what_runtimes_do_is_no_contradiction(
    kind: str,
    suite: str,
    make_store: MakeStore,
    run_module: RunModule,
    host: t.Callable[[str], t.Any],
    small_image: Image,
) -> None:
    machine = host(suite) if suite else None
    store = make_store(kind, small_image, machine=machine)
    root = store.base / "root"
    root.mkdir()
    (store.base / "context").mkdir()
    (store.base / "context" / "Containerfile").write_text(
        f"FROM {small_image.name}\nENV A=1\nCOPY Containerfile /x\n"
    )
    store.create(small_image.name, "--name", "plain")
    store.create(small_image.name, "--name", "mapped", *MAP)
    store.podman("create", "--name", "bare", "--rootfs", root, "/bin/true")
    store.buildah("from", "--name", "work", small_image.name)
    store.buildah("from", "--name", "nothing", "scratch")
    # Some buildahs cannot commit here; what that leaves is no contradiction either.
    store.buildah(
        "build", "--layers", "-t", "localhost/built:1", store.base / "context", check=False
    )
    store.podman("commit", "plain", "localhost/committed:1")
    store.podman("volume", "create", "kept")
    store.podman("rmi", store.podman("commit", "plain").stdout.split()[-1])
    words = store.module_args()
    assert run_module("image_layers_info", words, machine=machine)["contradictions"] == []
    store.podman("rm", "mapped")
    done = run_module("layer_gc", {**words, **EVERYTHING}, machine=machine)
    assert done["contradictions"] == []
    # In some copies of theirs a directory was left to the host's root.
    assert {item["kind"] for item in done["repaired"]} <= {"foreign_root"}


def test_a_whole_store_has_no_contradictions(
    in_use: t.Tuple[Store, str, str], run_module: RunModule
) -> None:
    store, _container, layer = in_use
    assert run_module("image_layers_info", store.module_args())["contradictions"] == []
    done = run_module("layer_gc", {**store.module_args(), **EVERYTHING})
    assert (done["contradictions"], len(done["removed"] + done["repaired"])) == ([], 1)
    assert data_of(store, layer) == "the only copy"


@pytest.mark.parametrize("suite", ["", "trixie"])
def test_no_layer_is_lost_when_podman_recreates_short_names(
    suite: str,
    make_store: MakeStore,
    run_module: RunModule,
    host: t.Callable[[str], t.Any],
    small_image: Image,
) -> None:
    machine = host(suite) if suite else None
    store = make_store("overlay-forced", small_image, machine=machine)
    words = store.module_args()
    made = {"images": [small_image.name], "uidmap": [MAP[1]], "gidmap": [MAP[3]]}
    run_module("layer_template", {**words, **made, "force": True}, machine=machine)
    targets = {name: os.readlink(name) for name in (store.graphroot / "overlay/l").iterdir()}
    for name in targets:
        name.unlink()
    repair = {**words, "min_age": "0", "broken": "repair", "orphans": "remove"}
    assert not run_module("layer_gc", repair, machine=machine)["changed"]
    if store.has_merging_loader:
        # It creates no short names, and skopeo has written layers that are only readable with them.
        (image,) = run_module("image_layers_info", words, machine=machine)["images"]
        assert "short name" in (image["problem"] or "") or "names l/" in (image["problem"] or "")
        assert store.podman("run", "--rm", small_image.name, "true", check=False).rc != 0
        for name, target in targets.items():
            name.symlink_to(target)
    assert store.run(small_image.name, "echo", "there", args=MAP) == "there\n"
    assert {name for name in targets if name.is_symlink()} == set(targets)


def test_what_hints_say_can_be_typed_as_it_stands(
    make_store: MakeStore, run_module: RunModule, small_image: Image
) -> None:
    store = make_store("overlay-forced", small_image)
    container = store.create(small_image.name, "--name", "db", *MAP)
    words = store.module_args()
    path = records(store, "containers")
    path.write_text("[]")
    problem = next(
        item
        for item in run_module("image_layers_info", words)["contradictions"]
        if "podman's database has container db" in item["problem"]
    )
    line = problem["hint"].rpartition(": ")[2]
    assert line.startswith(f"podman --root {store.graphroot} ")
    store.tool("sh", "-c", line)
    assert container not in store.podman("ps", "--all", "--quiet", "--no-trunc").stdout
    left = run_module("image_layers_info", words)["contradictions"]
    assert "podman's database" not in str(left)
