# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Mount a store in its state after a power loss: a copy of its disk without data that the kernel has not written."""

from __future__ import annotations

import contextlib
import os
import pathlib
import subprocess
import typing as t

from . import mounts
from .stores import Store


@contextlib.contextmanager
def mount_after_power_loss(store: Store) -> t.Iterator[pathlib.Path]:
    """Mount a copy of the disk of a store that has its own disk; yields the graph root on the copy."""
    copy = pathlib.Path(f"/dev/shm/us-{os.getpid()}-copy.img")
    mount_point = store.base / "copy"
    command = ["cp", "--sparse=always", "--reflink=auto", str(store.base / "disk.img"), str(copy)]
    subprocess.run(command, check=True)
    try:
        mount_point.mkdir(exist_ok=True)
        if store.driver == "btrfs":
            # Otherwise the kernel mistakes the copy for a device of an earlier copy.
            subprocess.run(["btrfs", "device", "scan", "--forget"], check=False)
        mounts.mount("-o", "loop", str(copy), str(mount_point))
        try:
            yield mount_point / "g"
        finally:
            subprocess.run(["umount", str(mount_point)], check=True)
    finally:
        copy.unlink()
