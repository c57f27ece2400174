# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of kernel/files.py."""

from __future__ import annotations

import errno
import fcntl
import os
import pathlib
import struct
import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.kernel import files

Maker = t.Callable[[str], int]


@pytest.fixture
def open_file(tmp_path: pathlib.Path) -> t.Iterator[Maker]:
    """Create empty files, open for reading and writing."""
    fds: t.List[int] = []

    def make(name: str) -> int:
        fds.append(os.open(tmp_path / name, os.O_RDWR | os.O_CREAT, 0o600))
        return fds[-1]

    yield make
    for fd in fds:
        os.close(fd)


def content(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


@pytest.mark.parametrize("size", [0, 1, 1 << 14, (1 << 14) + 1, 3 << 18])
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("error_number", [None, errno.EXDEV, errno.ENOSYS, errno.EINVAL])
def test_copy_data_copies_content(
    open_file: Maker,
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    sparse: bool,
    error_number: t.Optional[int],
) -> None:
    def fail(*_arguments: t.Any) -> int:
        raise OSError(error_number, "no")

    if error_number is not None:
        monkeypatch.setattr(os, "copy_file_range", fail, raising=False)
    data = os.urandom(size)
    source, target = open_file("source"), open_file("target")
    os.write(source, data)
    files.copy_data(target, source, size, sparse)
    assert content(target) == data


def test_copy_data_keeps_holes(open_file: Maker) -> None:
    source, target = open_file("source"), open_file("target")
    os.pwrite(source, b"begin", 0)
    os.pwrite(source, b"middle", 64 << 20)
    os.ftruncate(source, 128 << 20)
    files.copy_data(target, source, 128 << 20)
    assert os.fstat(target).st_size == 128 << 20
    assert os.fstat(target).st_blocks <= os.fstat(source).st_blocks + 64
    assert os.pread(target, 6, 64 << 20) == b"middle"
    assert os.pread(target, 6, 0) == b"begin\0"


def test_copy_data_allocates_no_blocks_for_hole(open_file: Maker) -> None:
    source, target = open_file("source"), open_file("target")
    os.ftruncate(source, 1 << 30)
    files.copy_data(target, source, 1 << 30)
    assert os.fstat(target).st_size == 1 << 30
    assert os.fstat(target).st_blocks == 0


def test_copy_data_raises_other_errors(open_file: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_arguments: t.Any) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "copy_file_range", full, raising=False)
    source, target = open_file("source"), open_file("target")
    os.write(source, b"x" * (1 << 15))
    with pytest.raises(OSError, match="full"):
        files.copy_data(target, source, 1 << 15, False)


def test_shared_extents_are_read_in_several_calls(
    open_file: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    extents = [(number << 20, 4096, 0x2000 if number % 3 == 0 else 0) for number in range(300)]

    def fiemap(_fd: int, request: int, buffer: t.Any, _mutate: bool) -> int:
        assert request == 0xC020660B
        start, _length, _flags, _mapped, capacity, _reserved = struct.unpack_from("=QQLLLL", buffer)
        answer = [extent for extent in extents if extent[0] >= start][:capacity]
        struct.pack_into("=L", buffer, 20, len(answer))
        for index, (logical, length, flags) in enumerate(answer):
            if logical == extents[-1][0]:
                flags |= 1
            struct.pack_into(
                "=QQQQQLLLL",
                buffer,
                32 + 56 * index,
                logical,
                logical + 1,
                length,
                0,
                0,
                flags,
                0,
                0,
                0,
            )
        return 0

    monkeypatch.setattr(fcntl, "ioctl", fiemap)
    assert list(files.shared_extents(open_file("file"))) == [
        ((number << 20) + 1, 4096) for number in range(0, 300, 3)
    ]


def test_filesystem_type_of_path_and_descriptor() -> None:
    assert files.filesystem_type("/proc") == "proc"
    fd = os.open("/proc", os.O_RDONLY)
    try:
        assert files.filesystem_type(fd) == "proc"
    finally:
        os.close(fd)


def test_syncfs_succeeds(open_file: Maker) -> None:
    files.syncfs(open_file("file"))


@pytest.fixture(params=["openat2", "stepwise"])
def _open_beneath_method(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "stepwise":
        monkeypatch.setattr(files, "_openat2_works", False)


@pytest.mark.usefixtures("_open_beneath_method")
class TestOpenBeneath:
    def open(self, root: pathlib.Path, path: str) -> int:
        fd = os.open(root, os.O_RDONLY)
        try:
            return files.open_beneath(fd, path, os.O_RDONLY)
        finally:
            os.close(fd)

    def test_file_is_opened(self, tmp_path: pathlib.Path) -> None:
        (tmp_path / "a" / "b").mkdir(parents=True)
        (tmp_path / "a" / "b" / "c").write_text("found")
        fd = self.open(tmp_path, "a/b/c")
        assert content(fd) == b"found"
        os.close(fd)

    def test_empty_path_opens_root(self, tmp_path: pathlib.Path) -> None:
        fd = self.open(tmp_path, "")
        assert os.fstat(fd).st_ino == tmp_path.stat().st_ino
        os.close(fd)

    def test_path_longer_than_path_max_is_opened(self, tmp_path: pathlib.Path) -> None:
        name = "n" * 255
        fd = os.open(tmp_path, os.O_RDONLY)
        for _level in range(40):
            os.mkdir(name, dir_fd=fd)
            deeper = os.open(name, os.O_RDONLY, dir_fd=fd)
            os.close(fd)
            fd = deeper
        found = self.open(tmp_path, "/".join([name] * 40))
        assert os.fstat(found).st_ino == os.fstat(fd).st_ino
        os.close(found)
        os.close(fd)

    @pytest.mark.parametrize("path", ["link", "link/file", "folder/link/file"])
    def test_symbolic_links_are_refused(self, tmp_path: pathlib.Path, path: str) -> None:
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "file").write_text("x")
        (tmp_path / "link").symlink_to("folder")
        (tmp_path / "folder" / "link").symlink_to(".")
        with pytest.raises(OSError, match=r"symbolic links|Not a directory"):
            self.open(tmp_path, path)

    def test_missing_file_raises_error(self, tmp_path: pathlib.Path) -> None:
        with pytest.raises(FileNotFoundError):
            self.open(tmp_path, "no/such")


def test_link_to_null_device_is_read_as_empty_file_on_request(
    tmp_path: pathlib.Path,
) -> None:
    hidden, endless = tmp_path / "hidden", tmp_path / "endless"
    hidden.symlink_to(os.devnull)
    endless.symlink_to("/dev/zero")
    assert files.read_regular(str(hidden), 10, follow=True, null=True) == b""
    for path, null in ((hidden, False), (endless, True)):
        with pytest.raises(OSError, match="not a regular file") as caught:
            files.read_regular(str(path), 10, follow=True, null=null)
        assert caught.value.errno == errno.EINVAL
    # Links are followed only on request.
    with pytest.raises(OSError, match="symbolic links") as caught:
        files.read_regular(str(hidden), 10, null=True)
    assert caught.value.errno == errno.ELOOP
