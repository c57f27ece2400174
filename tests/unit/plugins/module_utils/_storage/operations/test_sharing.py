# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of finding overlay mounts of other stores that use layers of a store, whatever path they use."""

from __future__ import annotations

import pathlib

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.operations import sharing


@pytest.mark.parametrize(
    ("lower", "upper", "found"),
    [
        ("GRAPH/overlay/l/A:GRAPH/overlay/l/B", "/other/overlay/1/diff", True),
        ("LINK/overlay/l/A:/other/overlay/l/B", "/other/overlay/1/diff", True),
        ("/other/overlay/l/B:LINK/overlay/1/diff", "/other/overlay/1/diff", True),
        # The mount is of a container of the store itself.
        ("GRAPH/overlay/l/A", "GRAPH/overlay/1/diff", False),
        ("LINK/overlay/l/A", "GRAPH/overlay/1/diff", False),
        # The mount is read-only, or does not use the store.
        ("GRAPH/overlay/l/A", "", False),
        ("/other/overlay/l/A", "/other/overlay/1/diff", False),
        ("GRAPHS/overlay/l/A", "/other/overlay/1/diff", False),
    ],
)
def test_mounts_of_other_stores_are_found(
    lower: str, upper: str, found: bool, tmp_path: pathlib.Path
) -> None:
    graphroot, link = tmp_path / "graph", tmp_path / "link"
    (graphroot / "overlay").mkdir(parents=True)
    link.symlink_to(graphroot)
    options = [
        f"{name}={value}".replace("GRAPH", str(graphroot)).replace("LINK", str(link))
        for name, value in (("lowerdir", lower), ("upperdir", upper))
    ]
    assert sharing._rests_on(options, sharing._Directory(str(graphroot))) == found
