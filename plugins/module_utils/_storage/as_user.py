# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run programs as the user who owns the store."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import signal
import subprocess
import time
import typing as t
from dataclasses import dataclass

from .errors import ConfigError, StoreError
from .kernel import namespaces
from .printable import command, user_command
from .store.config import Account
from .userns import running as userns
from .userns.shapes import Record, text, whole

# The time without progress of a program, and the interval of the checks (seconds).
_STALLED = 600.0
_LOOK = 5.0
# Descriptors of files in memory, above those that programs pass to their child processes.
_FIRST_DESCRIPTOR = 100
# Bytes of a program's standard error.
_STDERR_LIMIT = 2000


@dataclass(frozen=True)
class Finished:
    """A program that has ended.

    :ivar stdout: at most 1 MiB of its output
    :ivar digest: the SHA-256 of the whole output, in hexadecimal
    :ivar stderr: the last 2,000 bytes
    """

    rc: int
    stdout: str
    digest: str
    stderr: str


def typed(account: t.Optional[Account], line: str) -> str:
    """The command line with which the user of this process runs a command line as ``account``.

    :param account: None for the user of this process
    """
    if account is None or os.geteuid() == account.uid:
        return line
    return user_command(account.name, line)


def execute(
    argv: t.Sequence[str],
    account: t.Optional[Account],
    variables: t.Mapping[str, str],
    stalled: float = _STALLED,
    files: t.Optional[t.Mapping[str, bytes]] = None,
) -> Finished:
    """Run a program as ``account``, with the groups of that user and in the environment of the user's store.

    :param account: None for the caller
    :param variables: added to the environment
    :param stalled: the program is terminated after this time (seconds) in which its processes used no CPU time
    :param files: contents of files by placeholder. Arguments and values of ``variables`` that equal a placeholder are
        replaced by the path of a file in memory, which only the account and root can read and which disappears when all
        processes of the program have ended
    :raises StorageError: it cannot be started, was terminated, or the process that waits for it did not respond
    """
    # The child process checks for progress, including that of other processes of the program.
    limits = userns.Limits(stall=0.0)
    found = userns.run_as(
        _watched, (argv, variables, stalled, account, dict(files or {})), account, limits
    )
    return Finished(**found)


@userns.returns(Record({"rc": whole, "stdout": text, "digest": text, "stderr": text}))
def _watched(
    argv: t.Sequence[str],
    variables: t.Mapping[str, str],
    stalled: float,
    account: t.Optional[Account],
    files: t.Mapping[str, bytes],
) -> t.Dict[str, t.Any]:
    """Run a program in its own session, and terminate it if it stalls."""
    environ = dict(os.environ)
    if account is not None:
        environ = userns.environment(os.environ, account, own=True)
    own = os.getpid()
    # In memory, because check mode must not write to any folder.
    with contextlib.ExitStack() as undo:
        output, errors = (undo.enter_context(_memory(name)) for name in ("stdout", "stderr"))
        paths: t.Dict[str, str] = {}
        descriptors = []
        for placeholder, content in files.items():
            descriptors.append(_file_in_memory(undo, content))
            paths[placeholder] = f"/proc/self/fd/{descriptors[-1]}"
        given = {name: paths.get(value, value) for name, value in variables.items()}
        try:
            process = subprocess.Popen(
                [paths.get(argument, argument) for argument in argv],
                pass_fds=descriptors,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                cwd="/",
                env={**environ, **given},
                umask=0o022,
                start_new_session=True,
                preexec_fn=lambda: namespaces.die_with_parent(own),
            )
        except OSError as error:
            raise ConfigError(
                argv[0], f"cannot be executed: {error.strerror}", "Check its path and permissions."
            ) from error
        status = _wait(process, argv, stalled)
        output.seek(0)
        digest = hashlib.sha256()
        first = b""
        for piece in iter(lambda: output.read(2**20), b""):
            first = first or piece
            digest.update(piece)
        errors.seek(max(0, errors.seek(0, os.SEEK_END) - _STDERR_LIMIT))
        stderr = errors.read().decode("utf-8", "replace").strip()
    return {
        "rc": status,
        "stdout": first.decode("utf-8", "replace"),
        "digest": digest.hexdigest(),
        "stderr": stderr,
    }


def _wait(process: subprocess.Popen[bytes], argv: t.Sequence[str], stalled: float) -> int:
    used, since = -1, time.monotonic()
    while True:
        try:
            return process.wait(_LOOK)
        except subprocess.TimeoutExpired:
            now = _processor_time(process.pid)
        if now != used:
            used, since = now, time.monotonic()
        elif time.monotonic() - since > stalled:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            raise StoreError(
                argv[0],
                f"made no progress for {stalled:g} s and was terminated: its source does not "
                "respond, or its process was stopped",
                f"Run it manually: {command(*argv)}",
            )


def _file_in_memory(undo: contextlib.ExitStack, content: bytes) -> int:
    """The descriptor of a file that only its owner, this process' user, and root can read."""
    with _memory("userns-storage") as stream:
        os.fchmod(stream.fileno(), 0o400)
        stream.write(content)
        stream.flush()
        descriptor = fcntl.fcntl(stream.fileno(), fcntl.F_DUPFD_CLOEXEC, _FIRST_DESCRIPTOR)
    undo.callback(os.close, descriptor)
    return descriptor


def _memory(name: str) -> t.IO[bytes]:
    return os.fdopen(os.memfd_create(name, os.MFD_CLOEXEC), "w+b")


def _processor_time(session: int) -> int:
    """The CPU time of the processes of a session in clock ticks; proc_pid_stat(5)."""
    total = 0
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                with open(f"/proc/{name}/stat", "rb") as content:
                    fields = content.read().rpartition(b")")[2].split()
                if int(fields[3]) == session:
                    total += int(fields[11]) + int(fields[12])
    return total
