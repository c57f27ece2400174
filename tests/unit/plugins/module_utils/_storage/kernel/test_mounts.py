# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of reading the mount table, and of calls that fail before they change anything."""

from __future__ import annotations

import errno
import os
import pathlib

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.kernel import (
    mounts,
    namespaces,
)


def test_mountinfo_line_is_parsed() -> None:
    line = (
        "36 35 98:0 /mnt1\\040x /mnt2\\011y\\134z rw,noatime shared:1 master:2 - ext3 /dev/root "
        "rw,errors=continue\n"
    )
    assert mounts._entry(line) == mounts.MountEntry(
        36, "/mnt1 x", "/mnt2\ty\\z", "ext3", "/dev/root", ("rw", "errors=continue")
    )


def test_mountinfo_line_without_optional_fields_or_source() -> None:
    entry = mounts._entry("1 0 0:1 / / rw - rootfs  rw\n")
    assert (entry.mount_point, entry.fstype, entry.source) == ("/", "rootfs", "")


def test_all_mounts_of_process_are_read() -> None:
    entries = mounts.entries()
    assert "/" in [entry.mount_point for entry in entries]
    with open("/proc/self/mountinfo", encoding="utf-8") as table:
        assert len(table.readlines()) == len(entries)


def test_mount_of_open_file_is_found() -> None:
    descriptor = os.open("/proc", os.O_RDONLY)
    try:
        number = mounts.mount_id(descriptor)
        assert "/proc" in [
            entry.mount_point for entry in mounts.entries() if entry.mount_id == number
        ]
    finally:
        os.close(descriptor)


def test_path_of_descriptor_is_in_proc() -> None:
    assert mounts.path_of(7) == "/proc/self/fd/7"
    assert mounts.path_of("/a") == "/a"


def test_error_names_target(tmp_path: pathlib.Path) -> None:
    target = str(tmp_path / "missing")
    with pytest.raises(OSError, match="missing") as caught:
        mounts.umount(target)
    assert caught.value.filename == target


def test_layer_that_is_symbolic_link_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "link").symlink_to("/")
    cwd = os.getcwd()
    with pytest.raises(OSError, match="link") as caught:
        mounts.overlay(str(tmp_path), [str(tmp_path / "link")])
    assert caught.value.errno in (errno.ELOOP, errno.ENOTDIR)
    assert os.getcwd() == cwd


def test_mount_with_too_many_layers_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(OSError, match="too long") as caught:
        mounts.overlay(str(tmp_path), [1000] * 1000)
    assert caught.value.errno == errno.E2BIG


def test_failed_mount_keeps_working_directory(tmp_path: pathlib.Path) -> None:
    cwd = os.getcwd()
    with pytest.raises(OSError, match=r".+"):
        mounts.overlay(str(tmp_path / "none"), [str(tmp_path)])
    assert os.getcwd() == cwd


def test_mounts_of_test_process_are_not_private() -> None:
    assert not namespaces.mounts_are_private()


def test_idmap_probe_fails_for_proc_and_missing_path(tmp_path: pathlib.Path) -> None:
    assert not namespaces.idmap_probe("/proc")
    assert not namespaces.idmap_probe(str(tmp_path / "none"))
