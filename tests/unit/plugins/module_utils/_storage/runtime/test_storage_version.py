# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of the detection of the containers/storage version in an executable.

The tests create executables with a list of modules, since Debian builds its programs without that list.
tests/interop/test_store_discovery.py covers the programs of Debian.
"""

from __future__ import annotations

import os
import pathlib
import struct
import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.runtime import storage_version
from ansible_collections.userns.storage.plugins.module_utils._storage.runtime.storage_version import (
    BUILD_INFORMATION,
    LOADER,
    PACKAGE,
    FoundVersion,
    contains,
)

OLD = "dep\tgithub.com/containers/storage\tv1.55.0\th1:x=\n"
NEW = "dep\tgo.podman.io/storage\tv1.62.1\th1:x=\n"


def executable(
    path: pathlib.Path, modules: str = "", rest: bytes = b"", wide: bool = True, order: str = "<"
) -> str:
    """Create an ELF file with Go's build information and other content."""
    text = f"path\tgithub.com/x\n{modules}build\t-compiler=gc\n".encode()
    information = b"\xff Go buildinf:\x08\x02".ljust(32, b"\0") + b"\x08go1.24.4" + text
    names = b"\0.text\0.go.buildinfo\0.shstrtab\0"
    kinds = ("QQQQ", "IQQQQIIQQ") if wide else ("IIII", "IIIIIIIII")
    head_size, start = (64, 64) if wide else (52, 52)
    contents = [b"", rest, information, names]
    offsets, at = [], start
    for content in contents:
        offsets.append(at)
        at += len(content)
    head = bytearray(head_size)
    head[:6] = b"\x7fELF" + bytes([2 if wide else 1, 1 if order == "<" else 2])
    struct.pack_into(order + kinds[0][0], head, 40 if wide else 32, at)
    size = struct.calcsize("<IIQQQQIIQQ" if wide else "<IIIIIIIIII")
    struct.pack_into(f"{order}HHH", head, 58 if wide else 46, size, 4, 3)
    table = b"".join(
        struct.pack(order + "I" + kinds[1], name, 1, 0, 0, offset, len(content), 0, 0, 0, 0)
        for name, offset, content in zip((0, 1, 7, 21), offsets, contents)
    )
    path.write_bytes(bytes(head) + b"".join(contents) + table)
    return str(path)


@pytest.mark.parametrize("rest", [b"", b"storage/pkg/configfile"])
@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("modules", "version"),
    [
        (OLD, (1, 55, 0)),
        (NEW, (1, 62, 1)),
        (f"dep\tgithub.com/a\tv9.9.9\th1:=\n{NEW}", (1, 62, 1)),
        (f"{OLD}=>\tgo.podman.io/storage\tv1.61.0\th1:=\n", (1, 61, 0)),
        (f"{OLD}dep\tgithub.com/z\tv2.0.0\th1:=\n", (1, 55, 0)),
    ],
)
def test_version_is_read_from_build_information(
    tmp_path: pathlib.Path,
    modules: str,
    version: tuple[int, ...],
    wide: bool,
    order: str,
    rest: bytes,
) -> None:
    path = executable(tmp_path / "podman", modules, rest, wide, order)
    found = storage_version.storage_version(path, "podman", lambda: (1, 40))
    assert found == FoundVersion(version, BUILD_INFORMATION)


def test_loader_determines_version_of_snapshot(tmp_path: pathlib.Path) -> None:
    modules = "dep\tgo.podman.io/storage\tv1.62.1-0.20260515151312-e2c14667a598\th1:=\n"
    old = executable(tmp_path / "old", modules)
    new = executable(tmp_path / "new", modules, b"x" * 5000 + b"storage/pkg/configfile.Read")
    assert storage_version.storage_version(old, "podman", lambda: (1, 40)).version == (1, 62)
    assert storage_version.storage_version(new, "podman", lambda: (1, 40)).version == (1, 63)


def release(*version: int) -> t.Callable[[], t.Tuple[int, ...]]:
    return lambda: version


def test_release_and_loader_are_used_without_build_information(tmp_path: pathlib.Path) -> None:
    for name, rest, released, version in (
        ("a", b"", (1, 57, 1), (1, 57, 1)),
        ("b", b"storage/pkg/configfile", (1, 62, 0), (1, 63)),
        ("c", b"", (1, 64, 0), (1, 62)),
    ):
        path = executable(tmp_path / name, "", rest)
        found = storage_version.storage_version(path, "podman", release(*released))
        assert found == FoundVersion(version, LOADER)
    replaced = executable(tmp_path / "d", f"{NEW}=>\t../storage\t\n")
    assert storage_version.storage_version(replaced, "podman", lambda: (1, 57)).version == (
        1,
        62,
        1,
    )


def test_version_is_read_from_debian_package(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """dpkg-query is a script here. Its output applies only to the file that the package has installed."""
    query = tmp_path / "dpkg-query"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(storage_version, "_DPKG", str(tmp_path))
    path = executable(tmp_path / "podman")
    (tmp_path / "podman.list").write_text(f"/usr\n{path}\n")
    for answer, version in (
        ("golang-1.24 (= 1.24.4-1), golang-github-containers-storage (= 1.57.2+ds1-1)", (1, 57, 2)),
        ("golang-github-containers-storage (= 1:1.64.0-1), x (= 1)", (1, 64, 0)),
        ("golang-go.podman-storage-storage (= 1.65-1)", (1, 65, 0)),
    ):
        query.write_text(f"#!/bin/sh\necho '{answer}'\n")
        query.chmod(0o755)
        found = storage_version.storage_version(path, "podman", lambda: (1, 40))
        assert found == FoundVersion(version, PACKAGE)
    (tmp_path / "podman.list").write_text("/usr\n/usr/bin/podman\n")
    assert storage_version.storage_version(path, "podman", lambda: (1, 40)).source == LOADER
    (tmp_path / "podman.list").write_text(f"{path}\n")
    query.write_text("#!/bin/sh\nexit 1\n")
    assert storage_version.storage_version(path, "podman", lambda: (1, 40)).source == LOADER


def test_damaged_executables_raise_no_error(tmp_path: pathlib.Path) -> None:
    whole = pathlib.Path(executable(tmp_path / "a", NEW)).read_bytes()
    path = tmp_path / "b"
    for size in (*range(70), 200, len(whole) - 10):
        path.write_bytes(whole[:size])
        storage_version.storage_version(str(path), "podman", lambda: (1, 57))
    for at in range(4, 64):
        path.write_bytes(whole[:at] + b"\xff" + whole[at + 1 :])
        storage_version.storage_version(str(path), "podman", lambda: (1, 57))
    with pytest.raises(OSError, match="absent"):
        storage_version.storage_version(str(tmp_path / "absent"), "podman", lambda: (1, 57))


def test_text_across_chunks_is_found(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"a" * 13 + b"needle" + b"b" * 9)
    for size in range(1, 30):
        monkeypatch.setattr(storage_version, "_CHUNK", size)
        assert contains(str(path), b"needle")
        assert not contains(str(path), b"needles")
