# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Each task stopped at each of its calls in each way; tests/faults/test_stops.py does the half of it."""

from __future__ import annotations

import typing as t

from support.conversion_stops import Conversions
from support.hosts import Host
from support.stops import TASKS, stop_everywhere

if t.TYPE_CHECKING:
    from benchmarks.soak import Place

KINDS = ("vfs-tmpfs", "overlay-tmpfs", "overlay-ext4", "btrfs")
CONVERTED = ("vfs-tmpfs", "overlay-tmpfs", "btrfs")


def soak(place: Place) -> int:
    """Stop everything; the number of stops that were not survived."""
    trixie = Host(place.lab, "trixie")
    machines = [place.lab.machine, trixie]
    problems = tried = 0
    for kind in KINDS:
        for task in TASKS:
            scene = stop_everywhere(
                place.lab, place.make_store, kind, task, machines, thorough=True
            )
            for problem in scene.problems:
                print(problem, flush=True)
            problems += len(scene.problems)
            tried += sum(scene.tried.values())
    for kind in CONVERTED:
        conversions = Conversions(place.lab, place.make_store(kind), machines)
        try:
            tried += conversions.kill_everywhere()
        finally:
            conversions.modules.close()
    trixie.close()
    print(f"{tried} stops tried, {tried - problems} survived", flush=True)
    return problems
