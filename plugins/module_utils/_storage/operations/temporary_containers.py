# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Containers that podman creates for a task, that never start, and that the task removes again."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import typing as t

_PREFIX = "userns-storage-check"
_NAME = re.compile(rf"{_PREFIX}-([0-9]{{1,10}})-([0-9]{{1,20}})-[0-9a-f]{{8}}")


def new_name() -> str:
    """A new name, which contains the start time of this process."""
    return f"{_PREFIX}-{os.getpid()}-{_start_time(os.getpid())}-{secrets.token_hex(4)}"


def is_name(name: str) -> bool:
    """Whether the name of a container has this form."""
    return _NAME.fullmatch(name) is not None


def is_running(name: str) -> bool:
    """Whether the process in a container's name is still running."""
    found = _NAME.fullmatch(name)
    return found is not None and _start_time(int(found.group(1))) == found.group(2)


def create_arguments(name: str, pull: str) -> t.List[str]:
    """The arguments of ``podman`` to create it without network, volumes, log and restart.

    :param pull: ``never`` or ``always``
    """
    arguments = ["create", "--name", name, "--pull", pull, "--network", "none"]
    return [*arguments, "--image-volume", "ignore", "--log-driver", "none", "--restart", "no"]


def remove_arguments(name: str) -> t.List[str]:
    """The arguments of ``podman`` to remove it; a missing container is ignored."""
    return ["rm", "--force", "--ignore", "--volumes", name]


def _start_time(pid: int) -> str:
    """The start time of a process in clock ticks after the boot (proc_pid_stat(5)); empty if there is no process."""
    with contextlib.suppress(OSError, IndexError), open(f"/proc/{pid}/stat", "rb") as stream:
        return stream.read().rpartition(b")")[2].split()[19].decode("ascii")
    return ""
