# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This module util is PRIVATE to the userns.storage collection.
"""Who owns what stands at the top of a merged tree."""

from __future__ import annotations

import os
import typing as t

from .merged import LayerStack


def top_owners(stack: LayerStack) -> t.Iterator[t.Tuple[str, int, int]]:
    """The root directory ("") and each name in it, with the IDs it has on disk.

    :raises OSError: a directory cannot be read
    """
    if not stack.fds:
        return
    root = os.fstat(stack.fds[0])
    yield "", root.st_uid, root.st_gid
    seen: t.Set[str] = set()
    for directory in stack.fds:
        with os.scandir(directory) as entries:
            names = sorted(entry.name for entry in entries)
        for name in names:
            if name in seen:
                continue
            seen.add(name)
            try:
                status = os.lstat(name, dir_fd=directory)
            except FileNotFoundError:
                continue
            if not stack.is_whiteout(status):
                yield name, status.st_uid, status.st_gid
