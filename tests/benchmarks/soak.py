# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What takes too long for each test run: all stops, long races, and fuzzing. Needs root and podman.

``soak.py [stops|races|fuzz ...] [--minutes 10] [--seed N]``; without a name all three.
"""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import sys
import time
import typing as t

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks import soak_fuzz, soak_races, soak_stops
from support import images, stores, users
from support.lab import Lab


class Place:
    """The laboratory with what the soaks need of it."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
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


PARTS: t.Mapping[str, t.Callable[[Place, argparse.Namespace], int]] = {
    "stops": lambda place, options: soak_stops.soak(place),
    "races": lambda place, options: soak_races.soak(place, options.minutes, options.seed),
    "fuzz": lambda place, options: soak_fuzz.soak(options.minutes, options.seed),
}


def main(words: t.Optional[t.Sequence[str]] = None) -> int:
    """Soak; the number of problems found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="which; default: all")
    parser.add_argument("--minutes", type=float, default=10.0, help="for each of races and fuzz")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args(words)
    print(f"seed {options.seed}", flush=True)
    lab = Lab()
    problems = 0
    try:
        place = Place(lab)
        try:
            for name in options.parts or PARTS:
                started = time.monotonic()
                found = PARTS[name](place, options)
                problems += found
                print(f"{name}: {time.monotonic() - started:.0f} s, {found} problems", flush=True)
        finally:
            place.close()
    finally:
        lab.close()
    return problems


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
