# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The time by the wall clock, which can be set, and by the clock of this boot, which cannot."""

from __future__ import annotations

import time
import typing as t

_BOOT_ID = "/proc/sys/kernel/random/boot_id"


class Moment(t.NamedTuple):
    """One moment on both clocks.

    :ivar wall: seconds since the epoch, as the host has it
    :ivar uptime: seconds since the boot, sleep included (CLOCK_BOOTTIME)
    :ivar boot: what identifies the boot; empty where the kernel does not tell
    """

    wall: float
    uptime: float
    boot: str

    def same_boot(self, other: Moment) -> bool:
        """Whether the uptimes of both can be compared."""
        return bool(self.boot) and self.boot == other.boot


def now() -> Moment:
    """This moment."""
    try:
        with open(_BOOT_ID, encoding="ascii", errors="replace") as stream:
            boot = stream.read(64).strip()
    except OSError:
        boot = ""
    return Moment(time.time(), time.clock_gettime(time.CLOCK_BOOTTIME), boot)
