# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This module util is PRIVATE to the userns.storage collection.
"""Mark opaque directories of a layer for both kinds of overlay mounts.

Root's runtimes mark them with ``trusted.overlay.opaque``. Overlays in a user namespace are mounted
with ``userxattr`` and only use ``user.overlay.opaque``; see the kernel's
Documentation/filesystems/overlayfs.rst.
"""

from __future__ import annotations

import os

from ..kernel import files

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY
_TRUSTED = "trusted.overlay.opaque"
_USER = "user.overlay.opaque"
_OPAQUE = (b"y", b"x")


def mark_for_users(layer: int) -> int:
    """Set the mark for overlays of users on each opaque directory of a layer.

    :param layer: descriptor of the layer's own tree; nothing outside it is opened
    :returns: the number of directories that were marked
    :raises OSError: an attribute cannot be written
    """
    marked = 0
    waiting = [""]
    while waiting:
        path = waiting.pop()
        directory = files.open_beneath(layer, path, _DIRECTORY)
        try:
            if _get(directory, _TRUSTED) in _OPAQUE and _get(directory, _USER) not in _OPAQUE:
                os.setxattr(directory, _USER, b"y")
                marked += 1
            with os.scandir(directory) as entries:
                waiting += [
                    os.path.join(path, entry.name)
                    for entry in entries
                    if entry.is_dir(follow_symlinks=False)
                ]
        finally:
            os.close(directory)
    return marked


def _get(directory: int, name: str) -> bytes:
    try:
        return os.getxattr(directory, name)
    except OSError:
        return b""
