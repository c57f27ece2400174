# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of the comparison of a mapped tree with its template: each kind of difference is reported."""

from __future__ import annotations

import os
import pathlib
import shutil
import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.idmap.mapping import (
    Mapping,
    Shift,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.idmap.ranges import IDMap
from ansible_collections.userns.storage.plugins.module_utils._storage.tree.compare import (
    Comparison,
    compare,
)

Change = t.Callable[[pathlib.Path], t.Any]


@pytest.fixture
def trees(tmp_path: pathlib.Path) -> t.Tuple[pathlib.Path, pathlib.Path]:
    """A small tree and its copy with equal times."""
    first = tmp_path / "first"
    (first / "etc" / "deep").mkdir(parents=True)
    (first / "etc" / "passwd").write_text("root")
    (first / "etc" / "deep" / "file").write_text("content")
    (first / "link").symlink_to("etc/passwd")
    os.link(first / "etc" / "passwd", first / "again")
    os.mkfifo(first / "fifo")
    second = tmp_path / "second"
    shutil.copytree(first, second, symlinks=True, ignore=lambda *_: ["again", "fifo"])
    os.link(second / "etc" / "passwd", second / "again")
    os.mkfifo(second / "fifo")
    copy_times(first, second)
    return first, second


def copy_times(first: pathlib.Path, second: pathlib.Path) -> None:
    """Copy the times of all entries of the first tree to the second."""
    for item in [*sorted(first.rglob("*"), reverse=True), first]:
        other = second / item.relative_to(first)
        if os.path.lexists(other):
            status = item.lstat()
            timestamps = (status.st_atime_ns, status.st_mtime_ns)
            os.utime(other, ns=timestamps, follow_symlinks=False)


def compared(
    first: pathlib.Path, second: pathlib.Path, shift: t.Optional[Shift] = None
) -> Comparison:
    descriptors = [os.open(item, os.O_RDONLY | os.O_DIRECTORY) for item in (first, second)]
    try:
        return compare(descriptors[0], descriptors[1], shift or Shift(Mapping(), Mapping()))
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def test_equal_trees_have_no_difference(trees: t.Tuple[pathlib.Path, pathlib.Path]) -> None:
    assert compared(*trees) == Comparison(8, 0, 0, ())


def test_times_are_not_a_difference(trees: t.Tuple[pathlib.Path, pathlib.Path]) -> None:
    os.utime(trees[1] / "etc", (1, 1))
    assert compared(*trees) == Comparison(8, 0, 1, ())


def replaced(path: pathlib.Path) -> None:
    path.unlink()
    path.mkdir()


def relinked(path: pathlib.Path) -> None:
    path.unlink()
    path.symlink_to("elsewhere")


def unlinked(path: pathlib.Path) -> None:
    path.unlink()
    path.write_text("root")


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("etc/deep", lambda path: path.chmod(0o700), "has mode 0700, not 0755"),
        ("etc/deep/file", lambda path: path.write_text("more content"), "has 12 bytes, not 7"),
        ("link", relinked, "leads elsewhere"),
        ("fifo", replaced, "is a directory, not a FIFO"),
        ("etc/deep/file", lambda path: path.unlink(), "is missing"),
        ("etc/new", lambda path: path.write_text(""), "is not in the image"),
        # Reported for the second of two names in the order of reading.
        ("etc/passwd", unlinked, "is hard-linked otherwise"),
        ("etc/deep/file", lambda path: os.setxattr(path, "user.x", b"1"), "has user.x"),
    ],
)
def test_each_kind_of_difference_is_reported(
    name: str, change: Change, problem: str, trees: t.Tuple[pathlib.Path, pathlib.Path]
) -> None:
    (trees[0] / "etc" / "deep").chmod(0o755)
    (trees[1] / "etc" / "deep").chmod(0o755)
    change(trees[1] / name)
    found = compared(*trees)
    assert (found.different, found.shown[0].path) == (1, f"/{name}")
    assert found.shown[0].problems == (problem,)


def test_unchanged_owners_are_reported(trees: t.Tuple[pathlib.Path, pathlib.Path]) -> None:
    me = os.getuid()
    maps = [IDMap.of((me, me + 1000, 1)), IDMap.of((os.getgid(), os.getgid(), 1))]
    found = compared(*trees, Shift(Mapping(), Mapping(*maps)))
    assert found.different == 8
    assert found.shown[0].problems == (
        f"belongs to {me}:{os.getgid()}, not to {me + 1000}:{os.getgid()}",
    )


def test_list_of_differences_is_limited(
    trees: t.Tuple[pathlib.Path, pathlib.Path],
) -> None:
    for number in range(500):
        (trees[1] / f"{number}\x1b[31m").write_text("")
    found = compared(*trees)
    assert (found.different, len(found.shown)) == (500, 20)
    assert all(item.path.isprintable() for item in found.shown)
