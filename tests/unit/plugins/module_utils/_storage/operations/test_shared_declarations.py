# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Declarations of shared stores: damaged files and errors of the filesystem are errors with a hint."""

from __future__ import annotations

import errno
import os
import pathlib
import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.errors import (
    ConfigError,
    NoSpace,
    PermissionDenied,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.operations import (
    shared_declarations,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.operations.shared_declarations import (
    Declaration,
    Share,
    declarations,
    write_declaration,
)

DECLARATION = Declaration("/real", "/run/real", "overlay", users={"alice": Share(1000, ("*",), ())})


@pytest.fixture(autouse=True)
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """An empty folder of declarations."""
    path = tmp_path / "userns-storage/shared"
    monkeypatch.setattr(shared_declarations, "_DECLARATIONS", str(path))
    return path


def test_written_declarations_are_read() -> None:
    assert declarations() == []
    write_declaration(DECLARATION)
    assert declarations() == [DECLARATION]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"graphroot": 5}', "\xff", '{"users": {}}'])
def test_damaged_file_is_a_config_error(folder: pathlib.Path, content: str) -> None:
    folder.mkdir(parents=True)
    (folder / "0123.json").write_text(content)
    with pytest.raises(ConfigError, match=r"0123\.json: cannot be read"):
        declarations()


def test_copy_with_other_name_is_ignored(folder: pathlib.Path) -> None:
    write_declaration(DECLARATION)
    (written,) = folder.iterdir()
    (folder / "copy.json").write_bytes(written.read_bytes())
    (folder / "notes.json").write_text("{}")
    assert declarations() == [DECLARATION]


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, NoSpace), (errno.EROFS, PermissionDenied)]
)
def test_errors_of_the_filesystem(
    number: int, kind: t.Type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: t.Any) -> t.NoReturn:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(kind, match=os.strerror(number).lower()):
        write_declaration(DECLARATION)
