# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Subordinate IDs: the host IDs that each user may map, from subuid(5), subgid(5) or NSS.

The files are read as newuidmap and newgidmap read them, see ``subid_file``. ``getsubids`` queries NSS (FreeIPA, LDAP)
if nsswitch.conf names a ``subid`` source other than files. It is also used for names without
an account, because newer versions of libsubid (shadow 4.20) have no ranges for those.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import re
import subprocess
import typing as t
from dataclasses import dataclass

from ..errors import MapError, NamespaceError
from ..printable import command
from . import subid_file
from .mapping import Mapping
from .ranges import ID_LIMIT, IDMap, IDRange

USUAL_COUNT = 65536
FIRST_PROPOSED = 100000
_NSS_TIMEOUT = 60.0
_LISTING_TIMEOUT = 10.0
# Larger files are not read (bytes).
_SIZE_LIMIT = 64 * 1024 * 1024
# The limits of useradd without settings in /etc/login.defs.
_USUAL_MIN, _USUAL_MAX = 100000, 600100000
# Lines that look like entries, whether shadow reads them or not.
_LOOKS_LIKE = re.compile(
    rb"\s*([^:\s][^:]*?)\s*:[^0-9:]*([0-9]+)[^0-9:]*:[^0-9:]*([0-9]+)(?:[^0-9].*)?", re.DOTALL
)
_DECIMAL = re.compile(r"[ \t\n\v\f\r]*\+?([0-9]+)")


class SubIDRange(t.NamedTuple):
    """``size`` host IDs from ``start`` on that a user may map."""

    start: int
    size: int


@dataclass(frozen=True)
class SubIDs:
    """A user's subordinate UIDs and GIDs, in the order of the source."""

    uid: t.Tuple[SubIDRange, ...] = ()
    gid: t.Tuple[SubIDRange, ...] = ()


@dataclass(frozen=True)
class Sources:
    """The files and programs that define which user has which IDs."""

    subuid: str = "/etc/subuid"
    subgid: str = "/etc/subgid"
    nsswitch: str = "/etc/nsswitch.conf"
    passwd: str = "/etc/passwd"
    # The program that queries libsubid; empty if only the files are used.
    getsubids: t.Tuple[str, ...] = ("getsubids",)
    login_defs: str = "/etc/login.defs"
    # The dialect of the files; None for that of this host's shadow.
    dialect: t.Optional[subid_file.Dialect] = None
    # The program that lists accounts of services other than files.
    getent: t.Tuple[str, ...] = ("getent",)

    @property
    def reading(self) -> subid_file.Dialect:
        """The dialect in which the files are read."""
        return self.dialect or subid_file.installed()

    def path(self, kind: str) -> str:
        """The file of a kind of ID, "uid" or "gid"."""
        return self.subuid if kind == "uid" else self.subgid


def subordinate_ids(
    name: str, uid: t.Optional[int], *, required: bool = True, sources: Sources = Sources()
) -> SubIDs:
    """The subordinate IDs of a user, from entries under the name or under the UID.

    :param uid: the user's host UID; None when there is no such user, only a name in the files
    :param required: whether it is an error to have none
    :raises NamespaceError: there are none (the message gives the line to add), an entry is
        malformed, or NSS does not answer
    """
    return SubIDs(
        ranges_of(name, uid, "uid", required=required, sources=sources),
        ranges_of(name, uid, "gid", required=required, sources=sources),
    )


def ranges_of(
    name: str,
    uid: t.Optional[int],
    kind: str,
    *,
    required: bool = True,
    sources: Sources = Sources(),
) -> t.Tuple[SubIDRange, ...]:
    """One kind ("uid" or "gid") of a user's subordinate IDs.

    :raises NamespaceError: as ``subordinate_ids``
    """
    service = nss_service(sources.nsswitch)
    path = sources.path(kind)
    if service:
        ranges = _ask_nss(name, kind, service, sources)
    else:
        ranges = own_ranges(read_file(path), path, name, uid, sources.reading)
        if ranges and uid is None and not _known_to_libsubid(name, kind, sources):
            if required:
                raise NamespaceError(
                    f"name {name}",
                    f"has ranges in {path}, but no account, and this host assigns ranges only to accounts",
                    f"Create the account: useradd --system --no-create-home --shell /usr/sbin/nologin {name}",
                    user=name,
                    file=path,
                )
            ranges = ()
    if not ranges and required:
        raise _nothing(name, uid, kind, service, sources)
    return ranges


def own_ranges(
    content: bytes, path: str, name: str, uid: t.Optional[int], dialect: subid_file.Dialect
) -> t.Tuple[SubIDRange, ...]:
    """A user's ranges in the content of a file, as shadow reads it; lines that shadow does not read are ignored.

    :param path: the file, for messages
    :raises NamespaceError: an entry of the user exceeds the last ID
    """
    found = []
    try:
        lines = subid_file.parse(content, dialect)
    except subid_file.NotRead:
        return ()
    for line in lines:
        if not line.size or not _is_of(line.owner, name, uid, dialect):
            continue
        if line.start + line.size > ID_LIMIT:
            raise NamespaceError(
                f"{path}: {line.owner}:{line.start}:{line.size}",
                f"exceeds the last ID, {ID_LIMIT - 1}",
                f"Correct the line, for example to {line.owner}:{FIRST_PROPOSED}:{USUAL_COUNT}.",
            )
        found.append(SubIDRange(line.start, line.size))
    return tuple(found)


def _is_of(owner: str, name: str, uid: t.Optional[int], dialect: subid_file.Dialect) -> bool:
    """Whether an entry of that owner belongs to a user."""
    if owner == name or (uid is not None and owner == str(uid)):
        return True
    if uid is None or not dialect.strict:
        return False
    # From 4.20 on, all names of the same account.
    number = _DECIMAL.fullmatch(owner)
    if number is not None:
        return int(number.group(1)) == uid
    try:
        return pwd.getpwnam(owner).pw_uid == uid
    except (KeyError, ValueError, UnicodeError):
        return False


def unread(
    content: bytes, name: str, uid: t.Optional[int], dialect: subid_file.Dialect
) -> t.List[t.Tuple[int, str]]:
    """Number and text of lines that look like entries of a user, but that shadow ignores."""
    found = []
    for number, raw in enumerate(content.split(b"\n"), 1):
        owner = raw.partition(b":")[0].strip().decode("utf-8", "surrogateescape")
        if owner in (name, str(uid)) and subid_file.parse_line(raw, dialect) is None:
            found.append((number, raw[:200].decode("utf-8", "backslashreplace")))
        elif owner == name and not raw.startswith(name.encode("utf-8", "surrogateescape") + b":"):
            # A blank beside the name is part of the name.
            found.append((number, raw[:200].decode("utf-8", "backslashreplace")))
    return found


def why_not_read(path: str, content: bytes, dialect: subid_file.Dialect) -> str:
    """The reason why shadow does not read a file at all; empty if it does."""
    if os.path.islink(path):
        return "is a symbolic link"
    try:
        subid_file.parse(content, dialect)
    except subid_file.NotRead as error:
        return str(error)
    return ""


def everybodys_ranges(kind: str, sources: Sources = Sources()) -> t.Tuple[SubIDRange, ...]:
    """One kind ("uid" or "gid") of the subordinate IDs of all users: all entries that any version of shadow reads in
    the file, and all lines that look like entries.

    :raises NamespaceError: the file cannot be read
    """
    return tuple(
        SubIDRange(start, size) for _owner, start, size in claims(read_file(sources.path(kind)))
    )


def claims(content: bytes) -> t.List[subid_file.Line]:
    """As :func:`everybodys_ranges`, for the content of a file, with the owners as written. The ranges are cut off at
    the last ID.
    """
    found: t.Dict[subid_file.Line, None] = {}
    pieces = dict.fromkeys(re.split(rb"[\n\0]", content))
    for dialect in subid_file.DIALECTS:
        with contextlib.suppress(subid_file.NotRead):
            found.update(dict.fromkeys(subid_file.parse(content, dialect)))
        for raw in pieces:
            line = subid_file.parse_line(raw, dialect)
            if line is not None:
                found[line] = None
    for raw in pieces:
        match = _LOOKS_LIKE.fullmatch(raw)
        if match is not None and not match.group(1).startswith(b"#"):
            owner, start, size = match.groups()
            if len(start) < 20 and len(size) < 20:
                name = owner.decode("utf-8", "surrogateescape")
                found[subid_file.Line(name, int(start), int(size))] = None
    return [
        subid_file.Line(line.owner, line.start, min(line.size, ID_LIMIT - line.start))
        for line in found
        if line.size and line.start < ID_LIMIT
    ]


def namespace_mapping(uid: int, gid: int, subids: SubIDs) -> Mapping:
    """The map of a rootless runtime's namespace: intermediate ID to host ID.

    Intermediate ID 0 is the user. The subordinate ranges follow in order of their start, each
    as an entry of its own, as podman passes them to newuidmap.

    :param uid: the user's host UID
    :param gid: the user's primary host GID
    :raises NamespaceError: ranges overlap each other or the user's own ID
    """
    maps = []
    for kind, own, ranges in (("uid", uid, subids.uid), ("gid", gid, subids.gid)):
        entries = [IDRange(0, own, 1)]
        position = 1
        for start, size in sorted(ranges):
            entries.append(IDRange(position, start, size))
            position += size
        result = IDMap(tuple(entries))
        try:
            result.validate()
        except MapError as error:
            raise NamespaceError(
                f"sub{kind} ranges of {kind} {own}",
                f"cannot be mapped: {error.subject} {error.cause}",
                f"Correct the user's lines in {Sources().path(kind)}.",
            ) from error
        maps.append(result)
    return Mapping(*maps)


def propose(name: str, sources: Sources = Sources()) -> SubIDRange:
    """A range of the usual size that does not overlap an entry of either file or a local account."""
    taken = [
        everybodys_range
        for kind in ("uid", "gid")
        for everybodys_range in everybodys_ranges(kind, sources)
    ]
    taken += accounts(sources.passwd, (2, 3))
    taken += nss_accounts("passwd", (2, 3), sources) + nss_accounts("group", (2,), sources)
    try:
        return free_range(taken, USUAL_COUNT, *bounds(("uid", "gid"), sources))
    except NamespaceError:
        return free_range(taken, USUAL_COUNT)


def free_range(
    taken: t.Iterable[SubIDRange], count: int, first: int = FIRST_PROPOSED, last: int = ID_LIMIT - 1
) -> SubIDRange:
    """The first free range of this size, from ``first`` on in multiples of 65536.

    :param last: the last ID that it may contain
    :raises NamespaceError: there is none
    """
    start = first
    for begin, size in sorted(taken):
        if begin >= start + count:
            break
        if begin + size > start:
            # Multiples keep the lines readable.
            start += -(-(begin + size - start) // USUAL_COUNT) * USUAL_COUNT
    if start + count - 1 > last:
        raise NamespaceError(
            f"{count} subordinate IDs",
            f"no free range of this size is left between {first} and {last}",
            "Remove ranges of deleted users from /etc/subuid and /etc/subgid, or raise SUB_UID_MAX and "
            "SUB_GID_MAX in /etc/login.defs.",
        )
    return SubIDRange(start, count)


def bounds(kinds: t.Iterable[str], sources: Sources = Sources()) -> t.Tuple[int, int]:
    """The first and the last subordinate ID that useradd assigns for these kinds ("uid", "gid"), by
    SUB_UID_MIN, SUB_UID_MAX, SUB_GID_MIN and SUB_GID_MAX of login.defs(5).
    """
    given: t.Dict[str, int] = {}
    for line in _lines(sources.login_defs):
        fields = line.replace('"', " ").split()
        if len(fields) > 1:
            value = subid_file.number(fields[1].encode("utf-8", "replace"), subid_file.SHADOW_4_17)
            if value is not None and value < ID_LIMIT:
                given[fields[0]] = value
    names = [f"SUB_{kind.upper()}_" for kind in kinds]
    return (
        max(given.get(f"{name}MIN", _USUAL_MIN) for name in names),
        min(given.get(f"{name}MAX", _USUAL_MAX) for name in names),
    )


def accounts(path: str, columns: t.Sequence[int]) -> t.List[SubIDRange]:
    """The IDs in columns of passwd(5) or group(5), each as a range of size 1."""
    return _numbers(_lines(path), columns)


def nss_accounts(
    database: str, columns: t.Sequence[int], sources: Sources = Sources()
) -> t.List[SubIDRange]:
    """As :func:`accounts`, from NSS if accounts are not only in files.

    Many services list no accounts, such as sssd without ``enumerate``. After a timeout, the list is incomplete.

    :param database: ``passwd`` or ``group``
    """
    if not _other_services(sources.nsswitch, database):
        return []
    listed: t.Any = b""
    try:
        listed = subprocess.run(
            [*sources.getent, database],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_LISTING_TIMEOUT,
            check=False,
        ).stdout
    except subprocess.TimeoutExpired as error:
        listed = error.stdout
    except OSError:
        pass
    return _numbers((listed or b"").decode("utf-8", "surrogateescape").split("\n"), columns)


def _other_services(path: str, database: str) -> bool:
    """Whether nsswitch.conf(5) names other services than files for a database."""
    for line in _lines(path):
        name, colon, services = line.partition("#")[0].partition(":")
        if colon and name.strip() == database:
            return bool(set(services.split()) - {"files", "compat"})
    return False


def _numbers(lines: t.Iterable[str], columns: t.Sequence[int]) -> t.List[SubIDRange]:
    found = []
    for line in lines:
        fields = line.split(":")
        for column in columns:
            number = _DECIMAL.fullmatch(fields[column]) if column < len(fields) else None
            if number is not None:
                found.append(SubIDRange(int(number.group(1)), 1))
    return found


def nss_service(path: str) -> str:
    """The NSS service with the subordinate IDs; empty if they are in the files."""
    for line in _lines(path):
        database, colon, services = line.partition(":")
        if colon and database.strip() == "subid":
            names = services.split()
            if names and names[0] != "files":
                return names[0]
    return ""


def read_file(path: str) -> bytes:
    """The content of a file; empty if it does not exist.

    :raises NamespaceError: it cannot be read
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as stream:
            content = stream.read(_SIZE_LIMIT + 1)
        if len(content) > _SIZE_LIMIT:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise NamespaceError(
            path, f"cannot be read: {error.strerror}", "Make it readable for everyone."
        ) from error
    return content


def _lines(path: str) -> t.List[str]:
    return read_file(path).decode("utf-8", "surrogateescape").split("\n")


def _ask_nss(name: str, kind: str, service: str, sources: Sources) -> t.Tuple[SubIDRange, ...]:
    subject = f"subordinate {kind.upper()}s of {name}"
    try:
        answer = _getsubids(name, kind, sources)
    except FileNotFoundError as error:
        raise NamespaceError(
            subject,
            f"are provided by the NSS service {service}, but getsubids, which queries it, is not installed",
            "Install the package uidmap (Debian, Ubuntu) or shadow-utils-subid (Fedora, RHEL).",
        ) from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NamespaceError(
            subject,
            f"could not be queried from the NSS service {service}: {error}",
            f"Try: getsubids {'' if kind == 'uid' else '-g '}{name}",
        ) from error
    ranges = []
    for line in answer.splitlines():
        # "0: alice 100000 65536"
        fields = line.split()
        if len(fields) >= 3 and fields[-1].isdigit() and fields[-2].isdigit():
            ranges.append(SubIDRange(int(fields[-2]), int(fields[-1])))
    return tuple(entry for entry in ranges if entry.size)


def _known_to_libsubid(name: str, kind: str, sources: Sources) -> bool:
    """Whether libsubid knows a name; without libsubid, the files are used."""
    if not sources.getsubids:
        return True
    try:
        return bool(_getsubids(name, kind, sources).strip())
    except (OSError, subprocess.TimeoutExpired):
        return True


def _getsubids(name: str, kind: str, sources: Sources) -> str:
    option = () if kind == "uid" else ("-g",)
    return subprocess.run(
        [*sources.getsubids, *option, name],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=_NSS_TIMEOUT,
        check=False,
        encoding="utf-8",
        errors="replace",
    ).stdout


def _nothing(
    name: str, uid: t.Optional[int], kind: str, service: str, sources: Sources
) -> NamespaceError:
    subject = f"user {name}"
    if service:
        return NamespaceError(
            subject,
            f"has no subordinate {kind.upper()}s in the NSS service {service}",
            f"Assign some in the directory service, for example: ipa subid-generate --owner={name}",
            user=name,
        )
    path = sources.path(kind)
    start, size = propose(name, sources)
    line = f"{name}:{start}:{size}"
    facts = {"user": name, "file": path, "line": line}
    content, dialect = read_file(path), sources.reading
    reason = why_not_read(path, content, dialect)
    if reason:
        return NamespaceError(
            subject,
            f"has no subordinate {kind.upper()}s: newuidmap and newgidmap ignore {path} because it {reason}",
            f"Correct the file: {path} must be a regular file of lines, each with its newline.",
            **facts,
        )
    passed_over = unread(content, name, uid, dialect)
    if passed_over:
        number, text = passed_over[0]
        return NamespaceError(
            subject,
            f"has no subordinate {kind.upper()}s in {path}: newuidmap and newgidmap do not read "
            f"line {number}, {text!r}",
            f"Correct it to NAME:START:COUNT without blanks, for example to {line}.",
            **facts,
        )
    # usermod requires an account. The last line of the file may lack its newline.
    form = r"%s\n" if not content or content.endswith(b"\n") else r"\n%s\n"
    run = (
        f"{command('printf', form, line)} >>{command(path)}"
        if uid is None
        else command("usermod", f"--add-sub{kind}s", f"{start}-{start + size - 1}", name)
    )
    return NamespaceError(
        subject,
        f"has no subordinate {kind.upper()}s in {path}",
        f"Add the line {line} to {path}, for example: {run}",
        **facts,
    )
