# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Manage mounts of the laboratory with the C library and mount(8), independently of the code under test."""

from __future__ import annotations

import ctypes
import os
import subprocess
import typing as t

CLONE_NEWNS = 0x00020000
MNT_DETACH = 2
PR_SET_PDEATHSIG = 1
SYS_PIVOT_ROOT = 155 if os.uname().machine == "x86_64" else 41

_LIBC = ctypes.CDLL(None, use_errno=True)


def _call(function: t.Any, *arguments: t.Any) -> None:
    if function(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(arguments))


def unshare_mounts(propagation: str = "private") -> None:
    """Move this process to a new mount namespace, whose mounts do not propagate to the old namespace.

    :param propagation: "private", or "slave" to receive new mounts of the old namespace
    """
    _call(_LIBC.unshare, CLONE_NEWNS)
    mount(f"--make-r{propagation}", "/")


def prctl(option: int, value: int) -> None:
    """prctl(2) with one argument."""
    _call(_LIBC.prctl, option, ctypes.c_ulong(value), 0, 0, 0)


def pivot_root(new_root: str, put_old: str) -> None:
    """pivot_root(2)."""
    _call(_LIBC.syscall, SYS_PIVOT_ROOT, os.fsencode(new_root), os.fsencode(put_old))


def mount(*arguments: str) -> None:
    """Run mount(8); its message is in the error."""
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(f"mount {' '.join(arguments)}: {done.stderr.strip()}")


def detach(target: str) -> None:
    """Unmount `target` immediately, even if it is busy."""
    _call(_LIBC.umount2, os.fsencode(target), MNT_DETACH)


def mount_points(below: str) -> t.List[str]:
    """Mount points at or below a path, deepest first."""
    found = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
        for line in table:
            raw = line.split()[4]
            for code, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
                raw = raw.replace(code, char)
            if raw == below or raw.startswith(below.rstrip("/") + "/"):
                found.append(raw)
    return found[::-1]


def detach_all(below: str) -> None:
    """Unmount everything at or below a path."""
    for point in mount_points(below):
        detach(point)


def filesystem(path: str) -> str:
    """The type of the filesystem that contains `path`."""
    command = ["findmnt", "-no", "FSTYPE", "-T", path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
