# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""podman, buildah and the modules run at the same time; scripts/bench --soak runs them for longer."""

from __future__ import annotations

import typing as t

import pytest
from support import users
from support.hosts import Host
from support.images import Image
from support.lab import Lab
from support.races import Race
from support.stores import Store

# Steps of each of the five workers; together they take about 90 seconds of processor time.
STEPS = 20
NEEDED = ("podman create", "podman remove", "buildah begin", "ours present", "ours collect")


@pytest.mark.parametrize("kind", ["overlay-tmpfs", "vfs-tmpfs", "rootless-overlay"])
def test_concurrent_programs_lose_nothing_and_do_not_fail(
    kind: str,
    lab: Lab,
    make_store: t.Callable[..., Store],
    small_image: Image,
    host: t.Callable[[str], Host],
) -> None:
    race = Race(lab, make_store(kind, small_image), small_image, seed=6)
    race.run(steps=STEPS, needed=NEEDED)
    race.check_final_state()
    checking_host = host("trixie")
    if race.store.user:
        users.add_to_machine(race.store.user, checking_host)
    race.check(checking_host)
    print(f"{kind}: {sum(race.done.values())} operations, {dict(race.known)}")
    assert race.failures == []
    assert all(race.done[who] for who in NEEDED), race.done
