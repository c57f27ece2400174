# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The literal form in which a runtime writes a map. Runtimes compare maps entry by entry."""

from __future__ import annotations

import pwd
import typing as t

from ..idmap.grammar import UsernsContext
from ..idmap.mapping import Mapping
from ..idmap.ranges import EVERYTHING
from ..idmap.subids import SubIDRange, ranges_of
from .detect import Runtime

_WHOLE_HOST = Mapping(EVERYTHING, EVERYTHING)


def named_ranges(name: str, kind: str) -> t.Tuple[SubIDRange, ...]:
    """The ranges of an owner named by ``subuidname`` ("uid") or ``subgidname`` ("gid").

    :raises NamespaceError: there are none in the files or NSS
    """
    try:
        uid: t.Optional[int] = pwd.getpwnam(name).pw_uid
    except KeyError:
        uid = None
    return ranges_of(name, uid, kind)


def context(
    runtime: Runtime,
    rootless: bool,
    uid: int,
    gid: int,
    available: Mapping = _WHOLE_HOST,
    names: t.Callable[[str, str], t.Tuple[SubIDRange, ...]] = named_ranges,
) -> UsernsContext:
    """The context for a version of a runtime, a user and a namespace.

    :param uid: the user's host UID
    :param gid: the user's primary host GID
    :param available: the runtime's namespace, intermediate ID to host ID
    """
    if runtime.name != "podman":
        return UsernsContext(
            rootless=rootless,
            uid=uid,
            gid=gid,
            available=available,
            map_flags=False,
            merge_and_sort=False,
            auto_parent_ids=False,
            gid_map_alone=runtime.name != "buildah",
            kinds=frozenset(("host", "auto")),
            program=str(runtime),
            named_ranges=names,
        )
    can = runtime.capabilities
    return UsernsContext(
        rootless=rootless,
        uid=uid,
        gid=gid,
        available=available,
        map_flags=can.map_flags,
        merge_and_sort=can.merges_maps,
        keep_zero_entry=not can.drops_zero_entry,
        keep_id_needs_ranges=not can.keep_id_without_ranges,
        rootful_keep_id=can.rootful_keep_id,
        keep_id_size=can.keep_id_size,
        auto_parent_ids=can.auto_parent_ids,
        program=str(runtime),
        named_ranges=names,
    )


def recorded_form(
    mapping: Mapping, runtime: Runtime, shifting_checked: bool, typed: bool = False
) -> Mapping:
    """The form in which the runtime's store records a map that was resolved for it.

    :param shifting_checked: the store asks whether the map is contiguous
        (``Shifting.reorders_map``), and this check sorts the list; if the UID map is not
        contiguous, the GID map is not checked
    :param typed: the map is in the notation of the user, not from ``resolve``, and
        the runtime's own sorting and merging must still be applied
    """
    if typed and runtime.capabilities.merges_maps:
        mapping = Mapping(mapping.uid.normal(), mapping.gid.normal())
    if not shifting_checked:
        return mapping
    contiguous, uid = mapping.uid.contiguity()
    return Mapping(uid, mapping.gid.contiguity()[1] if contiguous else mapping.gid)


def reuse_form(mapping: Mapping, seen: t.Iterable[Mapping]) -> Mapping:
    """The form in which the runtime already recorded a map of the same meaning, if any.

    :param seen: mappings of the runtime's own containers and mapped layers, best evidence first
    """
    for other in seen:
        if not other.identity and other.same_meaning(mapping):
            return other
    return mapping
