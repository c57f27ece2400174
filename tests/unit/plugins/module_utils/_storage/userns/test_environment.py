# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of the environment of processes in a user namespace."""

from __future__ import annotations

import os
import pathlib

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.errors import NamespaceError
from ansible_collections.userns.storage.plugins.module_utils._storage.store.config import Account
from ansible_collections.userns.storage.plugins.module_utils._storage.userns import (
    running as userns,
)

ALICE = Account("alice", os.getuid(), os.getgid(), "/home/alice")
OTHER_USER = Account("nobody-at-all", 987654, 987654, "/home/nobody")


def test_own_environment_is_kept(tmp_path: pathlib.Path) -> None:
    given_environ = {"A": "1", "HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path), "USER": "x"}
    environ = userns.environment(given_environ, ALICE, own=True)
    assert environ["A"] == "1"
    assert environ["HOME"] == environ["XDG_DATA_HOME"] == str(tmp_path)
    assert environ["USER"] == environ["LOGNAME"] == "alice"


def test_only_neutral_variables_of_another_environment_are_kept(tmp_path: pathlib.Path) -> None:
    conf = tmp_path / "storage.conf"
    conf.write_text("")
    environ = userns.environment(
        {
            "A": "1",
            "HOME": "/root",
            "PATH": "/bin",
            "LC_ALL": "C",
            "XDG_RUNTIME_DIR": str(tmp_path),
            "XDG_CONFIG_HOME": "/nowhere",
            "CONTAINERS_STORAGE_CONF": str(conf),
            "STORAGE_DRIVER": "vfs",
        },
        ALICE,
        own=False,
    )
    assert "A" not in environ
    assert "XDG_CONFIG_HOME" not in environ
    assert environ["HOME"] == "/home/alice"
    assert environ["XDG_RUNTIME_DIR"] == str(tmp_path)
    assert environ["CONTAINERS_STORAGE_CONF"] == str(conf)
    assert environ["STORAGE_DRIVER"] == "vfs"
    assert (environ["PATH"], environ["LC_ALL"]) == ("/bin", "C")


def test_paths_of_other_users_are_dropped(tmp_path: pathlib.Path) -> None:
    home = str(tmp_path)
    environ = {"XDG_RUNTIME_DIR": home, "XDG_CONFIG_HOME": home, "XDG_DATA_HOME": "a\0b"}
    for own in (False, True):
        kept = userns.environment(environ, OTHER_USER, own=own)
        assert not [name for name in kept if name.startswith("XDG_")]


def test_uid_without_account_is_an_error() -> None:
    with pytest.raises(NamespaceError, match="987654"):
        userns.caller(987654)
