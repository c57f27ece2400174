# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""One ID map: an ordered list of ranges as in records and in the kernel, with operations on it.

Order and splitting of the ranges are part of the value, because runtimes compare maps literally.
``normal()`` and ``same_meaning()`` compare what maps do.
"""

from __future__ import annotations

import re
import typing as t
from dataclasses import dataclass

from ..errors import MapError, RecordError

# The kernel's (uid_t) -1 means "leave alone" and is never an ID.
ID_LIMIT = 2**32 - 1

_ITEM = re.compile(r"([0-9]+):([0-9]+):([0-9]+)")
_ITEM_HELP = "Write each entry as CONTAINER_ID:HOST_ID:COUNT, for example 0:100000:65536."


class IDRange(t.NamedTuple):
    """``size`` consecutive IDs: those from ``container_id`` on are stored as those from ``host_id`` on."""

    container_id: int
    host_id: int
    size: int

    def __str__(self) -> str:
        return f"{self.container_id}:{self.host_id}:{self.size}"


def _touching(spans: t.Iterable[t.Tuple[int, int]]) -> bool:
    """Whether each of the (start, size) spans begins where the previous one ends."""
    end: t.Optional[int] = None
    for start, size in spans:
        if end is not None and start != end:
            return False
        end = start + size
    return True


def overlapping(ranges: t.Iterable[IDRange]) -> t.Optional[t.Tuple[IDRange, IDRange, str]]:
    """The first two ranges that share an ID, and on which side ("container" or "host")."""
    filled = [entry for entry in ranges if entry.size]
    for index, side in ((0, "container"), (1, "host")):
        ordered = sorted(filled, key=lambda entry: (entry[index], entry))
        for before, after in zip(ordered, ordered[1:]):
            if before[index] + before.size > after[index]:
                return before, after, side
    return None


@dataclass(frozen=True)
class IDMap:
    """An ordered ID map. A map without ranges is the identity: every ID is stored unchanged."""

    ranges: t.Tuple[IDRange, ...] = ()

    # Creating and formatting

    @classmethod
    def of(cls, *ranges: t.Tuple[int, int, int]) -> IDMap:
        """A map of (container ID, host ID, size) triples, unchecked."""
        return cls(tuple(IDRange(*entry) for entry in ranges))

    @classmethod
    def parse(cls, items: t.Iterable[str]) -> IDMap:
        """Read plain ``C:H:N`` strings, keeping their order.

        :raises MapError: an item is malformed, empty, too large or overlaps another item
        """
        ranges = []
        for item in items:
            match = _ITEM.fullmatch(item.strip())
            if match is None:
                raise MapError(
                    f"map entry {item!r}", "is not CONTAINER_ID:HOST_ID:COUNT", _ITEM_HELP
                )
            ranges.append(IDRange(*(int(number) for number in match.groups())))
        result = cls(tuple(ranges))
        result.validate()
        return result

    def validate(self) -> None:
        """Check that the kernel would accept this map.

        :raises MapError: a range is empty, goes beyond 4294967294, or shares IDs with another range
        """
        for entry in self.ranges:
            if entry.size <= 0:
                raise MapError(
                    f"map entry {entry}",
                    "maps no ID, because its count is 0",
                    "Set a count of at least 1.",
                )
            if max(entry.container_id, entry.host_id) + entry.size > ID_LIMIT:
                raise MapError(
                    f"map entry {entry}",
                    f"exceeds the highest ID, {ID_LIMIT - 1}",
                    "Lower its start or its count.",
                )
        clash = overlapping(self.ranges)
        if clash is not None:
            before, after, side = clash
            raise MapError(
                f"map entries {before} and {after}",
                f"overlap in their {side} IDs",
                "Each ID can be mapped only once. Shorten or move an entry.",
            )

    @classmethod
    def from_record(cls, record: object, subject: str = "ID map") -> IDMap:
        """Read the ``uidmap`` or ``gidmap`` of a JSON record; absent (None) is the identity.

        Overlaps and empty ranges are kept, because records are compared literally.

        :param subject: the object of error messages
        :raises RecordError: the value is no list of three whole numbers under their names
        """
        if record is None:
            return cls()
        if not isinstance(record, list):
            raise RecordError(subject, f"is {type(record).__name__}, not a list of ranges")
        ranges = []
        for entry in record:
            if not isinstance(entry, dict):
                raise RecordError(subject, f"holds {entry!r}, which is not a range")
            numbers = []
            for key in ("container_id", "host_id", "size"):
                number = entry.get(key, 0)
                if isinstance(number, bool) or not isinstance(number, int) or number < 0:
                    raise RecordError(subject, f"has {key} {number!r}, not a whole number")
                numbers.append(number)
            ranges.append(IDRange(*numbers))
        return cls(tuple(ranges))

    def to_record(self) -> t.List[t.Dict[str, int]]:
        """The list for JSON records (omit the key if it is empty)."""
        return [entry._asdict() for entry in self.ranges]

    def to_strings(self) -> t.List[str]:
        """``C:H:N`` per range, as on podman's command line and in ``/proc/PID/uid_map``."""
        return [str(entry) for entry in self.ranges]

    def __str__(self) -> str:
        return ",".join(self.to_strings()) or "identity"

    # Queries

    def to_host(self, container_id: int) -> t.Optional[int]:
        """The host ID of a container ID; None if it is not mapped."""
        if not self.ranges:
            return container_id
        for start, host, size in self.ranges:
            if start <= container_id < start + size:
                return host + container_id - start
        return None

    def to_container(self, host_id: int) -> t.Optional[int]:
        """The container ID of a host ID; None if it is not mapped."""
        if not self.ranges:
            return host_id
        for start, host, size in self.ranges:
            if host <= host_id < host + size:
                return start + host_id - host
        return None

    def missing(self, ids: t.Iterable[int]) -> t.List[int]:
        """The unmapped IDs among these container IDs, sorted, without duplicates."""
        return sorted(identifier for identifier in set(ids) if self.to_host(identifier) is None)

    @property
    def contiguous(self) -> bool:
        """Whether the ranges are adjacent, both in host order and in container order.

        containers/storage shifts only such maps before its 1.59.
        """
        return self.contiguity()[0]

    def contiguity(self) -> t.Tuple[bool, IDMap]:
        """``contiguous``, and the list in the order in which the runtime's check leaves it.

        The check sorts by host ID first, and then by container ID if the ranges are adjacent. Sorting a
        sorted list determines the position of an empty range.
        """
        by_host = self.sorted_by_host()
        if not _touching((entry.host_id, entry.size) for entry in by_host.ranges):
            return False, by_host
        both = by_host.sorted_by_container()
        return _touching((entry.container_id, entry.size) for entry in both.ranges), both

    @property
    def root(self) -> t.Optional[int]:
        """The host ID of the container's root; None if it is not mapped.

        A single range of size 1 counts as root, regardless of its container ID (GetRootUIDGID).
        """
        if len(self.ranges) == 1 and self.ranges[0].size == 1:
            return self.ranges[0].host_id
        return self.to_host(0)

    @property
    def size(self) -> int:
        """The number of mapped IDs."""
        if not self.ranges:
            return ID_LIMIT
        return sum(entry.size for entry in self.ranges)

    def same_meaning(self, other: IDMap) -> bool:
        """Whether both map every ID to the same ID, in any notation."""
        return self.meaning == other.meaning

    @property
    def meaning(self) -> t.Tuple[IDRange, ...]:
        """A value that is equal for all maps of the same meaning."""
        return self._explicit().normal().ranges

    # Transformations

    def sorted_by_host(self) -> IDMap:
        """The same ranges in host ID order."""
        return IDMap(tuple(sorted(self.ranges, key=lambda entry: entry.host_id)))

    def sorted_by_container(self) -> IDMap:
        """The same ranges in container ID order."""
        return IDMap(tuple(sorted(self.ranges, key=lambda entry: entry.container_id)))

    def normal(self) -> IDMap:
        """The normal form of this map: container order, adjacent ranges merged, no empty ranges.

        A map of empty ranges becomes ``NOTHING``, because a map without ranges is the identity.
        """
        merged: t.List[IDRange] = []
        for entry in sorted(self.ranges):
            if not entry.size:
                continue
            if merged:
                last = merged[-1]
                if (
                    last.container_id + last.size == entry.container_id
                    and last.host_id + last.size == entry.host_id
                ):
                    merged[-1] = last._replace(size=last.size + entry.size)
                    continue
            merged.append(entry)
        if self.ranges and not merged:
            return NOTHING
        return IDMap(tuple(merged))

    def invert(self) -> IDMap:
        """The map from host IDs to container IDs, ranges in the same order."""
        return IDMap(
            tuple(IDRange(entry.host_id, entry.container_id, entry.size) for entry in self.ranges)
        )

    def compose(self, inner: IDMap) -> IDMap:
        """The composition: ``inner`` first, then this map; in normal form unless either is the identity.

        With a user namespace's own map as ``self`` and a container's map in that namespace as
        ``inner`` the result maps the container's IDs to those of the host. IDs that either
        map lacks are dropped.
        """
        if not self.ranges:
            return inner
        if not inner.ranges:
            return self
        pieces = []
        for container_id, middle, size in inner.ranges:
            for start, host, count in self.ranges:
                low = max(middle, start)
                high = min(middle + size, start + count)
                if low < high:
                    pieces.append(
                        IDRange(container_id + low - middle, host + low - start, high - low)
                    )
        return IDMap(tuple(pieces)).normal() if pieces else NOTHING

    def _explicit(self) -> IDMap:
        return self if self.ranges else EVERYTHING


IDENTITY = IDMap()
NOTHING = IDMap((IDRange(0, 0, 0),))
EVERYTHING = IDMap((IDRange(0, 0, ID_LIMIT),))
