# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Everybody at once on rootful stores and on a rootless one, for long; and once without our modules."""

from __future__ import annotations

import typing as t

from support.races import Race

if t.TYPE_CHECKING:
    from benchmarks.soak import Place

KINDS = ("overlay-forced", "vfs", "rootless-overlay")


def soak(place: Place, seconds: float, seed: int) -> int:
    """Race for so long, an equal part of it on each kind of store; the number of failures with our modules.

    For a third of that time more podman and buildah race alone: what they fail at then is told, and no failure of ours.
    """
    failures = 0
    for kind in KINDS:
        for ours in (0, 2):
            race = Race(place.lab, place.make_store(kind, place.image), place.image, seed)
            race.run(seconds=seconds / len(KINDS) / (1 if ours else 3), ours=ours)
            race.settle()
            who = kind if ours else f"{kind} without our modules"
            told = ", ".join(f"{number} {what}" for what, number in sorted(race.done.items()))
            print(f"{who}: {sum(race.done.values())} operations: {told}", flush=True)
            for why, number in race.known.items():
                print(f"{who}: {number} times podman's own: {why}", flush=True)
            for failure in race.failures:
                print(f"{who}: {failure}", flush=True)
            failures += len(race.failures) if ours else 0
    return failures
