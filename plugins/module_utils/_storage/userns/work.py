# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The child process: run the function, send its result or error, and send progress messages."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import traceback
import typing as t

from ..errors import InternalError, NoSpace, StorageError, StoreError
from ..kernel import steps
from .channel import ERROR, PROGRESS, RESULT, BadMessage, Sender, error_message

# Seconds between two messages of progress.
_BEAT = 1.0


def work(sender: Sender, function: t.Callable[..., t.Any], arguments: t.Sequence[t.Any]) -> None:
    """Run a function and send its result or error."""
    os.chdir("/")
    os.umask(0o022)
    nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    os.dup2(nothing, 0)
    os.close(nothing)
    with _heartbeat(sender), errors_sent(sender):
        sender.send(RESULT, function(*arguments))


@contextlib.contextmanager
def errors_sent(sender: Sender) -> t.Iterator[None]:
    """Send an exception to the parent instead of raising it."""
    try:
        yield
    except StorageError as error:
        _send_error(sender, error)
    except MemoryError:
        _send_error(sender, _no_memory())
    except BadMessage as error:
        _send_error(sender, _unsendable(str(error)))
    except Exception as error:
        _send_error(sender, unexpected(error))


def _send_error(sender: Sender, error: StorageError) -> None:
    message = error_message(error)
    try:
        sender.send(ERROR, message)
    except BadMessage:
        sender.send(ERROR, {**message, "facts": {}})


def _no_memory() -> StorageError:
    return NoSpace(
        "the work in the store",
        "needs more memory than its limit",
        "Check the store for records or databases of an unusual size.",
    )


def _unsendable(why: str) -> StorageError:
    return StoreError(
        "the result",
        why,
        "Process fewer images at once: list them in `images`.",
    )


def unexpected(error: BaseException) -> InternalError:
    """The error of the library for an unexpected exception."""
    return InternalError(
        "the work in the store",
        f"failed unexpectedly with {type(error).__name__}: {error}",
        "Please report this with the trace.",
        trace="".join(traceback.format_exception(type(error), error, error.__traceback__)),
    )


@contextlib.contextmanager
def _heartbeat(sender: Sender) -> t.Iterator[None]:
    """Send messages of progress from a separate thread.

    Messages are also sent while the work waits. They contain the CPU time that the work and its
    child processes have used since the last message, so that the parent can detect a stall.
    """
    ended = threading.Event()
    clock = time.pthread_getcpuclockid(threading.get_ident())
    main = threading.get_native_id()

    def beat() -> None:
        before: t.Tuple[t.Any, ...] = ()
        while not ended.wait(_BEAT):
            step = steps.current()
            now = (time.clock_gettime(clock), _children_seconds(main), step)
            # If nobody reads the pipe, a signal ends this process, or the work detects it.
            with contextlib.suppress(BadMessage, OSError):
                sender.send(PROGRESS, {"moved": now != before, "step": step})
            before = now

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _children_seconds(main: int) -> t.List[str]:
    """The CPU time of the child processes of the main thread, in clock ticks."""
    used = []
    with contextlib.suppress(OSError, ValueError):
        with open(f"/proc/self/task/{main}/children", encoding="ascii") as stream:
            children = stream.read().split()
        for child in children:
            with open(f"/proc/{int(child)}/stat", encoding="ascii", errors="replace") as stream:
                used.append(" ".join(stream.read().rpartition(")")[2].split()[11:15]))
    return used
