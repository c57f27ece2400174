# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The module subordinate_ids: assign unique ID ranges to users, under the locks of the shadow tools."""

from __future__ import annotations

import contextlib
import os
import pwd
import stat
import time
import typing as t
from dataclasses import dataclass, field, replace

from ..errors import ConfigError, LockTimeout, NamespaceError, StorageError
from ..idmap.ranges import ID_LIMIT
from ..idmap.subids import (
    USUAL_COUNT,
    Sources,
    SubIDRange,
    accounts,
    bounds,
    claims,
    free_range,
    nss_accounts,
    nss_service,
    own_ranges,
    ranges_of,
    unread,
    why_not_read,
)
from ..kernel.oserrors import translate_error_of_root_file

KINDS = ("uid", "gid")

# The timeout of shadow's tools (seconds).
_LOCK_TIMEOUT = 15.0
_SELINUX = "security.selinux"


@dataclass(frozen=True)
class AssignRequest:
    """What a task declares.

    :param users: names of accounts, or names without an account such as ``containers``
    :param count: the minimum number of subordinate UIDs and GIDs of each
    """

    users: t.Tuple[str, ...]
    count: int = USUAL_COUNT
    check: bool = False
    sources: Sources = field(default_factory=Sources)
    group: str = "/etc/group"


def assign(request: AssignRequest) -> t.Dict[str, t.Any]:
    """Ensure that each user has the requested number of subordinate IDs. Existing ranges are kept.

    :returns: the module's result; with ``error`` and ``facts`` if a file cannot be replaced after another was
    :raises ConfigError: a name or the count is invalid
    :raises NamespaceError: a user has too few IDs in a directory service, or no range is free
    :raises LockTimeout: another program holds a file's lock
    :raises PermissionDenied: the files may not be written
    :raises NoSpace: their filesystem is full
    :raises StoreError: they cannot be written for another reason
    """
    for name in request.users:
        if not name or not name.isprintable() or {*":#"} & {*name} or name != name.strip():
            raise ConfigError(f"user {name!a}", "is not a valid user name", "Check: getent passwd")
    if not 0 < request.count < ID_LIMIT:
        raise ConfigError(
            f"count {request.count}",
            "is not a valid number of IDs",
            f"The usual number is {USUAL_COUNT}.",
        )
    if nss_service(request.sources.nsswitch):
        return _elsewhere(request)
    names = tuple(dict.fromkeys(request.users))
    # Queried before the locks are taken, because it may be slow.
    listed = nss_accounts("passwd", (2, 3), request.sources)
    listed += nss_accounts("group", (2,), request.sources)
    plan = _planned(names, request, listed)
    if not plan.changed or request.check:
        return _result(plan)
    replaced: t.List[str] = []
    try:
        with contextlib.ExitStack() as locks:
            for kind in KINDS:
                locks.enter_context(_locked(request.sources.path(kind)))
            # The result depends only on what is read under the locks.
            plan = _planned(names, request, listed)
            for kind in plan.changed:
                path = request.sources.path(kind)
                _replace(path, plan.before[kind], plan.after[kind])
                replaced.append(kind)
                _sync_folder(path)
    except StorageError as error:
        if not replaced:
            raise
        done = _result(plan.only(replaced))
        return {**done, "error": str(error), "facts": dict(error.facts)}
    return _result(plan)


class _NewRange(t.NamedTuple):
    """A range that is assigned to a user."""

    kind: str
    owner: str
    ids: SubIDRange

    @property
    def line(self) -> bytes:
        """The line of the file."""
        return f"{self.owner}:{self.ids.start}:{self.ids.size}\n".encode()


@dataclass(frozen=True)
class _Plan:
    """The files before and after the change.

    :param before: the content of the files as read, by kind of ID
    :param after: their content after the change
    :param added: the new ranges
    :param accounts: the IDs of local accounts and groups, by kind of ID
    """

    request: AssignRequest
    names: t.Tuple[str, ...]
    before: t.Mapping[str, bytes]
    after: t.Mapping[str, bytes]
    added: t.Tuple[_NewRange, ...]
    accounts: t.Mapping[str, t.Sequence[SubIDRange]]

    @property
    def changed(self) -> t.List[str]:
        """The kinds of ID whose file changes."""
        return [kind for kind in KINDS if self.after[kind] != self.before[kind]]

    def only(self, kinds: t.Container[str]) -> _Plan:
        """The same without the changes of the files of other kinds."""
        after = {kind: (self.after if kind in kinds else self.before)[kind] for kind in KINDS}
        added = tuple(item for item in self.added if item.kind in kinds)
        return replace(self, after=after, added=added)

    def own(self, name: str, kind: str) -> t.Sequence[SubIDRange]:
        """A user's ranges after the change."""
        return _own(name, kind, self.after[kind], self.request)


def _planned(
    names: t.Tuple[str, ...], request: AssignRequest, listed: t.Sequence[SubIDRange]
) -> _Plan:
    """Read each file once, and choose the missing ranges.

    :param listed: the IDs of accounts that NSS lists
    """
    sources = request.sources
    before = {kind: _read(sources.path(kind)) for kind in KINDS}
    _refuse_unreadable(before, request)
    local = {"uid": accounts(sources.passwd, (2,)), "gid": accounts(request.group, (2,))}
    taken = [SubIDRange(line.start, line.size) for kind in KINDS for line in claims(before[kind])]
    taken += [*local["uid"], *local["gid"], *accounts(sources.passwd, (3,)), *listed]
    added = _missing_ranges(names, request, before, taken)
    after = {}
    for kind in KINDS:
        lines = b"".join(item.line for item in added if item.kind == kind)
        # Newer versions of shadow do not read a file without a newline at the end.
        ended = bool(lines) or sources.reading.strict
        after[kind] = (_whole(before[kind]) if ended else before[kind]) + lines
    return _Plan(request, names, before, after, tuple(added), local)


def _missing_ranges(
    names: t.Iterable[str],
    request: AssignRequest,
    before: t.Mapping[str, bytes],
    taken: t.List[SubIDRange],
) -> t.List[_NewRange]:
    """The new ranges, which are added to ``taken``. UIDs and GIDs get the same range if both are missing."""
    added = []
    for name in names:
        missing: t.Dict[int, t.List[str]] = {}
        for kind in KINDS:
            own = _own(name, kind, before[kind], request)
            short = request.count - sum(item.size for item in own)
            if short > 0:
                missing.setdefault(short, []).append(kind)
        for short, kinds in missing.items():
            found = free_range(taken, short, *bounds(kinds, request.sources))
            taken.append(found)
            added += [_NewRange(kind, name, found) for kind in kinds]
    return added


def _uid_of(name: str) -> t.Optional[int]:
    try:
        return pwd.getpwnam(name).pw_uid
    except (KeyError, ValueError, UnicodeError):
        return None


def _whole(content: bytes) -> bytes:
    """The content of a file with a newline at the end, which any write adds."""
    return content if not content or content.endswith(b"\n") else content + b"\n"


def _own(name: str, kind: str, content: bytes, request: AssignRequest) -> t.Sequence[SubIDRange]:
    """A user's ranges in the content of the file itself, including ranges of names without an account, which libsubid
    omits and which must not be added again.
    """
    path = request.sources.path(kind)
    return own_ranges(_whole(content), path, name, _uid_of(name), request.sources.reading)


def _refuse_unreadable(before: t.Mapping[str, bytes], request: AssignRequest) -> None:
    """Refuse files that shadow would not read even after the change."""
    for kind in KINDS:
        path = request.sources.path(kind)
        reason = why_not_read(path, _whole(before[kind]), request.sources.reading)
        if reason:
            raise NamespaceError(
                path,
                f"{reason}, so newuidmap and newgidmap ignore the whole file",
                "Make it a regular file of lines NAME:START:COUNT.",
                file=path,
            )


def _warnings(plan: _Plan) -> t.List[str]:
    """Warnings about existing ranges of these users."""
    found = []
    for kind in KINDS:
        path = plan.request.sources.path(kind)
        for name in plan.names:
            uid = _uid_of(name)
            content = _whole(plan.after[kind])
            for number, text in unread(content, name, uid, plan.request.sources.reading):
                found.append(
                    f"{path} line {number}, {text!r}, is ignored by newuidmap and newgidmap, and "
                    f"assigns nothing to {name}"
                )
            own = plan.own(name, kind)
            for number, one in enumerate(own):
                if any(_overlap(one, other) for other in own[:number]):
                    found.append(f"{path}: ranges of {name} overlap each other at {_words(one)}")
            found += _shared(name, uid, kind, plan)
    return list(dict.fromkeys(found))


def _shared(name: str, uid: t.Optional[int], kind: str, plan: _Plan) -> t.Iterator[str]:
    path = plan.request.sources.path(kind)
    own = plan.own(name, kind)
    for line in claims(plan.after[kind]):
        if line.owner in (name, str(uid)) or (uid is not None and _uid_of(line.owner) == uid):
            continue
        other = SubIDRange(line.start, line.size)
        for item in own:
            if _overlap(item, other):
                yield (
                    f"{path}: {name} ({_words(item)}) and {line.owner} ({_words(other)}) share "
                    "subordinate IDs, so the containers of each can reach the files of the other's. "
                    f"Assign another range to one of them, and run `podman system migrate` as that user"
                )
    source = plan.request.sources.passwd if kind == "uid" else plan.request.group
    for account in plan.accounts[kind]:
        for item in own:
            if account.start != uid and _overlap(item, account):
                yield (
                    f"{path}: the range {_words(item)} of {name} holds the {kind.upper()} "
                    f"{account.start} of an account in {source}"
                )


def _overlap(sub_idrange: SubIDRange, other: SubIDRange) -> bool:
    return (
        sub_idrange.start < other.start + other.size
        and other.start < sub_idrange.start + sub_idrange.size
    )


def _words(sub_idrange: SubIDRange) -> str:
    return f"{sub_idrange.start}-{sub_idrange.start + sub_idrange.size - 1}"


def _elsewhere(request: AssignRequest) -> t.Dict[str, t.Any]:
    """Users with IDs in a directory service, which are counted, but never written."""
    service = nss_service(request.sources.nsswitch)
    users = []
    for name in dict.fromkeys(request.users):
        found = {kind: ranges_of(name, None, kind, sources=request.sources) for kind in KINDS}
        for kind, ranges in found.items():
            have = sum(item.size for item in ranges)
            if have < request.count:
                raise NamespaceError(
                    f"user {name}",
                    f"has {have} subordinate {kind.upper()}s in the NSS service {service}, "
                    f"but {request.count} are required",
                    "Assign more in the directory service.",
                    user=name,
                )
        users.append({"name": name, "added": False, **{k: _as_result(v) for k, v in found.items()}})
    return {"changed": False, "users": users, "source": service, "warnings": [], "diff": []}


def _result(plan: _Plan) -> t.Dict[str, t.Any]:
    """The module's result."""
    changed_users = {item.owner for item in plan.added}
    paths = {kind: plan.request.sources.path(kind) for kind in plan.changed}
    return {
        "changed": bool(plan.changed),
        "users": [
            {
                "name": name,
                "added": name in changed_users,
                **{kind: _as_result(plan.own(name, kind)) for kind in KINDS},
            }
            for name in plan.names
        ],
        "source": "files",
        "warnings": _warnings(plan),
        "diff": [
            {
                "before_header": path,
                "after_header": path,
                "before": plan.before[kind].decode(errors="replace"),
                "after": plan.after[kind].decode(errors="replace"),
            }
            for kind, path in paths.items()
        ],
    }


def _as_result(ranges: t.Iterable[SubIDRange]) -> t.List[t.Dict[str, int]]:
    return [{"start": item.start, "count": item.size} for item in ranges]


def _read(path: str) -> bytes:
    with (
        translate_error_of_root_file(path),
        contextlib.suppress(FileNotFoundError),
        open(path, "rb") as stream,
    ):
        return stream.read()
    return b""


def _replace(path: str, before: bytes, after: bytes) -> None:
    """Write the file as shadow's tools do, with the old content as ``PATH-``."""
    fresh = f"{path}+"
    try:
        with translate_error_of_root_file(path):
            mode, owner, group = 0o644, 0, 0
            with contextlib.suppress(FileNotFoundError):
                info = os.stat(path)
                mode, owner, group = stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid
                _write(f"{path}-", before, mode, owner, group, path)
            _write(fresh, after, mode, owner, group, path)
            os.rename(fresh, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(fresh)
        raise


def _sync_folder(path: str) -> None:
    """Write the entry of a file in its folder to disk."""
    with translate_error_of_root_file(path):
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _write(path: str, content: bytes, mode: int, owner: int, group: int, model: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(content)
        os.fchmod(descriptor, mode)
        if os.geteuid() == 0:
            os.fchown(descriptor, owner, group)
        # Without SELinux there is no such attribute.
        with contextlib.suppress(OSError):
            os.setxattr(descriptor, _SELINUX, os.getxattr(model, _SELINUX))
        stream.flush()
        os.fsync(descriptor)


@contextlib.contextmanager
def _locked(path: str) -> t.Iterator[None]:
    """shadow's lock: ``PATH.lock``, a hard link to a file that holds the owner's PID."""
    lock, own = f"{path}.lock", f"{path}.{os.getpid()}"
    with translate_error_of_root_file(lock):
        try:
            with open(own, "w", encoding="ascii") as stream:
                stream.write(f"{os.getpid()}\0")
            _link(own, lock)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(own)
    try:
        yield
    finally:
        with translate_error_of_root_file(lock), contextlib.suppress(FileNotFoundError):
            os.unlink(lock)


def _link(own: str, lock: str) -> None:
    """Create the lock as a link to a file, as soon as no other program holds it.

    :raises LockTimeout: a program holds it for too long
    :raises OSError: it cannot be created
    """
    deadline = time.monotonic() + _LOCK_TIMEOUT
    while True:
        try:
            os.link(own, lock)
            return
        except FileExistsError:
            holder = _holder(lock)
        if holder is not None and not _alive(holder):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(lock)
        elif time.monotonic() > deadline:
            raise LockTimeout(
                lock,
                f"is held by process {holder or 'unknown'} for more than {_LOCK_TIMEOUT:.0f} s",
                "Wait until it finishes, or remove the file if no program edits users.",
            )
        else:
            time.sleep(0.1)


def _holder(lock: str) -> t.Optional[int]:
    with contextlib.suppress(FileNotFoundError, ValueError):
        return int(_read(lock).rstrip(b"\0\n") or b"x")
    return None


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
