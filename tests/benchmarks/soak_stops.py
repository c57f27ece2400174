# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Stop each task at each of its calls with each fault; tests/faults/test_interrupted_tasks.py tests a selection."""

from __future__ import annotations

import typing as t

from support.conversion_stops import Conversions
from support.hosts import Host
from support.task_stops import TASKS, stop_everywhere

if t.TYPE_CHECKING:
    from benchmarks.soak import SoakContext

KINDS = ("vfs-tmpfs", "overlay-tmpfs", "overlay-ext4", "btrfs")
CONVERTED = ("vfs-tmpfs", "overlay-tmpfs", "btrfs")


def soak(context: SoakContext) -> int:
    """Stop each task at each call; returns the number of problems."""
    trixie = Host(context.lab, "trixie")
    machines = [context.lab.machine, trixie]
    problems = tried = 0
    for kind in KINDS:
        for task in TASKS:
            scene = stop_everywhere(
                context.lab, context.make_store, kind, task, machines, thorough=True
            )
            for problem in scene.problems:
                print(problem, flush=True)
            problems += len(scene.problems)
            tried += sum(scene.tried.values())
    for kind in CONVERTED:
        conversions = Conversions(context.lab, context.make_store(kind), machines)
        try:
            tried += conversions.kill_everywhere()
        finally:
            conversions.modules.close()
    trixie.close()
    print(f"{tried} stops tested, {tried - problems} without problems", flush=True)
    return problems
