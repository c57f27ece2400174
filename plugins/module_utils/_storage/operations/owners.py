# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This module util is PRIVATE to the userns.storage collection.
"""Whether what stands at the top of a mapped layer's tree belongs to the IDs of its map."""

from __future__ import annotations

import typing as t

from ..drivers.base import Driver
from ..idmap.mapping import Shift
from ..store.records import Layer

_MOST_NAMED = 5
# A name ("" for the root directory), its UID and its GID on disk.
_Owner = t.Tuple[str, int, int]


class TopOwners(t.NamedTuple):
    """What was found, each in words; "" when there is nothing to tell.

    :param outside: names that belong to somebody outside the map
    :param kept: names that still have the owner that they have in the image, when that is true of all
        that were to have another: in this layer nothing was mapped
    """

    outside: str
    kept: str


def top_owners(driver: Driver, layer: Layer, template: t.Sequence[Layer]) -> TopOwners:
    """Look at the root directory of a mapped layer and the names in it.

    :param template: the layer's template and its parents, top first; empty when it is not known
    :raises StorageError: a layer is missing or cannot be read
    """
    if layer.mapping.identity:
        return TopOwners("", "")
    uids, gids = layer.mapping.uid, layer.mapping.gid
    found = driver.top_owners([layer.id, *(one.id for one in template[1:])])
    outside = [
        one for one in found if None in (uids.to_container(one[1]), gids.to_container(one[2]))
    ]
    return TopOwners(
        _words("outside its map", outside),
        _words("its owners are still those of the image", _kept(driver, layer, template, found)),
    )


def _kept(
    driver: Driver, layer: Layer, template: t.Sequence[Layer], found: t.Sequence[_Owner]
) -> t.Sequence[_Owner]:
    if not template:
        return ()
    shift = Shift(template[0].mapping, layer.mapping)

    def would_move(one: _Owner) -> bool:
        name, uid, gid = one
        new = shift.uid(uid), shift.gid(gid)
        return bool(name) and -1 not in new and new != (uid, gid)

    # Seldom true of a layer that was mapped, so that its template need not be read.
    if not any(map(would_move, found)):
        return ()
    moved = list(filter(would_move, driver.top_owners([one.id for one in template])))
    return moved if set(moved) <= set(found) else ()


def _words(what: str, names: t.Sequence[_Owner]) -> str:
    if not names:
        return ""
    told = ", ".join(f"/{name} belongs to {uid}:{gid}" for name, uid, gid in names[:_MOST_NAMED])
    more = len(names) - _MOST_NAMED
    return f"{what}: {told}" + (f" and {more} more" if more > 0 else "")
