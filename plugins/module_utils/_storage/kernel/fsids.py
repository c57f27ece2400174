# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The owner of new files that a process creates, see setfsuid(2). It saves a chown(2) for each file."""

from __future__ import annotations

import ctypes

from . import libc

# linux/prctl.h and linux/securebits.h
_PR_GET_PDEATHSIG = 2
_PR_GET_SECUREBITS = 27
_PR_SET_SECUREBITS = 28
_NO_SETUID_FIXUP = 1 << 2


def keep_capabilities() -> bool:
    """Keep all capabilities of this process when the owner of its new files changes. This cannot be undone.

    :returns: whether the kernel allows that (CAP_SETPCAP)
    """
    try:
        bits = libc.call("prctl", _PR_GET_SECUREBITS, 0, 0, 0, 0)
        libc.call("prctl", _PR_SET_SECUREBITS, bits | _NO_SETUID_FIXUP, 0, 0, 0)
    except OSError:
        return False
    return True


def set_fs_ids(uid: int, gid: int) -> bool:
    """Set the owner of new files of this process, in IDs of its user namespace.

    :returns: whether the kernel accepted both
    """
    # The kernel clears the parent death signal with every change of IDs.
    signal = ctypes.c_int()
    libc.call("prctl", _PR_GET_PDEATHSIG, ctypes.addressof(signal), 0, 0, 0)
    done = all(
        libc.set_fsid(name, number) == number
        for name, number in (("setfsuid", uid), ("setfsgid", gid))
    )
    libc.call("prctl", libc.PR_SET_PDEATHSIG, signal.value, 0, 0, 0)
    return done
