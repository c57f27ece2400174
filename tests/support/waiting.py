# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Waiting for an event. No test decides by the clock: a slow or busy machine only takes longer."""

from __future__ import annotations

import time
import typing as t

if t.TYPE_CHECKING:
    import subprocess

T = t.TypeVar("T")

# Seconds. It only ends a wait for an event that never comes; no event of any test takes a minute.
LIMIT = 1200.0


def wait_until(
    condition: t.Callable[[], T],
    *,
    while_running: t.Optional[subprocess.Popen[bytes]] = None,
    describe: t.Callable[[], object] = lambda: "the event never came",
    pause: float = 0.01,
) -> T:
    """Call ``condition`` until it returns something true, and return that.

    :param while_running: a process without which the event cannot come
    :param describe: what the failure shows
    :param pause: seconds between two calls
    """
    until = time.monotonic() + LIMIT
    while True:
        # Asked before the condition: a process that ends in between may have brought the event.
        ended = while_running is not None and while_running.poll() is not None
        found = condition()
        if found:
            return found
        assert not ended, f"the process ended first: {describe()}"
        assert time.monotonic() < until, describe()
        time.sleep(pause)
