# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Save the files of a store, and restore them."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import subprocess

from . import subvolumes
from .stores import Store


class StoreCopies:
    """Named copies of a store's graph root, on the same filesystem."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._saved = store.base / ("disk/saved" if (store.base / "disk").is_dir() else "saved")

    def save(self, name: str) -> None:
        """Save a copy of the store."""
        target = self._saved / name
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        self._copy(self._store.graphroot, target)

    def restore(self, name: str) -> None:
        """Restore the store from a copy."""
        for entry in os.scandir(self._store.graphroot):
            self._remove(entry.path)
        self._copy(self._saved / name, self._store.graphroot)

    def _copy(self, source: pathlib.Path, target: pathlib.Path) -> None:
        if self._store.driver == "btrfs":
            subvolumes.copy(str(source), str(target))
            return
        subprocess.run(["cp", "-a", "--reflink=auto", f"{source}/.", str(target)], check=True)

    @staticmethod
    def _remove(path: str) -> None:
        if not os.path.isdir(path) or os.path.islink(path):
            os.unlink(path)
            return
        for entry in os.scandir(path):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)
        with contextlib.suppress(OSError):
            # It may be a mount of podman.
            os.rmdir(path)
