# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Count the function calls of an action, which are the same on every machine. scripts/bench measures times."""

from __future__ import annotations

import sys
import typing as t


def count_calls(action: t.Callable[[], t.Any]) -> int:
    """The number of Python and C functions that ``action`` calls in this thread."""
    counted = 0

    def note(_frame: t.Any, event: str, _argument: t.Any) -> None:
        nonlocal counted
        counted += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(before)
    return counted
