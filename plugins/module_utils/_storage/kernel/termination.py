# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Detect that a process should end: signals, and a closed standard output."""

from __future__ import annotations

import select
import signal

# A hangup, an interrupt from a terminal, and the usual request.
SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)

_STDOUT = 1


def stdout_closed(patience: float = 0) -> bool:
    """Whether the reader of standard output is gone, as after an interruption of the task.

    :param patience: seconds to wait for it
    """
    poll = select.poll()
    poll.register(_STDOUT, 0)
    found = poll.poll(int(patience * 1000))
    return any(event & (select.POLLERR | select.POLLHUP) for _fd, event in found)


def signal_text(number: int) -> str:
    """A signal for messages: ``signal 9 (SIGKILL)``; without the name if it has none."""
    try:
        return f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return f"signal {number}"
