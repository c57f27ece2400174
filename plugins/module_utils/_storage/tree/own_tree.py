# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The open files of a layer itself."""

from __future__ import annotations

import typing as t


class OwnTree(t.NamedTuple):
    """The files of a layer itself, without those of its parents.

    :ivar root: an open directory
    :ivar whiteouts: whether character devices 0:0 are whiteouts
    """

    layer_id: str
    root: int
    whiteouts: bool = False
