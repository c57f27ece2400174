# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Everybody at once on a rootful and on a rootless store, for long."""

from __future__ import annotations

import typing as t

from support import images
from support.races import Race

if t.TYPE_CHECKING:
    from benchmarks.soak import Place

KINDS = ("overlay-forced", "vfs", "rootless-overlay")


def soak(place: Place, minutes: float, seed: int) -> int:
    """Race for so long, an equal part of it on each kind of store; the number of failures."""
    image = images.build(place.lab.folder(), images.small_layers(), "localhost/small:1")
    failures = 0
    for kind in KINDS:
        race = Race(place.lab, place.make_store(kind, image), image, seed)
        race.run(minutes * 60 / len(KINDS))
        race.settle()
        for one in race.failures:
            print(one, flush=True)
        failures += len(race.failures)
        told = ", ".join(f"{number} {what}" for what, number in sorted(race.done.items()))
        print(f"{kind}: {sum(race.done.values())} operations: {told}", flush=True)
    return failures
