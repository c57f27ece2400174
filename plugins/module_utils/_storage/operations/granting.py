# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This module util is PRIVATE to the userns.storage collection.
"""What subordinate_ids does: give users ranges that nobody else has, under the locks of shadow's own tools."""

from __future__ import annotations

import contextlib
import os
import pwd
import stat
import time
import typing as t
from dataclasses import dataclass, field

from ..errors import ConfigError, LockTimeout, NamespaceError, PermissionDenied
from ..idmap.ranges import ID_LIMIT
from ..idmap.subids import (
    FIRST_PROPOSED,
    USUAL_COUNT,
    Sources,
    SubIDRange,
    everybodys_ranges,
    nss_service,
    ranges_of,
)

KINDS = ("uid", "gid")

# As long as shadow's tools wait (seconds).
_LOCK_TIMEOUT = 15.0
_SELINUX = "security.selinux"


@dataclass(frozen=True)
class GrantRequest:
    """What a task declares.

    :param users: names, of accounts or, as ``containers``, of nobody
    :param count: how many subordinate UIDs and GIDs each has at least
    """

    users: t.Tuple[str, ...]
    count: int = USUAL_COUNT
    check: bool = False
    sources: Sources = field(default_factory=Sources)
    group: str = "/etc/group"


def grant(request: GrantRequest) -> t.Dict[str, t.Any]:
    """See to it that each user has so many subordinate IDs. What somebody has, stays.

    :returns: the module's result
    :raises ConfigError: a name or the count is wrong
    :raises NamespaceError: a user's IDs are kept elsewhere and are too few, or no range is free
    :raises LockTimeout: another program holds a file's lock
    :raises PermissionDenied: the files cannot be written
    """
    for name in request.users:
        if not name or any(mark in name for mark in ":#\n") or name != name.strip():
            raise ConfigError(f"user {name!r}", "is no name of a user", "Check: getent passwd")
    if not 0 < request.count < ID_LIMIT:
        raise ConfigError(
            f"count {request.count}", "is no number of IDs", f"The usual one is {USUAL_COUNT}."
        )
    if nss_service(request.sources.nsswitch):
        return _elsewhere(request)
    names = list(dict.fromkeys(request.users))
    with contextlib.ExitStack() as locks:
        if not request.check and _lines_to_add(names, request)[0]:
            for kind in KINDS:
                locks.enter_context(_locked(request.sources.path(kind)))
        # Only what is read under the locks counts.
        lines, granted = _lines_to_add(names, request)
        before = {kind: _read(request.sources.path(kind)) for kind in KINDS}
        after = {
            kind: _with_lines(before[kind], [line for one, line in lines if one == kind])
            for kind in KINDS
        }
        if not request.check:
            for kind in KINDS:
                if after[kind] != before[kind]:
                    _replace(request.sources.path(kind), after[kind])
    return {
        "changed": bool(lines),
        "users": [_result(name, granted, request) for name in names],
        "source": "files",
        "diff": [
            {
                "before_header": request.sources.path(kind),
                "after_header": request.sources.path(kind),
                "before": before[kind].decode(errors="replace"),
                "after": after[kind].decode(errors="replace"),
            }
            for kind in KINDS
            if after[kind] != before[kind]
        ],
    }


def free_range(taken: t.Iterable[SubIDRange], count: int) -> SubIDRange:
    """The first range of so many IDs, from 100000 on by whole multiples of 65536, that touches none.

    :raises NamespaceError: there is none
    """
    start = FIRST_PROPOSED
    for begin, size in sorted(taken):
        if begin >= start + count:
            break
        if begin + size > start:
            start += -(-(begin + size - start) // USUAL_COUNT) * USUAL_COUNT
    if start + count > ID_LIMIT:
        raise NamespaceError(
            f"{count} subordinate IDs",
            "there is no such range left below 4294967295",
            "Take ranges of users who are gone out of /etc/subuid and /etc/subgid.",
        )
    return SubIDRange(start, count)


def _lines_to_add(
    names: t.Sequence[str], request: GrantRequest
) -> t.Tuple[t.List[t.Tuple[str, str]], t.Set[str]]:
    """Lines with their kind, and who gets them. UIDs and GIDs get the same range where both are short."""
    taken = [one for kind in KINDS for one in everybodys_ranges(kind, request.sources)]
    taken += _accounts(request)
    lines, granted = [], set()
    for name in names:
        missing: t.Dict[int, t.List[str]] = {}
        for kind in KINDS:
            short = request.count - sum(one.size for one in _own(name, kind, request))
            if short > 0:
                missing.setdefault(short, []).append(kind)
        for short, kinds in missing.items():
            found = free_range(taken, short)
            taken.append(found)
            granted.add(name)
            lines += [(kind, f"{name}:{found.start}:{found.size}") for kind in kinds]
    return lines, granted


def _own(name: str, kind: str, request: GrantRequest) -> t.List[SubIDRange]:
    """A user's ranges in the file itself: what libsubid leaves out must not be added once more."""
    owners = {name}
    with contextlib.suppress(KeyError):
        owners.add(str(pwd.getpwnam(name).pw_uid))
    found = []
    for line in _read(request.sources.path(kind)).decode(errors="surrogateescape").splitlines():
        fields = line.strip().split(":")
        if len(fields) == 3 and fields[0] in owners and fields[1].isdigit() and fields[2].isdigit():
            found.append(SubIDRange(int(fields[1]), int(fields[2])))
    return found


def _accounts(request: GrantRequest) -> t.List[SubIDRange]:
    """The IDs of local accounts and groups."""
    found = []
    for path, columns in ((request.sources.passwd, (2, 3)), (request.group, (2,))):
        for line in _read(path).decode(errors="surrogateescape").splitlines():
            fields = line.split(":")
            found += [
                SubIDRange(int(fields[column]), 1)
                for column in columns
                if column < len(fields) and fields[column].isdigit()
            ]
    return found


def _elsewhere(request: GrantRequest) -> t.Dict[str, t.Any]:
    """Users whose IDs a directory keeps: they are counted, and never written."""
    service = nss_service(request.sources.nsswitch)
    users = []
    for name in dict.fromkeys(request.users):
        found = {kind: ranges_of(name, None, kind, True, request.sources) for kind in KINDS}
        for kind, ranges in found.items():
            have = sum(one.size for one in ranges)
            if have < request.count:
                raise NamespaceError(
                    f"user {name}",
                    f"has {have} subordinate {kind.upper()}s in the NSS service {service}, "
                    f"{request.count} are asked for",
                    "Let the directory give more.",
                    user=name,
                )
        users.append({"name": name, "added": False, **{k: _said(v) for k, v in found.items()}})
    return {"changed": False, "users": users, "source": service, "diff": []}


def _result(name: str, granted: t.Set[str], request: GrantRequest) -> t.Dict[str, t.Any]:
    found: t.Dict[str, t.Any] = {kind: _own(name, kind, request) for kind in KINDS}
    if request.check and name in granted:
        # All lines of one request, so that several users' predictions do not overlap either.
        for kind, line in _lines_to_add(list(dict.fromkeys(request.users)), request)[0]:
            owner, start, size = line.rsplit(":", 2)
            if owner == name:
                found[kind].append(SubIDRange(int(start), int(size)))
    return {
        "name": name,
        "added": name in granted,
        **{kind: _said(ranges) for kind, ranges in found.items()},
    }


def _said(ranges: t.Iterable[SubIDRange]) -> t.List[t.Dict[str, int]]:
    return [{"start": one.start, "count": one.size} for one in ranges]


def _with_lines(content: bytes, lines: t.Sequence[str]) -> bytes:
    if not lines:
        return content
    if content and not content.endswith(b"\n"):
        content += b"\n"
    return content + "".join(f"{line}\n" for line in lines).encode()


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as stream:
            return stream.read()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise PermissionDenied(
            path, f"cannot be read: {error.strerror}", "Run the task with become: true."
        ) from error


def _replace(path: str, content: bytes) -> None:
    """Write the file as shadow's tools do: the old one stays behind as ``PATH-``."""
    fresh = f"{path}+"
    try:
        mode, owner, group = 0o644, 0, 0
        with contextlib.suppress(FileNotFoundError):
            info = os.stat(path)
            mode, owner, group = stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid
            _write(f"{path}-", _read(path), mode, owner, group, path)
        _write(fresh, content, mode, owner, group, path)
        os.rename(fresh, path)
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(fresh)
        raise PermissionDenied(
            path, f"cannot be replaced: {error.strerror}", "Run the task with become: true."
        ) from error


def _write(path: str, content: bytes, mode: int, owner: int, group: int, model: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(content)
        os.fchmod(descriptor, mode)
        if os.geteuid() == 0:
            os.fchown(descriptor, owner, group)
        # Hosts without SELinux have no such attribute.
        with contextlib.suppress(OSError):
            os.setxattr(descriptor, _SELINUX, os.getxattr(model, _SELINUX))
        stream.flush()
        os.fsync(descriptor)


@contextlib.contextmanager
def _locked(path: str) -> t.Iterator[None]:
    """shadow's lock: ``PATH.lock``, a hard link to a file that holds the owner's PID."""
    lock, own = f"{path}.lock", f"{path}.{os.getpid()}"
    deadline = time.monotonic() + _LOCK_TIMEOUT
    try:
        with open(own, "w", encoding="ascii") as stream:
            stream.write(f"{os.getpid()}\0")
    except OSError as error:
        raise PermissionDenied(
            own, f"cannot be made: {error.strerror}", "Run the task with become: true."
        ) from error
    try:
        while True:
            try:
                os.link(own, lock)
                break
            except FileExistsError:
                holder = _holder(lock)
                if holder is not None and not _alive(holder):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(lock)
                elif time.monotonic() > deadline:
                    raise LockTimeout(
                        lock,
                        f"is held by process {holder or 'unknown'} for more than {_LOCK_TIMEOUT:.0f} s",
                        "Let it finish, or remove the file if no program edits users.",
                    ) from None
                else:
                    time.sleep(0.1)
    finally:
        os.unlink(own)
    try:
        yield
    finally:
        os.unlink(lock)


def _holder(lock: str) -> t.Optional[int]:
    with contextlib.suppress(FileNotFoundError, ValueError):
        return int(_read(lock).rstrip(b"\0\n") or b"x")
    return None


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
