# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Exchange two directory entries atomically, see renameat2(2)."""

from __future__ import annotations

import errno
import os

from . import libc

_RENAME_EXCHANGE = 2
# The call is older than the common numbers, so its number depends on the architecture. C libraries may lack it.
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


def exchange(dir_fd: int, name: str, other_dir_fd: int, other: str) -> None:
    """Swap two entries of open directories.

    :raises OSError: ENOENT if an entry is missing; ENOSYS, EINVAL if it is not supported
    """
    number = _SYS_RENAMEAT2.get(os.uname().machine)
    if number is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), name)
    first, second = os.fsencode(name), os.fsencode(other)
    flags = _RENAME_EXCHANGE
    libc.syscall(number, dir_fd, first, other_dir_fd, second, flags, path=name)
