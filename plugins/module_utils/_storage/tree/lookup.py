# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This module util is PRIVATE to the userns.storage collection.
"""One file of a merged tree, found without walking the rest."""

from __future__ import annotations

import os
import stat
import typing as t

from .merged import LayerStack, attribute_names

_LARGEST = 4 * 1024 * 1024
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def read_text(stack: LayerStack, path: str) -> t.Optional[str]:
    """The text of a regular file, as the container would read it.

    Symbolic links are not followed. What is beyond 4 MiB is cut off.

    :param path: relative to the tree's root
    :returns: None when there is no such file
    :raises NeedsMount: a directory on the way cannot be read by hand
    :raises OSError: a layer cannot be read
    """
    folder, _slash, name = path.rpartition("/")
    layers = list(range(len(stack)))
    walked = ""
    for component in folder.split("/") if folder else ():
        layers = list(_showing(stack, layers, walked, component))
        walked = f"{walked}/{component}" if walked else component
    for layer in layers:
        parent = stack.open(layer, walked)
        try:
            status = os.stat(name, dir_fd=parent, follow_symlinks=False)
            if not stat.S_ISREG(status.st_mode):
                return None
            with os.fdopen(os.open(name, _FILE, dir_fd=parent), "rb") as file:
                return file.read(_LARGEST).decode("utf-8", "replace")
        except FileNotFoundError:
            continue
        finally:
            os.close(parent)
    return None


def _showing(
    stack: LayerStack, layers: t.Iterable[int], walked: str, component: str
) -> t.Iterator[int]:
    """The layers, topmost first, whose directory of that name is part of the merged one."""
    for layer in layers:
        parent = stack.open(layer, walked)
        try:
            status = os.stat(component, dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError:
            continue
        finally:
            os.close(parent)
        if not stat.S_ISDIR(status.st_mode):
            return
        yield layer
        directory = stack.open(layer, f"{walked}/{component}" if walked else component)
        try:
            if stack.is_opaque(directory, attribute_names(directory)):
                return
        finally:
            os.close(directory)
