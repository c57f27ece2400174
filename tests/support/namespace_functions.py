# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Functions that tests run in namespaces.

A process of another user imports a copy of this file, so it is self-contained.
"""

from __future__ import annotations

import os
import pathlib
import signal
import typing as t


def state(path: str = "") -> t.Dict[str, t.Any]:
    """The state of this process, and the owners of a new file."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    answer: t.Dict[str, t.Any] = {
        "ids": [*os.getresuid(), *os.getresgid()],
        "groups": os.getgroups(),
        "uid_map": pathlib.Path("/proc/self/uid_map").read_text().split(),
        "gid_map": pathlib.Path("/proc/self/gid_map").read_text().split(),
        "mounts": os.readlink("/proc/self/ns/mnt"),
        "users": os.readlink("/proc/self/ns/user"),
        "capabilities": status["CapEff"],
        "environ": dict(os.environ),
        "cwd": os.getcwd(),
        "pid": os.getpid(),
    }
    if path:
        with open(path, "x"):
            os.chown(path, 5, 6)
            seen = os.stat(path)
            answer["file"] = [seen.st_uid, seen.st_gid]
    return answer


def crash() -> None:
    """Raise an exception that the library does not expect."""
    raise ValueError("as it happens")


def stay(path: str) -> None:
    """Write the ID of this process to a new file, and wait for a signal."""
    with open(path, "x") as file:
        file.write(str(os.getpid()))
    signal.pause()
