# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The time of the wall clock, which can be set, and of the clock of this boot, which cannot."""

from __future__ import annotations

import time
import typing as t

_BOOT_ID = "/proc/sys/kernel/random/boot_id"


class Moment(t.NamedTuple):
    """A point in time on both clocks.

    :ivar wall: seconds since the epoch by the host's wall clock
    :ivar uptime: seconds since the boot, sleep included (CLOCK_BOOTTIME)
    :ivar boot: the ID of the boot; empty if unknown
    """

    wall: float
    uptime: float
    boot: str

    def same_boot(self, other: Moment) -> bool:
        """Whether both are of the same boot, so that their uptimes can be compared."""
        return bool(self.boot) and self.boot == other.boot


def now() -> Moment:
    """The current time."""
    try:
        with open(_BOOT_ID, encoding="ascii", errors="replace") as stream:
            boot = stream.read(64).strip()
    except OSError:
        boot = ""
    return Moment(time.time(), time.clock_gettime(time.CLOCK_BOOTTIME), boot)
