# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests that take too long for each test run: all stops, long races, 500 rounds beside layer_gc, and fuzzing."""

from __future__ import annotations

import contextlib
import time
import typing as t

from benchmarks import soak_fuzz, soak_gc, soak_races, soak_stops
from support import images, stores, users
from support.lab import Lab


class SoakContext:
    """The laboratory, an image and the stores of a soak test."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.image = images.build(lab.folder(), images.small_layers(), "localhost/small:1")
        self._undo = contextlib.ExitStack()

    def make_store(self, kind: str, *loaded: images.Image, **options: t.Any) -> stores.Store:
        """A store of a kind with images, which is removed by `close`."""
        if stores.KINDS[kind][2]:
            user = users.add_user(self.lab)
            self._undo.callback(users.remove_user, self.lab, user)
            options["user"] = user
        store = stores.Store(self.lab, kind, **options)
        self._undo.callback(store.close)
        for image in loaded:
            store.load(image)
        return store

    def close(self) -> None:
        """Remove all stores and users."""
        self._undo.close()


# The soak tests by name: functions of context, seconds and seed, which return the number of problems.
PARTS: t.Mapping[str, t.Callable[[SoakContext, float, int], int]] = {
    "races": soak_races.soak,
    "gc": lambda context, _seconds, _seed: soak_gc.soak(context),
    "fuzz": lambda _context, seconds, seed: soak_fuzz.soak(seconds, seed),
    "stops": lambda context, _seconds, _seed: soak_stops.soak(context),
}


def soak(parts: t.Sequence[str], seconds: float, seed: int) -> int:
    """Run soak tests; returns the number of problems.

    :param seconds: the duration of races and that of fuzzing; the other parts end by themselves
    """
    print(f"seed {seed}", flush=True)
    problems = 0
    lab = Lab()
    try:
        for name in parts:
            context = SoakContext(lab)
            try:
                started = time.monotonic()
                found = PARTS[name](context, seconds, seed)
            finally:
                context.close()
            problems += found
            print(f"{name}: {time.monotonic() - started:.0f} s, {found} problems", flush=True)
    finally:
        lab.close()
    return problems
