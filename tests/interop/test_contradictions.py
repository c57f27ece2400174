# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Test that contradictions in damaged stores of podman are reported, and that nothing is removed from these stores."""

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


def records_file(store: Store, kind: str) -> pathlib.Path:
    return pathlib.Path(store.graphroot) / f"{store.driver}-{kind}" / f"{kind}.json"


def with_changed_records(kind: str, change: t.Callable[[t.List[Json]], t.List[Json]]) -> Damage:
    """Damage after which the file is still valid JSON."""

    def damage(store: Store) -> None:
        path = records_file(store, kind)
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return damage


def with_content(kind: str, text: str) -> Damage:
    return lambda store: t.cast(None, records_file(store, kind).write_text(text))


def truncated(kind: str) -> Damage:
    def damage(store: Store) -> None:
        path = records_file(store, kind)
        path.write_text(path.read_text()[: path.stat().st_size // 2])

    return damage


def deleted(kind: str) -> Damage:
    return lambda store: records_file(store, kind).unlink()


def combined(*damages: Damage) -> Damage:
    def damage(store: Store) -> None:
        for damage in damages:
            damage(store)

    return damage


def without_mapped_layers(found: t.List[Json]) -> t.List[Json]:
    return [item for item in found if not item.get("uidmap")]


def restored_from_backup(*kinds: str) -> Damage:
    """Records restored from a backup of the store without containers and mapped layers."""

    def damage(store: Store) -> None:
        for kind in kinds:
            backup = records_file(store, kind).with_suffix(".backup")
            if backup.exists():
                shutil.copyfile(backup, records_file(store, kind))
            else:
                records_file(store, kind).unlink()

    return damage


def swapped(kind: str, other_kind: str) -> Damage:
    def damage(store: Store) -> None:
        first, second = records_file(store, kind), records_file(store, other_kind)
        contents = first.read_text(), second.read_text()
        first.write_text(contents[1])
        second.write_text(contents[0])

    return damage


def renamed_field(kind: str, key: str) -> Damage:
    """A wrong character in the name of a field."""

    def damage(store: Store) -> None:
        path = records_file(store, kind)
        path.write_text(path.read_text().replace(f'"{key}"', f'"{key[:-1]}_"'))

    return damage


def database(store: Store) -> pathlib.Path:
    """The path of podman's database of the store."""
    found = [store.graphroot / "libpod/bolt_state.db", store.graphroot / "db.sql"]
    return next(path for path in found if path.exists())


def database_with(content: bytes) -> Damage:
    return lambda store: t.cast(None, database(store).write_bytes(content))


DAMAGES: t.Dict[str, Damage] = {
    "layers.json is empty": with_content("layers", ""),
    "layers.json is an empty list": with_content("layers", "[]"),
    "layers.json is null": with_content("layers", "null"),
    "layers.json is truncated": truncated("layers"),
    "layers.json is missing": deleted("layers"),
    "layers.json without the last record": with_changed_records("layers", lambda found: found[:-1]),
    "layers.json without the first record": with_changed_records("layers", lambda found: found[1:]),
    "layers.json without mapped layers": with_changed_records("layers", without_mapped_layers),
    "layers.json is an object": with_content("layers", "{}"),
    "images.json is empty": with_content("images", ""),
    "images.json is an empty list": with_content("images", "[]"),
    "images.json is truncated": truncated("images"),
    "images.json is missing": deleted("images"),
    "containers.json is empty": with_content("containers", ""),
    "containers.json is an empty list": with_content("containers", "[]"),
    "containers.json is truncated": truncated("containers"),
    "containers.json is missing": deleted("containers"),
    "all are empty": combined(
        *(with_content(item, "") for item in ("layers", "images", "containers"))
    ),
    "all are empty lists": combined(
        *(with_content(item, "[]") for item in ("layers", "images", "containers"))
    ),
    "all are missing": combined(*(deleted(item) for item in ("layers", "images", "containers"))),
    "layers.json and containers.json are empty lists": combined(
        with_content("layers", "[]"), with_content("containers", "[]")
    ),
    "layers.json is older": restored_from_backup("layers"),
    "images.json is older": restored_from_backup("images"),
    "containers.json is older": restored_from_backup("containers"),
    "layers.json and images.json are older": restored_from_backup("layers", "images"),
    "layers.json and containers.json are older": restored_from_backup("layers", "containers"),
    "all are older": restored_from_backup("layers", "images", "containers"),
    "images.json and layers.json are swapped": swapped("images", "layers"),
    "containers.json and layers.json are swapped": swapped("containers", "layers"),
    "containers.json and images.json are swapped": swapped("containers", "images"),
    "images.json has no mapped layers": renamed_field("images", "mapped-layers"),
    "images.json names no layer": renamed_field("images", "layer"),
    "containers.json names no layer": renamed_field("containers", "layer"),
    "layers.json names no parent": renamed_field("layers", "parent"),
    "podman's database has other content": database_with(b"something else " * 5000),
    "podman's database is truncated": database_with(b"SQLite format 3\0"),
}
MAIN_DAMAGES = (
    "layers.json is empty",
    "layers.json is an empty list",
    "layers.json without the last record",
    "images.json is empty",
    "containers.json is missing",
    "all are missing",
    "layers.json and containers.json are older",
    "podman's database has other content",
)

ALL_RULES: Json = {
    "min_age": "0",
    "orphans": "remove",
    "broken": "repair",
    "max_copies_per_image": 0,
    "duplicates": True,
    "created_before": "0",
}


def make_old(store: Store) -> None:
    """Make all recorded layers and images old enough to be removed."""
    for kind in ("layers", "images"):
        path = records_file(store, kind)
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
    """A store with an image, a container with a file of its own, and an unused mapped layer."""
    store = make_store(request.param, small_image)
    for kind in ("layers", "images"):
        path = records_file(store, kind)
        shutil.copyfile(path, path.with_suffix(".backup"))
    container = store.create(small_image.name, "--name", "db", *MAP)
    (tmp_path / "precious").write_text("the only copy")
    store.podman("cp", tmp_path / "precious", "db:/precious")
    store.podman("rm", store.create(small_image.name, *OTHER_MAP))
    make_old(store)
    layer = next(item["layer"] for item in store.containers() if item["id"] == container)
    return store, container, layer


def folders(store: Store) -> t.Set[str]:
    """All folders and links of the driver, and all big data."""
    found = set()
    top = pathlib.Path(store.graphroot)
    for pattern in (
        f"{store.driver}*/*", "overlay/l/*", "vfs/dir/*", "btrfs/subvolumes/*",
    ):  # fmt: skip
        found |= {str(path) for path in top.glob(pattern) if len(path.name) > 20}
    return found


def container_file(store: Store, layer: str) -> str:
    """The content of the file in the layer of the container; empty if it is missing."""
    found = list(pathlib.Path(store.layer_folder(layer)).rglob("precious"))
    return found[0].read_text() if found else ""


def back_up(store: Store, folder: pathlib.Path) -> t.Callable[[], None]:
    """Copy all records and podman's database, and return a function that restores them."""
    folder.mkdir()
    paths = [
        database(store),
        *(records_file(store, kind) for kind in ("layers", "images", "containers")),
    ]
    for path in paths:
        shutil.copy2(path, folder / path.name)

    def restore() -> None:
        for path in paths:
            shutil.copy2(folder / path.name, path)

    return restore


def test_nothing_is_removed_from_damaged_store(
    in_use: t.Tuple[Store, str, str],
    run_module: RunModule,
    small_image: Image,
    tmp_path: pathlib.Path,
) -> None:
    store, _container, layer = in_use
    restore = back_up(store, tmp_path / "kept")
    names = DAMAGES if store.driver == "overlay" else MAIN_DAMAGES
    for name in names:
        DAMAGES[name](store)
        before = folders(store)
        contradictions = run_module("image_layers_info", store.module_args())["contradictions"]
        assert contradictions, f"{name}: not reported"
        assert all(item["problem"] and item["hint"] for item in contradictions)
        result = run_module("layer_gc", {**store.module_args(), **ALL_RULES}, fails=True)
        assert str(store.graphroot) in result["msg"], name
        assert not any(result.get(item) for item in ("removed", "repaired", "changed")), name
        if name in MAIN_DAMAGES:
            args = {**store.module_args(), "images": [small_image.name]}
            absent = {**args, "state": "absent", "uidmap": [OTHER_MAP[1]]}
            present = {**args, "uidmap": ["0:500000:65536"]}
            predicted = run_module(
                "layer_gc", {**store.module_args(), **ALL_RULES}, check=True, fails=True
            )
            assert not any(predicted.get(item) for item in ("removed", "repaired", "changed")), name
            run_module("image_layers", {**args, "state": "absent"}, fails=None)
            run_module("layer_template", absent, fails=None)
            # Also removes leftovers, if this is allowed.
            run_module("layer_template", present, fails=None)
        assert before <= folders(store), name
        assert container_file(store, layer) == "the only copy", name
        restore()
    store.podman("start", "db", check=False)
    mounted = store.machine.path(store.podman("mount", "db").stdout.strip())
    assert (mounted / "precious").read_text() == "the only copy"


@pytest.mark.parametrize("suite", ["", "trixie", "sid"])
@pytest.mark.parametrize("kind", ["overlay", "vfs"])
def test_stores_written_by_runtimes_have_no_contradictions(
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
    # Some versions of buildah cannot commit here; what the failure leaves is no contradiction either.
    store.buildah(
        "build", "--layers", "-t", "localhost/built:1", store.base / "context", check=False
    )
    store.podman("commit", "plain", "localhost/committed:1")
    store.podman("volume", "create", "kept")
    store.podman("rmi", store.podman("commit", "plain").stdout.split()[-1])
    args = store.module_args()
    assert run_module("image_layers_info", args, machine=machine)["contradictions"] == []
    store.podman("rm", "mapped")
    result = run_module("layer_gc", {**args, **ALL_RULES}, machine=machine)
    assert result["contradictions"] == []
    # In some copies by podman a directory still belongs to root of the host.
    assert {item["kind"] for item in result["repaired"]} <= {"foreign_root"}


def test_undamaged_store_has_no_contradictions(
    in_use: t.Tuple[Store, str, str], run_module: RunModule
) -> None:
    store, _container, layer = in_use
    assert run_module("image_layers_info", store.module_args())["contradictions"] == []
    result = run_module("layer_gc", {**store.module_args(), **ALL_RULES})
    assert (result["contradictions"], len(result["removed"] + result["repaired"])) == ([], 1)
    assert container_file(store, layer) == "the only copy"


@pytest.mark.parametrize("suite", ["", "trixie"])
def test_layers_are_kept_when_podman_recreates_short_names(
    suite: str,
    make_store: MakeStore,
    run_module: RunModule,
    host: t.Callable[[str], t.Any],
    small_image: Image,
) -> None:
    machine = host(suite) if suite else None
    store = make_store("overlay-forced", small_image, machine=machine)
    args = store.module_args()
    mapped_layer = {"images": [small_image.name], "uidmap": [MAP[1]], "gidmap": [MAP[3]]}
    run_module("layer_template", {**args, **mapped_layer, "force": True}, machine=machine)
    targets = {name: os.readlink(name) for name in (store.graphroot / "overlay/l").iterdir()}
    for name in targets:
        name.unlink()
    repair = {**args, "min_age": "0", "broken": "repair", "orphans": "remove"}
    assert not run_module("layer_gc", repair, machine=machine)["changed"]
    if store.has_merging_loader:
        # This podman creates no short names, and skopeo has written layers that are only readable with them.
        (image,) = run_module("image_layers_info", args, machine=machine)["images"]
        assert "short name" in (image["problem"] or "") or "names l/" in (image["problem"] or "")
        assert store.podman("run", "--rm", small_image.name, "true", check=False).rc != 0
        for name, target in targets.items():
            name.symlink_to(target)
    assert store.run(small_image.name, "echo", "there", args=MAP) == "there\n"
    assert {name for name in targets if name.is_symlink()} == set(targets)


def test_commands_in_hints_work_without_changes(
    make_store: MakeStore, run_module: RunModule, small_image: Image
) -> None:
    store = make_store("overlay-forced", small_image)
    container = store.create(small_image.name, "--name", "db", *MAP)
    args = store.module_args()
    path = records_file(store, "containers")
    path.write_text("[]")
    problem = next(
        item
        for item in run_module("image_layers_info", args)["contradictions"]
        if "podman's database has container db" in item["problem"]
    )
    command = problem["hint"].rpartition(": ")[2]
    assert command.startswith(f"podman --root {store.graphroot} ")
    store.tool("sh", "-c", command)
    assert container not in store.podman("ps", "--all", "--quiet", "--no-trunc").stdout
    contradictions = run_module("image_layers_info", args)["contradictions"]
    assert "podman's database" not in str(contradictions)
