# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The files of a layer itself, as a value."""

from __future__ import annotations

import typing as t


class OwnTree(t.NamedTuple):
    """The files of a layer itself, without those of its parents.

    :ivar root: an open directory
    :ivar whiteouts: whether a character device 0:0 says that a name is gone
    """

    layer_id: str
    root: int
    whiteouts: bool = False
