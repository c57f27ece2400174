# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Enter namespaces with ``podman unshare``, if only podman may create them (AppArmor profiles of Ubuntu)."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import typing as t

from ..errors import InternalError, NamespaceError
from ..kernel import namespaces
from ..store.config import Account
from .channel import ENTERED, UNLIMITED, Receiver, Sender, decode
from .entering import Forbidden, explain
from .environment import environment, find_program
from .requests import as_data, from_data
from .shapes import Items, Record, plain, text
from .waiting import Ended, death, outcome, signals_passed_on, terminated_when_unread
from .work import errors_sent, work

# The program that `podman unshare` runs: a line with the library's own path, then the call.
_BOOT = (
    "import importlib, json, sys; source = sys.stdin.buffer; "
    "sys.path[:], name = json.loads(source.readline()); importlib.import_module(name).serve(source)"
)
_CALL = Record({"module": text, "function": text, "arguments": Items(plain(12))})
_LONGEST_CALL = 16 * 1024 * 1024


def run_through_podman(
    function: t.Callable[..., t.Any],
    arguments: t.Sequence[t.Any],
    account: Account,
    forbidden: Forbidden,
) -> t.Any:
    """Run a function in the namespace that podman creates for the current user.

    :param function: imported by its name in the other process
    :param forbidden: why no namespace could be created without podman
    :raises StorageError: the function's own error
    :raises NamespaceError: podman cannot create a namespace either
    """
    podman = find_program("podman")
    if podman is None:
        raise explain(account, forbidden)
    if "<" in function.__qualname__ or function.__module__ == "__main__":
        raise InternalError(
            f"{function.__module__}.{function.__qualname__}", "cannot be found by name in a child"
        )
    parent = os.getpid()
    with tempfile.TemporaryFile() as messages:
        process = subprocess.Popen(
            [podman, "unshare", sys.executable or "python3", "-c", _BOOT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=messages,
            env=environment(os.environ, account, own=True),
            cwd="/",
            preexec_fn=lambda: namespaces.die_with_parent(parent),
        )
        try:
            return _converse(process, function, arguments, account)
        except _NoAnswer:
            messages.seek(0)
            words = messages.read(4096).decode(errors="replace").strip()
            raise NamespaceError(
                f"user {account.name}",
                f"cannot create a user namespace, neither directly ({forbidden.reason}) nor through podman "
                f"unshare: {words or 'no output'}",
                f"Try as {account.name}: podman unshare cat /proc/self/uid_map",
            ) from None
        finally:
            process.kill()
            process.wait()


class _NoAnswer(Exception):
    """The program ended without a message."""


def _converse(
    process: subprocess.Popen[bytes],
    function: t.Callable[..., t.Any],
    arguments: t.Sequence[t.Any],
    account: Account,
) -> t.Any:
    sink, source = process.stdin, process.stdout
    if sink is None or source is None:
        raise _NoAnswer
    call = {
        "module": function.__module__,
        "function": function.__qualname__,
        "arguments": as_data(arguments),
    }
    try:
        # Closing flushes, so a program that never reads is also detected here.
        with sink:
            sink.write(json.dumps((sys.path, __name__)).encode("ascii") + b"\n")
            sink.write(json.dumps(call).encode("ascii"))
    except BrokenPipeError:
        raise _NoAnswer from None
    entered: t.List[int] = []
    with source, contextlib.ExitStack() as undo:
        # Everything belongs to the user who runs this.
        receiver = Receiver(source.fileno(), UNLIMITED)

        def enter(message: t.Dict[str, t.Any]) -> None:
            entered.append(message["pid"])
            undo.enter_context(signals_passed_on(message["pid"], receiver))
            undo.enter_context(terminated_when_unread(message["pid"]))

        try:
            return outcome(receiver, function, f"user {account.name}", {ENTERED: enter})
        except Ended:
            pass
    if not entered:
        raise _NoAnswer
    raise death(f"user {account.name}", process.wait(), receiver.step)


def serve(source: t.IO[bytes]) -> None:
    """Run inside ``podman unshare``: read the call from stdin, and write the result to stdout.

    :param source: stdin, of which the first line was read
    """
    namespaces.die_with_parent(os.getppid())
    sender = Sender(os.dup(1))
    os.dup2(2, 1)
    call = decode(source.read(_LONGEST_CALL), _CALL)
    namespaces.unshare(namespaces.CLONE_NEWNS)
    namespaces.isolate_mounts()
    sender.send(ENTERED, {"pid": os.getpid()})
    with errors_sent(sender):
        function: t.Any = importlib.import_module(call["module"])
        for part in call["function"].split("."):
            function = getattr(function, part)
        work(sender, function, from_data(function, call["arguments"]))
