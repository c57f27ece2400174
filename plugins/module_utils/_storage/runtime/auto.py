# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Predict the map of ``userns=auto``: its size and the free IDs that it uses, by version.

Pure functions; the caller reads the image, the records and the configuration.
"""

from __future__ import annotations

import typing as t
from dataclasses import dataclass

from ..capabilities import Capabilities
from ..errors import MapError
from ..idmap.mapping import OVERFLOW_ID, UNMAPPED, Mapping
from ..idmap.ranges import IDMap, IDRange
from ..idmap.subids import SubIDs
from ..store.config import AutoUserns
from .detect import Runtime

Span = t.Tuple[int, int]

_CRIO_SIZE = 65536
_INT64_MAX = 2**63 - 1


@dataclass(frozen=True)
class ImageIDs:
    """The inputs for the size of an automatic namespace.

    :param highest: the highest ID in the ``uidset`` and ``gidset`` of the image's top layer and
        all layers below it, -1 if these are empty
    :param passwd: text of the image's /etc/passwd; None if it has none
    :param group: text of its /etc/group
    :param started_group: text of ``etc/group`` in the working directory of the runtime;
        that of the host for "/", as for systemd services. Old versions read it instead.
    """

    highest: int = -1
    passwd: t.Optional[str] = None
    group: t.Optional[str] = None
    started_group: t.Optional[str] = None


def image_ids(
    id_sets: t.Iterable[t.Iterable[int]],
    read_file: t.Callable[[str], t.Optional[str]],
    started_group: t.Optional[str] = None,
) -> ImageIDs:
    """Collect them from an image.

    :param id_sets: each layer's ``uidset`` and ``gidset``
    :param read_file: returns the text of a file in the merged image ("etc/passwd"), or None
    """
    highest = max((identifier for ids in id_sets for identifier in ids), default=-1)
    return ImageIDs(highest, read_file("etc/passwd"), read_file("etc/group"), started_group)


def namespace_size(
    runtime: Runtime,
    limits: AutoUserns,
    image: ImageIDs,
    size: t.Optional[int] = None,
    user: str = "",
) -> int:
    """The number of IDs in the namespace.

    :param size: auto's ``size=``, which is used unchanged
    :param user: ``--user`` of the container, or USER of the image ("1000", "app:50"); podman
        includes its numbers in the size
    :raises MapError: the image needs more than the configuration allows
    """
    if size:
        return size
    if runtime.name == "cri-o":
        # The default only applies without size; 0 is passed on, and the pod's own image needs nothing more.
        return _CRIO_SIZE if size is None else limits.minimum
    result = limits.minimum
    if runtime.name == "podman":
        result = max(result, *(number + 1 for number in _numbers(user)), 1)
    result = max(result, 1, image.highest + 1, accounts_size(runtime.capabilities, image))
    if limits.maximum and result > limits.maximum:
        raise MapError(
            "userns auto",
            f"the image needs {result} IDs, more than auto-userns-max-size {limits.maximum} allows",
            f"Raise auto-userns-max-size in storage.conf, or use auto:size={result}.",
        )
    return result


def accounts_size(can: Capabilities, image: ImageIDs) -> int:
    """The size that an image's accounts need, as the runtime counts it.

    Up to 1.55 the size is the highest ID itself, which excludes that ID, and the group file is
    searched below the working directory; before 1.46, ID 65534 counts unless its name is nobody.
    """
    if can.counts_accounts_exactly:
        size = 0
        for name, ids in _accounts(image.passwd, (2, 3)) + _accounts(image.group, (2,)):
            if name in ("nobody", "nogroup"):
                continue
            for number in ids:
                # Compared with the size, not with the highest ID: an ID that equals the size is lost.
                if number > size and number != OVERFLOW_ID:
                    size = number + 1
        return size
    size = 0
    for name, ids in _accounts(image.passwd, (2, 3)) + _accounts(image.started_group, (2,)):
        if name == "nobody":
            continue
        for number in ids:
            if number > size and not (can.ignores_overflow_accounts and number == OVERFLOW_ID):
                size = number
    return size


def available_ids(rootless: bool, subids: SubIDs) -> t.Tuple[t.List[Span], t.List[Span]]:
    """(start, end) spans of the UIDs and of the GIDs that are available to containers.

    :param subids: those of the rootless user, or of ``AutoUserns.owner`` for root
    """
    result = []
    for ranges in (subids.uid, subids.gid):
        if rootless:
            # Intermediate IDs; 0 is the user itself.
            result.append([(1, sum(item.size for item in ranges) + 1)])
        else:
            result.append(_union((item.start, item.start + item.size) for item in ranges))
    return result[0], result[1]


def allocate(
    size: int,
    available: t.Tuple[t.Sequence[Span], t.Sequence[Span]],
    used: t.Iterable[Mapping],
    extra: Mapping = UNMAPPED,
) -> Mapping:
    """The map of the next automatic container: the lowest free IDs, concatenated.

    :param size: from ``namespace_size``
    :param used: mappings of every container record in the store, running or not
    :param extra: auto's ``uidmapping=`` and ``gidmapping=``; they are the last entries of the map
    :raises MapError: too few IDs are free
    """
    taken = list(used)
    maps = []
    for kind, spans, held, more in (
        ("UID", available[0], [item.uid for item in taken], extra.uid),
        ("GID", available[1], [item.gid for item in taken], extra.gid),
    ):
        busy = [
            (entry.host_id, entry.host_id + entry.size) for item in held for entry in item.ranges
        ]
        busy += [(entry.host_id, entry.host_id + entry.size) for entry in more.ranges]
        inside = _without(
            [(0, size)],
            [(entry.container_id, entry.container_id + entry.size) for entry in more.ranges],
        )
        free = _without(_union(spans), busy)
        needed = _count(inside)
        if _count(free) < needed:
            total = _count(_union(spans))
            advice = [
                "Use smaller namespaces (auto:size=N), remove containers that are no longer needed"
            ]
            if any(entry.size >= total > 0 for item in held for entry in item.ranges):
                advice.append(
                    "set a size for the containers with keep-id, because each of them reserves all IDs without it "
                    "(keep-id:size=N, podman 5.4 or later)"
                )
            advice.append(f"or add a range to /etc/sub{kind.lower()}.")
            raise MapError(
                "userns auto",
                f"needs {needed} free {kind}s, but the store has only {_count(free)} left of {total}",
                ", ".join(advice),
                wanted=needed,
                free=_count(free),
            )
        maps.append(IDMap((*_zip(inside, free), *more.ranges)))
    return Mapping(*maps)


def slots(
    count: int,
    size: int,
    available: t.Tuple[t.Sequence[Span], t.Sequence[Span]],
    used: t.Iterable[Mapping],
    held: t.Iterable[Mapping] = (),
    extra: Mapping = UNMAPPED,
) -> t.List[Mapping]:
    """The maps of the first ``count`` simultaneous containers of an image.

    Existing containers of the image with a map of this size occupy slots,
    so that the result does not change when they are created and removed.

    :param used: mappings of every container record in the store, including ``held``
    :param held: mappings of the containers of this image
    :raises MapError: too few IDs are free
    """
    taken = list(used)
    result: t.List[Mapping] = []
    for item in held:
        alike = (
            item.uid.size == size and item.gid.size == size and item.uid.ranges and item.gid.ranges
        )
        if alike and item not in result and _from(item, available):
            result.append(item)
    while len(result) < count:
        try:
            mapping = allocate(size, available, taken, extra)
        except MapError as error:
            if count == 1:
                raise
            raise MapError(
                "userns auto",
                f"{count} slots of {size} IDs each exceed the free IDs, only {len(result)} are possible: {error.cause}",
                f"{_fewer(len(result))}{error.hint[0].lower()}{error.hint[1:]}",
                **error.facts,
            ) from error
        taken.append(mapping)
        result.append(mapping)
    return result[:count]


def _fewer(fit: int) -> str:
    return f"Set slots to {fit}, " if fit else ""


def _from(mapping: Mapping, available: t.Tuple[t.Sequence[Span], t.Sequence[Span]]) -> bool:
    """Whether a map starts with IDs that are available to automatic namespaces."""
    return all(
        any(low <= idmap.ranges[0].host_id < high for low, high in spans)
        for idmap, spans in zip((mapping.uid, mapping.gid), available)
    )


def _numbers(user: str) -> t.List[int]:
    numbers = (_whole(part) for part in user.split(":") if part.isascii() and part.isdigit())
    return [number for number in numbers if number < 2**32]


def _whole(digits: str) -> int:
    """A number of any length, limited to 64 bits, because Python refuses to convert thousands of digits."""
    significant = digits.lstrip("0") or "0"
    return min(int(significant), _INT64_MAX) if len(significant) < 20 else _INT64_MAX


def _accounts(
    text: t.Optional[str], fields: t.Tuple[int, ...]
) -> t.List[t.Tuple[str, t.List[int]]]:
    """Name and IDs of each line; invalid numbers count as 0, as in Go's parser."""
    result = []
    for line in (text or "").split("\n"):
        parts = line.strip().split(":")
        if parts != [""]:
            result.append(
                (parts[0], [_atoi(parts[field]) for field in fields if field < len(parts)])
            )
    return result


def _atoi(text: str) -> int:
    sign, digits = (-1, text[1:]) if text[:1] == "-" else (1, text[1:] if text[:1] == "+" else text)
    if not (digits.isascii() and digits.isdigit()):
        return 0
    return sign * _whole(digits)


def _union(spans: t.Iterable[Span]) -> t.List[Span]:
    """The sorted spans, with overlapping and adjacent spans merged."""
    result: t.List[Span] = []
    for low, high in sorted(spans):
        if low >= high:
            continue
        if result and low <= result[-1][1]:
            result[-1] = (result[-1][0], max(result[-1][1], high))
        else:
            result.append((low, high))
    return result


def _without(spans: t.Sequence[Span], holes: t.Iterable[Span]) -> t.List[Span]:
    """The rest of sorted, disjoint spans after the removal of others."""
    busy = _union(holes)
    result = []
    for low, high in spans:
        for start, end in busy:
            if end <= low or start >= high:
                continue
            if start > low:
                result.append((low, start))
            low = max(low, end)
        if low < high:
            result.append((low, high))
    return result


def _count(spans: t.Iterable[Span]) -> int:
    return sum(high - low for low, high in spans)


def _zip(inside: t.Sequence[Span], outside: t.Sequence[Span]) -> t.List[IDRange]:
    """Map container IDs to host IDs in order, split at the gaps of either."""
    result = []
    hosts = list(outside)
    for low, high in inside:
        while low < high:
            start, end = hosts[0]
            size = min(high - low, end - start)
            result.append(IDRange(low, start, size))
            low += size
            if start + size == end:
                hosts.pop(0)
            else:
                hosts[0] = (start + size, end)
    return result
