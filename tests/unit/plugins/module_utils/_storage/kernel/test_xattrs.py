# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of kernel/xattrs.py."""

from __future__ import annotations

import os
import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.kernel import xattrs

Calls = t.List[t.Tuple[t.Any, ...]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Record the calls instead of making them, because not all filesystems support attributes."""
    recorded: Calls = []

    def record(name: str, answer: t.Any) -> None:
        def call(*arguments: t.Any, follow_symlinks: bool = True) -> t.Any:
            recorded.append((name, *arguments, follow_symlinks))
            return answer

        monkeypatch.setattr(os, name, call)

    record("listxattr", ["user.a"])
    record("getxattr", b"value")
    record("setxattr", None)
    record("removexattr", None)
    return recorded


@pytest.mark.parametrize(
    ("entry", "target", "follow"),
    [
        (None, 7, True),
        ("name\n", "/proc/self/fd/7/name\n", False),
        ("", "/proc/self/fd/7", True),
    ],
)
def test_calls_use_descriptor_or_path_in_proc(
    calls: Calls, entry: t.Optional[str], target: t.Union[int, str], follow: bool
) -> None:
    assert xattrs.names(7, entry) == ["user.a"]
    assert xattrs.get(7, "user.a", entry) == b"value"
    xattrs.put(7, "user.a", b"new", entry)
    xattrs.remove(7, "user.a", entry)
    assert calls == [
        ("listxattr", target, follow),
        ("getxattr", target, "user.a", follow),
        ("setxattr", target, "user.a", b"new", follow),
        ("removexattr", target, "user.a", follow),
    ]
