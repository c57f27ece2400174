# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of LayerStack: extended attributes of overlay, and file descriptors of layers."""

from __future__ import annotations

import os
import pathlib

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.tree.merged import (
    LayerStack,
    NeedsMount,
)


def test_private_attributes_are_not_content(tmp_path: pathlib.Path) -> None:
    names = ["user.overlay.origin", "trusted.overlay.impure", "user.a", "trusted.overlay.overlay.b"]
    with LayerStack([str(tmp_path)], "trusted") as stack:
        assert stack.content(names) == [names[0], names[2], names[3]]
    with LayerStack([str(tmp_path)], "user") as stack:
        assert stack.content(names) == names[1:]
    with LayerStack([str(tmp_path)], "plain") as stack:
        assert stack.content(names) == names


@pytest.mark.parametrize("attribute", ["redirect", "metacopy", "whiteout", "whiteouts"])
def test_content_elsewhere_needs_a_mount(tmp_path: pathlib.Path, attribute: str) -> None:
    with LayerStack([str(tmp_path)], "trusted") as stack:
        with pytest.raises(NeedsMount, match=attribute):
            stack.content([f"trusted.overlay.{attribute}"])
        assert stack.content([f"user.overlay.{attribute}"]) == [f"user.overlay.{attribute}"]


def test_opaque_attribute_is_read(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"trusted.overlay.opaque": b"y"}
    monkeypatch.setattr(os, "getxattr", lambda _fd, name: values[name])
    with LayerStack([str(tmp_path)], "trusted") as stack:
        assert stack.is_opaque(stack.fds[0], list(values))
        assert not stack.is_opaque(stack.fds[0], ["user.overlay.opaque"])
        values["trusted.overlay.opaque"] = b"x"
        with pytest.raises(NeedsMount, match="opaque"):
            stack.is_opaque(stack.fds[0], list(values))
    with LayerStack([str(tmp_path)], "plain") as stack:
        assert not stack.is_opaque(stack.fds[0], list(values))


def test_descriptors_are_duplicated_and_closed(tmp_path: pathlib.Path) -> None:
    before = os.listdir("/proc/self/fd")
    fd = os.open(tmp_path, os.O_RDONLY)
    with LayerStack([fd, str(tmp_path)], "trusted") as stack:
        assert len(stack) == 2
        assert stack.labels == [str(tmp_path), str(tmp_path)]
    os.fstat(fd)
    os.close(fd)
    assert os.listdir("/proc/self/fd") == before


def test_missing_and_linked_layers_are_rejected(tmp_path: pathlib.Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    before = os.listdir("/proc/self/fd")
    for name in ("link", "missing"):
        with pytest.raises(OSError, match=name):
            LayerStack([str(tmp_path), str(tmp_path / name)], "trusted")
    assert os.listdir("/proc/self/fd") == before


def test_unknown_family_is_rejected(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="trusted, user, plain"):
        LayerStack([str(tmp_path)], "security")
