# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of clone, survey, shift_in_place and measure that need no privileges."""

from __future__ import annotations

import os
import pathlib
import stat
import struct
import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.errors import (
    TreeError,
    UnmappedIDs,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.idmap.mapping import (
    Mapping,
    Shift,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.idmap.ranges import (
    IDMap,
    IDRange,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.kernel import files
from ansible_collections.userns.storage.plugins.module_utils._storage.tree import clone as cloning
from ansible_collections.userns.storage.plugins.module_utils._storage.tree import walk
from ansible_collections.userns.storage.plugins.module_utils._storage.tree.clone import clone
from ansible_collections.userns.storage.plugins.module_utils._storage.tree.measure import measure
from ansible_collections.userns.storage.plugins.module_utils._storage.tree.merged import LayerStack
from ansible_collections.userns.storage.plugins.module_utils._storage.tree.shift import (
    shift_in_place,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.tree.survey import survey
from ansible_collections.userns.storage.plugins.module_utils._storage.tree.tree_tools import (
    Suspended,
)

SAME = Shift(Mapping(), Mapping())


def listing(root: pathlib.Path) -> t.Dict[str, t.Any]:
    """The mode, modification time and content of each entry of a tree, by path."""
    found: t.Dict[str, t.Any] = {}
    inodes: t.Dict[int, str] = {}
    for folder, folders, names in os.walk(os.fsencode(root)):
        for name in sorted([b".", *folders, *names]):
            path = os.path.join(folder, name)
            status = os.lstat(path)
            relative = os.fsdecode(os.path.relpath(path, os.fsencode(root)))
            content: t.Any = None
            if stat.S_ISREG(status.st_mode):
                with open(path, "rb") as file:
                    content = (file.read(), inodes.setdefault(status.st_ino, relative))
            elif stat.S_ISLNK(status.st_mode):
                content = os.readlink(path)
            found[relative] = (status.st_mode, status.st_mtime_ns, content)
    return found


def template(root: pathlib.Path) -> pathlib.Path:
    (root / "usr" / "bin").mkdir(parents=True)
    (root / "usr" / "bin" / "tool").write_text("#!/bin/sh\n")
    (root / "usr" / "bin" / "tool").chmod(0o4755)
    os.link(root / "usr" / "bin" / "tool", root / "usr" / "bin" / "same")
    os.link(root / "usr" / "bin" / "tool", root / "same")
    (root / "link").symlink_to("/nowhere")
    os.mkfifo(root / "fifo", 0o620)
    with open(os.path.join(os.fsencode(root), b"\xff\n"), "wb") as file:
        file.write(b"odd")
    (root / "empty").mkdir(mode=0o1777)
    for number in range(900):
        path = root / "many" / str(number % 4) / str(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(number))
    for folder, folders, names in os.walk(root):
        for index, name in enumerate([*names, *folders, "."]):
            path = pathlib.Path(folder, name)
            os.utime(path, ns=(1, 10**9 + index), follow_symlinks=False)
    return root


@pytest.mark.parametrize("workers", [1, 2])
def test_clone_equals_the_template(tmp_path: pathlib.Path, workers: int) -> None:
    root, copy = template(tmp_path / "root"), tmp_path / "copy"
    copy.mkdir()
    expected = listing(root)
    before = os.listdir("/proc/self/fd")
    with LayerStack([str(root)], "trusted") as stack:
        result = clone(stack, str(copy), SAME, workers=workers)
        assert survey(stack, SAME, workers)[:4] == result[:4]
    assert listing(copy) == expected
    assert (result.files, result.directories, result.inodes) == (906, 9, 913)
    usage = measure([str(root), str(root)])
    assert (usage.inodes, usage.files, usage.apparent) == (913, 904, result.apparent)
    shift_in_place(str(copy), SAME, workers=workers)
    assert listing(copy) == expected
    assert os.listdir("/proc/self/fd") == before


def test_layers_are_merged(tmp_path: pathlib.Path) -> None:
    top, middle, bottom, copy = (tmp_path / name for name in ("top", "middle", "bottom", "copy"))
    for path, text in (
        (top / "both" / "a", "top"),
        (top / "file", "top"),
        (middle / "both" / "b", "middle"),
        (middle / "file" / "hidden", "middle"),
        (middle / "folder", "middle"),
        (bottom / "both" / "a", "bottom"),
        (bottom / "both" / "c", "bottom"),
        (bottom / "folder" / "hidden", "bottom"),
        (bottom / "only" / "here", "bottom"),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    copy.mkdir()
    with LayerStack([str(path) for path in (top, middle, bottom)], "trusted") as stack:
        clone(stack, str(copy), SAME)
    found = {path: content[2][0] for path, content in listing(copy).items() if content[2]}
    assert found == {
        "both/a": b"top",
        "both/b": b"middle",
        "both/c": b"bottom",
        "file": b"top",
        "folder": b"middle",
        "only/here": b"bottom",
    }


def test_unmapped_ids_are_reported(tmp_path: pathlib.Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "copy").mkdir()
    ids = [IDMap((IDRange(own + 1, 100000, 1),)) for own in (os.getuid(), os.getgid())]
    with LayerStack([str(tmp_path / "root")], "trusted") as stack:
        with pytest.raises(UnmappedIDs) as caught:
            clone(stack, str(tmp_path / "copy"), Shift(Mapping(), Mapping(*ids)))
        with pytest.raises(UnmappedIDs):
            survey(stack, Shift(Mapping(), Mapping(*ids)))
    assert caught.value.facts["uids"] == [os.getuid()]
    assert caught.value.facts["gids"] == [os.getgid()]


def test_destination_in_use_is_rejected(tmp_path: pathlib.Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "a").write_text("a")
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "a").write_text("b")
    with LayerStack([str(tmp_path / "root")], "trusted") as stack:
        with pytest.raises(TreeError, match="copy/a: file exists"):
            clone(stack, str(tmp_path / "copy"), SAME)
        with pytest.raises(TreeError, match="no such file"):
            clone(stack, str(tmp_path / "none"), SAME)
        with pytest.raises(ValueError, match="reflink"):
            clone(stack, str(tmp_path / "copy"), SAME, "magic")


def test_missing_directory_has_no_size(tmp_path: pathlib.Path) -> None:
    usage = measure([str(tmp_path / "none")])
    # parts is set only if several layers are measured together.
    assert {name: value for name, value in usage._asdict().items() if value != 0} == {"parts": None}


def test_single_file_is_measured(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("text")
    usage = measure([str(tmp_path / "file")], exclusive=True)
    assert usage[:3] == (1, 1, 4)
    assert usage.exclusive == usage.allocated


class Stopper:
    """A progress callback that suspends the work after a number of calls that report progress."""

    def __init__(self, calls: int) -> None:
        self.remaining = calls
        self.reported = (0, 0)

    def __call__(self, files: int, size: int) -> None:
        if (files, size) == self.reported:
            return
        self.reported = (files, size)
        self.remaining -= 1
        if self.remaining <= 0:
            raise Suspended


class TestResumption:
    @pytest.mark.parametrize("workers", [1, 3])
    @pytest.mark.parametrize("first", [1, 4])
    def test_resumed_clone_equals_an_uninterrupted_clone(
        self, workers: int, first: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(walk, "_PROGRESS_SECONDS", 0)
        source = template(tmp_path / "source")
        whole, parts = tmp_path / "whole", tmp_path / "parts"
        whole.mkdir()
        parts.mkdir()
        stops = 0
        found = None
        with LayerStack([str(source)], "user") as stack:
            uninterrupted = clone(stack, str(whole), SAME)
            while True:
                try:
                    stopper = Stopper(first + stops)
                    found = clone(
                        stack, str(parts), SAME, workers=workers, progress=stopper, again=stops > 0
                    )
                    break
                except Suspended:
                    stops += 1
        assert stops > 1
        assert listing(parts) == listing(whole) == listing(source)
        assert found == uninterrupted

    def test_incomplete_entries_are_copied_again(self, tmp_path: pathlib.Path) -> None:
        source = template(tmp_path / "source")
        target = tmp_path / "target"
        target.mkdir()
        with LayerStack([str(source)], "user") as stack:
            clone(stack, str(target), SAME)
            (target / "many/1/1").write_text("2")
            (target / "many/2/2").write_text("")
            (target / "usr/bin/same").unlink()
            (target / "usr/bin/same").write_text("a file of its own")
            (target / "link").unlink()
            clone(stack, str(target), SAME, again=True)
        assert listing(target) == listing(source)

    def test_complete_entries_are_kept(self, tmp_path: pathlib.Path) -> None:
        source = template(tmp_path / "source")
        target = tmp_path / "target"
        target.mkdir()
        with LayerStack([str(source)], "user") as stack:
            first = clone(stack, str(target), SAME)
            before = {path: os.lstat(path).st_ino for path in target.rglob("*")}
            resumed = clone(stack, str(target), SAME, again=True)
        assert {path: os.lstat(path).st_ino for path in target.rglob("*")} == before
        assert resumed == first

    @pytest.mark.parametrize("sparse", [False, True])
    def test_copy_of_a_large_file_is_resumed(
        self, sparse: bool, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(walk, "_PROGRESS_SECONDS", 0)
        monkeypatch.setattr(cloning, "_LARGE", 1 << 16)
        monkeypatch.setattr(files, "_COPY_STEP", 1 << 16)
        source, target = tmp_path / "source", tmp_path / "target"
        source.mkdir()
        target.mkdir()
        with open(source / "large", "wb") as stream:
            for number in range(64):
                if sparse and number % 5 in (0, 4):
                    stream.seek(1 << 16, os.SEEK_CUR)
                else:
                    stream.write(os.urandom(1 << 16))
            stream.truncate(64 << 16)
        (source / "large").chmod(0o4710)
        os.utime(source / "large", ns=(1, 2))
        sizes: t.List[int] = []

        def stop(_files: int, size: int) -> None:
            if size > sizes[-1] + (1 << 17):
                raise Suspended

        number = -1
        result = None
        with LayerStack([str(source)], "user") as stack:
            for _attempt in range(100):
                sizes.append((target / "large").stat().st_size if number >= 0 else 0)
                try:
                    result = clone(
                        stack, str(target), SAME, workers=1, progress=stop, again=number >= 0
                    )
                    break
                except Suspended:
                    found = (target / "large").stat()
                    assert number in (-1, found.st_ino)
                    number = found.st_ino
        assert len(sizes) > 10
        assert sizes == sorted(sizes)
        assert (target / "large").stat().st_ino == number
        assert (target / "large").read_bytes() == (source / "large").read_bytes()
        assert listing(target) == listing(source)
        assert result is not None
        assert result.apparent == 64 << 16
        if sparse:
            assert (target / "large").stat().st_blocks < 64 << 7

    @pytest.mark.parametrize("missing", [["a/one", "b/two"], ["a/one"], ["b/two"]])
    def test_default_acl_of_a_complete_directory_is_not_inherited(
        self, tmp_path: pathlib.Path, missing: t.List[str]
    ) -> None:
        """A file that is created when the clone is resumed does not inherit the default ACL of its directory."""
        source, target = tmp_path / "source", tmp_path / "target"
        for name in ("a", "b"):
            (source / name).mkdir(parents=True)
            acl = struct.pack("<L", 2) + b"".join(
                struct.pack("<HHL", tag, bits, qualifier)
                for tag, bits, qualifier in (
                    *((1, 7, 0xFFFFFFFF), (2, 7, 1234), (4, 5, 0xFFFFFFFF)),
                    *((16, 7, 0xFFFFFFFF), (32, 5, 0xFFFFFFFF)),
                )
            )
            os.setxattr(source / name, "system.posix_acl_default", acl)
        (source / "a/one").write_text("1")
        os.removexattr(source / "a/one", "system.posix_acl_access")
        os.link(source / "a/one", source / "b/two")
        target.mkdir()
        with LayerStack([str(source)], "user") as stack:
            clone(stack, str(target), SAME)
            # As after an interruption before these hard links were created.
            for name in missing:
                (target / name).unlink()
            clone(stack, str(target), SAME, again=True)
        assert listing(target) == listing(source)
        for name in ("a/one", "b/two"):
            assert os.listxattr(target / name) == []
            assert (target / name).stat().st_nlink == 2

    def test_directory_that_is_not_empty_is_rejected(self, tmp_path: pathlib.Path) -> None:
        source = template(tmp_path / "source")
        target = tmp_path / "target"
        (target / "many").mkdir(parents=True)
        with LayerStack([str(source)], "user") as stack, pytest.raises(TreeError):
            clone(stack, str(target), SAME)
