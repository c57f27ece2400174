# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The parent process: wait for the result of a child, with limits for time and memory."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import typing as t

from ..errors import WorkerError
from ..kernel import termination
from .channel import (
    ERROR,
    RESULT,
    BadMessage,
    Receiver,
    Silence,
    decode,
    decode_message,
    rebuilt_error,
)
from .declared import form_of

# A killed process that waits for a device or a server cannot end; it is not waited for.
_LAST_WAIT = 5.0


class Ended(Exception):
    """The child closed its end without a result."""


def outcome(
    receiver: Receiver,
    function: t.Callable[..., t.Any],
    owner: str,
    handlers: t.Mapping[bytes, t.Callable[[t.Dict[str, t.Any]], None]],
) -> t.Any:
    """The result of the function that a child runs.

    :param owner: the owner of the store, for messages
    :param handlers: handlers of messages that are neither a result nor an error
    :raises StorageError: the function's own error
    :raises WorkerError: the child did not respond, or sent invalid data
    :raises Ended: it ended without a result
    """
    try:
        for kind, data in receiver.messages():
            if kind == RESULT:
                return decode(data, form_of(function))
            message = decode_message(kind, data)
            if kind == ERROR:
                raise rebuilt_error(message)
            if kind not in handlers:
                raise BadMessage(f"is of the unexpected kind {kind!a}")
            handlers[kind](message)
    except BadMessage as error:
        raise WorkerError(
            owner,
            f"the process that works in the store sent a message that {error}",
            "If nobody has interfered with that process, please report this.",
        ) from error
    except Silence as error:
        step = f" while {receiver.step}" if receiver.step else ""
        raise WorkerError(
            owner,
            f"the process that works in the store {error}{step}, and was killed",
            "Check whether the filesystem responds, and whether the process was stopped.",
        ) from error
    raise Ended


def death(owner: str, status: int, step: str) -> WorkerError:
    """A description of how a child ended.

    :param status: its exit status; negative for a signal's number
    """
    doing = f" while {step}" if step else ""
    if status >= 0:
        return WorkerError(
            owner,
            f"the process that works in the store ended{doing} with status {status} and no result",
        )
    hint = "Run the task again; it removes leftovers."
    if -status == signal.SIGKILL:
        hint = f"If memory ran out, the kernel log says so. {hint}"
    return WorkerError(
        owner,
        f"the process that works in the store was killed by {termination.signal_text(-status)}{doing}",
        hint,
    )


def wait_for_end(pid: int) -> t.Optional[int]:
    """The exit status of a child that has ended or is about to end, negative for a signal; None if it still runs."""
    until = time.monotonic() + _LAST_WAIT
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            return None
        time.sleep(0.005)


def killed(pid: int) -> None:
    """Kill a child and wait for its end, unless the kernel cannot end it."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    wait_for_end(pid)


@contextlib.contextmanager
def signals_passed_on(pid: int, receiver: Receiver) -> t.Iterator[None]:
    """Forward signals that request the end of this process to a child, and end after the child has ended."""
    received: t.List[int] = []

    def pass_on(number: int, _frame: t.Any) -> None:
        received.append(number)
        receiver.note_end_requested()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in termination.SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, pass_on)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if received:
            os.kill(os.getpid(), received[0])


@contextlib.contextmanager
def terminated_when_unread(pid: int) -> t.Iterator[None]:
    """Terminate a process when nobody reads the output of this process any more."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.is_set():
            if termination.stdout_closed(patience=0.5):
                with contextlib.suppress(ProcessLookupError):
                    # nohup ignores hangups.
                    os.kill(pid, signal.SIGTERM)
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
