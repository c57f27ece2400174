# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This module util is PRIVATE to the userns.storage collection.
"""What tells a process that its work is no longer wanted."""

from __future__ import annotations

import select
import signal

# A hangup, an interrupt from a terminal, and the usual request.
SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)

_STDOUT = 1


def nobody_listens(patience: float = 0) -> bool:
    """Whether standard output leads nowhere, as it does once the task that waited for it was interrupted.

    :param patience: seconds to wait for that
    """
    poll = select.poll()
    poll.register(_STDOUT, 0)
    found = poll.poll(int(patience * 1000))
    return any(event & (select.POLLERR | select.POLLHUP) for _fd, event in found)
