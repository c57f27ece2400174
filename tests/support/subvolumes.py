# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Copies of folders on btrfs in which subvolumes stay subvolumes."""

from __future__ import annotations

import os
import shutil

from ansible_collections.userns.storage.plugins.module_utils._storage.kernel import btrfs

# The number of the root of any subvolume.
_ROOT = 256


def copy(source: str, target: str) -> None:
    """Copy all that is in a folder into another, subvolumes as snapshots."""
    for entry in os.scandir(source):
        place = os.path.join(target, entry.name)
        if not entry.is_dir(follow_symlinks=False):
            shutil.copy2(entry.path, place, follow_symlinks=False)
        elif entry.stat(follow_symlinks=False).st_ino == _ROOT:
            _snapshot(entry.path, target, entry.name)
            continue
        else:
            # What podman has mounted there could not be taken away.
            os.makedirs(place, exist_ok=True)
            copy(entry.path, place)
            shutil.copystat(entry.path, place)
        info = entry.stat(follow_symlinks=False)
        os.chown(place, info.st_uid, info.st_gid, follow_symlinks=False)


def _snapshot(source: str, folder: str, name: str) -> None:
    source_fd, folder_fd = (os.open(path, os.O_RDONLY) for path in (source, folder))
    try:
        btrfs.snapshot(source_fd, folder_fd, name)
    finally:
        os.close(source_fd)
        os.close(folder_fd)
