# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Failures of a child process before its function runs."""

from __future__ import annotations

import os
import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.errors import (
    ConfigError,
    InternalError,
    StorageError,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.store.config import Account
from ansible_collections.userns.storage.plugins.module_utils._storage.userns import entering, shapes
from ansible_collections.userns.storage.plugins.module_utils._storage.userns.channel import (
    DEFAULT_LIMITS,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.userns.declared import returns

ACCOUNT = Account("alice", os.getuid(), os.getgid(), "/home/alice")


@returns(shapes.text)
def _greeting() -> str:
    return "hello"


def run_without_namespace() -> t.Any:
    return entering.run_in_child(_greeting, (), ACCOUNT, DEFAULT_LIMITS, namespace=False)


@pytest.fixture
def become(monkeypatch: pytest.MonkeyPatch) -> t.Callable[[t.Optional[Exception]], None]:
    """become(error): what the child does instead of taking the IDs of the account."""

    def replace(error: t.Optional[Exception]) -> None:
        def fake(_account: Account, _parent: int) -> None:
            if error is not None:
                raise error

        monkeypatch.setattr(entering, "become", fake)

    return replace


def test_errors_before_the_function_reach_the_parent(
    become: t.Callable[[t.Optional[Exception]], None],
) -> None:
    become(None)
    assert run_without_namespace() == "hello"
    become(ValueError("no such codec"))
    with pytest.raises(InternalError, match="ValueError: no such codec") as caught:
        run_without_namespace()
    assert "in fake" in caught.value.facts["trace"]
    become(ConfigError("HOME", "is not set", "Set it."))
    with pytest.raises(ConfigError, match="HOME: is not set. Set it."):
        run_without_namespace()


def test_errors_while_the_function_is_prepared_reach_the_parent(
    become: t.Callable[[t.Optional[Exception]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_path: str) -> t.NoReturn:
        raise OSError(5, "Input/output error")

    become(None)
    monkeypatch.setattr(os, "chdir", fail)
    with pytest.raises(StorageError, match="Input/output error"):
        run_without_namespace()
