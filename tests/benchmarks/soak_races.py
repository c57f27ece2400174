# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Long races of runtimes with and without modules of this collection, on rootful stores and a rootless store."""

from __future__ import annotations

import typing as t

from support.races import Race

if t.TYPE_CHECKING:
    from benchmarks.soak import SoakContext

KINDS = ("overlay-forced", "vfs", "rootless-overlay")


def soak(context: SoakContext, seconds: float, seed: int) -> int:
    """Run races, for an equal part of the time on each kind of store; returns the number of failures.

    Additional races of podman and buildah alone take a third of that time. Their failures are printed, but not counted.
    """
    failures = 0
    for kind in KINDS:
        for ours in (0, 2):
            race = Race(context.lab, context.make_store(kind, context.image), context.image, seed)
            race.run(seconds=seconds / len(KINDS) / (1 if ours else 3), ours=ours)
            race.check_final_state()
            title = kind if ours else f"{kind} without modules"
            counts = ", ".join(f"{number} {what}" for what, number in sorted(race.done.items()))
            print(f"{title}: {sum(race.done.values())} operations: {counts}", flush=True)
            for reason, number in race.known.items():
                print(f"{title}: {number} known failures of podman: {reason}", flush=True)
            for failure in race.failures:
                print(f"{title}: {failure}", flush=True)
            failures += len(race.failures) if ours else 0
    return failures
