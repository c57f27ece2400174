# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Errors of the filesystem under storage.conf keep their cause, with a hint that fits it."""

from __future__ import annotations

import errno
import os
import pathlib
import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.errors import (
    NoSpace,
    PermissionDenied,
    StorageError,
    StoreError,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.operations import storage_conf


@pytest.mark.parametrize("call", ["rename", "write", "fsync"])
@pytest.mark.parametrize(
    ("number", "kind", "hint"),
    [
        (errno.ENOSPC, NoSpace, "Free space"),
        (errno.EROFS, PermissionDenied, "Mount its filesystem writable."),
        (errno.EIO, StoreError, "dmesg"),
        (errno.EACCES, PermissionDenied, "namei -l"),
        (errno.ELOOP, StoreError, "namei -l"),
    ],
)
def test_hint_matches_cause(
    number: int,
    kind: t.Type[StorageError],
    hint: str,
    call: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_arguments: t.Any) -> t.NoReturn:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, fail)
    files = storage_conf._Files("root", str(tmp_path), check=False, backup=True)
    with pytest.raises(kind, match=os.strerror(number).lower()) as caught:
        files.write(str(tmp_path / "storage.conf"), None, "[storage]\n")
    assert caught.type is kind
    assert hint in str(caught.value)
    assert "user root: " in str(caught.value)
    assert "cannot be " in str(caught.value)
    assert caught.value.facts == {"path": str(tmp_path / "storage.conf"), "errno": number}
    assert not list(tmp_path.iterdir())
