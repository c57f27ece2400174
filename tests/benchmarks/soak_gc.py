# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run layer_gc beside a busy podman, for 500 rounds."""

from __future__ import annotations

import threading
import time
import typing as t

from support.podman_load import Rounds

if t.TYPE_CHECKING:
    from benchmarks.soak import SoakContext

KINDS = ("overlay-forced", "vfs")
MAPS = [f"0:{start}:65536" for start in range(100000, 800000, 70000)]


def soak(context: SoakContext, count: int = 500) -> int:
    """Run `count` rounds on each kind of store; returns the number of failed commands and lost layers."""
    failures = 0
    for kind in KINDS:
        store = context.make_store(kind, context.image)
        rounds = Rounds(context.lab, store, context.image.name, MAPS)
        worker = threading.Thread(target=rounds.collect_until_stopped)
        started = time.monotonic()
        worker.start()
        try:
            rounds.run(count)
        finally:
            rounds.stop()
            worker.join()
        print(
            f"{kind}: {rounds.count} rounds in {time.monotonic() - started:.0f} s, {rounds.collections} collections "
            f"removed {rounds.removed} layers, {len(rounds.failures)} failures",
            flush=True,
        )
        for failure in rounds.failures:
            print(failure, flush=True)
        failures += len(rounds.failures)
    return failures
