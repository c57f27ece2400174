# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Modules that are killed, or whose system calls fail, at calls that change the filesystem.

The soak test in scripts/bench tries all calls.
"""

from __future__ import annotations

import typing as t

import pytest
from support.hosts import Host
from support.lab import Lab
from support.stores import Store
from support.task_stops import stop_everywhere


@pytest.mark.parametrize("task", ["present", "absent", "gc"])
@pytest.mark.parametrize("kind", ["vfs-tmpfs", "overlay-tmpfs"])
def test_store_is_usable_after_stop_at_any_call(
    kind: str,
    task: str,
    lab: Lab,
    make_store: t.Callable[..., Store],
    host: t.Callable[[str], Host],
) -> None:
    machines = [lab.machine, host("trixie")]
    scene = stop_everywhere(lab, make_store, kind, task, machines, thorough=False)
    assert scene.problems == []
    assert scene.tried["kill"] >= 10


@pytest.mark.parametrize("kind", ["vfs-tmpfs", "overlay-tmpfs"])
def test_store_is_usable_after_stop_during_image_removal(
    kind: str,
    lab: Lab,
    make_store: t.Callable[..., Store],
    host: t.Callable[[str], Host],
) -> None:
    """The image's own and mapped layers are removed too; most of the points are deletions afterwards."""
    machines = [lab.machine, host("trixie")]
    scene = stop_everywhere(lab, make_store, kind, "image", machines, thorough=False)
    assert scene.problems == []
    assert scene.tried["kill"] >= 10


def test_store_is_usable_after_stop_during_name_change(
    lab: Lab, make_store: t.Callable[..., Store], host: t.Callable[[str], Host]
) -> None:
    machines = [lab.machine, host("trixie")]
    scene = stop_everywhere(lab, make_store, "vfs-tmpfs", "names", machines, thorough=False)
    assert scene.problems == []
    assert scene.tried["kill"] > 5


def test_store_is_usable_after_stop_in_user_namespace(
    lab: Lab, make_store: t.Callable[..., Store]
) -> None:
    """Root's module and its child, which runs as the user, stop at a few points, since the calls are the same."""
    scene = stop_everywhere(
        lab, make_store, "rootless-vfs-tmpfs", "present", [lab.machine], thorough=False
    )
    assert scene.problems == []
    assert scene.tried["kill"] >= 10


def test_store_is_usable_after_stop_on_btrfs(
    lab: Lab, make_store: t.Callable[..., Store], host: t.Callable[[str], Host]
) -> None:
    """Only a few points, since all calls except a few of the driver are the same as with other drivers."""
    machines = [lab.machine, host("trixie")]
    for task in ("present", "gc"):
        scene = stop_everywhere(lab, make_store, "btrfs", task, machines, thorough=False)
        assert scene.problems == []
        assert scene.tried["kill"] >= 10
