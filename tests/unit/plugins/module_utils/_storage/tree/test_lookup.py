# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of reading a file from the merged layers of an image."""

from __future__ import annotations

import os
import pathlib
import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.tree.lookup import read_text
from ansible_collections.userns.storage.plugins.module_utils._storage.tree.merged import (
    LayerStack,
    NeedsMount,
)


@pytest.fixture
def layers(tmp_path: pathlib.Path) -> t.List[pathlib.Path]:
    folders = [tmp_path / name for name in ("top", "middle", "base")]
    for layer in folders:
        layer.mkdir()
    return folders


def write(layer: pathlib.Path, path: str, text: str) -> None:
    target = layer / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")


def read(layers: t.Sequence[pathlib.Path], path: str) -> t.Optional[str]:
    with LayerStack([str(layer) for layer in layers], "user") as stack:
        return read_text(stack, path)


def test_topmost_file_is_read(layers: t.List[pathlib.Path]) -> None:
    write(layers[1], "etc/passwd", "middle")
    write(layers[2], "etc/passwd", "base")
    write(layers[2], "etc/group", "base")

    assert read(layers, "etc/passwd") == "middle"
    assert read(layers, "etc/group") == "base"
    assert read(layers, "etc/shadow") is None
    assert read(layers, "nowhere/at/all") is None


def test_file_hides_a_directory_of_the_same_name(layers: t.List[pathlib.Path]) -> None:
    write(layers[0], "etc", "a file")
    write(layers[2], "etc/passwd", "base")

    assert read(layers, "etc/passwd") is None


def test_links_are_not_followed(layers: t.List[pathlib.Path]) -> None:
    write(layers[2], "secret", "outside")
    (layers[0] / "etc").mkdir()
    (layers[0] / "etc/passwd").symlink_to(layers[2] / "secret")
    (layers[1] / "lib").symlink_to(layers[2])

    assert read(layers, "etc/passwd") is None
    assert read(layers, "lib/secret") is None


def test_file_in_the_root_directory_is_read(layers: t.List[pathlib.Path]) -> None:
    write(layers[1], "motd", "hello")

    assert read(layers, "motd") == "hello"


@pytest.mark.parametrize(
    ("path", "attribute"), [("etc/passwd", "metacopy"), ("etc", "redirect"), ("etc", "whiteouts")]
)
def test_content_behind_overlay_attributes_needs_a_mount(
    layers: t.List[pathlib.Path], path: str, attribute: str
) -> None:
    """With metacopy=on, a file whose owner or mode was changed has the length of the original file, but no data."""
    write(layers[0], "etc/passwd", "\0\0\0\0")
    write(layers[1], "etc/passwd", "root")
    os.setxattr(layers[0] / path, f"user.overlay.{attribute}", b"y")

    with pytest.raises(NeedsMount, match=attribute):
        read(layers, "etc/passwd")
