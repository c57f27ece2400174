# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of the operations on ID maps, with a dict as the model, and of parsing strings and records."""

from __future__ import annotations

import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.errors import (
    MapError,
    RecordError,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.idmap.ranges import (
    EVERYTHING,
    IDENTITY,
    NOTHING,
    IDMap,
    IDRange,
    overlapping,
)
from hypothesis import given
from hypothesis import strategies as st

SMALL = 60


@st.composite
def maps(draw: st.DrawFn, empty_ranges: bool = False) -> IDMap:
    """Maps with a few small ranges in any order that do not overlap on either side."""
    sizes = draw(st.lists(st.integers(0 if empty_ranges else 1, 8), min_size=1, max_size=6))
    sides = []
    for _side in ("container", "host"):
        order = draw(st.permutations(range(len(sizes))))
        starts, position = {}, 0
        for index in order:
            position += draw(st.integers(0, 3))
            starts[index] = position
            position += sizes[index]
        sides.append(starts)
    ranges = [IDRange(sides[0][n], sides[1][n], size) for n, size in enumerate(sizes)]
    return IDMap(tuple(ranges))


def model(idmap: IDMap) -> dict[int, int]:
    """Return the host ID for each container ID of a map."""
    return {c + n: h + n for c, h, size in idmap.ranges for n in range(size)}


@given(maps(empty_ranges=True))
def test_lookups_match_model(idmap: IDMap) -> None:
    forth = model(idmap)
    back = {host: container for container, host in forth.items()}
    for number in range(SMALL):
        assert idmap.to_host(number) == forth.get(number)
        assert idmap.to_container(number) == back.get(number)
    assert idmap.size == len(forth)
    assert idmap.missing(range(SMALL)) == [n for n in range(SMALL) if n not in forth]


@given(maps(empty_ranges=True))
def test_normal_form_keeps_meaning_and_is_unique(idmap: IDMap) -> None:
    normal = idmap.normal()
    assert model(normal) == model(idmap)
    assert normal.normal() == normal
    assert normal.same_meaning(idmap)
    assert idmap.sorted_by_host().normal() == normal
    # No range is empty or can be merged with the next.
    if model(idmap):
        assert all(entry.size for entry in normal.ranges)
    else:
        assert normal == NOTHING
    for before, after in zip(normal.ranges, normal.ranges[1:]):
        assert before.container_id + before.size <= after.container_id
        assert (before.container_id + before.size, before.host_id + before.size) != after[:2]


@given(maps(), maps())
def test_same_meaning_matches_model(idmap: IDMap, other: IDMap) -> None:
    assert idmap.same_meaning(other) == (model(idmap) == model(other))


@given(maps(), maps())
def test_composition_matches_model(outer: IDMap, inner: IDMap) -> None:
    first, second = model(inner), model(outer)
    expected = {
        container: second[middle] for container, middle in first.items() if middle in second
    }
    result = outer.compose(inner)
    assert model(result) == expected
    assert bool(expected) == (result != NOTHING)


@given(maps(), maps(), maps())
def test_composition_is_associative(idmap: IDMap, two: IDMap, three: IDMap) -> None:
    left = idmap.compose(two).compose(three)
    right = idmap.compose(two.compose(three))
    assert left.same_meaning(right)


@given(maps())
def test_inverse_swaps_sides(idmap: IDMap) -> None:
    assert idmap.invert().invert() == idmap
    assert model(idmap.invert()) == {host: container for container, host in model(idmap).items()}
    round_trip = idmap.invert().compose(idmap)
    assert model(round_trip) == {container: container for container in model(idmap)}


@given(maps())
def test_identity_is_neutral(idmap: IDMap) -> None:
    assert idmap.compose(IDENTITY) == idmap
    assert IDENTITY.compose(idmap) == idmap
    assert idmap.compose(EVERYTHING).same_meaning(idmap)
    assert EVERYTHING.compose(idmap).same_meaning(idmap)


@given(maps())
def test_strings_and_records_keep_form_and_order(idmap: IDMap) -> None:
    assert IDMap.parse(idmap.to_strings()) == idmap
    assert IDMap.from_record(idmap.to_record()) == idmap


@given(maps())
def test_valid_maps_are_accepted(idmap: IDMap) -> None:
    idmap.validate()
    assert overlapping(idmap.ranges) is None


@given(maps(), st.data())
def test_overlap_is_rejected(idmap: IDMap, data: st.DataObject) -> None:
    entry = data.draw(st.sampled_from(idmap.ranges))
    inside = data.draw(st.integers(0, entry.size - 1))
    clash = IDRange(entry.container_id + inside, 5000, 1)
    with pytest.raises(MapError, match="overlap in their container IDs"):
        IDMap((*idmap.ranges, clash)).validate()
    clash = IDRange(5000, entry.host_id + inside, 1)
    with pytest.raises(MapError, match="overlap in their host IDs"):
        IDMap((*idmap.ranges, clash)).validate()


@given(maps())
def test_contiguous_maps_have_no_gap_on_either_side(idmap: IDMap) -> None:
    def has_no_gap(ids: t.Collection[int]) -> bool:
        return max(ids) - min(ids) + 1 == len(ids)

    forth = model(idmap)
    assert idmap.contiguous == (has_no_gap(forth.keys()) and has_no_gap(forth.values()))


def test_contiguity_check_returns_sorted_map() -> None:
    host_gap = IDMap.of((0, 300, 5), (5, 100, 5))
    assert host_gap.contiguity() == (False, IDMap.of((5, 100, 5), (0, 300, 5)))
    container_gap = IDMap.of((70000, 0, 1), (0, 1, 65536))
    assert container_gap.contiguity() == (False, IDMap.of((0, 1, 65536), (70000, 0, 1)))
    no_gap = IDMap.of((1000, 0, 1), (0, 1, 1000))
    assert no_gap.contiguity() == (True, IDMap.of((0, 1, 1000), (1000, 0, 1)))
    # keep-id of root in old versions begins with an empty range, which the sort moves.
    empty_first = IDMap.of((0, 1, 0), (0, 0, 1), (1, 1, 9))
    assert empty_first.contiguity() == (False, IDMap.of((0, 0, 1), (0, 1, 0), (1, 1, 9)))


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["0:1"], "is not CONTAINER_ID:HOST_ID:COUNT"),
        (["0:1:x"], "is not CONTAINER_ID:HOST_ID:COUNT"),
        (["0:-1:5"], "is not CONTAINER_ID:HOST_ID:COUNT"),
        (["٣:1:5"], "is not CONTAINER_ID:HOST_ID:COUNT"),
        ([""], "is not CONTAINER_ID:HOST_ID:COUNT"),
        (["0:1:0"], "its count is 0"),
        (["0:1:4294967295"], "exceeds the highest ID, 4294967294"),
        (["4294967295:0:1"], "exceeds the highest ID, 4294967294"),
        (["0:0:10", "5:100:10"], "overlap in their container IDs"),
        (["0:0:10", "10:9:1"], "overlap in their host IDs"),
    ],
)
def test_invalid_string_is_named_in_error(items: list[str], message: str) -> None:
    with pytest.raises(MapError, match=message) as caught:
        IDMap.parse(items)
    assert items[-1] in str(caught.value)
    assert caught.value.hint


def test_map_of_all_ids_is_not_identity() -> None:
    whole = IDMap.parse(["0:0:4294967295"])
    assert whole == EVERYTHING
    assert whole != IDENTITY
    assert whole.same_meaning(IDENTITY)
    assert not NOTHING.same_meaning(IDENTITY)


@pytest.mark.parametrize(
    "record",
    [
        {"container_id": 0},
        "0:1:2",
        [1],
        [{"container_id": "0", "host_id": 1, "size": 1}],
        [{"container_id": 0, "host_id": 1.0, "size": 1}],
        [{"container_id": 0, "host_id": True, "size": 1}],
        [{"container_id": 0, "host_id": -1, "size": 1}],
    ],
)
def test_invalid_record_is_named_in_error(record: object) -> None:
    with pytest.raises(RecordError, match="layer abc uidmap"):
        IDMap.from_record(record, "layer abc uidmap")


def test_absent_record_means_identity() -> None:
    assert IDMap.from_record(None) == IDENTITY
    assert IDMap.from_record([]) == IDENTITY
    assert IDENTITY.to_record() == []
    assert IDENTITY.to_host(7) == IDENTITY.to_container(7) == 7
    assert IDENTITY.missing([1, 2]) == []
    assert IDENTITY.root == 0
    assert str(IDENTITY) == "identity"


def test_root_is_host_id_of_container_root_or_single_id() -> None:
    assert IDMap.of((0, 1000, 5)).root == 1000
    assert IDMap.of((5, 1000, 5)).root is None
    assert IDMap.of((5, 1000, 1)).root == 1000
    assert IDMap.of((1, 0, 1), (0, 7, 1)).root == 7
