# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This plugin util is PRIVATE to the userns.storage collection.
"""Bytes and seconds, for people."""

from __future__ import annotations


def human(number: float) -> str:
    """Bytes in words: 512 B, 1.4 KiB, 23 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(number) < 1024 or unit == "TiB":
            break
        number /= 1024
    digits = 0 if unit == "B" or abs(number) >= 99.5 else 1
    return f"{number:.{digits}f} {unit}"


def duration(seconds: float) -> str:
    """A time to wait: 45 s, 12 min, 2 h 5 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
