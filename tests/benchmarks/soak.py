# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What takes too long for each test run: all stops, long races, 500 rounds beside collections, and fuzzing."""

from __future__ import annotations

import contextlib
import time
import typing as t

from benchmarks import soak_fuzz, soak_gc, soak_races, soak_stops
from support import images, stores, users
from support.lab import Lab


class Place:
    """The laboratory with what the soaks need of it."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.image = images.build(lab.folder(), images.small_layers(), "localhost/small:1")
        self._undo = contextlib.ExitStack()

    def make_store(self, kind: str, *loaded: images.Image, **options: t.Any) -> stores.Store:
        """A store of that kind with these images; gone with the laboratory."""
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
        """Take it all away."""
        self._undo.close()


# By name: what gets the place, so many seconds and a seed, and gives the number of problems found.
PARTS: t.Mapping[str, t.Callable[[Place, float, int], int]] = {
    "races": soak_races.soak,
    "gc": lambda place, _seconds, _seed: soak_gc.soak(place),
    "fuzz": lambda _place, seconds, seed: soak_fuzz.soak(seconds, seed),
    "stops": lambda place, _seconds, _seed: soak_stops.soak(place),
}


def soak(parts: t.Sequence[str], seconds: float, seed: int) -> int:
    """Soak; the number of problems found.

    :param seconds: for the races, and again for fuzzing; the other parts end by themselves
    """
    print(f"seed {seed}", flush=True)
    problems = 0
    lab = Lab()
    try:
        for name in parts:
            place = Place(lab)
            try:
                started = time.monotonic()
                found = PARTS[name](place, seconds, seed)
            finally:
                place.close()
            problems += found
            print(f"{name}: {time.monotonic() - started:.0f} s, {found} problems", flush=True)
    finally:
        lab.close()
    return problems
