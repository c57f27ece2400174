# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of removing untrusted directory trees: the whole tree is removed, and nothing outside it."""

from __future__ import annotations

import errno
import os
import pathlib
import resource
import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.errors import StoreError
from ansible_collections.userns.storage.plugins.module_utils._storage.kernel import mounts
from ansible_collections.userns.storage.plugins.module_utils._storage.store.removal import (
    remove_tree,
)


@pytest.fixture
def tree(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "tree").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "precious").write_text("safe")
    return tmp_path / "tree"


def fill(folder: str) -> None:
    for name in (b"plain", b"new\nline", b"\xff\xfe", b"-rf", b"*", b" ", b"x" * 255):
        with open(os.path.join(os.fsencode(folder), name), "wb") as file:
            file.write(b"1")
    os.mkfifo(os.path.join(folder, "fifo"))
    os.symlink("/", os.path.join(folder, "root"))
    os.symlink("..", os.path.join(folder, "up"))
    os.symlink("../../outside", os.path.join(folder, "out"))
    os.symlink("nowhere", os.path.join(folder, "dangling"))
    os.link(os.path.join(folder, "plain"), os.path.join(folder, "hard"))


def test_all_kinds_of_files_are_removed(tree: pathlib.Path) -> None:
    fill(str(tree))
    (tree / "sub").mkdir()
    fill(str(tree / "sub"))
    (tree / "empty").mkdir(mode=0o700)
    os.link(tree.parent / "outside" / "precious", tree / "theirs")
    remove_tree(str(tree))
    assert sorted(os.listdir(tree.parent)) == ["outside"]
    assert (tree.parent / "outside" / "precious").read_text() == "safe"


def test_files_links_and_missing_paths_are_accepted(tree: pathlib.Path) -> None:
    (tree / "f").write_text("")
    os.symlink(tree.parent / "outside", tree / "l")
    for name in ("f", "l", "never", "never/at/all"):
        remove_tree(str(tree / name))
    assert os.listdir(tree) == []
    assert os.listdir(tree.parent / "outside") == ["precious"]


def test_two_thousand_levels_are_removed_with_few_descriptors(tree: pathlib.Path) -> None:
    top = os.open(tree, os.O_RDONLY)
    here = os.dup(top)
    for level in range(2000):
        name = "d" * 100
        os.mkdir(name, dir_fd=here)
        if level % 50 == 0:
            os.symlink("..", "link", dir_fd=here)
            os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=here))
            os.mkdir("other", dir_fd=here)
        below = os.open(name, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    os.close(top)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (150, hard))
    try:
        remove_tree(str(tree))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not tree.exists()


def test_many_entries_are_removed(tree: pathlib.Path) -> None:
    (tree / "plain").write_text("")
    folder = os.open(tree, os.O_RDONLY)
    for number in range(20_000):
        if number % 20 == 0:
            os.mkdir(f"d{number}", dir_fd=folder)
        else:
            os.symlink("x", f"l{number}", dir_fd=folder)
    os.close(folder)
    remove_tree(str(tree))
    assert not tree.exists()


def test_directory_replaced_by_a_link_is_not_followed(
    tree: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tree / "sub").mkdir()
    real = os.open

    def swap(path: t.Any, flags: int, *args: t.Any, **options: t.Any) -> int:
        if path == "sub":
            os.rmdir(tree / "sub")
            os.symlink(tree.parent / "outside", tree / "sub")
        return real(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", swap)
    remove_tree(str(tree))
    assert not tree.exists()
    assert os.listdir(tree.parent / "outside") == ["precious"]


def test_subvolumes_are_removed_as_a_whole(
    tree: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A btrfs subvolume has another device number, but is in the same mount."""
    (tree / "vol").mkdir()
    (tree / "vol" / "file").write_text("")
    (tree / "kept").mkdir()
    real = os.fstat
    volume = os.stat(tree / "vol").st_ino

    class OtherDevice:
        def __init__(self, found: os.stat_result) -> None:
            self.found = found
            self.st_dev = found.st_dev + (1 if found.st_ino == volume else 0)

        def __getattr__(self, name: str) -> t.Any:
            return getattr(self.found, name)

    monkeypatch.setattr(os, "fstat", lambda descriptor: OtherDevice(real(descriptor)))
    destroyed = []

    def destroy(folder: int, name: str) -> bool:
        destroyed.append(name)
        os.unlink(f"{name}/file", dir_fd=folder)
        os.rmdir(name, dir_fd=folder)
        return True

    remove_tree(str(tree), destroy)
    assert destroyed == ["vol"]
    assert not tree.exists()


def test_other_mounts_are_not_entered(tree: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tree / "mnt").mkdir()
    (tree / "mnt" / "file").write_text("")
    (tree / "other").mkdir()
    inode = os.stat(tree / "mnt").st_ino
    real = mounts.mount_id

    def elsewhere(descriptor: int) -> int:
        return -2 if os.fstat(descriptor).st_ino == inode else real(descriptor)

    monkeypatch.setattr(mounts, "mount_id", elsewhere)
    with pytest.raises(StoreError, match="mnt") as caught:
        remove_tree(str(tree))
    assert caught.value.facts["failures"] == ["'mnt': another filesystem is mounted there"]
    assert os.listdir(tree) == ["mnt"]
    assert os.listdir(tree / "mnt") == ["file"]


def test_failures_are_reported_and_other_entries_are_removed(
    tree: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b/stuck", "c"):
        (tree / name).mkdir(parents=True)
        (tree / name / "file").write_text("")
    real = os.unlink
    inode = os.stat(tree / "b" / "stuck").st_ino

    def unlink(path: t.Any, *, dir_fd: t.Optional[int] = None) -> None:
        if dir_fd is not None and os.fstat(dir_fd).st_ino == inode:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        real(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", unlink)
    with pytest.raises(StoreError, match="b/stuck/file") as caught:
        remove_tree(str(tree))
    assert "1 entries" in str(caught.value)
    assert os.listdir(tree) == ["b"]


def test_descriptors_are_closed(tree: pathlib.Path) -> None:
    before = os.listdir("/proc/self/fd")
    for _round in range(3):
        deep = tree / "/".join("abcdef")
        deep.mkdir(parents=True)
        remove_tree(str(tree))
    assert os.listdir("/proc/self/fd") == before
