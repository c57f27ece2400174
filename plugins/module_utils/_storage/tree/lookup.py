# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Find a single file of a merged tree without walking the tree."""

from __future__ import annotations

import os
import stat
import typing as t

from ..kernel import files
from .merged import LayerStack, attribute_names

_LARGEST = 4 * 1024 * 1024


def read_text(stack: LayerStack, path: str) -> t.Optional[str]:
    """The text of a regular file, as the container would read it.

    Symbolic links are not followed. Text after the first 4 MiB is cut off.

    :param path: relative to the tree's root
    :returns: None if there is no such file
    :raises NeedsMount: only the kernel can read a directory of the path or the file
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
            with os.fdopen(files.open_regular(name, dir_fd=parent), "rb") as file:
                # Its data may be in a layer below, as with metacopy.
                stack.content(attribute_names(file.fileno()))
                return file.read(_LARGEST).decode("utf-8", "replace")
        except FileNotFoundError:
            continue
        finally:
            os.close(parent)
    return None


def _showing(
    stack: LayerStack, layers: t.Iterable[int], walked: str, component: str
) -> t.Iterator[int]:
    """The layers, topmost first, whose directory of that name is part of the merged directory."""
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
            names = attribute_names(directory)
            stack.content(names)
            if stack.is_opaque(directory, names):
                return
        finally:
            os.close(directory)
