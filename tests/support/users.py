# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Temporary users with subordinate IDs, made by useradd on a machine and taken away again."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import itertools
import os
import pathlib
import typing as t

from .lab import Lab
from .machines import Account, Machine

_NUMBERS = itertools.count(1)
_RANGE = 65536


@dataclasses.dataclass(frozen=True)
class User(Account):
    """A temporary user: IDs `subuid_start` to `subuid_start + subuid_count - 1` belong to it."""

    subuid_start: int = 0
    subuid_count: int = 0

    def write(self, path: str, text: str) -> pathlib.Path:
        """Put a file of the user's own below its home, folders included."""
        target = pathlib.Path(self.home) / path
        missing = [p for p in (target, *target.parents) if not p.exists()]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        for item in missing:
            os.chown(item, self.uid, self.gid)
        return target


def _claimed(etc: pathlib.Path) -> t.Tuple[t.Set[int], t.List[t.Tuple[int, int]]]:
    """IDs taken by users and groups, and all subordinate ranges as (first, past the last)."""
    taken: t.Set[int] = set()
    for name in ("passwd", "group"):
        for line in (etc / name).read_text().splitlines():
            taken.add(int(line.split(":")[2]))
    ranges = []
    for name in ("subuid", "subgid"):
        with contextlib.suppress(FileNotFoundError):
            for line in (etc / name).read_text().splitlines():
                with contextlib.suppress(ValueError):
                    _owner, start, count = line.split(":")
                    ranges.append((int(start), int(start) + int(count)))
    return taken, ranges


@contextlib.contextmanager
def _numbers(lab: Lab) -> t.Iterator[t.Callable[[t.Collection[int]], int]]:
    """Hold the lock on account files, and get UIDs that no laboratory of this machine has just used.

    Laboratories share PIDs: an equal UID elsewhere would make userdel find processes of "the user".
    """
    with open(lab.base.parent / ".us-users.lock", "a+", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        def number(taken: t.Collection[int]) -> int:
            lock.seek(0)
            last = int(lock.read() or 0)
            fresh = next(n for n in _circle(last) if n not in taken)
            lock.truncate(0)
            lock.write(str(fresh))
            lock.flush()
            return fresh

        yield number


def _circle(last: int) -> t.Iterator[int]:
    """UIDs of ordinary users, those after `last` first."""
    first, past = 1500, 60000
    start = last + 1 if first <= last < past - 1 else first
    return itertools.chain(range(start, past), range(first, start))


def add_user(
    lab: Lab,
    machine: t.Optional[Machine] = None,
    subordinate: int = _RANGE,
    uid: int = 0,
    name: str = "",
) -> User:
    """Make a user whose home lies in the laboratory, with `subordinate` IDs (0: none).

    Ranges and UIDs overlap no other's on that machine. /run/user/UID is there and is the user's, as
    after a login.
    """
    machine = machine or lab.machine
    home = lab.folder() / "h"
    with _numbers(lab) as fresh:
        taken, ranges = _claimed(machine.path("/etc"))
        for other in _also_known_to(lab, machine):
            more_taken, more_ranges = _claimed(other.path("/etc"))
            taken, ranges = taken | more_taken, ranges + more_ranges
        number = uid or fresh(taken)
        name = name or f"us{os.getpid() % 100000}n{next(_NUMBERS)}x"
        machine.run(["groupadd", "-g", str(number), name])
        # -K keeps useradd from choosing ranges itself; -M from copying /etc/skel.
        words = ["-M", "-N", "-u", str(number), "-g", str(number), "-d", str(home)]
        words += ["-s", "/bin/bash", "-K", "SUB_UID_COUNT=0", "-K", "SUB_GID_COUNT=0"]
        machine.run(["useradd", *words, name])
        start = 0
        if subordinate:
            start = 100_000 + _RANGE * (number - 1500)
            while any(start < end and first < start + subordinate for first, end in ranges):
                start += _RANGE
            last = start + subordinate - 1
            words = ["--add-subuids", f"{start}-{last}", "--add-subgids", f"{start}-{last}"]
            machine.run(["usermod", *words, name])
    home.mkdir(mode=0o700)
    os.chown(home, number, number)
    runtime = f"/run/user/{number}"
    machine.run(["install", "-d", "-m", "0700", "-o", str(number), "-g", str(number), runtime])
    user = User(name, number, number, str(home), runtime, start, subordinate)
    for other in _also_known_to(lab, machine):
        introduce(user, other)
    return user


def _also_known_to(lab: Lab, machine: Machine) -> t.List[Machine]:
    """Tests use the library in their own process, too, so it has to know the users of the machine under test."""
    return [lab.local] if machine is lab.machine and machine is not lab.local else []


def introduce(user: User, machine: Machine) -> None:
    """Make a user of this machine known to another one, with the same IDs, for as long as that lives."""
    etc = machine.path("/etc")
    lines = {
        "passwd": f"{user.name}:x:{user.uid}:{user.gid}::{user.home}:/bin/bash",
        "group": f"{user.name}:x:{user.gid}:",
    }
    if user.subuid_count:
        for name in ("subuid", "subgid"):
            lines[name] = f"{user.name}:{user.subuid_start}:{user.subuid_count}"
    for name, line in lines.items():
        with open(etc / name, "a", encoding="utf-8") as content:
            content.write(f"{line}\n")
    folder = ["install", "-d", "-m", "0700", "-o", str(user.uid), "-g", str(user.gid)]
    machine.run([*folder, user.runtime_dir])


def remove_user(lab: Lab, user: User, machine: t.Optional[Machine] = None) -> None:
    """End what the user runs, and take away home, runtime folder, account and range lines."""
    machine = machine or lab.machine
    lab.remove(pathlib.Path(user.home).parent)
    for item in (machine, *_also_known_to(lab, machine)):
        item.run(["rm", "-rf", user.runtime_dir])
        with _numbers(lab):
            item.run(["userdel", "-f", user.name], check=False)
            item.run(["groupdel", user.name], check=False)
            for name in ("subuid", "subgid"):
                item.run(["sed", "-i", f"/^{user.name}:/d", f"/etc/{name}"], check=False)
