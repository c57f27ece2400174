# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Check whether the root directory of a mapped layer and the entries in it belong to IDs of its map."""

from __future__ import annotations

import typing as t

from ..drivers.base import Driver
from ..idmap.mapping import Shift
from ..store.records import Layer

_MOST_NAMED = 5
# A name ("" for the root directory), its UID and its GID on disk.
_Owner = t.Tuple[str, int, int]


class TopOwners(t.NamedTuple):
    """The findings, each as text; "" if there is none.

    :param outside: entries that belong to IDs outside the map
    :param wrong: whether ``outside`` has more than the root directory, which belongs to the host's root in
        every layer that old runtimes map
    :param kept: entries that still have their owners in the image, if no entry has its new
        owner: nothing was mapped in this layer
    """

    outside: str
    kept: str
    wrong: bool = False


def top_owners(driver: Driver, layer: Layer, template: t.Sequence[Layer]) -> TopOwners:
    """Examine the root directory of a mapped layer and its entries.

    :param template: the layer's template and its parents, top first; empty if unknown
    :raises StorageError: a layer is missing or cannot be read
    """
    if layer.mapping.identity and (not template or template[0].mapping.identity):
        return TopOwners("", "")
    uids, gids = layer.mapping.uid, layer.mapping.gid
    found = driver.top_owners([layer.id, *(item.id for item in template[1:])])
    outside = [
        item for item in found if None in (uids.to_container(item[1]), gids.to_container(item[2]))
    ]
    return TopOwners(
        _sentence("outside its map", outside),
        _sentence(
            "its owners are still the owners of the image", _kept(driver, layer, template, found)
        ),
        any(name for name, _uid, _gid in outside),
    )


def _kept(
    driver: Driver, layer: Layer, template: t.Sequence[Layer], found: t.Sequence[_Owner]
) -> t.Sequence[_Owner]:
    if not template:
        return ()
    shift = Shift(template[0].mapping, layer.mapping)

    def would_move(owner: _Owner) -> bool:
        name, uid, gid = owner
        new = shift.uid(uid), shift.gid(gid)
        return bool(name) and -1 not in new and new != (uid, gid)

    # Usually false for mapped layers, so that the template need not be read.
    if not any(map(would_move, found)):
        return ()
    moved = list(filter(would_move, driver.top_owners([item.id for item in template])))
    return moved if set(moved) <= set(found) else ()


def _sentence(what: str, names: t.Sequence[_Owner]) -> str:
    if not names:
        return ""
    listed = ", ".join(f"/{name} belongs to {uid}:{gid}" for name, uid, gid in names[:_MOST_NAMED])
    more = len(names) - _MOST_NAMED
    return f"{what}: {listed}" + (f" and {more} more" if more > 0 else "")
