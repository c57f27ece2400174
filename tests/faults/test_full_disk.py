# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""layer_gc removes layers and loses no data on filesystems without a free byte or inode."""

from __future__ import annotations

import os
import subprocess
import typing as t

import pytest
from support import fill_filesystem, images, mounts
from support.images import Image
from support.injection import KILL, ModuleServer
from support.lab import Lab
from support.stores import Store
from support.task_stops import spread

MakeStore = t.Callable[..., Store]
RunModule = t.Callable[..., t.Dict[str, t.Any]]
MAPS = [f"0:{start}:65536" for start in (100000, 200000)]
MIB = 1 << 20
RESERVE = ("reserve-0", "reserve-1", "reserve-2")


@pytest.fixture(scope="session")
def plain_image(lab: Lab) -> Image:
    """Two layers, 6 MB in 300 files. The removal of mapped layers that podman created needs no reserve."""
    large = {"data": images.directory(), "data/large": images.file(os.urandom(5 * MIB))}
    small = {f"data/{number:03}": images.file(os.urandom(3000)) for number in range(300)}
    return images.build(lab.folder(), [large, small], "localhost/plain:1")


def create_with_podman(store: Store, image: Image) -> t.List[str]:
    """Use podman to create two mapped layers that no container uses."""
    for text in MAPS:
        store.podman("rm", store.create(image.name, "--uidmap", text, "--gidmap", text))
    return store.mapped_layers(image.name)


def create_with_layer_template(store: Store, image: Image, run_module: RunModule) -> t.List[str]:
    """Use layer_template to create two mapped layers."""
    for text in MAPS:
        args = {"image": image.name, "uidmap": [text], "gidmap": [text], "force": True}
        run_module("layer_template", {**store.module_args(), **args})
    return store.mapped_layers(image.name)


def fill(store: Store, resource: str) -> None:
    """Use up all bytes or all inodes of the store's filesystem."""
    disk = store.graphroot.parent
    if resource == "inodes":
        if store.kind.endswith("xfs"):
            subprocess.run(["xfs_growfs", "-m", "1", str(disk)], check=True, capture_output=True)
        fill_filesystem.fill_inodes(disk)
    else:
        fill_filesystem.fill_bytes(disk)


def collect(store: Store, run_module: RunModule, check: bool = False) -> t.Dict[str, t.Any]:
    args = {**store.module_args(), "min_age": "0", "max_copies_per_image": 0}
    return run_module("layer_gc", args, check=check)


@pytest.mark.parametrize(
    ("kind", "resource"),
    [
        *(
            (kind, resource)
            for kind in ("overlay-ext4", "overlay-xfs", "vfs-ext4", "vfs-xfs")
            for resource in ("bytes", "inodes")
        ),
        # btrfs does not limit the number of inodes.
        ("overlay-btrfs", "bytes"),
        ("btrfs", "bytes"),
    ],
)
@pytest.mark.parametrize("creator", ["podman", "layer_template"])
def test_layer_gc_removes_layers_on_full_filesystem(
    kind: str,
    creator: str,
    resource: str,
    make_store: MakeStore,
    run_module: RunModule,
    plain_image: Image,
) -> None:
    store = make_store(kind, plain_image, mib=320)
    if creator == "podman":
        unused = create_with_podman(store, plain_image)
        assert not (store.graphroot / "userns-storage").exists()
    else:
        unused = create_with_layer_template(store, plain_image, run_module)
        assert all((store.graphroot / "userns-storage" / name).is_file() for name in RESERVE)
    assert len(unused) == 2
    fill(store, resource)
    before = os.statvfs(store.graphroot)
    predicted = collect(store, run_module, check=True)
    assert sorted(item["id"] for item in predicted["removed"]) == sorted(unused)
    result = collect(store, run_module)
    assert sorted(item["id"] for item in result["removed"]) == sorted(unused)
    assert result["failures"] == []
    after = os.statvfs(store.graphroot)
    # On some filesystems the mapped layers share data with the image; the run creates a reserve for the next run.
    own = store.graphroot / "userns-storage"
    kept = sum(path.lstat().st_blocks * 512 for path in (own, *own.rglob("*")))
    assert (after.f_bfree - before.f_bfree) * before.f_frsize + kept >= 0
    if resource == "inodes":
        assert after.f_ffree > before.f_ffree
    assert store.mapped_layers(plain_image.name) == []
    assert not store.layer_ids().intersection(unused)
    for layer_id in unused:
        assert store.remaining_paths(layer_id) == []
    delete_fill(store)
    collect(store, run_module)
    assert not list((store.graphroot / f"{store.driver}-layers").glob(".tmp*"))
    store.podman("images", "-a")
    store.podman("system", "df", "-v")
    store.create(plain_image.name, "--uidmap", MAPS[0], "--gidmap", MAPS[0])


def delete_fill(store: Store) -> None:
    """Delete the files that fill the disk."""
    for path in sorted(store.graphroot.parent.glob("fill-*")):
        path.unlink()
    for folder in store.graphroot.parent.glob("inodes-*"):
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


@pytest.mark.parametrize("creator", ["podman", "layer_template"])
@pytest.mark.parametrize("kind", ["overlay-ext4", "vfs-xfs", "btrfs"])
def test_run_killed_on_full_disk_is_completed_by_next_run(
    kind: str,
    creator: str,
    lab: Lab,
    make_store: MakeStore,
    run_module: RunModule,
    plain_image: Image,
) -> None:
    """After a kill at any call, no layer without its data counts as complete.

    The next run completes the removal on the same full disk.
    """
    store = make_store(kind, plain_image, mib=320)
    unused = (
        create_with_podman(store, plain_image)
        if creator == "podman"
        else create_with_layer_template(store, plain_image, run_module)
    )
    fill(store, "bytes")
    complete = {layer_id: entries(store, layer_id) for layer_id in store.layer_ids()}
    disk = Disk(store)
    disk.save()
    modules = ModuleServer(lab)
    args = {**store.module_args(), "min_age": "0", "max_copies_per_image": 0}
    tried = 0
    try:
        points = modules.run("layer_gc", args, below=str(store.graphroot)).points
        # Most of the points are similar deletions.
        for at in spread(points, 8):
            disk.restore()
            run = modules.run("layer_gc", args, below=str(store.graphroot), at=at, fault=KILL)
            if run.at is None:
                break
            tried += 1
            where = f"killed at {at} of {points}, {run.at}"
            listed = store.image(plain_image.name).get("mapped-layers") or []
            assert set(listed) <= store.layer_ids(), where
            for record in store.layers():
                if not (record.get("flags") or {}).get("incomplete"):
                    assert entries(store, record["id"]) == complete[record["id"]], where
            done = modules.run("layer_gc", args, below=str(store.graphroot)).result
            assert done.get("failures") == [], (where, done)
            disk.flush()
            assert store.mapped_layers(plain_image.name) == [], where
            remaining = store.layer_ids().intersection(unused)
            assert remaining == set(), where
            delete_fill(store)
            store.podman("images", "-a")
            assert [store.remaining_paths(item) for item in unused] == [[], []], where
    finally:
        modules.close()
    assert tried >= 6
    print(f"{kind} {creator}: killed at {tried} of {points} calls")


def entries(store: Store, layer_id: str) -> t.Dict[str, t.Tuple[int, ...]]:
    """The sizes, owners and modes of a layer's files by path."""
    found: t.Dict[str, t.Tuple[int, ...]] = {}
    for parent, folders, names in os.walk(store.layer_folder(layer_id)):
        for name in (*folders, *names):
            info = os.lstat(os.path.join(parent, name))
            found[os.path.join(parent, name)] = (
                info.st_size * (name in names),
                info.st_uid,
                info.st_mode,
            )
    return found


class Disk:
    """The filesystem of a store, which can be saved and restored."""

    def __init__(self, store: Store) -> None:
        self.image = os.path.realpath(store.base / "disk.img")
        self.copy = f"{self.image}.saved"
        self.folder = store.graphroot.parent

    def save(self) -> None:
        self.flush()
        mounts.detach_all(str(self.folder))
        subprocess.run(["cp", "--sparse=always", self.image, self.copy], check=True)
        mounts.mount("-o", "loop", self.image, str(self.folder))

    def restore(self) -> None:
        mounts.detach_all(str(self.folder))
        subprocess.run(["cp", "--sparse=always", self.copy, self.image], check=True)
        mounts.mount("-o", "loop", self.image, str(self.folder))

    def flush(self) -> None:
        subprocess.run(["sync", "-f", str(self.folder)], check=False)


def test_read_only_filesystem_is_refused_also_in_check_mode(
    make_store: MakeStore, run_module: RunModule, plain_image: Image
) -> None:
    store = make_store("overlay-ext4", plain_image)
    layers = create_with_podman(store, plain_image)
    disk = str(store.graphroot.parent)
    args = {**store.module_args(), "min_age": "0", "max_copies_per_image": 0}
    mounts.mount("-o", "remount,ro", disk)
    try:
        for check in (True, False):
            result = run_module("layer_gc", args, check=check, fails=True)
            assert "Mount its filesystem writable." in result["msg"]
    finally:
        mounts.mount("-o", "remount,rw", disk)
    assert store.mapped_layers(plain_image.name) == layers
    assert len(run_module("layer_gc", args)["removed"]) == len(layers)
