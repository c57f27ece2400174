# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""layer_gc beside a busy podman for 500 rounds: python3 tests/benchmarks/soak_gc.py [ROUNDS] [KIND]."""

from __future__ import annotations

import pathlib
import sys
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from support import images
from support.beside import Rounds
from support.lab import Lab
from support.stores import Store

MAPS = [f"0:{start}:65536" for start in range(100000, 800000, 70000)]


def main(count: int = 500, kind: str = "vfs") -> int:
    """Run so many rounds on a store of that kind; 0 if no command failed and no layer was lost."""
    lab = Lab()
    try:
        store = Store(lab, kind)
        store.load(images.build(lab.folder(), images.small_layers(), "localhost/small:1"))
        rounds = Rounds(lab, store, "localhost/small:1", MAPS)
        worker = threading.Thread(target=rounds.collect_all_the_while)
        started = time.monotonic()
        worker.start()
        try:
            rounds.run(count)
        finally:
            rounds.stop()
            worker.join()
        seconds = time.monotonic() - started
        store.close()
    finally:
        lab.close()
    print(
        f"{kind}: {count} rounds in {seconds:.0f} s, {rounds.collections} collections took "
        f"{rounds.removed} layers, {len(rounds.failures)} failures"
    )
    for failure in rounds.failures:
        print(failure)
    return 1 if rounds.failures else 0


if __name__ == "__main__":
    words = sys.argv[1:]
    sys.exit(main(int(words[0]) if words else 500, words[1] if len(words) > 1 else "vfs"))
