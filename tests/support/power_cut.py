# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A store as it is after power was lost: on a copy of its disk, without what the kernel still held back."""

from __future__ import annotations

import contextlib
import os
import pathlib
import subprocess
import typing as t

from . import mounts
from .stores import Store


@contextlib.contextmanager
def cut_off(store: Store) -> t.Iterator[pathlib.Path]:
    """Mount a copy of the disk of a store that has one of its own; the graphroot on it."""
    copy = pathlib.Path(f"/dev/shm/us-{os.getpid()}-copy.img")
    place = store.base / "copy"
    words = ["cp", "--sparse=always", "--reflink=auto", str(store.base / "disk.img"), str(copy)]
    subprocess.run(words, check=True)
    try:
        place.mkdir(exist_ok=True)
        if store.driver == "btrfs":
            # Otherwise the kernel takes it for a device of a copy that has gone.
            subprocess.run(["btrfs", "device", "scan", "--forget"], check=False)
        mounts.mount("-o", "loop", str(copy), str(place))
        try:
            yield place / "g"
        finally:
            subprocess.run(["umount", str(place)], check=True)
    finally:
        copy.unlink()
