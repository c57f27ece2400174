# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Fuzz all readers of untrusted data with atheris for a long time."""

from __future__ import annotations

from support import fuzz_atheris


def soak(seconds: float, seed: int) -> int:
    """Fuzz all readers within a total time; returns the number of readers that failed."""
    if not fuzz_atheris.available():
        print("atheris has no wheel for this Python; tests/faults/test_fuzz.py does not require it")
        return 0
    from support.fuzz import READERS

    failed = 0
    for name in READERS:
        limit = f"-max_total_time={max(int(seconds / len(READERS)), 1)}"
        result = fuzz_atheris.fuzz_readers([name], seed, limit)
        print(f"{name}: {result.inputs} inputs", flush=True)
        if result.error:
            failed += 1
            print(f"{name}: {result.error}", flush=True)
    return failed
