# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This plugin util is PRIVATE to the userns.storage collection.
"""Format bytes and seconds."""

from __future__ import annotations

from ansible_collections.userns.storage.plugins.module_utils._storage.errors import (
    size_text as human,
)

__all__ = ["duration", "human"]


def duration(seconds: float) -> str:
    """Format a duration: 45 s, 12 min, 2 h 5 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
