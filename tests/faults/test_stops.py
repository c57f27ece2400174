# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The modules killed, or refused by the system, at calls with which they change the filesystem.

The soak test in scripts/bench tries all of them.
"""

from __future__ import annotations

import typing as t

import pytest
from support.hosts import Host
from support.lab import Lab
from support.stops import stop_everywhere
from support.stores import Store


@pytest.mark.parametrize("task", ["present", "absent", "gc"])
@pytest.mark.parametrize("kind", ["vfs-tmpfs", "overlay-tmpfs"])
def test_stopped_at_calls_from_first_to_last(
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
def test_stopped_while_an_image_goes(
    kind: str,
    lab: Lab,
    make_store: t.Callable[..., Store],
    host: t.Callable[[str], Host],
) -> None:
    """With all its layers, mapped and own; most of the points are of the deleting afterwards."""
    machines = [lab.machine, host("trixie")]
    scene = stop_everywhere(lab, make_store, kind, "image", machines, thorough=False)
    assert scene.problems == []
    assert scene.tried["kill"] >= 10


def test_stopped_while_a_name_changes_hands(
    lab: Lab, make_store: t.Callable[..., Store], host: t.Callable[[str], Host]
) -> None:
    machines = [lab.machine, host("trixie")]
    scene = stop_everywhere(lab, make_store, "vfs-tmpfs", "names", machines, thorough=False)
    assert scene.problems == []
    assert scene.tried["kill"] > 5


def test_stopped_in_a_users_namespace(lab: Lab, make_store: t.Callable[..., Store]) -> None:
    """Root's module and its child that has become the user; a few points, for the calls are the same."""
    scene = stop_everywhere(
        lab, make_store, "rootless-vfs-tmpfs", "present", [lab.machine], thorough=False
    )
    assert scene.problems == []
    assert scene.tried["kill"] >= 10


def test_stopped_among_subvolumes(
    lab: Lab, make_store: t.Callable[..., Store], host: t.Callable[[str], Host]
) -> None:
    """A few points, for all but the driver's few calls are the same as with the others."""
    machines = [lab.machine, host("trixie")]
    for task in ("present", "gc"):
        scene = stop_everywhere(lab, make_store, "btrfs", task, machines, thorough=False)
        assert scene.problems == []
        assert scene.tried["kill"] >= 10
