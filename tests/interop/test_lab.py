# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Test the laboratory, the hosts, the stores and the images on which the other tests depend."""

from __future__ import annotations

import os
import pathlib
import typing as t

import pytest
from support import hosts, images, mounts, stores, users
from support.hosts import Host, Sshd
from support.images import Image
from support.lab import Lab
from support.machines import busy_pids
from support.stores import Store
from support.users import User

ROOTFUL = ("--uidmap=0:100000:65536", "--gidmap=0:100000:65536")
KEEP_ID = ("--userns=keep-id",)

# Whether podman copies the image for a user namespace, by kind of store (kernel 5.19 and newer).
COPIES = {
    "vfs": True,
    "overlay": False,
    "overlay-forced": True,
    "overlay-xfs": True,
    "overlay-btrfs": True,
    "vfs-xfs": True,
    "vfs-ext4": True,
    "overlay-ext4": True,
    "overlay-tmpfs": True,
    "vfs-tmpfs": True,
    "btrfs": True,
    "rootless-overlay": True,
    "rootless-vfs": True,
    "rootless-vfs-tmpfs": True,
    "rootless-fuse": False,
}


def test_hosts_have_different_generations_of_podman(host: t.Callable[[str], Host]) -> None:
    versions = [host(suite).version("podman") for suite in hosts.SUITES]
    assert versions[0][:2] == (5, 4)
    assert versions[1] >= (5, 8)
    assert versions[2] >= (6, 1)
    assert host("experimental").version("buildah") >= (1, 45)


# Each kind runs on one machine, and each machine with several kinds; test_matrix.py runs all combinations.
@pytest.mark.parametrize(
    ("kind", "machine"),
    [
        (kind, ("local", *hosts.SUITES)[number % (1 + len(hosts.SUITES))])
        for number, kind in enumerate(stores.KINDS)
    ],
)
def test_store_loads_image_and_runs_mapped_container(
    kind: str,
    machine: str,
    make_store: t.Callable[..., Store],
    small_image: Image,
    host: t.Callable[[str], Host],
) -> None:
    host_machine = None if machine == "local" else host(machine)
    store = make_store(kind, small_image, machine=host_machine)
    before = store.layer_ids()
    assert len(before) == len(small_image.layers)
    assert store.mapped_layers(small_image.name) == []

    args = KEEP_ID if store.user else ROOTFUL
    script = "id -u; cat /proc/self/uid_map; stat -c '%u:%g %a' /home/user; cat /etc/motd"
    uid, *uid_map, home, motd = store.shell(small_image.name, script, args).splitlines()
    ranges = [tuple(map(int, line.split())) for line in uid_map]
    if store.user:
        user_id = store.user.uid
        assert uid == str(user_id)
        assert ranges == [
            (0, 1, user_id),
            (user_id, 0, 1),
            (user_id + 1, user_id + 1, 65536 - user_id),
        ]
    else:
        assert uid == "0"
        assert ranges == [(0, 100000, 65536)]
    assert home == "1000:1000 700"
    assert motd == "second"

    added = sorted(store.layer_ids() - before)
    assert added == store.mapped_layers(small_image.name)
    assert len(added) == int(COPIES[kind])
    assert store.containers() == []


def test_described_tree_equals_tree_in_store(
    make_store: t.Callable[..., Store], small_image: Image
) -> None:
    store = make_store("vfs", small_image)
    top = store.image(small_image.name)["layer"]
    with store.mounted(top) as tree:
        found = {"."} | {
            os.path.relpath(os.path.join(parent, name), tree)
            for parent, folders, files in os.walk(tree)
            for name in [*folders, *files]
        }
        expected = small_image.tree()
        assert found == set(expected)
        for path, entry in expected.items():
            info = os.lstat(tree / path)
            assert (info.st_uid, info.st_gid) == (entry.uid, entry.gid), path
            if entry.kind != "symlink":
                assert info.st_mode & 0o7777 == entry.mode, path
            if entry.kind == "file":
                assert (tree / path).read_bytes() == entry.content, path
                assert info.st_mtime_ns == entry.mtime_ns, path
            for key, value in entry.xattrs.items():
                assert os.getxattr(tree / path, key) == value, path
        assert (tree / "usr/lib/one").samefile(tree / "usr/lib/deep/three")


@pytest.mark.parametrize("kind", ["overlay", "rootless-overlay"])
def test_overlay_layers_can_be_mounted(
    kind: str, make_store: t.Callable[..., Store], small_image: Image
) -> None:
    store = make_store(kind, small_image)
    with store.mounted(store.image(small_image.name)["layer"]) as tree:
        assert (tree / "etc/motd").read_text() == "second\n"
        assert not (tree / "opt/app/old").exists()
        owner = os.lstat(tree / "home/user/notes").st_uid
        assert owner == store.host_id([], 1000)


def test_recorded_sizes_are_sizes_of_archives(
    make_store: t.Callable[..., Store], small_image: Image
) -> None:
    store = make_store("overlay", small_image)
    assert sorted(layer["diff-size"] for layer in store.layers()) == sorted(small_image.sizes)


def test_disk_snapshot_detects_each_write(
    make_store: t.Callable[..., Store], small_image: Image
) -> None:
    store = make_store("vfs", small_image)
    before = store.disk_state()
    assert before.changes(store.disk_state()) == []
    lock = store.graphroot / "vfs-layers/layers.lock"
    with open(lock, "r+b") as content:
        old = content.read(64)
        content.seek(0)
        content.write(old)
    changes = before.changes(store.disk_state())
    assert [line.partition(": ")[0] for line in changes] == [str(lock)]


def test_service_responds_and_ends(
    lab: Lab, make_store: t.Callable[..., Store], small_image: Image
) -> None:
    store = make_store("vfs", small_image)
    with store.service() as service:
        (image,) = service.call("GET", "images/json")
        assert image["Names"] == [small_image.name]
    assert not os.path.exists(f"/proc/{service.pid}")


@pytest.mark.parametrize("kind", ["vfs", "rootless-overlay"])
def test_closed_store_leaves_no_mounts_files_or_processes(
    kind: str, lab: Lab, small_image: Image, make_user: t.Callable[..., User]
) -> None:
    user = make_user() if kind.startswith("rootless") else None
    store = Store(lab, kind, user=user)
    store.load(small_image)
    store.podman("run", "-d", small_image.name, "sleep", "1000")
    paths = [str(store.base), *([user.home] if user else [])]
    for path in paths:
        point = pathlib.Path(path, "mounted")
        point.mkdir()
        mounts.mount("-t", "tmpfs", "lab", str(point))
        assert busy_pids(f"{path}/")
    store.close()
    assert [point for path in paths for point in mounts.mount_points(path)] == []
    assert not store.graphroot.exists()
    assert [pid for path in paths for pid in busy_pids(f"{path}/")] == []


def test_subordinate_ids_of_users_do_not_overlap(
    lab: Lab, make_user: t.Callable[..., User]
) -> None:
    first, second = make_user(), make_user()
    ranges = [range(u.subuid_start, u.subuid_start + u.subuid_count) for u in (first, second)]
    assert [len(r) for r in ranges] == [65536, 65536]
    assert ranges[0].stop <= ranges[1].start or ranges[1].stop <= ranges[0].start
    assert f"{first.name}:{first.subuid_start}:65536" in pathlib.Path("/etc/subuid").read_text()
    assert f"{first.name}:{first.subuid_start}:65536" in pathlib.Path("/etc/subgid").read_text()
    users.remove_user(lab, first)
    for name in ("passwd", "group", "subuid", "subgid"):
        assert first.name not in pathlib.Path("/etc", name).read_text()
    bare = make_user(subordinate=0)
    assert bare.name not in pathlib.Path("/etc/subuid").read_text()


def test_store_of_host_is_accessible_outside_host(
    make_store: t.Callable[..., Store], host: t.Callable[[str], Host], small_image: Image
) -> None:
    trixie = host("trixie")
    assert trixie.version("podman")[:2] == (5, 4)
    store = make_store("vfs", small_image, machine=trixie)
    store.create(small_image.name, *ROOTFUL)
    (mapped,) = store.mapped_layers(small_image.name)
    with store.mounted(mapped) as tree:
        assert os.lstat(tree / "home/user/notes").st_uid == 101000
    # The cached root directory is the lower directory of an overlay, so writes go to memory.
    trixie.run(["touch", "/etc/written"])
    assert pathlib.Path(f"{trixie.root}/etc/written").exists()
    assert not pathlib.Path("/etc/written").exists()


def test_host_is_accessible_by_ssh(
    lab: Lab,
    host: t.Callable[[str], Host],
    sshd: t.Callable[[Host], Sshd],
    run_playbook: t.Callable[..., t.List[t.Dict[str, t.Any]]],
) -> None:
    daemon = sshd(host("trixie"))
    (result,) = run_playbook(
        [{"ansible.builtin.command": "podman --version"}],
        inventory="trixie,",
        variables=daemon.variables,
    )
    assert result["stdout"].startswith("podman version 5.4")


@pytest.mark.parametrize("path", ["direct", "playbook"])
def test_modules_run(
    path: str,
    lab: Lab,
    make_user: t.Callable[..., User],
    run_module: t.Callable[..., t.Dict[str, t.Any]],
    run_playbook: t.Callable[..., t.List[t.Dict[str, t.Any]]],
) -> None:
    target = lab.folder() / "made"
    args = {"path": str(target), "state": "directory"}
    if path == "direct":
        predicted = run_module("ansible.builtin.file", args, check=True)
        assert predicted["changed"]
        assert not target.exists()
        created = run_module("ansible.builtin.file", args)
        failed = run_module(
            "ansible.builtin.file", {**args, "state": "absent"}, user=make_user(), fails=True
        )
    else:
        task = {"ansible.builtin.file": args}
        (predicted,) = run_playbook([task], check=True)
        assert predicted["changed"]
        assert not target.exists()
        created, failed = run_playbook(
            [task, {"ansible.builtin.file": {**args, "state": "file"}}],
        )
        assert failed["failed"]
    assert created["changed"]
    assert target.is_dir()
    assert failed["msg"]


def test_image_keeps_unusual_file_names(lab: Lab, make_store: t.Callable[..., Store]) -> None:
    names = ["new\nline", "\udcff\udcfe not UTF-8", " spaces ", "q'\"$(x)", "x" * 200]
    described = {
        f"d/{name}": images.file(name.encode("utf-8", "surrogateescape")) for name in names
    }
    image = images.build(lab.folder(), [images.shell(), described], "localhost/hostile:1")
    store = make_store("vfs", image)
    with store.mounted(store.image(image.name)["layer"]) as tree:
        assert sorted(os.listdir(tree / "d")) == sorted(names)
