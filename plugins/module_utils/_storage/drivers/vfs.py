# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This module util is PRIVATE to the userns.storage collection.
"""The vfs driver: each layer is a whole tree, copied by what the base class offers."""

from __future__ import annotations

import contextlib
import typing as t

from ..tree.merged import PLAIN, LayerStack
from .base import Driver


class VfsDriver(Driver):
    """GRAPHROOT/vfs/dir/ID is the layer's tree."""

    name = "vfs"
    places = ("vfs", "dir")

    @contextlib.contextmanager
    def _readable(self, chain: t.Sequence[str]) -> t.Iterator[LayerStack]:
        with contextlib.ExitStack() as undo:
            template = self._need_layer(undo, chain[0])
            yield undo.enter_context(LayerStack([template], PLAIN))
