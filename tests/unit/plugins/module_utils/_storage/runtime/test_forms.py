# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of the options that each version supports, and of the form in which a store records a map."""

from __future__ import annotations

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.idmap.grammar import (
    parse_request,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.idmap.mapping import (
    UNMAPPED,
    Mapping,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.idmap.ranges import (
    EVERYTHING,
    IDMap,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.idmap.subids import (
    SubIDRange,
    SubIDs,
    namespace_mapping,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.runtime.detect import runtime
from ansible_collections.userns.storage.plugins.module_utils._storage.runtime.forms import (
    context,
    recorded_form,
    reuse_form,
)
from hypothesis import given
from hypothesis import strategies as st

OLD = runtime("podman", "4.3.1")
NEW = runtime("podman", "5.8.0")
SUBIDS = SubIDs((SubIDRange(100000, 65536),), (SubIDRange(100000, 65536),))
# None of the maps is sorted on both sides. A gap is among the host IDs or the container IDs.
CONTIGUOUS = IDMap.of((5, 100, 5), (0, 105, 5))
HOST_GAP = IDMap.of((0, 300, 5), (5, 100, 5))
CONTAINER_GAP = IDMap.of((9, 105, 5), (0, 100, 5))


@pytest.mark.parametrize(
    ("version", "flags", "zero", "ranges", "rootful", "size", "auto"),
    [
        ("4.3.1", False, True, True, False, False, False),
        ("4.4.1", False, True, False, False, False, False),
        ("4.5.0", False, True, False, True, False, False),
        ("4.7.0", True, True, False, True, False, False),
        ("5.0.0", True, True, False, True, False, True),
        ("5.1.0", True, False, False, True, False, True),
        ("5.4.0", True, False, False, True, True, True),
        ("5.8.2", True, False, False, True, True, True),
    ],
)
def test_capabilities_of_podman_by_version(
    version: str, flags: bool, zero: bool, ranges: bool, rootful: bool, size: bool, auto: bool
) -> None:
    found = context(runtime("podman", version), False, 0, 0)
    assert (found.map_flags, found.merge_and_sort) == (flags, flags)
    assert found.keep_zero_entry is zero
    assert found.keep_id_needs_ranges is ranges
    assert found.rootful_keep_id is rootful
    assert found.keep_id_size is size
    assert found.auto_parent_ids is auto
    assert found.available == Mapping(EVERYTHING, EVERYTHING)


def test_other_programs_keep_maps_as_typed() -> None:
    for name in ("buildah", "cri-o"):
        found = context(runtime(name, "1.33"), False, 0, 0)
        assert not found.map_flags
        assert found.kinds == {"host", "auto"}
        typed = parse_request(uidmap=["9:100:5", "0:50:9"]).resolve(found)
        assert typed.uid == IDMap.of((9, 100, 5), (0, 50, 9))


@pytest.mark.parametrize(
    ("uid", "gid", "expected_uid", "expected_gid"),
    [
        (CONTIGUOUS, CONTIGUOUS, "0:105:5,5:100:5", "0:105:5,5:100:5"),
        (CONTIGUOUS, HOST_GAP, "0:105:5,5:100:5", "5:100:5,0:300:5"),
        (CONTIGUOUS, CONTAINER_GAP, "0:105:5,5:100:5", "0:100:5,9:105:5"),
        (HOST_GAP, CONTIGUOUS, "5:100:5,0:300:5", "5:100:5,0:105:5"),
        (CONTAINER_GAP, CONTIGUOUS, "0:100:5,9:105:5", "5:100:5,0:105:5"),
    ],
)
def test_shifting_check_sorts_maps(
    uid: IDMap, gid: IDMap, expected_uid: str, expected_gid: str
) -> None:
    mapping = Mapping(uid, gid)
    assert recorded_form(mapping, OLD, False) == mapping
    recorded = recorded_form(mapping, OLD, True)
    assert (str(recorded.uid), str(recorded.gid)) == (expected_uid, expected_gid)
    assert recorded_form(recorded, OLD, True) == recorded


@given(st.permutations(range(5)), st.booleans())
def test_recorded_form_keeps_meaning(order: list[int], checked: bool) -> None:
    pieces = [(0, 50, 5), (5, 10, 5), (10, 15, 1), (11, 90, 0), (20, 30, 2)]
    mapping = Mapping(IDMap.of(*(pieces[n] for n in order)), CONTIGUOUS)
    for item in (OLD, NEW):
        for typed in (False, True):
            assert recorded_form(mapping, item, checked, typed).same_meaning(mapping)


def test_typed_maps_are_merged_if_podman_merges_them() -> None:
    mapping = Mapping(IDMap.of((5, 105, 5), (0, 100, 5)), CONTIGUOUS)
    assert recorded_form(mapping, OLD, False, typed=True) == mapping
    assert str(recorded_form(mapping, NEW, False, typed=True).uid) == "0:100:10"


def test_keep_id_is_never_merged() -> None:
    user_context = context(NEW, True, 1500, 1500, namespace_mapping(1500, 1500, SUBIDS))
    mapping = parse_request(userns="keep-id:uid=0,gid=0").resolve(user_context)
    assert str(recorded_form(mapping, NEW, False).uid) == "0:0:1,1:1:65536"


def test_existing_form_is_reused() -> None:
    reordered = Mapping(IDMap.of((0, 105, 5), (5, 100, 5)), CONTIGUOUS)
    other = Mapping(HOST_GAP, CONTIGUOUS)
    mapping = Mapping(CONTIGUOUS, CONTIGUOUS)
    assert reuse_form(mapping, [other, reordered, mapping]) == reordered
    assert reuse_form(mapping, [other]) == mapping
    whole = Mapping(EVERYTHING, EVERYTHING)
    assert reuse_form(whole, [UNMAPPED]) == whole
