# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This module util is PRIVATE to the userns.storage collection.
"""The owner that a process's new files get, see setfsuid(2): it saves a chown(2) for each of them."""

from __future__ import annotations

import ctypes

from . import libc

# linux/prctl.h and linux/securebits.h
_PR_GET_PDEATHSIG = 2
_PR_GET_SECUREBITS = 27
_PR_SET_SECUREBITS = 28
_NO_SETUID_FIXUP = 1 << 2


def keep_capabilities() -> bool:
    """Let this process keep all it may do whoever its files belong to; there is no way back.

    :returns: whether the kernel allows that (CAP_SETPCAP)
    """
    try:
        bits = libc.call("prctl", _PR_GET_SECUREBITS, 0, 0, 0, 0)
        libc.call("prctl", _PR_SET_SECUREBITS, bits | _NO_SETUID_FIXUP, 0, 0, 0)
    except OSError:
        return False
    return True


def become(uid: int, gid: int) -> bool:
    """Give the files made from now on to these IDs, as this user namespace counts them.

    :returns: whether the kernel did
    """
    # The kernel forgets that signal with every change of IDs.
    signal = ctypes.c_int()
    libc.call("prctl", _PR_GET_PDEATHSIG, ctypes.addressof(signal), 0, 0, 0)
    done = all(
        libc.set_fsid(name, number) == number
        for name, number in (("setfsuid", uid), ("setfsgid", gid))
    )
    libc.call("prctl", libc.PR_SET_PDEATHSIG, signal.value, 0, 0, 0)
    return done
