# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""podman's grammar for user namespaces: ``--userns``, ``--uidmap``, ``--subuidname`` and so on.

Parsing (``parse_request``) does not depend on a host. Resolving needs a ``UsernsContext``: the user,
the namespace, and the abilities of the runtime's version.
Rules: podman-run(1), and how podman 4.3 to 5.8 behave.
"""

from __future__ import annotations

import re
import typing as t
from dataclasses import dataclass, field

from ..errors import MapError
from .mapping import Mapping
from .ranges import EVERYTHING, ID_LIMIT, IDMap, IDRange
from .subids import SubIDRange

_FLAGS_AND_ID = re.compile(r"([+ug]*)([0-9]+)")
_HOST = re.compile(r"(@?)([0-9]+)")
_FORM = "[+ug]CONTAINER_ID:[@]HOST_ID[:COUNT]"
_MAP_HELP = f"Write each entry as {_FORM}, for example 0:100000:65536 or +1000:@1000."
_KINDS_HELP = (
    "Use host, keep-id[:uid=N,gid=N,size=N], nomap "
    "or auto[:size=N,uidmapping=C:H:N,gidmapping=C:H:N]."
)


# Parsing


@dataclass(frozen=True)
class MapItem:
    """One entry of ``--uidmap`` or ``--gidmap``, as typed."""

    container_id: int
    host_id: int
    size: t.Optional[int] = None
    parent: bool = False  # "@": host_id is an ID of the host, not of the runtime's namespace
    extends: bool = False  # "+": overrides earlier entries
    uid: bool = True
    gid: bool = True
    flagged: bool = False

    def __str__(self) -> str:
        flags = "+" if self.extends else ""
        if self.uid != self.gid:
            flags += "u" if self.uid else "g"
        size = "" if self.size is None else f":{self.size}"
        return f"{flags}{self.container_id}:{'@' if self.parent else ''}{self.host_id}{size}"


@dataclass(frozen=True)
class Userns:
    """A value of ``--userns``."""

    kind: str
    uid: t.Optional[int] = None
    gid: t.Optional[int] = None
    size: t.Optional[int] = None
    uid_items: t.Tuple[t.Tuple[MapItem, ...], ...] = ()
    gid_items: t.Tuple[t.Tuple[MapItem, ...], ...] = ()


@dataclass(frozen=True)
class Request:
    """A user namespace as requested from a runtime: a ``--userns`` value, maps, or names of owners of ranges.

    ``kind`` is that of ``Userns``, or "maps" where maps or names are given.
    """

    kind: str
    userns: t.Optional[Userns] = None
    uid_items: t.Tuple[MapItem, ...] = ()
    gid_items: t.Tuple[MapItem, ...] = ()
    subuidname: str = ""
    subgidname: str = ""

    def resolve(self, context: UsernsContext) -> Mapping:
        """The maps that the runtime will request.

        :raises MapError: the request cannot be fulfilled here, or is ``auto``, whose map depends
            on the image and the containers of the store
        """
        if self.userns is not None:
            return resolve(self.userns, context)
        return resolve_maps(
            self.uid_items, self.gid_items, context, self.subuidname, self.subgidname
        )


def parse_request(
    userns: t.Optional[str] = None,
    uidmap: t.Iterable[str] = (),
    gidmap: t.Iterable[str] = (),
    subuidname: t.Optional[str] = None,
    subgidname: t.Optional[str] = None,
) -> Request:
    """Parse the options together, as podman's command line does.

    :raises MapError: an option is malformed, or ``userns`` is combined with maps or names
    """
    uid_items = parse_map_flags(uidmap)
    gid_items = parse_map_flags(gidmap)
    maps = bool(uid_items or gid_items or subuidname or subgidname)
    if userns and userns != "private":
        if maps:
            raise MapError(
                f"userns {userns}",
                "cannot be combined with uidmap, gidmap, subuidname or subgidname",
                "Set either userns or maps.",
            )
        parsed = parse_userns(userns)
        return Request(parsed.kind, parsed)
    if not maps:
        if userns:
            raise MapError(
                f"userns {userns}", "requires maps, but no map is set", "Add uidmap and gidmap."
            )
        return Request("host", Userns("host"))
    return Request("maps", None, uid_items, gid_items, subuidname or "", subgidname or "")


def parse_userns(text: str) -> Userns:
    """Parse a value of podman's ``--userns``.

    :raises MapError: it is unknown or malformed, or joins an existing namespace
    """
    kind, colon, rest = text.strip().partition(":")
    subject = f"userns {text}"
    if kind in ("host", "nomap"):
        if colon:
            raise MapError(subject, f"{kind} takes no options", _KINDS_HELP)
        return Userns(kind)
    if kind in ("container", "ns"):
        raise MapError(
            subject,
            "joins another user namespace, so its map cannot be determined",
            "Prepare the image for the mapping of the container whose namespace it joins.",
        )
    if kind == "keep-id":
        numbers: t.Dict[str, int] = {}
        for key, value in _options(subject, rest if colon else None):
            if key not in ("uid", "gid", "size"):
                raise MapError(subject, f"keep-id has no option {key!r}", _KINDS_HELP)
            numbers[key] = _number(subject, key, value)
        return Userns(kind, numbers.get("uid"), numbers.get("gid"), numbers.get("size"))
    if kind == "auto":
        size = None
        extra: t.Dict[str, t.List[t.Tuple[MapItem, ...]]] = {"uidmapping": [], "gidmapping": []}
        for key, value in _options(subject, rest if colon else None):
            if key == "size":
                size = _number(subject, key, value)
            elif key in extra:
                items = parse_map_flags([value])
                if not items or any(item.flagged for item in items):
                    raise MapError(
                        subject, f"{key} is not CONTAINER_ID:[@]HOST_ID[:COUNT]", _KINDS_HELP
                    )
                extra[key].append(items)
            else:
                raise MapError(subject, f"auto has no option {key!r}", _KINDS_HELP)
        return Userns(
            kind,
            size=size,
            uid_items=tuple(extra["uidmapping"]),
            gid_items=tuple(extra["gidmapping"]),
        )
    raise MapError(subject, "is not a user namespace mode of podman", _KINDS_HELP)


def parse_map_flags(items: t.Iterable[str]) -> t.Tuple[MapItem, ...]:
    """Parse values of ``--uidmap`` or ``--gidmap``.

    As on the command line a value may hold several entries, joined by commas, or by colons where
    all three numbers of each are given.

    :raises MapError: an entry is malformed; the message names it
    """
    result = []
    for value in items:
        for text in value.split(","):
            text = text.strip()
            if not text:
                continue
            fields = text.split(":")
            if len(fields) != 2 and len(fields) % 3:
                raise MapError(f"map entry {text!r}", f"is not {_FORM}", _MAP_HELP)
            for first in range(0, len(fields), 3):
                result.append(_item(text, fields[first : first + 3]))
    return tuple(result)


def _item(text: str, fields: t.List[str]) -> MapItem:
    subject = f"map entry {text!r}"
    inside = _FLAGS_AND_ID.fullmatch(fields[0])
    outside = _HOST.fullmatch(fields[1])
    if inside is None or outside is None:
        raise MapError(subject, f"is not {_FORM}", _MAP_HELP)
    flags = inside.group(1)
    size = None
    if len(fields) == 3:
        size = _number(subject, "its count", fields[2])
    item = MapItem(
        container_id=_number(subject, "its container ID", inside.group(2)),
        host_id=_number(subject, "its host ID", outside.group(2)),
        size=size,
        parent=bool(outside.group(1)),
        extends="+" in flags,
        uid="u" in flags or "g" not in flags,
        gid="g" in flags or "u" not in flags,
        flagged=bool(flags),
    )
    if max(item.container_id, item.host_id) + (1 if size is None else size) > ID_LIMIT:
        raise MapError(
            subject, f"exceeds the highest ID, {ID_LIMIT - 1}", "Lower its start or its count."
        )
    return item


def _options(subject: str, text: t.Optional[str]) -> t.Iterator[t.Tuple[str, str]]:
    if text is None:
        return
    for option in text.split(","):
        key, equals, value = option.partition("=")
        if not equals:
            raise MapError(subject, f"option {option!r} is not KEY=VALUE", _KINDS_HELP)
        yield key, value


def _number(subject: str, name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise MapError(subject, f"{name} is {text!r}, not a whole number", "Give a number.")
    number = int(text)
    if number > ID_LIMIT:
        raise MapError(subject, f"{name} is {number}, which exceeds 32 bits", "Lower it.")
    return number


# Resolving

_WHOLE_HOST = Mapping(EVERYTHING, EVERYTHING)


def _no_names(name: str, kind: str) -> t.Tuple[SubIDRange, ...]:
    raise MapError(
        f"sub{kind}name {name}", "cannot be looked up in this context", "Use plain maps instead."
    )


@dataclass(frozen=True)
class UsernsContext:
    """The user, the host's ranges, and the abilities of the runtime's version."""

    rootless: bool
    # The user's IDs on the host.
    uid: int
    gid: int
    # The runtime's own namespace: intermediate ID to host ID (of a rootless user:
    # subids.namespace_mapping), for root without a namespace of its own the whole host.
    available: Mapping = field(default=_WHOLE_HOST)
    # podman 4.7: flags and a default count; results are sorted and adjacent ranges merged.
    map_flags: bool = True
    merge_and_sort: bool = True
    # Before podman 5.1: keep-id of UID 0 begins with an entry of size 0.
    keep_zero_entry: bool = False
    # podman 4.4: keep-id works without subordinate IDs.
    keep_id_needs_ranges: bool = False
    # podman 4.5: keep-id for root.
    rootful_keep_id: bool = True
    # podman 5.4: keep-id:size=
    keep_id_size: bool = True
    # podman 5.0: "@" and a default count in auto's uidmapping= and gidmapping=.
    auto_parent_ids: bool = True
    # buildah requires a UID map with a GID map.
    gid_map_alone: bool = True
    # keep-id, nomap and auto are values of podman; buildah and CRI-O support some of them.
    kinds: t.FrozenSet[str] = frozenset(("host", "keep-id", "nomap", "auto"))
    program: str = "podman"
    # Subordinate ranges of an owner named by subuidname ("uid") or subgidname ("gid").
    named_ranges: t.Callable[[str, str], t.Tuple[SubIDRange, ...]] = _no_names


def resolve(userns: Userns, context: UsernsContext) -> Mapping:
    """The maps of host, keep-id and nomap, literally as the runtime writes them.

    :raises MapError: the runtime refuses it, or it is ``auto``
    """
    if userns.kind not in context.kinds:
        raise MapError(
            f"userns {userns.kind}",
            f"is not supported by {context.program}",
            "Use one of: " + ", ".join(sorted(context.kinds)) + ".",
        )
    if userns.kind == "host":
        return Mapping()
    if userns.kind == "nomap":
        return _nomap(context)
    if userns.kind == "keep-id":
        return _keep_id(userns, context)
    raise MapError(
        "userns auto",
        "has no fixed map, because the map depends on the image and the containers of the store",
        "Specify the image.",
    )


def resolve_maps(
    uid_items: t.Sequence[MapItem],
    gid_items: t.Sequence[MapItem],
    context: UsernsContext,
    subuidname: str = "",
    subgidname: str = "",
) -> Mapping:
    """The maps of ``--uidmap``, ``--gidmap``, ``--subuidname`` and ``--subgidname``.

    If only one kind is given, it is used for both, as podman does.

    :raises MapError: an entry needs a newer runtime, overlaps another one, or uses IDs that the
        runtime's namespace does not have
    """
    subuidname, subgidname = subuidname or subgidname, subgidname or subuidname
    if gid_items and not uid_items and not context.gid_map_alone:
        raise MapError(
            "gidmap " + ",".join(str(item) for item in gid_items),
            f"{context.program} also requires a UID map",
            "Set uidmap as well.",
        )
    uid_items, gid_items = uid_items or gid_items, gid_items or uid_items
    if not context.map_flags:
        for item in (*uid_items, *gid_items):
            _plain_only(item, context)
    named: t.List[t.Tuple[IDRange, ...]] = [(), ()]
    if subuidname:
        named = [
            _named(context.named_ranges(subuidname, "uid")),
            _named(context.named_ranges(subgidname, "gid")),
        ]
    uid_map = _typed("uid", uid_items, context)
    gid_map = _typed("gid", gid_items, context)
    if context.rootless and context.map_flags:
        if uid_map and not gid_map:
            gid_map = _fill([], _free([], context.available.gid))
        elif gid_map and not uid_map:
            uid_map = _fill([], _free([], context.available.uid))
    result = Mapping(IDMap((*named[0], *uid_map)), IDMap((*named[1], *gid_map)))
    for kind, idmap, have in (
        ("UID", result.uid, context.available.uid),
        ("GID", result.gid, context.available.gid),
    ):
        idmap.validate()
        _within(kind, idmap, have)
    if result.identity:
        raise MapError(
            "maps " + ",".join(str(item) for item in (*uid_items, *gid_items)),
            "do not map any ID",
            _MAP_HELP,
        )
    return result


def resolve_auto_extras(userns: Userns, context: UsernsContext) -> Mapping:
    """The additional maps of auto's ``uidmapping=`` and ``gidmapping=``.

    :raises MapError: a map needs a newer runtime, or IDs that its namespace does not have
    """
    maps = []
    for kind, options, have in (
        ("UID", userns.uid_items, context.available.uid),
        ("GID", userns.gid_items, context.available.gid),
    ):
        ranges: t.List[IDRange] = []
        for items in options:
            pieces: t.List[IDRange] = []
            for item in items:
                if not context.auto_parent_ids:
                    _plain_only(item, context)
                pieces.extend(_pieces(kind, item, have, context))
            if context.auto_parent_ids:
                pieces = _merge(pieces)
            ranges.extend(pieces)
        result = IDMap(tuple(ranges))
        result.validate()
        _within(kind, result, have)
        maps.append(result)
    return Mapping(*maps)


def _keep_id(userns: Userns, context: UsernsContext) -> Mapping:
    if not context.rootless:
        if not context.rootful_keep_id:
            raise MapError(
                "userns keep-id",
                f"{context.program} supports it only in rootless mode",
                "Run this for a user, or set uidmap and gidmap.",
            )
        if userns.size is not None:
            raise MapError(
                "userns keep-id",
                f"{context.program} supports its option size only in rootless mode",
                "Remove `size`.",
            )
        return Mapping(
            IDMap(context.available.uid.ranges or EVERYTHING.ranges),
            IDMap(context.available.gid.ranges or EVERYTHING.ranges),
        )
    if userns.size is not None and not context.keep_id_size:
        raise MapError(
            "userns keep-id",
            f"{context.program} does not support its option size, which requires podman 5.4 or later",
            "Remove `size`.",
        )
    if context.keep_id_needs_ranges:
        _need_ranges("keep-id", context)
    maps = []
    for own, requested, have in (
        (context.uid, userns.uid, context.available.uid),
        (context.gid, userns.gid, context.available.gid),
    ):
        kept = own if requested is None else requested
        ranges = _subordinate(have)
        most = sum(ranges)
        if userns.size:
            most = min(most, userns.size - 1)
        entries = []
        if ranges and (kept or context.keep_zero_entry):
            entries.append(IDRange(0, 1, min(kept, most)))
        entries.append(IDRange(kept, 0, 1))
        if most > kept:
            entries.append(IDRange(kept + 1, kept + 1, most - kept))
        maps.append(IDMap(tuple(entries)))
    return Mapping(*maps)


def _nomap(context: UsernsContext) -> Mapping:
    if not context.rootless:
        raise MapError(
            "userns nomap",
            f"{context.program} supports it only in rootless mode",
            "Run this for a user, or set uidmap and gidmap.",
        )
    _need_ranges("nomap", context)
    maps = []
    for have in (context.available.uid, context.available.gid):
        entries = []
        position = 0
        for size in _subordinate(have):
            entries.append(IDRange(position, position + 1, size))
            position += size
        maps.append(IDMap(tuple(entries)))
    return Mapping(*maps)


def _subordinate(have: IDMap) -> t.List[int]:
    """Sizes of the subordinate ranges in a namespace's own map: all but the user's own ID."""
    return [entry.size for entry in have.ranges if entry.container_id]


def _need_ranges(kind: str, context: UsernsContext) -> None:
    for name, have in (("subuid", context.available.uid), ("subgid", context.available.gid)):
        if not _subordinate(have):
            raise MapError(
                f"userns {kind}",
                f"{context.program} needs subordinate IDs for it, but the user has none",
                f"Add a range for the user to /etc/{name}.",
            )


def _plain_only(item: MapItem, context: UsernsContext) -> None:
    """Refuse syntax that an old runtime does not support."""
    if item.flagged or item.parent:
        cause = f"{context.program} does not support flags in maps"
    elif item.size is None:
        cause = f"{context.program} requires a count in each entry"
    elif not item.size:
        cause = "maps no ID, because its count is 0"
    else:
        return
    raise MapError(f"map entry {item}", cause, "Write it as CONTAINER_ID:HOST_ID:COUNT.")


def _named(ranges: t.Iterable[SubIDRange]) -> t.Tuple[IDRange, ...]:
    entries = []
    position = 0
    for start, size in sorted(ranges):
        entries.append(IDRange(position, start, size))
        position += size
    return tuple(entries)


def _typed(kind: str, items: t.Sequence[MapItem], context: UsernsContext) -> t.List[IDRange]:
    """The UID or the GID map, from the entries that apply to it."""
    have = context.available.uid if kind == "uid" else context.available.gid
    result: t.List[IDRange] = []
    fill = False
    for item in items:
        if not (item.uid if kind == "uid" else item.gid):
            continue
        for piece in _pieces(kind.upper(), item, have, context):
            if item.extends:
                # The gaps are filled only if the first entry begins with "+".
                fill = fill or (not result and context.rootless)
                result = _cut(result, piece)
            result.append(piece)
    if fill:
        result = _fill(result, _free(result, have))
    return _merge(result) if context.merge_and_sort else result


def _pieces(kind: str, item: MapItem, have: IDMap, context: UsernsContext) -> t.Iterator[IDRange]:
    """The ranges of an entry; several if an entry with "@" covers a host range that is not contiguous."""
    size = 1 if item.size is None else item.size
    if not size:
        return
    if not item.parent:
        yield IDRange(item.container_id, item.host_id, size)
        return
    inner = have.invert().compose(IDMap.of((item.container_id, item.host_id, size)))
    if inner.size < size:
        mapped = inner.size
        raise MapError(
            f"map entry {item}",
            f"{context.program} has only {mapped} of these {size} host {kind}s in its namespace",
            f"Use {kind}s that belong to the user or are in the user's ranges: {have}.",
        )
    yield from inner.ranges


def _cut(ranges: t.Iterable[IDRange], piece: IDRange) -> t.List[IDRange]:
    """The ranges without the IDs that another range maps, on both sides."""
    result = []
    for entry in ranges:
        holes = sorted(
            (max(0, low), min(entry.size, low + piece.size))
            for low in (
                piece.container_id - entry.container_id,
                piece.host_id - entry.host_id,
            )
        )
        position = 0
        for low, high in holes:
            if low >= high:
                continue
            if low > position:
                result.append(_part(entry, position, low))
            position = max(position, high)
        if position < entry.size:
            result.append(_part(entry, position, entry.size))
    return result


def _part(entry: IDRange, low: int, high: int) -> IDRange:
    return IDRange(entry.container_id + low, entry.host_id + low, high - low)


def _free(ranges: t.Iterable[IDRange], have: IDMap) -> t.List[t.Tuple[int, int]]:
    """(start, end) spans of the namespace's IDs that no range uses yet, lowest first."""
    used = sorted((entry.host_id, entry.host_id + entry.size) for entry in ranges)
    result = []
    for entry in sorted(have.ranges):
        position = entry.container_id
        end = position + entry.size
        for low, high in used:
            if high <= position or low >= end:
                continue
            if low > position:
                result.append((position, low))
            position = max(position, high)
        if position < end:
            result.append((position, end))
    return result


def _fill(ranges: t.Iterable[IDRange], free: t.Sequence[t.Tuple[int, int]]) -> t.List[IDRange]:
    """The ranges, with free IDs in order in the gaps between and behind them."""
    result: t.List[IDRange] = []
    spans = list(free)
    position = 0
    for entry in sorted(ranges):
        while position < entry.container_id and spans:
            low, high = spans.pop(0)
            size = min(entry.container_id - position, high - low)
            result.append(IDRange(position, low, size))
            position += size
            if low + size < high:
                spans.insert(0, (low + size, high))
        result.append(entry)
        position = max(position, entry.container_id) + entry.size
    for low, high in spans:
        result.append(IDRange(position, low, high - low))
        position += high - low
    return result


def _merge(ranges: t.Sequence[IDRange]) -> t.List[IDRange]:
    """The ranges in container order, adjacent ones merged."""
    return list(IDMap(tuple(ranges)).normal().ranges)


def _within(kind: str, idmap: IDMap, have: IDMap) -> None:
    """Check that the runtime's namespace has the IDs."""
    if idmap.ranges and have.compose(idmap).size != idmap.size:
        raise MapError(
            f"{kind} map {idmap}",
            f"uses IDs that the user's namespace does not have; it has {have.size} of them",
            "Host IDs of rootless maps count from 0, the user itself, and 1, its first "
            f"subordinate {kind}, up to {have.size - 1}.",
        )
