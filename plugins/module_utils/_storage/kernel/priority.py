# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run work in the background with idle CPU and I/O priority."""

from __future__ import annotations

import contextlib
import os
import platform

from . import libc

# Numbers of ioprio_set(2), which the C library does not wrap, by machine; elsewhere the generic one.
_IOPRIO_SET = {
    "x86_64": 251,
    "i686": 289,
    "armv7l": 314,
    "ppc64": 273,
    "ppc64le": 273,
    "s390x": 282,
}
_GENERIC_IOPRIO_SET = 30
_WHO_PROCESS = 1
_CLASS_IDLE = 3
_CLASS_SHIFT = 13
_LAST_NICE = 19


def set_idle_priority() -> None:
    """Give this process and its future children the idle I/O class and the lowest CPU priority.

    A setting that the kernel refuses stays unchanged.
    """
    number = _IOPRIO_SET.get(platform.machine(), _GENERIC_IOPRIO_SET)
    with contextlib.suppress(OSError):
        libc.syscall(number, _WHO_PROCESS, 0, _CLASS_IDLE << _CLASS_SHIFT)
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, _LAST_NICE)
