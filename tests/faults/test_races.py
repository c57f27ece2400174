# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""podman, buildah and our modules at once for some steps each; scripts/bench --soak goes on for longer."""

from __future__ import annotations

import typing as t

import pytest
from support import users
from support.hosts import Host
from support.images import Image
from support.lab import Lab
from support.races import Race
from support.stores import Store

# Of each of the five workers; some ninety seconds of one processor.
STEPS = 20
NEEDED = ("podman create", "podman remove", "buildah begin", "ours present", "ours collect")


@pytest.mark.parametrize("kind", ["overlay-tmpfs", "vfs-tmpfs", "rootless-overlay"])
def test_nothing_is_lost_and_no_other_program_fails(
    kind: str,
    lab: Lab,
    make_store: t.Callable[..., Store],
    small_image: Image,
    host: t.Callable[[str], Host],
) -> None:
    race = Race(lab, make_store(kind, small_image), small_image, seed=6)
    race.run(steps=STEPS, needed=NEEDED)
    race.settle()
    checking = host("trixie")
    if race.store.user:
        users.introduce(race.store.user, checking)
    race.check(checking)
    print(f"{kind}: {sum(race.done.values())} operations, {dict(race.known)}")
    assert race.failures == []
    assert all(race.done[who] for who in NEEDED), race.done
