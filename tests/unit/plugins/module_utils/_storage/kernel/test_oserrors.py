# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of the translation of OSError into errors of the collection."""

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


def translated(error: OSError, **options: t.Any) -> StorageError:
    """Return the translation of an OSError."""
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
def test_error_number_determines_class(number: int, kind: t.Type[Exception]) -> None:
    error = translated(OSError(number, os.strerror(number), "some/path"), kind=TreeError)
    assert error.__class__ is kind
    assert error.facts == {"path": "some/path", "errno": number}
    assert error.subject == "some/path"
    assert os.strerror(number).lower() in error.cause
    assert error.hint


def test_message_names_subject_and_file(tmp_path: pathlib.Path) -> None:
    with pytest.raises(StoreError) as caught, translate_oserror(str(tmp_path), "layer abc"):
        os.stat(tmp_path / "nowhere")
    cause = f"no such file or directory ({tmp_path}/nowhere)"
    assert str(caught.value).startswith(f"layer abc: {cause}. ")
    assert caught.value.facts["path"] == f"{tmp_path}/nowhere"


def test_error_without_file_name_is_about_root(tmp_path: pathlib.Path) -> None:
    root = str(tmp_path)
    with pytest.raises(NoSpace) as caught, translate_oserror(root):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.subject == root
    assert f"`df -h {root}` and `df -i {root}`" in caught.value.hint


def test_commands_name_existing_directory(tmp_path: pathlib.Path) -> None:
    full = translated(OSError(errno.ENOSPC, "No space left on device"), root=f"{tmp_path}/a/b")
    assert f"`df -h {tmp_path}` and `df -i {tmp_path}`" in full.hint


def test_hint_names_owner_of_existing_directory(tmp_path: pathlib.Path) -> None:
    denied = OSError(errno.EACCES, "Permission denied")
    owner = pwd.getpwuid(os.geteuid()).pw_name
    assert f"`user: {owner}`" in translated(denied, root=str(tmp_path / "a/b")).hint
    assert "`user: OWNER`" in translated(denied).hint


def test_errors_of_collection_are_not_translated() -> None:
    with pytest.raises(ConfigError), translate_oserror("/"):
        raise ConfigError("storage.conf", "is wrong")


def test_undecodable_name_is_escaped() -> None:
    error = translated(OSError(errno.EIO, "Input/output error", b"bad\xff"))
    assert error.subject == "bad\\xff"


def test_error_for_descriptor_has_subject(tmp_path: pathlib.Path) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    os.rmdir(tmp_path)
    os.close(descriptor)
    with pytest.raises(StoreError) as caught, translate_oserror(str(tmp_path)):
        os.listdir(descriptor)
    assert caught.value.subject == str(tmp_path)
    assert "bad file descriptor" in caught.value.cause
    error = translated(OSError(errno.EIO, "Input/output error", 7), kind=TreeError)
    assert error.subject == "the filesystem"


def test_shown_path_is_escaped_and_truncated() -> None:
    assert shown("plain") == "plain"
    assert shown(os.fsdecode(b"\xff")) == "\\xff"
    assert len(shown("x" * 10**6)) < 1100
