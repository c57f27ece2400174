# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This module util is PRIVATE to the userns.storage collection.
"""When to stop: at a time limit, or because nobody waits for the result any more."""

from __future__ import annotations

import select
import time

from ..tree.craft import Suspended

_STDOUT = 1


class Pace:
    """A progress callback that remembers what it was told, and suspends the work when its time is up.

    :param deadline: on the monotonic clock, which all processes of a host share; 0 for none
    """

    def __init__(self, deadline: float = 0.0) -> None:
        self._deadline = deadline
        self.files = 0
        self.bytes = 0
        # What was there already, which takes time to look through.
        self.before = 0

    @property
    def over(self) -> bool:
        """Whether nothing more is to be begun."""
        return (0 < self._deadline <= time.monotonic()) or not _somebody_listens()

    def __call__(self, files: int, size: int) -> None:
        """Take note of the files and bytes made.

        :raises Suspended: the time is up, and there is more than before; or nobody waits for it
        """
        self.files, self.bytes = files, size
        if self.over and (files > self.before or not _somebody_listens()):
            raise Suspended


def _somebody_listens() -> bool:
    """Whether standard output leads anywhere. It does not once the task that waited for it was interrupted."""
    poll = select.poll()
    poll.register(_STDOUT, 0)
    return not any(event & (select.POLLERR | select.POLLHUP) for _fd, event in poll.poll(0))
