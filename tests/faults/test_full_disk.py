# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Filesystems filled to the last byte, or the last inode: layer_gc collects, and nothing is lost."""

from __future__ import annotations

import os
import subprocess
import typing as t

import pytest
from support import full, images, mounts
from support.images import Image
from support.injection import KILL, Modules
from support.lab import Lab
from support.stops import spread
from support.stores import Store

MakeStore = t.Callable[..., Store]
RunModule = t.Callable[..., t.Dict[str, t.Any]]
MAPS = [f"0:{start}:65536" for start in (100000, 200000)]
MIB = 1 << 20
RESERVE = ("reserve-0", "reserve-1", "reserve-2")


@pytest.fixture(scope="session")
def plain_image(lab: Lab) -> Image:
    """Two layers, 6 MB in 300 files. What podman has made of it needs no reserve to be collected."""
    large = {"data": images.directory(), "data/large": images.file(os.urandom(5 * MIB))}
    small = {f"data/{number:03}": images.file(os.urandom(3000)) for number in range(300)}
    return images.build(lab.folder(), [large, small], "localhost/plain:1")


def of_podman(store: Store, image: Image) -> t.List[str]:
    """Two mapped layers that podman has made, which no container uses."""
    for text in MAPS:
        store.podman("rm", store.create(image.name, "--uidmap", text, "--gidmap", text))
    return store.mapped_layers(image.name)


def of_ours(store: Store, image: Image, run_module: RunModule) -> t.List[str]:
    """Two mapped layers that layer_template has made."""
    for text in MAPS:
        words = {"image": image.name, "uidmap": [text], "gidmap": [text], "force": True}
        run_module("layer_template", {**store.module_args(), **words})
    return store.mapped_layers(image.name)


def fill(store: Store, what: str) -> None:
    """Leave nothing of it."""
    disk = store.graphroot.parent
    if what == "inodes":
        if store.kind.endswith("xfs"):
            subprocess.run(["xfs_growfs", "-m", "1", str(disk)], check=True, capture_output=True)
        full.fill_inodes(disk)
    else:
        full.fill_bytes(disk)


def collect(store: Store, run_module: RunModule, check: bool = False) -> t.Dict[str, t.Any]:
    words = {**store.module_args(), "min_age": "0", "max_copies_per_image": 0}
    return run_module("layer_gc", words, check=check)


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        *(
            (kind, what)
            for kind in ("overlay-ext4", "overlay-xfs", "vfs-ext4", "vfs-xfs")
            for what in ("bytes", "inodes")
        ),
        # These count no inodes.
        ("overlay-btrfs", "bytes"),
        ("btrfs", "bytes"),
    ],
)
@pytest.mark.parametrize("maker", ["podman", "ours"])
def test_layer_gc_collects(
    kind: str,
    maker: str,
    what: str,
    make_store: MakeStore,
    run_module: RunModule,
    plain_image: Image,
) -> None:
    store = make_store(kind, plain_image, mib=320)
    if maker == "podman":
        gone = of_podman(store, plain_image)
        assert not (store.graphroot / "userns-storage").exists()
    else:
        gone = of_ours(store, plain_image, run_module)
        assert all((store.graphroot / "userns-storage" / name).is_file() for name in RESERVE)
    assert len(gone) == 2
    fill(store, what)
    before = os.statvfs(store.graphroot)
    said = collect(store, run_module, check=True)
    assert sorted(item["id"] for item in said["removed"]) == sorted(gone)
    done = collect(store, run_module)
    assert sorted(item["id"] for item in done["removed"]) == sorted(gone)
    assert done["failures"] == []
    after = os.statvfs(store.graphroot)
    # The copies share their data with the image on some filesystems; the run leaves a reserve for the next one.
    own = store.graphroot / "userns-storage"
    kept = sum(path.lstat().st_blocks * 512 for path in (own, *own.rglob("*")))
    assert (after.f_bfree - before.f_bfree) * before.f_frsize + kept >= 0
    if what == "inodes":
        assert after.f_ffree > before.f_ffree
    assert store.mapped_layers(plain_image.name) == []
    assert not store.layer_ids().intersection(gone)
    for layer_id in gone:
        assert store.leftovers(layer_id) == []
    empty(store)
    collect(store, run_module)
    assert not list((store.graphroot / f"{store.driver}-layers").glob(".tmp*"))
    store.podman("images", "-a")
    store.podman("system", "df", "-v")
    store.create(plain_image.name, "--uidmap", MAPS[0], "--gidmap", MAPS[0])


def empty(store: Store) -> None:
    """Delete what has filled the disk."""
    for path in sorted(store.graphroot.parent.glob("fill-*")):
        path.unlink()
    for folder in store.graphroot.parent.glob("inodes-*"):
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


@pytest.mark.parametrize("maker", ["podman", "ours"])
@pytest.mark.parametrize("kind", ["overlay-ext4", "vfs-xfs", "btrfs"])
def test_killed_on_a_full_disk(
    kind: str,
    maker: str,
    lab: Lab,
    make_store: MakeStore,
    run_module: RunModule,
    plain_image: Image,
) -> None:
    """At any call: no layer counts as whole without its data, and the next run ends it on the same full disk."""
    store = make_store(kind, plain_image, mib=320)
    gone = (
        of_podman(store, plain_image)
        if maker == "podman"
        else of_ours(store, plain_image, run_module)
    )
    fill(store, "bytes")
    whole = {layer_id: entries(store, layer_id) for layer_id in store.layer_ids()}
    disk = Disk(store)
    disk.save()
    modules = Modules(lab)
    words = {**store.module_args(), "min_age": "0", "max_copies_per_image": 0}
    tried = 0
    try:
        points = modules.run("layer_gc", words, below=str(store.graphroot)).points
        # Most of the points are deletions, one like the other.
        for at in spread(points, 8):
            disk.restore()
            run = modules.run("layer_gc", words, below=str(store.graphroot), at=at, what=KILL)
            if run.at is None:
                break
            tried += 1
            where = f"killed at {at} of {points}, {run.at}"
            named = store.image(plain_image.name).get("mapped-layers") or []
            assert set(named) <= store.layer_ids(), where
            for record in store.layers():
                if not (record.get("flags") or {}).get("incomplete"):
                    assert entries(store, record["id"]) == whole[record["id"]], where
            done = modules.run("layer_gc", words, below=str(store.graphroot)).result
            assert done.get("failures") == [], (where, done)
            disk.settle()
            assert store.mapped_layers(plain_image.name) == [], where
            left = store.layer_ids().intersection(gone)
            assert left == set(), where
            empty(store)
            store.podman("images", "-a")
            assert [store.leftovers(item) for item in gone] == [[], []], where
    finally:
        modules.close()
    assert tried >= 6
    print(f"{kind} {maker}: killed at {tried} of {points} calls")


def entries(store: Store, layer_id: str) -> t.Dict[str, t.Tuple[int, ...]]:
    """What a layer holds: sizes and owners by path."""
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
    """The filesystem of a store, to be put back as it was."""

    def __init__(self, store: Store) -> None:
        self.image = os.path.realpath(store.base / "disk.img")
        self.copy = f"{self.image}.saved"
        self.folder = store.graphroot.parent

    def save(self) -> None:
        self.settle()
        mounts.detach_all(str(self.folder))
        subprocess.run(["cp", "--sparse=always", self.image, self.copy], check=True)
        mounts.mount("-o", "loop", self.image, str(self.folder))

    def restore(self) -> None:
        mounts.detach_all(str(self.folder))
        subprocess.run(["cp", "--sparse=always", self.copy, self.image], check=True)
        mounts.mount("-o", "loop", self.image, str(self.folder))

    def settle(self) -> None:
        subprocess.run(["sync", "-f", str(self.folder)], check=False)


def test_a_read_only_filesystem_is_refused_in_check_mode_too(
    make_store: MakeStore, run_module: RunModule, plain_image: Image
) -> None:
    store = make_store("overlay-ext4", plain_image)
    layers = of_podman(store, plain_image)
    disk = str(store.graphroot.parent)
    words = {**store.module_args(), "min_age": "0", "max_copies_per_image": 0}
    mounts.mount("-o", "remount,ro", disk)
    try:
        for check in (True, False):
            told = run_module("layer_gc", words, check=check, fails=True)
            assert "Mount its filesystem writable." in told["msg"]
    finally:
        mounts.mount("-o", "remount,rw", disk)
    assert store.mapped_layers(plain_image.name) == layers
    assert len(run_module("layer_gc", words)["removed"]) == len(layers)
