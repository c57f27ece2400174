# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of how the system's errors are told."""

from __future__ import annotations

import errno
import os
import pathlib
import pwd
import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.errors import (
    ConfigError,
    NoSpace,
    PermissionDenied,
    StorageError,
    StoreError,
    TreeError,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.kernel.oserrors import (
    shown,
    translate_oserror,
)


def told(error: OSError, **options: t.Any) -> StorageError:
    """What becomes of an error of the system."""
    with pytest.raises(StorageError) as caught, translate_oserror(**options):
        raise error
    return caught.value


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, NoSpace),
        (errno.EDQUOT, NoSpace),
        (errno.EACCES, PermissionDenied),
        (errno.EPERM, PermissionDenied),
        (errno.EROFS, PermissionDenied),
        (errno.ELOOP, TreeError),
        (errno.EIO, TreeError),
    ],
)
def test_kinds(number: int, kind: t.Type[Exception]) -> None:
    error = told(OSError(number, os.strerror(number), "some/path"), kind=TreeError)
    assert error.__class__ is kind
    assert error.facts == {"path": "some/path", "errno": number}
    assert error.subject == "some/path"
    assert os.strerror(number).lower() in error.cause
    assert error.hint


def test_message_names_subject_and_file(tmp_path: pathlib.Path) -> None:
    with pytest.raises(StoreError) as caught, translate_oserror(str(tmp_path), "layer abc"):
        os.stat(tmp_path / "nowhere")
    gone = f"no such file or directory ({tmp_path}/nowhere)"
    assert str(caught.value).startswith(f"layer abc: {gone}. ")
    assert caught.value.facts["path"] == f"{tmp_path}/nowhere"


def test_one_that_names_no_file_is_about_the_root(tmp_path: pathlib.Path) -> None:
    root = str(tmp_path)
    with pytest.raises(NoSpace) as caught, translate_oserror(root):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.subject == root
    assert f"`df -h {root}` and `df -i {root}`" in caught.value.hint


def test_commands_name_a_directory_that_exists(tmp_path: pathlib.Path) -> None:
    full = told(OSError(errno.ENOSPC, "No space left on device"), root=f"{tmp_path}/a/b")
    assert f"`df -h {tmp_path}` and `df -i {tmp_path}`" in full.hint


def test_who_may_is_the_owner_of_what_is_there(tmp_path: pathlib.Path) -> None:
    denied = OSError(errno.EACCES, "Permission denied")
    owner = pwd.getpwuid(os.geteuid()).pw_name
    assert f"`user: {owner}`" in told(denied, root=str(tmp_path / "a/b")).hint
    assert "`user: OWNER`" in told(denied).hint


def test_ours_pass() -> None:
    with pytest.raises(ConfigError), translate_oserror("/"):
        raise ConfigError("storage.conf", "is wrong")


def test_names_are_bytes_for_all_one_knows() -> None:
    error = told(OSError(errno.EIO, "Input/output error", b"bad\xff"))
    assert error.subject == "bad\\xff"


def test_one_that_names_a_descriptor_or_nothing_has_a_subject(tmp_path: pathlib.Path) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    os.rmdir(tmp_path)
    os.close(descriptor)
    with pytest.raises(StoreError) as caught, translate_oserror(str(tmp_path)):
        os.listdir(descriptor)
    assert caught.value.subject == str(tmp_path)
    assert "bad file descriptor" in caught.value.cause
    error = told(OSError(errno.EIO, "Input/output error", 7), kind=TreeError)
    assert error.subject == "the filesystem"


def test_shown() -> None:
    assert shown("plain") == "plain"
    assert shown(os.fsdecode(b"\xff")) == "\\xff"
    assert len(shown("x" * 10**6)) < 1100
