# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Fill a filesystem to its last byte or inode."""

from __future__ import annotations

import contextlib
import itertools
import os
import pathlib
import subprocess

_FULL = (28, 122)


def fill_bytes(folder: pathlib.Path) -> None:
    """Write files in a folder until no block is free, after everything was synced."""
    for number in range(6):
        descriptor = os.open(folder / f"fill-{number}", os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            end = 0
            with contextlib.suppress(OSError):
                # The data is not written to the disk, so that its image stays small.
                for size in (1 << 24, 1 << 20, 1 << 16):
                    with contextlib.suppress(OSError):
                        while True:
                            os.posix_fallocate(descriptor, end, size)
                            end += size
            os.lseek(descriptor, end, os.SEEK_SET)
            for size in (1 << 16, 4096, 512):
                block = b"\1" * size
                with contextlib.suppress(OSError):
                    while True:
                        os.write(descriptor, block)
            with contextlib.suppress(OSError):
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        subprocess.run(["sync", "-f", str(folder)], check=False)
        try:
            probe = os.open(folder / f"fill-{number + 1}", os.O_WRONLY | os.O_CREAT, 0o600)
        except OSError:
            return
        os.close(probe)


def fill_inodes(folder: pathlib.Path) -> None:
    """Create empty files in a folder until no inode is free."""
    for attempt in range(2):
        inner = folder / f"inodes-{attempt}"
        try:
            inner.mkdir()
            for number in itertools.count():
                os.close(
                    os.open(inner / f"{number:07}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                )
        except OSError as error:
            if error.errno not in _FULL:
                raise
        subprocess.run(["sync", "-f", str(folder)], check=False)
