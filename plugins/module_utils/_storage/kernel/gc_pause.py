# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Suspend the cyclic garbage collection of Python, which is slow with tens of thousands of objects."""

from __future__ import annotations

import contextlib
import gc
import typing as t


@contextlib.contextmanager
def gc_disabled() -> t.Iterator[None]:
    """Disable garbage collection while many objects without reference cycles are created."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
