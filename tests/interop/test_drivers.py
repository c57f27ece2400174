# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Drivers on stores of the real podman: each strategy's layer is a faithful one that podman takes."""

from __future__ import annotations

import hashlib
import itertools
import os
import pathlib
import signal
import stat
import time
import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.drivers.base import (
    Staged,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.errors import (
    StoreError,
    UnmappedIDs,
    UnsupportedDriver,
    WorkerError,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.idmap.mapping import (
    Mapping,
    Shift,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.idmap.ranges import IDMap
from ansible_collections.userns.storage.plugins.module_utils._storage.kernel import mounts
from ansible_collections.userns.storage.plugins.module_utils._storage.operations.layer_flags import (
    mapped_record,
    new_layer_id,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.store.staging import (
    StagingArea,
    remove_tree,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.store.store import (
    Store as OurStore,
)
from support.driver_stores import Place, config_of, inside, opened, place_of, staging_folder

if t.TYPE_CHECKING:
    from support.images import Image
    from support.stores import Store

MakeStore = t.Callable[..., "Store"]

METACOPY = {"mountopt": "nodev,metacopy=on"}
# Kind of store, options, strategy asked for, strategy that comes of it.
CASES = [
    ("vfs", {}, "auto", "copy"),
    ("vfs-xfs", {}, "auto", "reflink"),
    ("overlay-forced", {}, "auto", "copy"),
    ("overlay-forced", METACOPY, "auto", "metacopy"),
    ("overlay-forced", METACOPY, "copy", "copy"),
    ("overlay-xfs", {}, "auto", "reflink"),
    ("overlay-xfs", {}, "copy", "copy"),
    ("overlay-xfs", METACOPY, "auto", "reflink"),
    ("overlay-xfs", METACOPY, "metacopy", "metacopy"),
    ("btrfs", {}, "auto", "snapshot"),
    ("btrfs", {}, "reflink", "reflink"),
    ("btrfs", {}, "copy", "copy"),
    ("rootless-overlay", {}, "auto", "copy"),
    ("rootless-vfs", {}, "auto", "copy"),
]


class Made(t.NamedTuple):
    layer_id: str
    strategy: str
    reason: str
    files: int
    apparent: int
    exclusive: int


def make(place: Place, image_id: str, items: t.Sequence[str], strategy: str) -> t.Tuple[t.Any, ...]:
    """A whole mapped layer, as the operations make it."""
    mapping = Mapping(IDMap.parse(items), IDMap.parse(items))
    with opened(place) as driver:
        records = OurStore.open(config_of(place))
        snapshot = records.snapshot()
        image = snapshot.images[image_id]
        chain = snapshot.chain(image.layer)
        layer_id = new_layer_id(snapshot.layers)
        into = staging_folder(place, layer_id)
        ids = [layer.id for layer in chain]
        shift = Shift(chain[0].mapping, mapping, False)
        way, found = driver.predict(ids, shift, strategy)
        staged = driver.stage(ids, shift, strategy, into, layer_id)
        assert (way.name, found.files, found.apparent) == (
            staged.strategy,
            staged.files,
            staged.apparent,
        )
        record = mapped_record(layer_id, chain[0], mapping, time.time_ns(), None)
        tar_split = os.path.join(into, "tar-split")
        with open(records.tar_split_path(chain[0].id), "rb") as source:
            pathlib.Path(tar_split).write_bytes(source.read())
        with records.transaction() as transaction:
            transaction.begin_layer(record)
            driver.commit(into, layer_id)
            transaction.install_tar_split(layer_id, tar_split)
            transaction.finish_layer(layer_id)
            transaction.append_mapped_layer(image_id, layer_id)
        assert driver.exists(layer_id)
        assert driver.damage(layer_id, ids) is None
        assert not driver.orphans(records.snapshot().layers)
    return (layer_id, *told(staged))


def told(staged: Staged) -> t.Tuple[str, str, int, int, int]:
    return staged.strategy, staged.reason, staged.files, staged.apparent, staged.exclusive


# The differ


def entries(root: pathlib.Path) -> t.Dict[str, t.Dict[str, t.Any]]:
    """All of a tree but owners, which stand apart."""
    found: t.Dict[str, t.Dict[str, t.Any]] = {}
    links: t.Dict[t.Tuple[int, int], t.List[str]] = {}

    def look(path: str, name: str) -> None:
        status = os.lstat(path)
        about: t.Dict[str, t.Any] = {
            "mode": oct(status.st_mode),
            "mtime": status.st_mtime_ns,
            "owner": (status.st_uid, status.st_gid),
            "device": status.st_rdev,
        }
        if not stat.S_ISDIR(status.st_mode):
            about["size"] = status.st_size
            links.setdefault((status.st_dev, status.st_ino), []).append(name)
        if stat.S_ISREG(status.st_mode):
            with open(path, "rb") as content:
                about["content"] = hashlib.sha256(content.read()).hexdigest()
        if stat.S_ISLNK(status.st_mode):
            about["target"] = os.readlink(path)
        about["xattrs"] = {
            attribute: os.getxattr(path, attribute, follow_symlinks=False)
            for attribute in os.listxattr(path, follow_symlinks=False)
            if ".overlay." not in attribute
        }
        found[name] = about

    look(str(root), ".")
    for parent, folders, files in os.walk(root):
        for name in [*folders, *files]:
            path = os.path.join(parent, name)
            look(path, os.path.relpath(path, root))
    for names in links.values():
        for name in names:
            found[name]["names"] = sorted(names)
    return found


def check_same(store: Store, template: str, layer: str, new_id: t.Callable[[int], int]) -> None:
    with store.mounted(template) as old_root:
        old = entries(old_root)
    with store.mounted(layer) as root:
        new = entries(root)
    assert sorted(new) == sorted(old)
    for name, about in old.items():
        about["owner"] = tuple(new_id(item) for item in about["owner"])
        assert new[name] == about, name


def container_id(store: Store, host_id: int) -> int:
    """Inverse of an unmapped record's owner on this machine's disk."""
    if store.user is None:
        return host_id
    return 0 if host_id == store.user.uid else host_id - store.user.subuid_start + 1


@pytest.mark.parametrize(("kind", "options", "asked", "strategy"), CASES)
def test_podman_takes_the_layer(
    make_store: MakeStore,
    small_image: Image,
    kind: str,
    options: t.Dict[str, str],
    asked: str,
    strategy: str,
) -> None:
    store = make_store(kind, small_image, options=options)
    items = ["0:1:20000"] if store.user else ["0:100000:65536"]
    image = store.image(small_image.name)
    before = store.layer_ids()
    made = Made(*inside(store, make, image["id"], items, asked))
    assert made.strategy == strategy
    assert made.reason
    assert store.layer_ids() == before | {made.layer_id}

    maps = [
        {"container_id": int(c), "host_id": int(h), "size": int(n)}
        for c, h, n in [item.split(":") for item in items]
    ]
    check_same(
        store,
        image["layer"],
        made.layer_id,
        lambda item: store.host_id(maps, container_id(store, item)),
    )
    arguments = [word for item in items for word in ("--uidmap", item, "--gidmap", item)]
    container = store.create(small_image.name, *arguments)
    assert store.layer(store.container(container)["layer"])["parent"] == made.layer_id
    assert len(store.layer_ids()) == len(before) + 2

    script = "stat -c '%u:%g:%a' /home/user/notes /usr/bin/suid /usr/lib/two; cat /etc/motd"
    output = store.shell(small_image.name, script, args=arguments)
    assert output.split() == ["1000:1000:600", "0:0:4755", "1000:1:640", "second"]

    store.podman("rm", container)
    store.podman("rmi", small_image.name)
    inside(store, sweep)
    assert store.leftovers(made.layer_id) == []


@pytest.mark.parametrize("kind", ["vfs", "overlay-forced", "btrfs", "rootless-overlay"])
def test_detach_leaves_nothing(make_store: MakeStore, small_image: Image, kind: str) -> None:
    store = make_store(kind, small_image)
    items = ["0:1:20000"] if store.user else ["0:100000:65536"]
    image = store.image(small_image.name)
    made = Made(*inside(store, make, image["id"], items, "auto"))
    inside(store, take_away, made.layer_id)
    assert not store.layer_folder(made.layer_id).exists()
    inside(store, sweep)
    left = [pathlib.Path(path).name for path in store.leftovers(made.layer_id)]
    assert left == [f"{made.layer_id}.tar-split.gz"]


def sweep(place: Place) -> None:
    with opened(place) as driver:
        area = StagingArea(os.path.join(place.graphroot, "userns-storage"))

        def destroy(parent: int, name: str) -> bool:
            if driver.is_placeholder(name):
                driver.remove_placeholder(name)
            return driver.destroy(parent, name)

        area.sweep(destroy)
        assert area.leftovers() == []


def take_away(place: Place, layer_id: str) -> None:
    trash = os.path.join(place.graphroot, "userns-storage", "trash")
    os.mkdir(trash)
    with opened(place) as driver:
        usage = driver.measure(layer_id, exclusive=True)
        assert usage.files > 40
        assert usage.apparent > 0
        driver.detach(layer_id, trash)
        driver.detach(layer_id, trash)
        assert not driver.exists(layer_id)
        missing = driver.damage(layer_id)
        assert missing is not None
        assert "missing" in missing
        assert driver.is_placeholder(layer_id) == (driver.name == "btrfs")
        driver.remove_placeholder(layer_id)
        assert not driver.is_placeholder(layer_id)
        descriptor = os.open(trash, os.O_RDONLY)
        if not driver.destroy(descriptor, layer_id):
            remove_tree(os.path.join(trash, layer_id), driver.destroy)
        os.close(descriptor)
    assert os.listdir(trash) == []


def test_staging_beside_a_bind_mounted_folder(make_store: MakeStore, small_image: Image) -> None:
    """What rootful podman mounts on its own folder does not get in the way, nor stay mounted."""
    store = make_store("overlay-forced", small_image)
    from support import mounts

    image = store.image(small_image.name)
    folder = str(store.graphroot / "overlay")
    if folder not in mounts.mount_points(folder):
        mounts.mount("--bind", folder, folder)
    mounts.mount("--make-private", folder)
    shown = inside(store, mounted_inside)
    assert shown == []
    made = Made(*inside(store, make, image["id"], ["0:100000:65536"], "auto"))
    assert store.layer_folder(made.layer_id).is_dir()
    assert folder in mounts.mount_points(folder)


def mounted_inside(place: Place) -> t.List[str]:
    with opened(place), open("/proc/self/mountinfo", encoding="utf-8") as table:
        points = [line.split()[4] for line in table]
    return [point for point in points if point.startswith(place.graphroot + "/")]


def test_a_runtime_mounts_its_folder_while_the_view_is_made(
    make_store: MakeStore, small_image: Image
) -> None:
    """Two mounts of it, as from two podmans, come before the view is private."""
    store = make_store("overlay-forced", small_image)
    assert inside(store, mounted_meanwhile) == []


def mounted_meanwhile(place: Place) -> t.List[str]:
    folder = os.path.join(place.graphroot, place.driver)
    make_private = mounts.make_private

    def late(target: mounts.PathOrFd = "/") -> None:
        if target == place.graphroot:
            mounts.bind(folder, folder)
            mounts.bind(folder, folder)
        make_private(target)

    mounts.make_private = late
    found = mounted_inside(place)
    with opened(place):
        os.mkdir(os.path.join(place.graphroot, "beside"))
        # It fails across mounts.
        os.rename(os.path.join(place.graphroot, "beside"), os.path.join(folder, "beside"))
        os.rmdir(os.path.join(folder, "beside"))
    return found


def test_another_filesystem_in_the_graphroot(make_store: MakeStore, small_image: Image) -> None:
    store = make_store("overlay-forced", small_image)
    from support import mounts

    folder = store.graphroot / "overlay"
    mounts.detach_all(str(folder))
    mounts.mount("-t", "tmpfs", "other", str(folder))
    try:
        with pytest.raises(UnsupportedDriver, match="another filesystem"):
            inside(store, mounted_inside)
    finally:
        mounts.detach_all(str(folder))


def test_ids_outside_the_map(make_store: MakeStore, small_image: Image) -> None:
    store = make_store("overlay-forced", small_image)
    image = store.image(small_image.name)
    with pytest.raises(UnmappedIDs) as caught:
        inside(store, make, image["id"], ["0:100000:600"], "auto")
    assert caught.value.facts["uids"] == [1000]


def redirected(place: Place, chain: t.List[str]) -> None:
    """A layer as a user of redirect_dir and metacopy may have left it."""
    top = os.path.join(place.graphroot, "overlay", chain[0], "diff")
    os.mkdir(os.path.join(top, "moved"))
    os.setxattr(os.path.join(top, "moved"), "trusted.overlay.redirect", b"/opt/app")


def test_what_only_the_kernel_can_merge(make_store: MakeStore, small_image: Image) -> None:
    store = make_store("overlay-forced", small_image, options={"mountopt": "redirect_dir=on"})
    image = store.image(small_image.name)
    chain = []
    layer = image["layer"]
    while layer:
        chain.append(layer)
        layer = store.layer(layer).get("parent", "")
    redirected(place_of(store), chain)
    made = Made(*inside(store, make, image["id"], ["0:100000:65536"], "auto"))
    assert made.strategy == "copy"
    assert "redirect" in made.reason
    tagged = store.layer_folder(made.layer_id) / "diff" / "moved" / "tagged"
    assert os.lstat(tagged).st_uid == 100500


def test_metacopy_above_a_layer_with_metacopy(make_store: MakeStore, small_image: Image) -> None:
    """Podman's own layer has files without data; only the kernel can go on from there."""
    store = make_store("overlay-forced", small_image, options=METACOPY)
    container = store.create(small_image.name, "--uidmap=0:200000:65536", "--gidmap=0:200000:65536")
    theirs = store.layer(store.container(container)["layer"])["parent"]
    built = inside(store, from_mapped, theirs)
    assert built[0] == "metacopy"
    layer = store.graphroot / "userns-storage" / "staging" / "built" / "layer"
    notes = layer / "diff1" / "home" / "user" / "notes"
    assert os.lstat(notes).st_uid == 301000
    assert os.lstat(layer / "diff1" / "bin" / "busybox").st_blocks < 20
    assert list((layer / "diff").iterdir()) == []


def test_a_template_that_podman_mapped(make_store: MakeStore, small_image: Image) -> None:
    """Its content lies in diff1, under other owners; on disk it rests on the unmapped layer."""
    store = make_store("overlay-forced", small_image)
    image = store.image(small_image.name)
    container = store.create(small_image.name, "--uidmap=0:200000:65536", "--gidmap=0:200000:65536")
    theirs = store.layer(store.container(container)["layer"])["parent"]
    assert (store.layer_folder(theirs) / "diff1").is_dir()
    built = inside(store, from_mapped, theirs)
    layer = store.graphroot / "userns-storage" / "staging" / "built" / "layer"
    lower = (layer / "lower-layers").read_text().split(":")
    assert lower[:2] == [theirs, image["layer"]]
    assert len((layer / "lower").read_text().split(":")) == len(lower)
    assert os.lstat(layer / "diff" / "home" / "user" / "notes").st_uid == 301000
    assert built[0] == "copy"


def from_mapped(place: Place, template: str) -> t.Tuple[str, str, int, int, int]:
    old = Mapping(IDMap.parse(["0:200000:65536"]), IDMap.parse(["0:200000:65536"]))
    new = Mapping(IDMap.parse(["0:300000:65536"]), IDMap.parse(["0:300000:65536"]))
    with opened(place) as driver:
        snapshot = OurStore.open(config_of(place)).snapshot()
        ids = [layer.id for layer in snapshot.chain(template)]
        into = staging_folder(place, "built")
        return told(driver.stage(ids, Shift(old, new, True), "auto", into, "f" * 64))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mount_program": "/usr/bin/fuse-overlayfs"}, "mount program"),
        ({"force_mask": "shared"}, "force_mask"),
    ],
)
def test_refused_overlays(
    make_store: MakeStore, small_image: Image, options: t.Dict[str, str], words: str
) -> None:
    store = make_store("overlay-forced", small_image)
    image = store.image(small_image.name)
    store.options.update(options)
    with pytest.raises(UnsupportedDriver, match=words):
        inside(store, make, image["id"], ["0:100000:65536"], "auto")


def test_a_hostile_layer_directory(make_store: MakeStore, small_image: Image) -> None:
    store = make_store("overlay-forced", small_image)
    image = store.image(small_image.name)
    folder = store.layer_folder(image["layer"])
    folder.joinpath("diff").rename(folder / "away")
    folder.joinpath("diff").symlink_to("/etc")
    with pytest.raises(StoreError):
        inside(store, make, image["id"], ["0:100000:65536"], "auto")


def test_parents_in_a_read_only_store(make_store: MakeStore, small_image: Image) -> None:
    shared = make_store("overlay-forced", small_image)
    store = make_store("overlay-forced", read_only=[str(shared.graphroot)])
    container = store.create(small_image.name)
    store.podman("commit", "-q", container, "localhost/upper:1")
    image = store.image("localhost/upper:1")
    parent = store.layer(image["layer"])["parent"]
    assert not store.layer_folder(parent).exists()
    made = Made(*inside(store, make, image["id"], ["0:100000:65536"], "auto"))
    notes = store.layer_folder(made.layer_id) / "diff" / "home" / "user" / "notes"
    assert os.lstat(notes).st_uid == 101000
    arguments = ["--uidmap=0:100000:65536", "--gidmap=0:100000:65536"]
    mapped = store.create("localhost/upper:1", *arguments)
    assert store.layer(store.container(mapped)["layer"])["parent"] == made.layer_id


def test_a_store_of_fuse_overlayfs(make_store: MakeStore, small_image: Image) -> None:
    """The store remembers it, even when the option is gone."""
    store = make_store("rootless-fuse", small_image)
    image = store.image(small_image.name)
    store.options.clear()
    with pytest.raises(UnsupportedDriver, match="mount program"):
        inside(store, make, image["id"], ["0:1:20000"], "auto")


def die() -> t.NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def killed(place: Place, image_id: str, layer_id: str, moment: str) -> None:
    """Commit a layer, or take one away, and be killed at a moment of it."""
    mapping = Mapping(IDMap.parse(["0:100000:65536"]), IDMap.parse(["0:100000:65536"]))

    def at(name: str) -> None:
        if name == moment:
            die()

    with opened(place) as driver:
        records = OurStore.open(config_of(place))
        snapshot = records.snapshot()
        chain = snapshot.chain(snapshot.images[image_id].layer)
        ids = [layer.id for layer in chain]
        into = staging_folder(place, layer_id)
        driver.stage(ids, Shift(Mapping(), mapping), "copy", into, layer_id)
        at("staged")
        record = mapped_record(layer_id, chain[0], mapping, time.time_ns(), None)
        with records.transaction() as transaction:
            transaction.begin_layer(record)
            at("begun")
            if moment == "renamed":
                os.symlink = lambda *_a, **_n: die()
            driver.commit(into, layer_id)
            at("linked")
            transaction.finish_layer(layer_id)
            transaction.append_mapped_layer(image_id, layer_id)
        trash = os.path.join(place.graphroot, "userns-storage", "trash")
        os.mkdir(trash)
        with records.transaction(containers=True) as transaction:
            transaction.drop_mapped_layer(layer_id)
            transaction.mark_incomplete(layer_id)
            at("marked")
            if moment == "unlinked":
                os.rename = lambda *_a, **_n: die()
            driver.detach(layer_id, trash)
            die()


@pytest.mark.parametrize(
    ("kind", "moment"),
    [
        *itertools.product(
            ["overlay-forced", "vfs", "btrfs"], ["staged", "begun", "linked", "marked", "detached"]
        ),
        ("overlay-forced", "renamed"),
        ("overlay-forced", "unlinked"),
    ],
)
def test_podman_cleans_up_after_a_kill(
    make_store: MakeStore, small_image: Image, kind: str, moment: str
) -> None:
    store = make_store(kind, small_image)
    image = store.image(small_image.name)
    layer_id = "0123456789abcdef" * 4
    before = store.layer_ids()
    with pytest.raises(WorkerError, match="killed by signal 9"):
        inside(store, killed, image["id"], layer_id, moment)
    store.create(small_image.name)
    assert layer_id not in store.layer_ids()
    assert len(store.layer_ids()) == len(before) + 1
    inside(store, sweep)
    assert not store.layer_folder(layer_id).exists()
    if store.driver == "overlay":
        links = store.graphroot / "overlay" / "l"
        assert not [link.name for link in links.iterdir() if not link.exists()]
    assert layer_id not in store.podman("images", "--all", "--no-trunc").stdout
