# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Decide when to stop work: at a time limit, on a signal, or when nobody waits for the result any more."""

from __future__ import annotations

import contextlib
import signal
import time
import typing as t

from ..kernel import termination
from ..tree.tree_tools import Suspended

# Signals that were received. After the first, this process starts no more work.
_received: t.List[int] = []


class WorkBudget:
    """A progress callback that records the progress and suspends the work at the time limit.

    :param deadline: on the monotonic clock, which all processes of a host share; 0 for none
    :param awaited: whether a reader of standard output waits for the result
    """

    def __init__(self, deadline: float = 0.0, awaited: bool = False) -> None:
        self._deadline = deadline
        self._awaited = awaited
        self._started = time.monotonic()
        self.files = 0
        self.bytes = 0
        # The time that it takes to read existing data again (seconds).
        self._files_before = 0
        self._bytes_before = 0
        self.resume_seconds = 0.0

    @property
    def given_up(self) -> bool:
        """Whether nobody waits for the result any more."""
        return bool(_received) or (self._awaited and termination.stdout_closed())

    @property
    def over(self) -> bool:
        """Whether no more work should be started."""
        return (0 < self._deadline <= time.monotonic()) or self.given_up

    @property
    def made_progress(self) -> bool:
        """Whether there is more work done than before."""
        return self.files > self._files_before or self.bytes > self._bytes_before

    def resume(self, files: int, size: int) -> None:
        """Set the number of existing files and bytes."""
        self._started = time.monotonic()
        self._files_before, self._bytes_before = files, size

    def __call__(self, files: int, size: int) -> None:
        """Record the files and bytes created.

        :raises Suspended: the time is over and there was progress, or nobody waits for the result
        """
        self.files, self.bytes = files, size
        if not self.made_progress:
            self.resume_seconds = time.monotonic() - self._started
        if self.made_progress and self.over:
            raise Suspended(self.given_up)
        self.look_only(files, size)

    def look_only(self, _files: int, _size: int) -> None:
        """A callback for work that creates nothing.

        :raises Suspended: nobody waits for the result
        """
        if self.given_up:
            raise Suspended(True)


@contextlib.contextmanager
def in_order() -> t.Iterator[None]:
    """Suspend the work when a signal requests the end of the process, so that the next run resumes it.

    Signals may arrive several times, and little work is left after the first, so the handlers stay installed.
    """
    before = {
        number: signal.signal(number, _take_note)
        for number in termination.SIGNALS
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in () if _received else before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _take_note(number: int, _frame: t.Any) -> None:
    _received.append(number)
