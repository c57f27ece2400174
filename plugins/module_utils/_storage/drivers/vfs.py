# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The vfs driver. Each layer is a complete tree, which the base class copies."""

from __future__ import annotations

import typing as t

from ..tree.merged import LayerStack
from .base import Driver


class VfsDriver(Driver):
    """GRAPHROOT/vfs/dir/ID is the layer's tree."""

    name = "vfs"
    folders = ("vfs", "dir")

    def _readable(self, chain: t.Sequence[str]) -> t.ContextManager[LayerStack]:
        return self._whole_layer(chain)
