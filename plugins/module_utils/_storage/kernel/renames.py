# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This module util is PRIVATE to the userns.storage collection.
"""Two names that change places in one step, see renameat2(2)."""

from __future__ import annotations

import errno
import os

from . import libc

_RENAME_EXCHANGE = 2
# Older than the common numbers, so each architecture has its own; C libraries may lack the call.
_SYS_RENAMEAT2 = {
    "x86_64": 316,
    "aarch64": 276,
    "riscv64": 276,
    "loongarch64": 276,
    "s390x": 347,
    "ppc64le": 357,
    "armv7l": 382,
    "i686": 353,
}


def exchange(one_dir_fd: int, one: str, other_dir_fd: int, other: str) -> None:
    """Swap two entries of open directories.

    :raises OSError: ENOENT if one is missing; ENOSYS, EINVAL where that is not to be had
    """
    number = _SYS_RENAMEAT2.get(os.uname().machine)
    if number is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), one)
    first, second = os.fsencode(one), os.fsencode(other)
    flags = _RENAME_EXCHANGE
    libc.syscall(number, one_dir_fd, first, other_dir_fd, second, flags, path=one)
