# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The current step of this process, for messages that report where it stopped."""

from __future__ import annotations

import typing as t

_LONGEST = 1000
_current: t.List[str] = [""]


def begin(step: str) -> None:
    """Record the current step, such as ``reading /a/path``."""
    _current[0] = step


def current() -> str:
    """The recorded step, cut to 1,000 characters; empty if there is none."""
    return _current[0][:_LONGEST]
