# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Test the modules in cases that podman's users have reported about podman's copies of images.

====  ===========================================================  ==========================================
case  reports and their subject                                    test
====  ===========================================================  ==========================================
E01   containers/storage#1060, podman#11544: the size of copies    test_image_layers_info.py, ``big_image``
E02   podman#12316: no command removes a copy                      test_layer_gc.py
E03   podman#8259, #14574, #16673: hard links                      here
E04   podman#1526, containers/storage PR#217: setuid, xattrs       here
E05   containers/storage PR#1564: the root directory's owner       test_image_layers_info.py
E06   podman#16608, containers/storage PR#1220: unmapped IDs       here
E07   containers/storage compares maps entry by entry: a copy for  test_image_layers_info.py
      each form of the same map
E08   podman#25213: other commands wait while a copy is made       here, smaller
E09   podman#24743, #16882: killed while a copy is made            here
E10   containers/storage PR#2285: images in a read-only store      test_image_layers_info.py
E11   podman#16830: cost of copies on btrfs and xfs                test_image_layers_info.py
E12   containers/storage#640: cost of copies with metacopy         test_image_layers_info.py
====  ===========================================================  ==========================================
"""

from __future__ import annotations

import os
import pathlib
import signal
import stat
import typing as t

import pytest
from support import images
from support.images import CAP_NET_RAW, Image, capability, directory, file, link, symlink
from support.lab import Lab
from support.modules import finish_module
from support.store_cases import Case
from support.stores import Store
from support.waiting import wait_until

MakeCase = t.Callable[..., Case]
Json = t.Dict[str, t.Any]

DRIVERS = ["vfs", "overlay-forced"]
LINKS = 400


@pytest.fixture(scope="module")
def linked_image(lab: Lab) -> Image:
    """E03: a file with hard links in two directories, and a program with 400 hard links."""
    tree = {".": directory(), "a": directory(), "b": directory(), "bin": directory()}
    tree["a/file"] = file("shared", uid=1000, gid=1000)
    tree["b/file"] = link("a/file")
    tree["bin/busybox"] = file("program", mode=0o755)
    tree.update({f"bin/applet{number}": link("bin/busybox") for number in range(1, LINKS)})
    return images.build(lab.folder(), [tree], "localhost/linked:1")


@pytest.mark.parametrize("kind", DRIVERS)
def test_e03_hard_links_are_kept(kind: str, make_case: MakeCase, linked_image: Image) -> None:
    case = make_case(kind, linked_image)
    (layer,) = case.layer_template()["layers"]
    with case.store.mounted(layer["layer_id"]) as tree:
        first, second = os.lstat(tree / "a/file"), os.lstat(tree / "b/file")
        assert (first.st_ino, first.st_nlink) == (second.st_ino, 2)
        assert (first.st_uid, first.st_gid) == (101000, 101000)
        applets = [os.lstat(path) for path in (tree / "bin").iterdir()]
        assert len(applets) == LINKS
        assert {applet.st_ino for applet in applets} == {os.lstat(tree / "bin/busybox").st_ino}
        assert {(applet.st_nlink, applet.st_uid) for applet in applets} == {(LINKS, 100000)}


@pytest.fixture(scope="module")
def privileged_image(lab: Lab) -> Image:
    """E04: attributes that a change of the owner can remove."""
    ping = {"security.capability": capability(CAP_NET_RAW)}
    tree = {
        ".": directory(),
        "su": file("su", mode=0o4755, uid=1000),
        "wall": file("wall", mode=0o2755, gid=1000),
        "ping": file("ping", mode=0o755, xattrs=ping),
        "noted": file("noted", xattrs={"user.foo": b"bar"}),
        "link": symlink("su", uid=1000),
    }
    return images.build(lab.folder(), [tree], "localhost/privileged:1")


@pytest.mark.parametrize("kind", DRIVERS)
def test_e04_attributes_survive_change_of_owner(
    kind: str, make_case: MakeCase, privileged_image: Image
) -> None:
    case = make_case(kind, privileged_image)
    (layer,) = case.layer_template()["layers"]
    with case.store.mounted(layer["layer_id"]) as tree:
        found = {
            path.name: (oct(stat.S_IMODE(info.st_mode)), info.st_uid, info.st_gid)
            for path in tree.iterdir()
            for info in [os.lstat(path)]
        }
        assert found == {
            "su": ("0o4755", 101000, 100000),
            "wall": ("0o2755", 100000, 101000),
            "ping": ("0o755", 100000, 100000),
            "noted": ("0o644", 100000, 100000),
            "link": ("0o777", 101000, 100000),
        }
        assert os.getxattr(tree / "noted", "user.foo") == b"bar"
        assert os.getxattr(tree / "ping", "security.capability") == capability(CAP_NET_RAW)
        assert os.readlink(tree / "link") == "su"


@pytest.fixture(scope="module")
def far_owners_image(lab: Lab) -> Image:
    """E06: files whose owners are not in small maps."""
    tree = {
        ".": directory(),
        "far": file("far", uid=70000, gid=70000),
        "near": file("near", uid=500, gid=500),
    }
    return images.build(lab.folder(), [tree], "localhost/far:1")


@pytest.mark.parametrize(
    ("size", "unmapped", "mapped"), [(65536, {70000}, {500}), (100, {500, 70000}, set())]
)
@pytest.mark.parametrize("kind", DRIVERS)
def test_e06_unmapped_ids_are_reported_before_changes(
    kind: str,
    size: int,
    unmapped: t.Set[int],
    mapped: t.Set[int],
    make_case: MakeCase,
    far_owners_image: Image,
) -> None:
    case = make_case(kind, far_owners_image)
    before = case.store.disk_state()
    mapping: t.Dict[str, t.Any] = {"uidmap": [f"0:100000:{size}"]}
    result = case.layer_template(**mapping, options={"fails": True})
    assert set(result["uids"]) == set(result["gids"]) == unmapped, result["msg"]
    assert all(str(number) in result["msg"] for number in unmapped)
    assert not any(f" {number}" in result["msg"] for number in mapped)
    assert before.changes(case.store.disk_state()) == []
    (layer,) = case.layer_template(**mapping, unmapped_ids="overflow")["layers"]
    with case.store.mounted(layer["layer_id"]) as tree:
        owners = {path.name: os.lstat(path).st_uid for path in tree.iterdir()}
    assert owners == {"far": 65534, "near": 100500 if mapped else 65534}


@pytest.fixture(scope="module")
def large_image(many_files_image: t.Callable[[int], Image]) -> Image:
    """E08: an image of 60 directories of 150 files, where the image of the report has 300."""
    return many_files_image(9_000)


def test_e08_programs_do_not_wait_for_copy_of_large_image(
    make_case: MakeCase, large_image: Image
) -> None:
    case = make_case("overlay-forced", large_image)
    process = case.start("layer_template", {"images": [large_image.name], **case.mapping_args})
    _wait_for_staging(case.store)
    listings = 0
    while process.poll() is None:
        case.store.podman("images")
        listings += 1
    (layer,) = finish_module(process)["layers"]
    assert layer["action"] == "created"
    assert layer["files"] > 9_000
    # A podman that waits for the whole copy would complete only one listing.
    assert listings > 1
    assert layer["lock_seconds"] < layer["seconds"] / 2


@pytest.mark.parametrize("killed", ["layer_template", "podman"])
def test_e09_leftovers_of_killed_copy_are_removed(
    killed: str, make_case: MakeCase, large_image: Image
) -> None:
    case = make_case("overlay-forced", large_image)
    store = case.store
    before = store.layer_ids()
    if killed == "podman":
        process = store.machine.popen(
            ["podman", "create", *case.podman_args, large_image.name, "true"],
            env=store.env(),
        )
        wait_until(lambda: _incomplete(store))
    else:
        process = case.start("layer_template", {"images": [large_image.name], **case.mapping_args})
        _wait_for_staging(store)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    (layer,) = case.layer_template()["layers"]
    assert layer["action"] == "created"
    case.assert_podman_works()
    assert store.layer_ids() == before | {layer["layer_id"]}
    assert _incomplete(store) == []
    names = (path.name for path in (store.graphroot / "overlay").iterdir())
    assert {name for name in names if len(name) == 64} == store.layer_ids()
    assert not list((store.graphroot / "userns-storage/staging").iterdir())
    assert str(store.graphroot / "overlay/") not in pathlib.Path("/proc/mounts").read_text()
    (info,) = case.info()["images"]
    assert [item["status"] for item in info["mapped_layers"]] == ["ok"]
    assert info["mapped_layers"][0]["inodes"] > 9_000


def _incomplete(store: Store) -> t.List[str]:
    return [layer["id"] for layer in store.layers() if layer.get("flags", {}).get("incomplete")]


def _wait_for_staging(store: Store) -> None:
    """Wait until the copy has started."""
    staging = store.graphroot / "userns-storage/staging"
    wait_until(lambda: list(staging.glob("*/layer/diff/data/*")))
