# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Test that podman uses the layers that drivers create with each strategy, and that their content is correct."""

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
from support.driver_access import (
    StoreDescription,
    config_of,
    describe_store,
    open_test_driver,
    run_as_owner,
    staging_folder,
)

if t.TYPE_CHECKING:
    from support.images import Image
    from support.stores import Store

MakeStore = t.Callable[..., "Store"]

METACOPY = {"mountopt": "nodev,metacopy=on"}
# Kind of store, options, requested strategy, resulting strategy.
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


class Created(t.NamedTuple):
    layer_id: str
    strategy: str
    reason: str
    files: int
    apparent: int
    exclusive: int


def create(
    description: StoreDescription, image_id: str, items: t.Sequence[str], strategy: str
) -> t.Tuple[t.Any, ...]:
    """Create a complete mapped layer as the operations do."""
    mapping = Mapping(IDMap.parse(items), IDMap.parse(items))
    with open_test_driver(description) as driver:
        records = OurStore.open(config_of(description))
        snapshot = records.snapshot()
        image = snapshot.images[image_id]
        chain = snapshot.chain(image.layer)
        layer_id = new_layer_id(snapshot.layers)
        folder = staging_folder(description, layer_id)
        ids = [layer.id for layer in chain]
        shift = Shift(chain[0].mapping, mapping, False)
        predicted, usage = driver.predict(ids, shift, strategy)
        staged = driver.stage(ids, shift, strategy, folder, layer_id)
        assert (predicted.name, usage.files, usage.apparent) == (
            staged.strategy,
            staged.files,
            staged.apparent,
        )
        record = mapped_record(layer_id, chain[0], mapping, time.time_ns(), None)
        tar_split = os.path.join(folder, "tar-split")
        with open(records.tar_split_path(chain[0].id), "rb") as source:
            pathlib.Path(tar_split).write_bytes(source.read())
        with records.transaction() as transaction:
            transaction.begin_layer(record)
            driver.commit(folder, layer_id)
            transaction.install_tar_split(layer_id, tar_split)
            transaction.finish_layer(layer_id)
            transaction.append_mapped_layer(image_id, layer_id)
        assert driver.exists(layer_id)
        assert driver.damage(layer_id, ids) is None
        assert not driver.orphans(records.snapshot().layers)
    return (layer_id, *figures(staged))


def figures(staged: Staged) -> t.Tuple[str, str, int, int, int]:
    return staged.strategy, staged.reason, staged.files, staged.apparent, staged.exclusive


# Comparison


def entries(root: pathlib.Path) -> t.Dict[str, t.Dict[str, t.Any]]:
    """All entries of a tree with their attributes and content."""
    found: t.Dict[str, t.Dict[str, t.Any]] = {}
    links: t.Dict[t.Tuple[int, int], t.List[str]] = {}

    def add(path: str, name: str) -> None:
        status = os.lstat(path)
        attributes: t.Dict[str, t.Any] = {
            "mode": oct(status.st_mode),
            "mtime": status.st_mtime_ns,
            "owner": (status.st_uid, status.st_gid),
            "device": status.st_rdev,
        }
        if not stat.S_ISDIR(status.st_mode):
            attributes["size"] = status.st_size
            links.setdefault((status.st_dev, status.st_ino), []).append(name)
        if stat.S_ISREG(status.st_mode):
            with open(path, "rb") as content:
                attributes["content"] = hashlib.sha256(content.read()).hexdigest()
        if stat.S_ISLNK(status.st_mode):
            attributes["target"] = os.readlink(path)
        attributes["xattrs"] = {
            attribute: os.getxattr(path, attribute, follow_symlinks=False)
            for attribute in os.listxattr(path, follow_symlinks=False)
            if ".overlay." not in attribute
        }
        found[name] = attributes

    add(str(root), ".")
    for parent, folders, files in os.walk(root):
        for name in [*folders, *files]:
            path = os.path.join(parent, name)
            add(path, os.path.relpath(path, root))
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
    for name, attributes in old.items():
        attributes["owner"] = tuple(new_id(item) for item in attributes["owner"])
        assert new[name] == attributes, name


def container_id(store: Store, host_id: int) -> int:
    """The container ID of an owner on disk in a layer without a map."""
    if store.user is None:
        return host_id
    return 0 if host_id == store.user.uid else host_id - store.user.subuid_start + 1


@pytest.mark.parametrize(("kind", "options", "requested", "strategy"), CASES)
def test_podman_uses_created_layer(
    make_store: MakeStore,
    small_image: Image,
    kind: str,
    options: t.Dict[str, str],
    requested: str,
    strategy: str,
) -> None:
    store = make_store(kind, small_image, options=options)
    items = ["0:1:20000"] if store.user else ["0:100000:65536"]
    image = store.image(small_image.name)
    before = store.layer_ids()
    created = Created(*run_as_owner(store, create, image["id"], items, requested))
    assert created.strategy == strategy
    assert created.reason
    assert store.layer_ids() == before | {created.layer_id}

    maps = [
        {"container_id": int(c), "host_id": int(h), "size": int(n)}
        for c, h, n in [item.split(":") for item in items]
    ]
    check_same(
        store,
        image["layer"],
        created.layer_id,
        lambda item: store.host_id(maps, container_id(store, item)),
    )
    arguments = [argument for item in items for argument in ("--uidmap", item, "--gidmap", item)]
    container = store.create(small_image.name, *arguments)
    assert store.layer(store.container(container)["layer"])["parent"] == created.layer_id
    assert len(store.layer_ids()) == len(before) + 2

    script = "stat -c '%u:%g:%a' /home/user/notes /usr/bin/suid /usr/lib/two; cat /etc/motd"
    output = store.shell(small_image.name, script, args=arguments)
    assert output.split() == ["1000:1000:600", "0:0:4755", "1000:1:640", "second"]

    store.podman("rm", container)
    store.podman("rmi", small_image.name)
    run_as_owner(store, sweep)
    assert store.remaining_paths(created.layer_id) == []


@pytest.mark.parametrize("kind", ["vfs", "overlay-forced", "btrfs", "rootless-overlay"])
def test_detach_leaves_only_tar_split(make_store: MakeStore, small_image: Image, kind: str) -> None:
    store = make_store(kind, small_image)
    items = ["0:1:20000"] if store.user else ["0:100000:65536"]
    image = store.image(small_image.name)
    created = Created(*run_as_owner(store, create, image["id"], items, "auto"))
    run_as_owner(store, remove, created.layer_id)
    assert not store.layer_folder(created.layer_id).exists()
    run_as_owner(store, sweep)
    leftovers = [pathlib.Path(path).name for path in store.remaining_paths(created.layer_id)]
    assert leftovers == [f"{created.layer_id}.tar-split.gz"]


def sweep(description: StoreDescription) -> None:
    with open_test_driver(description) as driver:
        area = StagingArea(os.path.join(description.graphroot, "userns-storage"))

        def destroy(parent: int, name: str) -> bool:
            if driver.is_placeholder(name):
                driver.remove_placeholder(name)
            return driver.destroy(parent, name)

        area.sweep(destroy)
        assert area.leftovers() == []


def remove(description: StoreDescription, layer_id: str) -> None:
    trash = os.path.join(description.graphroot, "userns-storage", "trash")
    os.mkdir(trash)
    with open_test_driver(description) as driver:
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


def test_staging_works_if_podman_mounted_its_folder(
    make_store: MakeStore, small_image: Image
) -> None:
    """The mount of rootful podman on its own folder is not in the view of the driver, and persists outside."""
    store = make_store("overlay-forced", small_image)
    from support import mounts

    image = store.image(small_image.name)
    folder = str(store.graphroot / "overlay")
    if folder not in mounts.mount_points(folder):
        mounts.mount("--bind", folder, folder)
    mounts.mount("--make-private", folder)
    visible = run_as_owner(store, mounted_inside)
    assert visible == []
    created = Created(*run_as_owner(store, create, image["id"], ["0:100000:65536"], "auto"))
    assert store.layer_folder(created.layer_id).is_dir()
    assert folder in mounts.mount_points(folder)


def mounted_inside(description: StoreDescription) -> t.List[str]:
    with open_test_driver(description), open("/proc/self/mountinfo", encoding="utf-8") as table:
        points = [line.split()[4] for line in table]
    return [point for point in points if point.startswith(description.graphroot + "/")]


def test_runtime_may_mount_its_folder_while_view_is_created(
    make_store: MakeStore, small_image: Image
) -> None:
    """Two processes of podman mount the folder before the view is private."""
    store = make_store("overlay-forced", small_image)
    assert run_as_owner(store, mount_while_view_is_created) == []


def mount_while_view_is_created(description: StoreDescription) -> t.List[str]:
    folder = os.path.join(description.graphroot, description.driver)
    make_private = mounts.make_private

    def mount_then_make_private(target: mounts.PathOrFd = "/") -> None:
        if target == description.graphroot:
            mounts.bind(folder, folder)
            mounts.bind(folder, folder)
        make_private(target)

    mounts.make_private = mount_then_make_private
    found = mounted_inside(description)
    with open_test_driver(description):
        os.mkdir(os.path.join(description.graphroot, "beside"))
        # A rename fails across mounts.
        os.rename(os.path.join(description.graphroot, "beside"), os.path.join(folder, "beside"))
        os.rmdir(os.path.join(folder, "beside"))
    return found


def test_other_filesystem_in_graph_root_is_rejected(
    make_store: MakeStore, small_image: Image
) -> None:
    store = make_store("overlay-forced", small_image)
    from support import mounts

    folder = store.graphroot / "overlay"
    mounts.detach_all(str(folder))
    mounts.mount("-t", "tmpfs", "other", str(folder))
    try:
        with pytest.raises(UnsupportedDriver, match="another filesystem"):
            run_as_owner(store, mounted_inside)
    finally:
        mounts.detach_all(str(folder))


def test_ids_outside_map_are_rejected(make_store: MakeStore, small_image: Image) -> None:
    store = make_store("overlay-forced", small_image)
    image = store.image(small_image.name)
    with pytest.raises(UnmappedIDs) as caught:
        run_as_owner(store, create, image["id"], ["0:100000:600"], "auto")
    assert caught.value.facts["uids"] == [1000]


def add_redirect(description: StoreDescription, chain: t.List[str]) -> None:
    """Add a redirect to the top layer, as a container with redirect_dir does."""
    top = os.path.join(description.graphroot, "overlay", chain[0], "diff")
    os.mkdir(os.path.join(top, "moved"))
    os.setxattr(os.path.join(top, "moved"), "trusted.overlay.redirect", b"/opt/app")


def test_layer_with_redirect_is_copied_from_mount(
    make_store: MakeStore, small_image: Image
) -> None:
    store = make_store("overlay-forced", small_image, options={"mountopt": "redirect_dir=on"})
    image = store.image(small_image.name)
    chain = []
    layer = image["layer"]
    while layer:
        chain.append(layer)
        layer = store.layer(layer).get("parent", "")
    add_redirect(describe_store(store), chain)
    created = Created(*run_as_owner(store, create, image["id"], ["0:100000:65536"], "auto"))
    assert created.strategy == "copy"
    assert "redirect" in created.reason
    tagged = store.layer_folder(created.layer_id) / "diff" / "moved" / "tagged"
    assert os.lstat(tagged).st_uid == 100500


def test_metacopy_of_layer_with_metacopy(make_store: MakeStore, small_image: Image) -> None:
    """The mapped layer of podman contains files without data, so only the kernel can read its content."""
    store = make_store("overlay-forced", small_image, options=METACOPY)
    container = store.create(small_image.name, "--uidmap=0:200000:65536", "--gidmap=0:200000:65536")
    podman_layer = store.layer(store.container(container)["layer"])["parent"]
    staged = run_as_owner(store, stage_from_mapped, podman_layer)
    assert staged[0] == "metacopy"
    layer = store.graphroot / "userns-storage" / "staging" / "built" / "layer"
    notes = layer / "diff1" / "home" / "user" / "notes"
    assert os.lstat(notes).st_uid == 301000
    assert os.lstat(layer / "diff1" / "bin" / "busybox").st_blocks < 20
    assert list((layer / "diff").iterdir()) == []


def test_mapped_layer_of_podman_as_template(make_store: MakeStore, small_image: Image) -> None:
    """Its content is in diff1 and has mapped owners; on disk it depends on the unmapped layer."""
    store = make_store("overlay-forced", small_image)
    image = store.image(small_image.name)
    container = store.create(small_image.name, "--uidmap=0:200000:65536", "--gidmap=0:200000:65536")
    podman_layer = store.layer(store.container(container)["layer"])["parent"]
    assert (store.layer_folder(podman_layer) / "diff1").is_dir()
    staged = run_as_owner(store, stage_from_mapped, podman_layer)
    layer = store.graphroot / "userns-storage" / "staging" / "built" / "layer"
    lower = (layer / "lower-layers").read_text().split(":")
    assert lower[:2] == [podman_layer, image["layer"]]
    assert len((layer / "lower").read_text().split(":")) == len(lower)
    assert os.lstat(layer / "diff" / "home" / "user" / "notes").st_uid == 301000
    assert staged[0] == "copy"


def stage_from_mapped(
    description: StoreDescription, template: str
) -> t.Tuple[str, str, int, int, int]:
    old = Mapping(IDMap.parse(["0:200000:65536"]), IDMap.parse(["0:200000:65536"]))
    new = Mapping(IDMap.parse(["0:300000:65536"]), IDMap.parse(["0:300000:65536"]))
    with open_test_driver(description) as driver:
        snapshot = OurStore.open(config_of(description)).snapshot()
        ids = [layer.id for layer in snapshot.chain(template)]
        folder = staging_folder(description, "built")
        return figures(driver.stage(ids, Shift(old, new, True), "auto", folder, "f" * 64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mount_program": "/usr/bin/fuse-overlayfs"}, "mount program"),
        ({"force_mask": "shared"}, "force_mask"),
    ],
)
def test_unsupported_overlay_options_are_rejected(
    make_store: MakeStore, small_image: Image, options: t.Dict[str, str], message: str
) -> None:
    store = make_store("overlay-forced", small_image)
    image = store.image(small_image.name)
    store.options.update(options)
    with pytest.raises(UnsupportedDriver, match=message):
        run_as_owner(store, create, image["id"], ["0:100000:65536"], "auto")


def test_symlink_as_layer_content_is_rejected(make_store: MakeStore, small_image: Image) -> None:
    store = make_store("overlay-forced", small_image)
    image = store.image(small_image.name)
    folder = store.layer_folder(image["layer"])
    folder.joinpath("diff").rename(folder / "away")
    folder.joinpath("diff").symlink_to("/etc")
    with pytest.raises(StoreError):
        run_as_owner(store, create, image["id"], ["0:100000:65536"], "auto")


def test_parent_layers_in_read_only_store(make_store: MakeStore, small_image: Image) -> None:
    shared = make_store("overlay-forced", small_image)
    store = make_store("overlay-forced", read_only=[str(shared.graphroot)])
    container = store.create(small_image.name)
    store.podman("commit", "-q", container, "localhost/upper:1")
    image = store.image("localhost/upper:1")
    parent = store.layer(image["layer"])["parent"]
    assert not store.layer_folder(parent).exists()
    created = Created(*run_as_owner(store, create, image["id"], ["0:100000:65536"], "auto"))
    notes = store.layer_folder(created.layer_id) / "diff" / "home" / "user" / "notes"
    assert os.lstat(notes).st_uid == 101000
    arguments = ["--uidmap=0:100000:65536", "--gidmap=0:100000:65536"]
    mapped = store.create("localhost/upper:1", *arguments)
    assert store.layer(store.container(mapped)["layer"])["parent"] == created.layer_id


def test_store_of_fuse_overlayfs_is_rejected(make_store: MakeStore, small_image: Image) -> None:
    """The store records the use of fuse-overlayfs, so the option is not needed."""
    store = make_store("rootless-fuse", small_image)
    image = store.image(small_image.name)
    store.options.clear()
    with pytest.raises(UnsupportedDriver, match="mount program"):
        run_as_owner(store, create, image["id"], ["0:1:20000"], "auto")


def kill_self() -> t.NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def killed(description: StoreDescription, image_id: str, layer_id: str, step: str) -> None:
    """Commit and detach a layer, and be killed at the given step."""
    mapping = Mapping(IDMap.parse(["0:100000:65536"]), IDMap.parse(["0:100000:65536"]))

    def kill_at(name: str) -> None:
        if name == step:
            kill_self()

    with open_test_driver(description) as driver:
        records = OurStore.open(config_of(description))
        snapshot = records.snapshot()
        chain = snapshot.chain(snapshot.images[image_id].layer)
        ids = [layer.id for layer in chain]
        folder = staging_folder(description, layer_id)
        driver.stage(ids, Shift(Mapping(), mapping), "copy", folder, layer_id)
        kill_at("staged")
        record = mapped_record(layer_id, chain[0], mapping, time.time_ns(), None)
        with records.transaction() as transaction:
            transaction.begin_layer(record)
            kill_at("begun")
            if step == "renamed":
                os.symlink = lambda *_a, **_n: kill_self()
            driver.commit(folder, layer_id)
            kill_at("linked")
            transaction.finish_layer(layer_id)
            transaction.append_mapped_layer(image_id, layer_id)
        trash = os.path.join(description.graphroot, "userns-storage", "trash")
        os.mkdir(trash)
        with records.transaction(containers=True) as transaction:
            transaction.drop_mapped_layer(layer_id)
            transaction.mark_incomplete(layer_id)
            kill_at("marked")
            if step == "unlinked":
                os.rename = lambda *_a, **_n: kill_self()
            driver.detach(layer_id, trash)
            kill_at("detached")
    raise AssertionError(f"the step {step} was not reached")


@pytest.mark.parametrize(
    ("kind", "step"),
    [
        *itertools.product(
            ["overlay-forced", "vfs", "btrfs"], ["staged", "begun", "linked", "marked", "detached"]
        ),
        ("overlay-forced", "renamed"),
        ("overlay-forced", "unlinked"),
    ],
)
def test_podman_cleans_up_after_kill(
    make_store: MakeStore, small_image: Image, kind: str, step: str
) -> None:
    store = make_store(kind, small_image)
    image = store.image(small_image.name)
    layer_id = "0123456789abcdef" * 4
    before = store.layer_ids()
    with pytest.raises(WorkerError, match="killed by signal 9"):
        run_as_owner(store, killed, image["id"], layer_id, step)
    store.create(small_image.name)
    assert layer_id not in store.layer_ids()
    assert len(store.layer_ids()) == len(before) + 1
    run_as_owner(store, sweep)
    assert not store.layer_folder(layer_id).exists()
    if store.driver == "overlay":
        links = store.graphroot / "overlay" / "l"
        assert not [link.name for link in links.iterdir() if not link.exists()]
    assert layer_id not in store.podman("images", "--all", "--no-trunc").stdout
