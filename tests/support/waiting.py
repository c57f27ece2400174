# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Wait for events. No test depends on elapsed time: on a slow or busy machine it only takes longer."""

from __future__ import annotations

import time
import typing as t

if t.TYPE_CHECKING:
    import subprocess

T = t.TypeVar("T")

# Seconds. It only ends waits for events that never occur; no event of any test takes a minute.
LIMIT = 1200.0


def wait_until(
    condition: t.Callable[[], T],
    *,
    while_running: t.Optional[subprocess.Popen[bytes]] = None,
    describe: t.Callable[[], object] = lambda: "the event did not occur",
    pause: float = 0.01,
) -> T:
    """Call ``condition`` until it returns a true value, and return this value.

    :param while_running: a process without which the event cannot occur
    :param describe: returns the message of a failure
    :param pause: seconds between two calls
    """
    until = time.monotonic() + LIMIT
    while True:
        # Checked before the condition, because a process that ends in between may have caused the event.
        ended = while_running is not None and while_running.poll() is not None
        found = condition()
        if found:
            return found
        assert not ended, f"the process ended first: {describe()}"
        assert time.monotonic() < until, describe()
        time.sleep(pause)
