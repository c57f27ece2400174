# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""tree/in_place.py changes each owner on real filesystems as the map defines, and changes nothing else."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import stat
import struct
import threading
import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.errors import (
    StoreChanged,
    TreeError,
    UnsupportedDriver,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.idmap.mapping import (
    UNMAPPED,
    Mapping,
    Shift,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.idmap.ranges import IDMap
from ansible_collections.userns.storage.plugins.module_utils._storage.tree import in_place
from ansible_collections.userns.storage.plugins.module_utils._storage.tree.own_tree import OwnTree
from support import images
from support.waiting import LIMIT

MAP = Mapping(IDMap.parse(["0:100000:65536"]), IDMap.parse(["0:200000:65536"]))
UIDS, GIDS = 100000, 200000
ACCESS, DEFAULT = "system.posix_acl_access", "system.posix_acl_default"
CAPABILITY = "security.capability"
Found = t.Dict[str, t.Tuple[t.Any, ...]]


def tree_of_all_kinds(root: pathlib.Path) -> None:
    """Create files of each kind, with attributes that contain IDs or that a change of the owner removes."""
    (root / "usr/bin").mkdir(parents=True)
    for number, mode in enumerate((0o4755, 0o2755, 0o6711, 0o1644, 0o644)):
        path = root / f"usr/bin/{mode:o}"
        path.write_text("x")
        os.chown(path, number, number + 1)
        path.chmod(mode)
    ping = root / "usr/bin/ping"
    ping.write_text("p")
    os.setxattr(ping, CAPABILITY, images.capability(13))
    own = root / "usr/bin/own"
    own.write_text("p")
    os.setxattr(own, CAPABILITY, images.capability(13, rootid=1000))
    os.link(own, root / "usr/again")
    os.link(own, root / "third")
    shared = root / "shared"
    shared.mkdir(mode=0o2775)
    os.chown(shared, 1000, 1000)
    shared.chmod(0o3775)
    acl = images.posix_acl(
        *(("u", 7, None), ("user", 6, 33), ("g", 5, None), ("group", 4, 44)),
        *(("mask", 7, None), ("other", 0, None)),
    )
    os.setxattr(shared, ACCESS, acl)
    os.setxattr(shared, DEFAULT, acl)
    os.setxattr(root / "usr/bin/4755", ACCESS, acl)
    os.setxattr(root / "usr/bin/644", "user.note", b"kept")
    os.symlink("/etc/shadow", root / "link")
    os.chown(root / "link", 7, 8, follow_symlinks=False)
    os.mkfifo(root / "fifo", 0o620)
    os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(root / "gone", stat.S_IFCHR, os.makedev(0, 0))
    os.chown(root / "gone", 70000, 70000)
    os.setxattr(root / "usr", "trusted.overlay.opaque", b"y")
    with open(os.fsencode(root) + b"/\xff\n", "wb"):
        pass
    many = root / "many"
    many.mkdir()
    for number in range(5000):
        path = many / str(number)
        path.touch()
        os.chown(path, number % 3, number % 5)
    deep = os.open(root, os.O_RDONLY)
    # Deeper than the longest path that the kernel accepts.
    for _level in range(60):
        os.mkdir("d" * 100, dir_fd=deep)
        below = os.open("d" * 100, os.O_RDONLY, dir_fd=deep)
        os.close(deep)
        deep = below
    os.close(deep)


def listing(root: pathlib.Path, uids: int = 0, gids: int = 0) -> Found:
    """The metadata of all files in a tree, with owners reduced by the given offsets."""
    found: Found = {}
    descriptor = os.open(root, os.O_RDONLY)
    try:
        for path, folders, names, fd in os.fwalk(".", dir_fd=descriptor):
            for name in (".", *folders, *names):
                status = os.lstat(name, dir_fd=fd)
                shift = (0, 0) if name == "gone" else (uids, gids)
                entry = f"/proc/self/fd/{fd}/{name}"
                values = (
                    []
                    if name == "."
                    else sorted(
                        (
                            key,
                            _translated(
                                key, os.getxattr(entry, key, follow_symlinks=False), *shift
                            ),
                        )
                        for key in os.listxattr(entry, follow_symlinks=False)
                    )
                )
                owner = (status.st_uid - shift[0], status.st_gid - shift[1])
                key = f"{path}/{name}"
                found[key] = (
                    oct(status.st_mode),
                    *owner,
                    status.st_mtime_ns,
                    status.st_nlink,
                    values,
                )
    finally:
        os.close(descriptor)
    return found


def _translated(key: str, value: bytes, uids: int, gids: int) -> bytes:
    """An attribute with the IDs that the container sees, computed without the tested code."""
    if key == CAPABILITY and len(value) == 24:
        return value[:20] + struct.pack("<I", struct.unpack("<I", value[20:])[0] - uids)
    if key not in (ACCESS, DEFAULT):
        return value
    result = value[:4]
    for offset in range(4, len(value), 8):
        tag, permissions, number = struct.unpack_from("<HHI", value, offset)
        number -= {2: uids, 8: gids}.get(tag, 0)
        result += struct.pack("<HHI", tag, permissions, number)
    return result


@contextlib.contextmanager
def open_trees(*roots: pathlib.Path, whiteouts: bool = True) -> t.Iterator[t.List[OwnTree]]:
    descriptors = [os.open(root, os.O_RDONLY) for root in roots]
    try:
        yield [OwnTree(f"{number:x}" * 64, fd, whiteouts) for number, fd in enumerate(descriptors)]
    finally:
        for fd in descriptors:
            os.close(fd)


@pytest.fixture
def root(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "layer"
    path.mkdir()
    tree_of_all_kinds(path)
    return path


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_owners_are_changed_and_restored(root: pathlib.Path, workers: int) -> None:
    before = listing(root)
    with open_trees(root) as trees:
        shift = Shift(UNMAPPED, MAP)
        plan = in_place.plan(trees, [shift])
        assert shift.complete
        assert listing(root) == before
        # The three hard links to a file count once, and the whiteout does not count.
        assert plan.inodes == plan.changes == len(before) - _counted_twice(before) - 3
        plan.apply(trees, workers=workers)
        assert listing(root, UIDS, GIDS) == before
        plan.apply(trees, backwards=True, workers=workers)
        assert listing(root) == before
        # The change that is reverted may be incomplete.
        plan.apply(trees, backwards=True, workers=workers)
        assert listing(root) == before


def _counted_twice(found: Found) -> int:
    """The number of directories that a listing contains twice, by name and as a dot: all except the root."""
    return sum(path.endswith("/.") for path in found) - 1


def test_unmapped_ids_are_reported_without_changes(root: pathlib.Path) -> None:
    before = listing(root)
    small = Mapping(IDMap.parse(["0:100000:1000"]), IDMap.parse(["0:200000:1000"]))
    with open_trees(root) as trees:
        shift = Shift(UNMAPPED, small)
        in_place.plan(trees, [shift])
    assert (shift.unmapped_uids, shift.unmapped_gids) == ({1000}, {1000})
    assert listing(root) == before


def test_file_with_hard_link_elsewhere_is_refused(
    root: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    os.link(root / "usr/bin/644", tmp_path / "elsewhere")
    with (
        open_trees(root) as trees,
        pytest.raises(TreeError, match=r"usr/bin/644.* 2 names .* 1 are"),
    ):
        in_place.plan(trees, [Shift(UNMAPPED, MAP)])


def test_file_shared_by_two_layers_is_changed_once(
    root: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    os.link(root / "usr/bin/4755", other / "same")
    with open_trees(root, other) as trees:
        shifts = [Shift(UNMAPPED, MAP), Shift(UNMAPPED, MAP)]
        in_place.plan(trees, shifts).apply(trees)
    found = os.stat(other / "same")
    assert (found.st_uid, found.st_gid, oct(found.st_mode)) == (UIDS, GIDS + 1, "0o104770")


@pytest.mark.parametrize(
    "attribute",
    [
        "user.containers.override_stat",
        "user.fuseoverlayfs.override_stat",
        "trusted.overlay.metacopy",
    ],
)
def test_metadata_in_attributes_is_refused(root: pathlib.Path, attribute: str) -> None:
    os.setxattr(root / "usr/bin/644", attribute, b"0:0:0644")
    with open_trees(root) as trees, pytest.raises(UnsupportedDriver, match=attribute):
        in_place.plan(trees, [Shift(UNMAPPED, MAP)])


def test_change_after_planning_is_detected_and_reverted(root: pathlib.Path) -> None:
    with open_trees(root) as trees:
        plan = in_place.plan(trees, [Shift(UNMAPPED, MAP)])
        (root / "shared/new").touch()
        before = listing(root)
        with pytest.raises(StoreChanged, match="shared"):
            plan.apply(trees)
        plan.apply(trees, backwards=True)
        assert listing(root) == before


def test_directory_replaced_by_link_is_not_followed(
    root: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    outside = tmp_path / "outside"
    (outside / "bin").mkdir(parents=True)
    (outside / "bin/4755").touch()
    with open_trees(root) as trees:
        plan = in_place.plan(trees, [Shift(UNMAPPED, MAP)])
        os.rename(root / "usr", tmp_path / "aside")
        os.symlink(outside, root / "usr")
        with pytest.raises(StoreChanged):
            plan.apply(trees)
        plan_error: t.Optional[BaseException] = None
        try:
            plan.apply(trees, backwards=True)
        except TreeError as error:
            plan_error = error
        assert plan_error is not None
    assert os.stat(outside / "bin/4755").st_uid == os.stat(outside).st_uid == 0


def test_names_repeatedly_replaced_by_links_are_not_followed(
    root: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names are replaced after the check of their directory, until the links were found several times."""
    victim = tmp_path / "victim"
    victim.write_text("root's")
    victim.chmod(0o4700)
    link, aside = tmp_path / "swap", tmp_path / "aside"
    names = [root / "usr/bin/4755", root / "usr/bin/ping", root / "usr/bin/644"]
    checked, ended, replaced = threading.Event(), threading.Event(), threading.Event()

    def swap() -> None:
        checked.wait()
        while not ended.is_set():
            for name in names:
                os.rename(name, aside)
                os.rename(link, name)
                replaced.set()
                os.rename(name, link)
                os.rename(aside, name)

    apply_names = in_place._apply_names

    def apply_names_while_replaced(fd: int, item: t.Any, backwards: bool) -> None:
        if item.path == "usr/bin":
            checked.set()
            assert replaced.wait(LIMIT)
        apply_names(fd, item, backwards)

    monkeypatch.setattr(in_place, "_apply_names", apply_names_while_replaced)
    failed = named = refused = missing = changed = attempts = 0
    with open_trees(root) as trees:
        while refused < 5 or changed < 5:
            attempts += 1
            assert attempts < 2000, (refused, missing, changed)
            os.symlink(victim, link)
            plan = in_place.plan(trees, [Shift(UNMAPPED, MAP)])
            for backwards in (False, True):
                for event in (checked, ended, replaced):
                    event.clear()
                thread = threading.Thread(target=swap)
                thread.start()
                try:
                    plan.apply(trees, backwards, workers=1)
                except TreeError as error:
                    named += "usr/bin" in error.subject
                    refused += "symbolic link" in str(error)
                    missing += "no such file" in str(error)
                    failed += 1
                finally:
                    ended.set()
                    checked.set()
                    thread.join()
            plan.apply(trees, backwards=True, workers=1)
            # chown with follow_symlinks=False changes the owner of the link itself.
            changed += os.lstat(link).st_uid != 0
            os.unlink(link)
            found = os.stat(victim)
            assert (found.st_uid, found.st_gid, oct(found.st_mode)) == (0, 0, "0o104700")
    # The attacker causes no other errors, and each error names the directory.
    assert failed == named == refused + missing


def test_killed_worker_is_reported(root: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leader, work = os.getpid(), in_place._apply_names

    def die(*arguments: t.Any) -> None:
        if os.getpid() != leader:
            os.kill(os.getpid(), signal.SIGKILL)
        work(*arguments)

    before = listing(root)
    with open_trees(root) as trees:
        plan = in_place.plan(trees, [Shift(UNMAPPED, MAP)])
        monkeypatch.setattr(in_place, "_apply_names", die)
        with pytest.raises(TreeError, match="worker process"):
            plan.apply(trees, workers=3)
        monkeypatch.setattr(in_place, "_apply_names", work)
        plan.apply(trees, backwards=True, workers=3)
    assert listing(root) == before


def test_root_directory_owned_by_host_root_is_accepted(root: pathlib.Path) -> None:
    with open_trees(root) as trees:
        in_place.plan(trees, [Shift(UNMAPPED, MAP)]).apply(trees)
        os.chown(root, 0, 0)
        shift = Shift(MAP, UNMAPPED)
        in_place.plan(trees, [shift]).apply(trees)
    assert shift.complete
    assert (os.stat(root).st_uid, os.stat(root / "usr").st_uid) == (0, 0)
