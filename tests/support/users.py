# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Create and remove temporary users with subordinate IDs on a machine."""

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
    """A temporary user with the subordinate IDs `subuid_start` to `subuid_start + subuid_count - 1`."""

    subuid_start: int = 0
    subuid_count: int = 0

    def write(self, path: str, text: str) -> pathlib.Path:
        """Write a file below the user's home; the user owns the file and its new folders."""
        target = pathlib.Path(self.home) / path
        missing = [p for p in (target, *target.parents) if not p.exists()]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        for item in missing:
            os.chown(item, self.uid, self.gid)
        return target


def _claimed(etc: pathlib.Path) -> t.Tuple[t.Set[int], t.List[t.Tuple[int, int]]]:
    """The IDs of users and groups, and all subordinate ranges as (first, last + 1)."""
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
    """Hold the lock of the account files; yields a function that returns a UID that no laboratory has used recently.

    Laboratories share PIDs: if another laboratory used the same UID, userdel would find processes of the user.
    """
    with open(lab.base.parent / ".us-users.lock", "a+", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        def number(taken: t.Collection[int]) -> int:
            lock.seek(0)
            last = int(lock.read() or 0)
            uid = next(n for n in _uids_after(last) if n not in taken)
            lock.truncate(0)
            lock.write(str(uid))
            lock.flush()
            return uid

        yield number


def _uids_after(last: int) -> t.Iterator[int]:
    """All UIDs of ordinary users, those after `last` first."""
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
    """Create a user with a home in the laboratory and `subordinate` IDs (0 for none).

    The UID and the ranges do not overlap with others on the machine. /run/user/UID exists and belongs to the
    user, as after a login.
    """
    machine = machine or lab.machine
    home = lab.folder() / "h"
    with _numbers(lab) as next_uid:
        taken, ranges = _claimed(machine.path("/etc"))
        for other in _also_known_to(lab, machine):
            more_taken, more_ranges = _claimed(other.path("/etc"))
            taken, ranges = taken | more_taken, ranges + more_ranges
        number = uid or next_uid(taken)
        name = name or f"us{os.getpid() % 100000}n{next(_NUMBERS)}x"
        machine.run(["groupadd", "-g", str(number), name])
        # -K prevents useradd from allocating ranges, and -M from copying /etc/skel.
        options = ["-M", "-N", "-u", str(number), "-g", str(number), "-d", str(home)]
        options += ["-s", "/bin/bash", "-K", "SUB_UID_COUNT=0", "-K", "SUB_GID_COUNT=0"]
        machine.run(["useradd", *options, name])
        start = 0
        if subordinate:
            start = 100_000 + _RANGE * (number - 1500)
            while any(start < end and first < start + subordinate for first, end in ranges):
                start += _RANGE
            last = start + subordinate - 1
            options = ["--add-subuids", f"{start}-{last}", "--add-subgids", f"{start}-{last}"]
            machine.run(["usermod", *options, name])
    home.mkdir(mode=0o700)
    os.chown(home, number, number)
    runtime = f"/run/user/{number}"
    machine.run(["install", "-d", "-m", "0700", "-o", str(number), "-g", str(number), runtime])
    user = User(name, number, number, str(home), runtime, start, subordinate)
    for other in _also_known_to(lab, machine):
        add_to_machine(user, other)
    return user


def _also_known_to(lab: Lab, machine: Machine) -> t.List[Machine]:
    """Further machines that need the users of a machine, because tests also use the library in their own process."""
    return [lab.local] if machine is lab.machine and machine is not lab.local else []


def add_to_machine(user: User, machine: Machine) -> None:
    """Add a user with the same IDs to the account files of another machine, for the lifetime of that machine."""
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
    """End the user's processes, and remove the home, the runtime folder, the account and the ranges."""
    machine = machine or lab.machine
    lab.remove(pathlib.Path(user.home).parent)
    for item in (machine, *_also_known_to(lab, machine)):
        item.run(["rm", "-rf", user.runtime_dir])
        with _numbers(lab):
            item.run(["userdel", "-f", user.name], check=False)
            item.run(["groupdel", user.name], check=False)
            for name in ("subuid", "subgid"):
                item.run(["sed", "-i", f"/^{user.name}:/d", f"/etc/{name}"], check=False)
