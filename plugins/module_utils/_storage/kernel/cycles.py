# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This module util is PRIVATE to the userns.storage collection.
"""Python's search for circles of objects, which costs more than all else among ten thousands of them."""

from __future__ import annotations

import contextlib
import gc
import typing as t


@contextlib.contextmanager
def unsearched() -> t.Iterator[None]:
    """Make many objects that hold no circles."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
