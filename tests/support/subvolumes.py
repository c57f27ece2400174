# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Copy folders on btrfs, including their subvolumes."""

from __future__ import annotations

import os
import shutil

from ansible_collections.userns.storage.plugins.module_utils._storage.kernel import btrfs

# The inode number of the root of each subvolume.
_ROOT = 256


def copy(source: str, target: str) -> None:
    """Copy the content of a folder to another folder; subvolumes are copied as snapshots."""
    for entry in os.scandir(source):
        path = os.path.join(target, entry.name)
        if not entry.is_dir(follow_symlinks=False):
            shutil.copy2(entry.path, path, follow_symlinks=False)
        elif entry.stat(follow_symlinks=False).st_ino == _ROOT:
            _snapshot(entry.path, target, entry.name)
            continue
        else:
            # It exists if a mount of podman could not be removed.
            os.makedirs(path, exist_ok=True)
            copy(entry.path, path)
            shutil.copystat(entry.path, path)
        info = entry.stat(follow_symlinks=False)
        os.chown(path, info.st_uid, info.st_gid, follow_symlinks=False)


def _snapshot(source: str, folder: str, name: str) -> None:
    source_fd, folder_fd = (os.open(path, os.O_RDONLY) for path in (source, folder))
    try:
        btrfs.snapshot(source_fd, folder_fd, name)
    finally:
        os.close(source_fd)
        os.close(folder_fd)
