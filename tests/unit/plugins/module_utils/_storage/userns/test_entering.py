# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Failures of a child process before its function runs."""

from __future__ import annotations

import errno
import os
import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.errors import (
    ConfigError,
    InternalError,
    NamespaceError,
    StorageError,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.store.config import Account
from ansible_collections.userns.storage.plugins.module_utils._storage.userns import (
    entering,
    podman,
    shapes,
)
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


def test_failure_to_take_user_ids_is_reported(
    become: t.Callable[[t.Optional[Exception]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    become(PermissionError(errno.EPERM, "Operation not permitted"))
    with pytest.raises(NamespaceError, match="capabilities SYS_ADMIN, SETUID") as caught:
        run_without_namespace()
    assert "root cannot take the IDs of this user: Operation not permitted" in str(caught.value)


@pytest.mark.parametrize(
    ("number", "euid", "hint"),
    [
        (errno.EPERM, 1000, "apparmor_restrict_unprivileged_userns"),
        (errno.EACCES, 1000, "unprivileged_userns_clone"),
        (errno.EPERM, 0, "capabilities SYS_ADMIN"),
        (errno.ENOSYS, 1000, "CONFIG_USER_NS"),
        (errno.EINVAL, 0, "seccomp"),
        (errno.ENOSPC, 1000, "user.max_user_namespaces=15000"),
        (errno.EIO, 0, "dmesg"),
    ],
)
def test_hint_matches_cause(
    number: int, euid: int, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: euid)
    error = entering.explain(ACCOUNT, entering.Forbidden(number, "unshare"))
    assert hint in error.hint
    restricted = number in (errno.EPERM, errno.EACCES) and euid != 0
    assert ("apparmor" in error.hint) == restricted


@pytest.mark.parametrize(
    ("step", "hint"),
    [
        (entering._UNSHARE, "CONFIG_USER_NS"),
        (entering._TAKE_GROUPS, "/proc/self/gid_map"),
        (entering._BECOME_ROOT, "/proc/self/uid_map"),
        (entering._MOUNT, "as in a chroot"),
        ("writing uid_map", "dmesg"),
    ],
)
def test_hint_for_invalid_argument_matches_step(step: str, hint: str) -> None:
    for account in (ACCOUNT, None):
        error = entering.explain(account, entering.Forbidden(errno.EINVAL, step))
        assert hint in error.hint


def test_unmapped_id_is_reported(
    become: t.Callable[[t.Optional[Exception]], None],
) -> None:
    become(OSError(errno.EINVAL, "Invalid argument"))
    with pytest.raises(NamespaceError, match="root cannot take the IDs of this user") as caught:
        run_without_namespace()
    assert "/proc/self/uid_map" in caught.value.hint


def test_missing_podman_gives_same_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(podman, "find_program", lambda _name: None)
    forbidden = entering.Forbidden(errno.ENOSYS, "unshare")
    with pytest.raises(NamespaceError) as caught:
        podman.run_through_podman(_greeting, (), ACCOUNT, forbidden)
    assert str(caught.value) == str(entering.explain(ACCOUNT, forbidden))


def test_limit_of_mount_namespaces_is_named() -> None:
    error = entering.explain(None, entering.Forbidden(errno.ENOSPC, "unshare"))
    assert "user.max_mnt_namespaces" in error.hint
