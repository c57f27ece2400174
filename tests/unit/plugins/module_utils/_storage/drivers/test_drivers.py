# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of the drivers on hand-made directories: damage, unsupported stores, and the order of file operations."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.drivers import overlay
from ansible_collections.userns.storage.plugins.module_utils._storage.drivers.base import (
    Driver,
    DriverHome,
    ShortNames,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.drivers.overlay import (
    OverlayDriver,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.drivers.registry import (
    REGISTRY,
    open_driver,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.drivers.vfs import VfsDriver
from ansible_collections.userns.storage.plugins.module_utils._storage.drivers.view import view_of
from ansible_collections.userns.storage.plugins.module_utils._storage.errors import (
    InternalError,
    StorageError,
    StoreError,
    UnsupportedDriver,
    UntestedRuntime,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.idmap.mapping import (
    Mapping,
    Shift,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.operations.layer_building import (
    TREE_TOOLS,
)
from hypothesis import given
from hypothesis import strategies as st

BASE, TOP, MINE, OTHER = ("a" * 64, "b" * 64, "c" * 64, "d" * 64)
SAME = Shift(Mapping(), Mapping())


def home(tmp_path: pathlib.Path, **options: str) -> DriverHome:
    path = str(tmp_path)
    return DriverHome(path, str(tmp_path / "run"), options, False, path, tree_tools=TREE_TOOLS)


def short(layer_id: str) -> str:
    return layer_id[0].upper() * 26


def layer(store: pathlib.Path, layer_id: str, *lowers: str) -> pathlib.Path:
    """Create an overlay layer in the form that containers/storage 1.43 writes."""
    folder = store / "overlay" / layer_id
    for name in ("diff", "work"):
        (folder / name).mkdir(parents=True)
    (folder / "link").write_text(short(layer_id))
    if lowers:
        (folder / "lower").write_text(":".join(f"l/{short(lower)}" for lower in lowers))
    (store / "overlay" / "l").mkdir(exist_ok=True)
    (store / "overlay" / "l" / short(layer_id)).symlink_to(f"../{layer_id}/diff")
    return folder


@pytest.fixture
def store(tmp_path: pathlib.Path) -> pathlib.Path:
    """Create a layer and its child, with one file each."""
    for layer_id, lowers in ((BASE, ()), (TOP, (BASE,))):
        (layer(tmp_path, layer_id, *lowers) / "diff" / layer_id[0]).write_text("x" * 10)
    return tmp_path


@pytest.fixture
def driver(store: pathlib.Path) -> OverlayDriver:
    return OverlayDriver(home(store))


def staged(driver: Driver, store: pathlib.Path, layer_id: str = MINE) -> pathlib.Path:
    staging = store / "staging"
    staging.mkdir()
    driver.stage([TOP, BASE], SAME, "auto", str(staging), layer_id)
    return staging


# Structure of layers


def test_intact_layer_has_no_damage(driver: OverlayDriver) -> None:
    assert driver.exists(TOP)
    assert driver.damage(TOP, [BASE]) is None
    assert driver.dependencies(TOP) == [BASE]
    assert driver.dependents(BASE) == [TOP]
    assert driver.links() == {short(BASE): BASE, short(TOP): TOP}


def test_missing_layer_is_reported(driver: OverlayDriver) -> None:
    assert not driver.exists(MINE)
    assert "missing" in (driver.damage(MINE) or "")
    with pytest.raises(StoreError, match="Pull or load"):
        driver.measure(MINE)


def remove_diff(folder: pathlib.Path) -> None:
    for path in (folder / "diff").iterdir():
        path.unlink()
    (folder / "diff").rmdir()


def redirect_link(link: pathlib.Path) -> None:
    link.unlink()
    link.symlink_to("/etc")


@pytest.mark.parametrize(
    "names",
    [ShortNames(True, True), ShortNames(True, False), ShortNames(False, False)],
    ids=["old", "old and new", "new"],
)
def test_lost_short_names_are_damage_unless_runtime_restores_them(
    driver: OverlayDriver, store: pathlib.Path, names: ShortNames
) -> None:
    driver = OverlayDriver(dataclasses.replace(driver.home, short_names=lambda: names))
    for link in (store / "overlay/l").iterdir():
        link.unlink()
    if (store / "overlay" / TOP / "lower-layers").exists():
        (store / "overlay" / TOP / "lower-layers").unlink()
    # Newer runtimes do not restore short names that layers need, even if an older runtime on the same host does.
    assert ("names l/AAA" in (driver.damage(TOP, [BASE]) or "")) is not names.restored
    assert driver.resting([TOP]) == {TOP: [BASE]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: remove_diff(g / TOP), "diff of layer"),
        (lambda g: (g / TOP / "link").unlink(), "link of layer"),
        (lambda g: (g / TOP / "link").write_text("../../../etc/passwd"), "26 letters"),
        (lambda g: redirect_link(g / "l" / short(TOP)), "short name"),
        (lambda g: redirect_link(g / "l" / short(BASE)), "names l/AAA"),
        (
            lambda g: [(g / item).unlink() for item in (f"l/{short(BASE)}", f"{BASE}/link")],
            "names l/AAA",
        ),
        (lambda g: remove_diff(g / BASE), "on which it depends, is missing"),
        (lambda g: (g / BASE).rename(g / OTHER), "directory of layer aaa"),
        (lambda g: (g / TOP / "lower-layers").write_text(OTHER), "contradict"),
    ],
)
def test_damage_is_reported(
    driver: OverlayDriver,
    store: pathlib.Path,
    change: t.Callable[[pathlib.Path], t.Any],
    message: str,
) -> None:
    change(store / "overlay")
    assert message in (driver.damage(TOP, [BASE]) or "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: (g / TOP / "blobs").mkdir(), "has blobs, which"),
        (lambda g: (g / TOP / "lower.v2").write_text("x"), "has lower.v2, which"),
        (lambda g: (g / TOP / "lower").write_text(f"m/{short(BASE)}"), "in lower, which is not"),
        (lambda g: (g / TOP / "lower").write_text(f"l/{short(BASE)}@1"), "in lower, which is not"),
        (lambda g: (g / TOP / "lower-layers").write_text(f"sha256:{BASE}"), "in lower-layers"),
    ],
)
def test_form_of_newer_version_is_refused(
    driver: OverlayDriver,
    store: pathlib.Path,
    change: t.Callable[[pathlib.Path], t.Any],
    message: str,
) -> None:
    """The layer is not reported as damaged, and no layer is created from it."""
    change(store / "overlay")
    for check in (
        lambda: driver.damage(TOP, [BASE]),
        lambda: driver.damage(TOP),
        lambda: driver.strategies([TOP, BASE]),
    ):
        with pytest.raises(UntestedRuntime) as caught:
            check()
        assert message in str(caught.value)
        assert "newer than this version of the collection knows" in str(caught.value)
        assert "pull" not in str(caught.value).lower()


@pytest.mark.parametrize(
    "name", ["diff1", "diff12", "work", "merged", "merged.1", "mapped", "empty", ".nfs0001"]
)
def test_entries_of_known_versions_are_accepted(
    driver: OverlayDriver, store: pathlib.Path, name: str
) -> None:
    (store / "overlay" / TOP / name).mkdir(exist_ok=True)
    assert driver.damage(TOP, [BASE]) is None
    assert driver.strategies([TOP, BASE])


def test_top_owners_are_read_only_if_files_have_them(
    driver: OverlayDriver, store: pathlib.Path
) -> None:
    owner = os.getuid(), os.getgid()
    # The order is that of an overlay mount: the top layer, then the layers below.
    assert driver.top_owners([TOP, BASE]) == [("", *owner), ("b", *owner), ("a", *owner)]
    assert OverlayDriver(home(store, force_mask="700")).top_owners([TOP, BASE]) == []
    for name in ("composefs-data", "additionallayer"):
        marker = store / "overlay" / BASE / name
        marker.mkdir()
        assert driver.top_owners([TOP, BASE]) == []
        marker.rmdir()


def test_parent_in_additional_image_store_is_found(tmp_path: pathlib.Path) -> None:
    shared, own = tmp_path / "shared", tmp_path / "own"
    layer(shared, BASE)
    layer(own, TOP, BASE)
    driver = OverlayDriver(
        DriverHome(str(own), str(tmp_path), {}, False, str(own), (str(shared), "/nowhere"))
    )
    assert driver.damage(TOP, [BASE]) is None
    assert driver.dependencies(TOP) == [BASE]
    assert not driver.exists(BASE)
    assert "is missing" in (OverlayDriver(home(own)).damage(TOP, [BASE]) or "")


@given(st.text(max_size=63) | st.text("0123456789abcdef", min_size=65, max_size=66))
def test_invalid_layer_ids_are_rejected(name: str) -> None:
    driver = VfsDriver(DriverHome("/nowhere", "/nowhere", {}, False, "/nowhere"))
    for call in (driver.exists, driver.damage, driver.measure):
        with pytest.raises(StorageError):
            call(name)


# Creation


def test_layer_is_staged_and_committed(driver: OverlayDriver, store: pathlib.Path) -> None:
    strategy, found = driver.predict([TOP, BASE], SAME)
    before = sorted(store.rglob("*"))
    staging = staged(driver, store)
    staged_layer = staging / "layer"
    assert [
        path for path in sorted(store.rglob("*")) if staging not in (path, *path.parents)
    ] == before
    assert found.files == 2
    assert strategy.name in ("copy", "reflink")
    assert {path.name for path in (staged_layer / "diff").iterdir()} == {"a", "b"}
    assert (staged_layer / "lower").read_text() == f"l/{short(TOP)}:l/{short(BASE)}"
    assert (staged_layer / "lower-layers").read_text() == f"{TOP}:{BASE}"
    link = (staged_layer / "link").read_text()
    assert overlay._LINK.fullmatch(link)
    assert not driver.exists(MINE)
    driver.commit(str(staging), MINE)
    assert driver.damage(MINE, [TOP, BASE]) is None
    assert os.readlink(store / "overlay" / "l" / link) == f"../{MINE}/diff"
    assert driver.dependencies(MINE) == [TOP, BASE]
    assert not staged_layer.exists()
    assert driver.measure(MINE).apparent >= 20


def test_staged_layer_has_expected_modes(driver: OverlayDriver, store: pathlib.Path) -> None:
    (store / "overlay" / TOP / "diff").chmod(0o555)
    os.utime(store / "overlay" / TOP / "diff", ns=(1, 123456789))
    staged_layer = staged(driver, store) / "layer"
    modes = {
        item.name: oct(item.stat().st_mode & 0o7777)
        for item in [staged_layer, *staged_layer.iterdir()]
    }
    assert modes == {
        "layer": "0o700",
        "diff": "0o555",
        "work": "0o700",
        "merged": "0o700",
        "link": "0o644",
        "lower": "0o644",
        "lower-layers": "0o644",
    }
    assert (staged_layer / "diff").stat().st_mtime_ns == 123456789


def test_layer_is_staged_from_numbered_diff_and_lost_short_name(
    driver: OverlayDriver, store: pathlib.Path
) -> None:
    """The runtime has mapped the template, and the short name of the template's parent is missing."""
    top = store / "overlay" / TOP
    (top / "diff").rename(top / "diff1")
    (top / "diff").mkdir()
    (store / "overlay" / "l" / short(BASE)).unlink()
    staged_layer = staged(driver, store) / "layer"
    assert {path.name for path in (staged_layer / "diff").iterdir()} == {"a", "b"}
    assert (staged_layer / "lower-layers").read_text() == f"{TOP}:{BASE}"


def test_chain_on_disk_may_be_longer_than_in_records(
    driver: OverlayDriver, store: pathlib.Path
) -> None:
    layer(store, OTHER, TOP, BASE)
    staging = store / "staging"
    staging.mkdir()
    driver.stage([OTHER, BASE], SAME, "copy", str(staging), MINE)
    assert (staging / "layer" / "lower-layers").read_text() == f"{OTHER}:{TOP}:{BASE}"
    assert {path.name for path in (staging / "layer" / "diff").iterdir()} == {"a", "b"}


def test_prediction_writes_nothing(driver: OverlayDriver, store: pathlib.Path) -> None:
    before = {path: path.lstat().st_ctime_ns for path in [store, *store.rglob("*")]}
    driver.predict([TOP, BASE], SAME)
    assert {path: path.lstat().st_ctime_ns for path in [store, *store.rglob("*")]} == before


def test_unsupported_strategy_is_rejected(driver: OverlayDriver, store: pathlib.Path) -> None:
    with pytest.raises(UnsupportedDriver, match=r"Use auto, or one of: .*copy"):
        driver.predict([TOP, BASE], SAME, "snapshot")


@pytest.mark.parametrize(
    ("mountopt", "notes", "first"),
    [
        ("nodev,metacopy=on", ["nodev,metacopy=on)-true"], "metacopy"),
        # No runtime has tried these options since the last boot.
        ("nodev,metacopy=on", [], "copy"),
        # A runtime used other options than the driver has read.
        ("nodev,metacopy=on", ["nodev,metacopy=off)-false"], "copy"),
        ("nodev,metacopy=on", ["nodev,metacopy=on)-true", "nodev,metacopy=off)-false"], "copy"),
        ("nodev,metacopy=on", ["nodev)-true"], "copy"),
        ("metacopy=on,metacopy=off", ["metacopy=on,metacopy=off)-true"], "copy"),
        ("metacopy=off", ["metacopy=off)-true"], "copy"),
        ("metacopy=on", ["metacopy=on)-false"], "copy"),
        # The default of the kernel.
        ("", [")-true"], "metacopy"),
        ("nodev", ["nodev)-false"], "copy"),
    ],
)
def test_metacopy_is_offered_only_if_runtime_has_used_it(
    store: pathlib.Path, mountopt: str, notes: t.List[str], first: str
) -> None:
    folder = store / "run" / "overlay"
    folder.mkdir(parents=True)
    for note in notes:
        (folder / f"metacopy({note}").write_text("")
    strategies_found = OverlayDriver(home(store, mountopt=mountopt)).strategies([TOP, BASE])
    assert ("metacopy" in [strategy.name for strategy in strategies_found]) == (first == "metacopy")
    assert strategies_found[-1].name == "copy"
    assert all(strategy.reason for strategy in strategies_found)


def test_metacopy_is_not_offered_in_rootless_store(store: pathlib.Path) -> None:
    rootful = home(store, mountopt="metacopy=on")
    (store / "run" / "overlay").mkdir(parents=True)
    (store / "run" / "overlay" / "metacopy(metacopy=on)-true").write_text("")
    assert "metacopy" in [strategy.name for strategy in OverlayDriver(rootful).strategies([TOP])]
    rootless = dataclasses.replace(rootful, rootless=True)
    assert "metacopy" not in [
        strategy.name for strategy in OverlayDriver(rootless).strategies([TOP])
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: (g / ".has-mount-program").write_text("true"), "mount program"),
        (lambda g: (g / BASE / "composefs-data").mkdir(), "composefs"),
        (lambda g: (g / TOP / "additionallayer").write_text("/x"), "additional layer store"),
    ],
)
def test_unsupported_stores_are_refused(
    driver: OverlayDriver,
    store: pathlib.Path,
    change: t.Callable[[pathlib.Path], t.Any],
    message: str,
) -> None:
    (store / "overlay" / ".has-mount-program").write_text("false")
    driver.predict([TOP, BASE], SAME)
    change(store / "overlay")
    with pytest.raises(UnsupportedDriver, match=message):
        driver.predict([TOP, BASE], SAME)
    assert driver.measure(TOP).files


@pytest.mark.parametrize(
    "lower", ["l/../../etc", "/etc", "l/" + "a" * 26, "l/AAAAAAAAAAAAAAAAAAAAAAAAAA:", "x" * 70000]
)
def test_lower_file_with_invalid_paths_is_refused(
    driver: OverlayDriver, store: pathlib.Path, lower: str
) -> None:
    (store / "overlay" / TOP / "lower").write_text(lower)
    with pytest.raises(StorageError):
        driver.predict([TOP, BASE], SAME)


@pytest.mark.parametrize("name", ["diff", "lower", "link", ""])
def test_symbolic_links_are_not_followed(
    driver: OverlayDriver, store: pathlib.Path, name: str
) -> None:
    victim = store / "overlay" / TOP / name
    moved = store / "moved"
    victim.rename(moved)
    victim.symlink_to(moved)
    with pytest.raises(StorageError):
        staged(driver, store)


def test_redirected_short_name_is_reported(driver: OverlayDriver, store: pathlib.Path) -> None:
    link = store / "overlay" / "l" / short(BASE)
    link.unlink()
    link.symlink_to("/etc")
    assert "names l/AAA" in (driver.damage(TOP) or "")
    assert driver.links()[short(BASE)] == ""


def test_commit_does_not_replace_existing_layer(driver: OverlayDriver, store: pathlib.Path) -> None:
    staging = staged(driver, store)
    links = driver.links()
    with pytest.raises(StoreError):
        driver.commit(str(staging), TOP)
    assert driver.links() == links
    assert (staging / "layer" / "diff").is_dir()


# Order of file operations


def record_operations(monkeypatch: pytest.MonkeyPatch) -> t.List[str]:
    operations: t.List[str] = []
    for name in ("rename", "symlink", "unlink", "fsync"):
        real = getattr(os, name)

        def record(
            *arguments: t.Any, _name: str = name, _real: t.Any = real, **named: t.Any
        ) -> None:
            operations.append(_name)
            _real(*arguments, **named)

        monkeypatch.setattr(os, name, record)
    return operations


def test_commit_creates_directory_before_short_name(
    driver: OverlayDriver, store: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staging = staged(driver, store)
    operations = record_operations(monkeypatch)
    driver.commit(str(staging), MINE)
    # The layer is durable before a record lists it.
    assert operations == ["rename", "symlink", "fsync", "fsync"]


def test_detach_removes_short_name_before_directory(
    driver: OverlayDriver, store: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.commit(str(staged(driver, store)), MINE)
    trash = store / "trash"
    trash.mkdir()
    operations = record_operations(monkeypatch)
    driver.detach(MINE, str(trash))
    assert operations == ["unlink", "rename", "fsync"]
    assert (trash / MINE / "diff").is_dir()
    assert set(driver.links().values()) == {BASE, TOP}
    driver.detach(MINE, str(trash))


def test_detach_keeps_short_name_of_other_layer(driver: OverlayDriver, store: pathlib.Path) -> None:
    (store / "overlay" / TOP / "link").write_text(short(BASE))
    trash = store / "trash"
    trash.mkdir()
    driver.detach(TOP, str(trash))
    assert driver.links()[short(BASE)] == BASE


# Orphans


def test_orphans_are_found_and_dropped(driver: OverlayDriver, store: pathlib.Path) -> None:
    folder = store / "overlay"
    layer(store, OTHER)
    (folder / "l" / ("Z" * 26)).symlink_to(f"../{MINE}/diff")
    (folder / "l" / ("Y" * 26)).symlink_to("/etc")
    (folder / "tempdirs").mkdir()
    (folder / ("e" * 64)).write_text("a file")
    (folder / ("f" * 64)).symlink_to("/etc")
    found = driver.orphans({BASE, TOP})
    assert [(item.kind, item.name) for item in found] == [("directory", OTHER), ("link", "Z" * 26)]
    assert found[0].usage().inodes >= 3
    assert found[1].usage().inodes == 1
    assert found[0].changed > 1_000_000_000
    trash = store / "trash"
    trash.mkdir()
    for item in found:
        driver.drop(item, str(trash))
    assert driver.orphans({BASE, TOP}) == []
    assert sorted(path.name for path in trash.iterdir()) == [OTHER]
    assert (folder / "l" / ("Y" * 26)).is_symlink()


# vfs, the generic driver


def test_vfs_layer_is_staged_committed_and_detached(tmp_path: pathlib.Path) -> None:
    tree = tmp_path / "vfs" / "dir" / TOP
    tree.mkdir(parents=True)
    (tree / "file").write_text("content")
    tree.chmod(0o711)
    driver = open_driver("vfs", home(tmp_path))
    staging = tmp_path / "staging"
    staging.mkdir()
    usage = driver.stage([TOP, BASE], SAME, "auto", str(staging), MINE)
    driver.commit(str(staging), MINE)
    new = tmp_path / "vfs" / "dir" / MINE
    assert (new / "file").read_text() == "content"
    assert new.stat().st_mode & 0o777 == 0o711
    assert (usage.files, usage.apparent, usage.inodes) == (1, 7, 2)
    assert driver.damage(MINE) is None
    assert (driver.dependencies(MINE), driver.dependents(TOP), driver.links()) == ([], [], {})
    assert [orphan.name for orphan in driver.orphans({TOP})] == [MINE]
    trash = tmp_path / "trash"
    trash.mkdir()
    driver.detach(MINE, str(trash))
    descriptor = os.open(trash, os.O_RDONLY)
    assert not driver.destroy(descriptor, MINE)
    os.close(descriptor)
    assert (trash / MINE / "file").exists()


def test_missing_template_is_reported(tmp_path: pathlib.Path) -> None:
    (tmp_path / "vfs" / "dir").mkdir(parents=True)
    with pytest.raises(StoreError, match="has no directory"):
        open_driver("vfs", home(tmp_path)).predict([TOP], SAME)


def test_missing_driver_directory_is_reported(tmp_path: pathlib.Path) -> None:
    for name in REGISTRY:
        with pytest.raises(StoreError, match="no such file or directory"):
            open_driver(name, home(tmp_path)).exists(TOP)


# Names, errors, views


def test_registry_resolves_names_and_rejects_unknown_drivers(tmp_path: pathlib.Path) -> None:
    assert isinstance(open_driver("overlay2", home(tmp_path)), OverlayDriver)
    assert {name: kind.name for name, kind in REGISTRY.items()} == {name: name for name in REGISTRY}
    for name in ("zfs", "devicemapper", ""):
        with pytest.raises(UnsupportedDriver, match="btrfs, overlay, vfs"):
            open_driver(name, home(tmp_path))


def test_view_without_namespace_is_real_path(store: pathlib.Path) -> None:
    with view_of(str(store), "overlay") as path:
        assert path == os.path.realpath(store)
    with view_of(str(store), "vfs") as path:
        assert path == os.path.realpath(store)


def test_view_of_missing_or_linked_directory_is_refused(
    store: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(StoreError), view_of(str(store / "none"), "overlay"):
        pass
    (store / "vfs").symlink_to(store / "overlay")
    with pytest.raises(UnsupportedDriver, match="symbolic link"), view_of(str(store), "vfs"):
        pass


def test_driver_without_tree_tools_cannot_create_layers(store: pathlib.Path) -> None:
    driver = OverlayDriver(dataclasses.replace(home(store), tree_tools=None))
    assert driver.damage(TOP, [BASE]) is None
    with pytest.raises(InternalError, match="for reading and removal only"):
        driver.predict([TOP, BASE], SAME)
