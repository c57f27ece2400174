# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Everybody at once on one store; the long version is tests/benchmarks/soak_races.py."""

from __future__ import annotations

import typing as t

import pytest
from support.images import Image
from support.lab import Lab
from support.races import Race
from support.stores import Store


@pytest.mark.parametrize(
    ("kind", "seconds"), [("overlay-tmpfs", 20), ("vfs-tmpfs", 10), ("rootless-overlay", 15)]
)
def test_everybody_at_once(
    kind: str,
    seconds: float,
    lab: Lab,
    make_store: t.Callable[..., Store],
    small_image: Image,
) -> None:
    race = Race(lab, make_store(kind, small_image), small_image, seed=1)
    race.run(seconds)
    race.settle()
    print(f"{kind}: {dict(sorted(race.done.items()))}")
    assert race.failures == []
