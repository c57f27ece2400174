# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This module util is PRIVATE to the userns.storage collection.
"""Subordinate IDs: who may use which host IDs, from subuid(5), subgid(5) or NSS.

The files are what newuidmap and containers/storage read. NSS (FreeIPA, LDAP) is asked through
``getsubids``, where nsswitch.conf names a ``subid`` source other than files; and for names without
an account, since newer versions of libsubid (shadow 4.20) know no ranges for those.
"""

from __future__ import annotations

import subprocess
import typing as t
from dataclasses import dataclass

from ..errors import MapError, NamespaceError
from .mapping import Mapping
from .ranges import ID_LIMIT, IDMap, IDRange

USUAL_COUNT = 65536
FIRST_PROPOSED = 100000
_NSS_TIMEOUT = 60.0


class SubIDRange(t.NamedTuple):
    """``size`` host IDs from ``start`` on that a user may map."""

    start: int
    size: int


@dataclass(frozen=True)
class SubIDs:
    """A user's subordinate UIDs and GIDs, in the order of their source."""

    uid: tuple[SubIDRange, ...] = ()
    gid: tuple[SubIDRange, ...] = ()


@dataclass(frozen=True)
class Sources:
    """What says who has which IDs."""

    subuid: str = "/etc/subuid"
    subgid: str = "/etc/subgid"
    nsswitch: str = "/etc/nsswitch.conf"
    passwd: str = "/etc/passwd"
    # The program that asks libsubid; empty where only the files count.
    getsubids: tuple[str, ...] = ("getsubids",)

    def path(self, kind: str) -> str:
        """The file of a kind of ID, "uid" or "gid"."""
        return self.subuid if kind == "uid" else self.subgid


def subordinate_ids(
    name: str, uid: int | None, required: bool = True, sources: Sources = Sources()
) -> SubIDs:
    """The subordinate IDs of a user, from entries under the name or under the UID.

    :param uid: the user's host UID; None when there is no such user, only a name in the files
    :param required: whether having none is an error
    :raises NamespaceError: there are none (the message gives the line to add), an entry is
        malformed, or NSS does not answer
    """
    return SubIDs(
        ranges_of(name, uid, "uid", required, sources),
        ranges_of(name, uid, "gid", required, sources),
    )


def ranges_of(
    name: str,
    uid: int | None,
    kind: str,
    required: bool = True,
    sources: Sources = Sources(),
) -> tuple[SubIDRange, ...]:
    """One kind ("uid" or "gid") of a user's subordinate IDs.

    :raises NamespaceError: as ``subordinate_ids``
    """
    service = nss_service(sources.nsswitch)
    path = sources.path(kind)
    if service:
        ranges = _ask_nss(name, kind, service, sources)
    else:
        ranges = tuple(
            entry for owner, entry in _entries(path, {name, str(uid)}) if owner in (name, str(uid))
        )
        if ranges and uid is None and not _known_to_libsubid(name, kind, sources):
            if required:
                raise NamespaceError(
                    f"name {name}",
                    f"has ranges in {path}, but no account, and this host gives ranges to "
                    "accounts only",
                    f"Make one: useradd --system --no-create-home --shell /usr/sbin/nologin {name}",
                    user=name,
                    file=path,
                )
            ranges = ()
    if not ranges and required:
        raise _nothing(name, kind, service, sources)
    return ranges


def everybodys_ranges(kind: str, sources: Sources = Sources()) -> tuple[SubIDRange, ...]:
    """One kind ("uid" or "gid") of the subordinate IDs of all users, as far as the files tell.

    :raises NamespaceError: the file cannot be read
    """
    return tuple(entry for _owner, entry in _entries(sources.path(kind), ()))


def namespace_mapping(uid: int, gid: int, subids: SubIDs) -> Mapping:
    """The map of a rootless runtime's namespace: intermediate ID to host ID.

    Intermediate 0 is the user, then follow the subordinate ranges in order of their start, each
    an entry of its own, as podman hands them to newuidmap.

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
    """A range of the usual size that no entry of either file and no local account touches."""
    taken: list[SubIDRange] = []
    for path in (sources.subuid, sources.subgid):
        taken.extend(entry for _owner, entry in _entries(path, {name}, lenient=True))
    for line in _lines(sources.passwd):
        fields = line.split(":")
        for number in fields[2:4]:
            if number.isdigit():
                taken.append(SubIDRange(int(number), 1))
    start = FIRST_PROPOSED
    for begin, size in sorted(taken):
        if begin >= start + USUAL_COUNT:
            break
        if begin + size > start:
            # Whole multiples, so that the lines stay easy to read.
            steps = -(-(begin + size - start) // USUAL_COUNT)
            start += steps * USUAL_COUNT
    return SubIDRange(start, USUAL_COUNT)


def nss_service(path: str) -> str:
    """The NSS service that holds subordinate IDs, empty when the files do."""
    for line in _lines(path):
        database, colon, services = line.partition(":")
        if colon and database.strip() == "subid":
            names = services.split()
            if names and names[0] != "files":
                return names[0]
    return ""


def _entries(
    path: str, strict_for: t.Collection[str], lenient: bool = False
) -> t.Iterator[tuple[str, SubIDRange]]:
    """Each entry with its owner; strangers' malformed lines are no concern of this user."""
    for number, line in enumerate(_lines(path), 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        fields = text.split(":")
        owner = fields[0]
        if len(fields) == 3 and fields[1].isdigit() and fields[2].isdigit():
            entry = SubIDRange(int(fields[1]), int(fields[2]))
            if entry.start + entry.size <= ID_LIMIT:
                if entry.size:
                    yield owner, entry
                continue
        if owner in strict_for and not lenient:
            raise NamespaceError(
                f"{path} line {number}",
                f"{text!r} is not NAME:START:COUNT with IDs up to {ID_LIMIT - 1}",
                f"Correct it, for example to {owner}:{FIRST_PROPOSED}:{USUAL_COUNT}.",
            )


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as stream:
            return stream.read().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise NamespaceError(
            path, f"cannot be read: {error.strerror}", "Make it readable for everyone."
        ) from error


def _ask_nss(name: str, kind: str, service: str, sources: Sources) -> tuple[SubIDRange, ...]:
    subject = f"subordinate {kind.upper()}s of {name}"
    try:
        answer = _getsubids(name, kind, sources)
    except FileNotFoundError as error:
        raise NamespaceError(
            subject,
            f"are kept by the NSS service {service}, and getsubids is not installed to ask it",
            "Install the package uidmap (Debian, Ubuntu) or shadow-utils-subid (Fedora, RHEL).",
        ) from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NamespaceError(
            subject,
            f"could not be asked of the NSS service {service}: {error}",
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
    """Whether libsubid answers for a name; where it cannot be asked the files are believed."""
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


def _nothing(name: str, kind: str, service: str, sources: Sources) -> NamespaceError:
    subject = f"user {name}"
    if service:
        return NamespaceError(
            subject,
            f"has no subordinate {kind.upper()}s in the NSS service {service}",
            f"Let the directory give some, for example: ipa subid-generate --owner={name}",
            user=name,
        )
    path = sources.path(kind)
    start, size = propose(name, sources)
    line = f"{name}:{start}:{size}"
    return NamespaceError(
        subject,
        f"has no subordinate {kind.upper()}s in {path}",
        f"Add the line {line} to {path}, or run: "
        f"usermod --add-sub{kind}s {start}-{start + size - 1} {name}",
        user=name,
        file=path,
        line=line,
    )
