# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of pairs of ID maps, and of the translation of owners from one pair to another."""

from __future__ import annotations

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.errors import MapError
from ansible_collections.userns.storage.plugins.module_utils._storage.idmap.mapping import (
    UNMAPPED,
    Mapping,
    Shift,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.idmap.ranges import (
    EVERYTHING,
    IDENTITY,
    IDMap,
)

KEEP = Mapping(IDMap.of((0, 1, 9), (9, 0, 1)), IDMap.of((0, 1, 5), (5, 0, 1), (6, 6, 4)))
HIGH = Mapping(IDMap.of((0, 1000, 10)), IDMap.of((0, 2000, 10)))


def test_form_and_meaning_are_compared_separately() -> None:
    reordered = Mapping(IDMap.of((9, 0, 1), (0, 1, 9)), KEEP.gid)
    assert not reordered.same_form(KEEP)
    assert reordered.same_meaning(KEEP)
    assert UNMAPPED.same_form(Mapping())
    assert UNMAPPED.identity
    assert not Mapping(EVERYTHING, IDENTITY).identity
    assert KEEP.contiguous
    assert not Mapping(IDENTITY, IDMap.of((0, 1, 1), (1, 5, 1))).contiguous
    assert str(HIGH) == "uid 0:1000:10 gid 0:2000:10"


def test_root_is_host_id_of_container_root() -> None:
    assert KEEP.root == (1, 1)
    assert HIGH.root == (1000, 2000)
    assert UNMAPPED.root == (0, 0)
    with pytest.raises(MapError, match="has no GID for the container's root"):
        _root = Mapping(IDENTITY, IDMap.of((1, 5, 3))).root


def test_shift_translates_owners_between_maps() -> None:
    shift = Shift(HIGH, KEEP)
    assert [shift.uid(1000 + n) for n in range(10)] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    assert [shift.gid(2000 + n) for n in range(10)] == [1, 2, 3, 4, 5, 0, 6, 7, 8, 9]
    assert shift.complete
    back = Shift(KEEP, HIGH)
    assert [back.uid(shift.uid(item)) for item in range(1000, 1010)] == list(range(1000, 1010))


def test_ids_outside_maps_are_recorded() -> None:
    shift = Shift(HIGH, Mapping(IDMap.of((0, 1, 2)), IDENTITY))
    assert shift.uid(1005) == -1
    assert shift.uid(5) == -1
    assert shift.gid(2003) == 3
    assert shift.gid(3) == -1
    assert shift.uid(1005) == -1
    assert (shift.unmapped_uids, shift.foreign_uids) == ({5}, {5})
    assert (shift.unmapped_gids, shift.foreign_gids) == (set(), {3})
    assert not shift.complete


def test_ids_outside_maps_become_overflow_id_on_request() -> None:
    shift = Shift(HIGH, Mapping(IDMap.of((0, 1, 2)), IDENTITY), overflow=True)
    assert shift.uid(1005) == 65534
    assert shift.uid(5) == 65534
    assert shift.gid(2003) == 3
    assert shift.complete
