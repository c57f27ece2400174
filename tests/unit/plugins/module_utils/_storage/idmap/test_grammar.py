# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of podman's grammar for user namespaces: parsing, rejected values, and the resulting maps."""

from __future__ import annotations

import dataclasses
import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.errors import MapError
from ansible_collections.userns.storage.plugins.module_utils._storage.idmap.grammar import (
    MapItem,
    UsernsContext,
    parse_map_flags,
    parse_request,
    parse_userns,
    resolve_auto_extras,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.idmap.mapping import Mapping
from ansible_collections.userns.storage.plugins.module_utils._storage.idmap.ranges import (
    EVERYTHING,
    IDMap,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.idmap.subids import (
    SubIDRange,
    SubIDs,
    namespace_mapping,
)
from hypothesis import given
from hypothesis import strategies as st

RANGES = (SubIDRange(100000, 65536),)
ROOT = UsernsContext(rootless=False, uid=0, gid=0)
USER = UsernsContext(
    rootless=True,
    uid=1500,
    gid=1600,
    available=namespace_mapping(1500, 1600, SubIDs(RANGES, RANGES)),
)
OLD = dataclasses.replace(
    USER,
    map_flags=False,
    merge_and_sort=False,
    keep_zero_entry=True,
    keep_id_needs_ranges=True,
    rootful_keep_id=False,
    keep_id_size=False,
    auto_parent_ids=False,
    program="podman 4.3.1",
)
OLD_ROOT = dataclasses.replace(OLD, rootless=False, uid=0, gid=0, available=ROOT.available)
NO_SUBIDS = dataclasses.replace(USER, available=namespace_mapping(1500, 1600, SubIDs()))
TWO_RANGES = dataclasses.replace(
    USER,
    available=namespace_mapping(1500, 1600, SubIDs((SubIDRange(9000, 10), *RANGES), RANGES)),
)


def maps(context: UsernsContext, **options: t.Any) -> tuple[str, str]:
    """Return both maps of a request as strings."""
    mapping = parse_request(**options).resolve(context)
    return str(mapping.uid), str(mapping.gid)


@pytest.mark.parametrize(
    ("text", "item"),
    [
        ("0:1:2", MapItem(0, 1, 2)),
        ("0:1", MapItem(0, 1)),
        ("0:@1", MapItem(0, 1, parent=True)),
        ("+5:@1:7", MapItem(5, 1, 7, parent=True, extends=True, flagged=True)),
        ("u5:1", MapItem(5, 1, gid=False, flagged=True)),
        ("g+5:1", MapItem(5, 1, extends=True, uid=False, flagged=True)),
        ("ug5:1", MapItem(5, 1, flagged=True)),
    ],
)
def test_entries_are_parsed(text: str, item: MapItem) -> None:
    assert parse_map_flags([text]) == (item,)


def test_value_with_several_entries_is_parsed() -> None:
    assert parse_map_flags(["0:1:2:+2:5:1,u9:9", ""]) == (
        MapItem(0, 1, 2),
        MapItem(2, 5, 1, extends=True, flagged=True),
        MapItem(9, 9, gid=False, flagged=True),
    )


@pytest.mark.parametrize(
    "text",
    [
        "0", "0:1:2:3", "x0:1", "0:x", "0:1:x", ":1:2", "0::2", "0:1:", "+:1", "0:@:1", "0:1:-1",
        "0:1:2:3:4", "0:5:4294967295", "4294967296:0", "٣:0:1", "@0:1:1",
    ],
)  # fmt: skip
def test_malformed_entry_is_named_in_error(text: str) -> None:
    with pytest.raises(MapError) as caught:
        parse_map_flags([text])
    assert repr(text) in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(
    "text",
    [
        "", "foo", "host:x", "nomap:size=1", "keep-id:", "keep-id:uid", "keep-id:uid=x",
        "keep-id:uid=-1", "keep-id:uid=4294967296", "keep-id:foo=1", "auto:", "auto:foo=1",
        "auto:size=", "auto:uidmapping=0", "auto:uidmapping=+0:1:1", "auto:gidmapping=", "ns:/x",
        "container:abc", "KEEP-ID",
    ],
)  # fmt: skip
def test_invalid_userns_is_rejected(text: str) -> None:
    with pytest.raises(MapError) as caught:
        parse_userns(text)
    assert text.rpartition("=")[2] in caught.value.subject
    assert caught.value.hint


def test_userns_is_parsed() -> None:
    keep = parse_userns("keep-id:uid=200,gid=210,size=5000")
    assert (keep.kind, keep.uid, keep.gid, keep.size) == ("keep-id", 200, 210, 5000)
    auto = parse_userns("auto:size=9,uidmapping=0:1:2,gidmapping=3:@4,uidmapping=5:6:7")
    assert (auto.kind, auto.size) == ("auto", 9)
    assert auto.uid_items == ((MapItem(0, 1, 2),), (MapItem(5, 6, 7),))
    assert auto.gid_items == ((MapItem(3, 4, parent=True),),)


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, "host"),
        ({"userns": "host"}, "host"),
        ({"userns": "auto"}, "auto"),
        ({"uidmap": ["0:1:1"]}, "maps"),
        ({"userns": "private", "gidmap": ["0:1:1"]}, "maps"),
        ({"subuidname": "alice"}, "maps"),
    ],
)
def test_request_has_expected_kind(options: dict[str, t.Any], kind: str) -> None:
    assert parse_request(**options).kind == kind


@pytest.mark.parametrize(
    "options",
    [
        {"userns": "keep-id", "uidmap": ["0:1:1"]},
        {"userns": "host", "subgidname": "alice"},
        {"userns": "private"},
    ],
)
def test_contradictory_request_is_rejected(options: dict[str, t.Any]) -> None:
    with pytest.raises(MapError):
        parse_request(**options)


# The maps have the form that podman of that version records. tests/interop/test_matrix.py checks the same with podman.


@pytest.mark.parametrize(
    ("context", "userns", "uid", "gid"),
    [
        (USER, "keep-id", "0:1:1500,1500:0:1,1501:1501:64036", "0:1:1600,1600:0:1,1601:1601:63936"),
        (USER, "keep-id:uid=0,gid=5", "0:0:1,1:1:65536", "0:1:5,5:0:1,6:6:65531"),
        (OLD, "keep-id:uid=0,gid=5", "0:1:0,0:0:1,1:1:65536", "0:1:5,5:0:1,6:6:65531"),
        (USER, "keep-id:uid=70000", "0:1:65536,70000:0:1", "0:1:1600,1600:0:1,1601:1601:63936"),
        (USER, "keep-id:size=1550", "0:1:1500,1500:0:1,1501:1501:49", "0:1:1549,1600:0:1"),
        (USER, "keep-id:size=0", "0:1:1500,1500:0:1,1501:1501:64036", "0:1:1600,1600:0:1,1601:1601:63936"),
        (NO_SUBIDS, "keep-id", "1500:0:1", "1600:0:1"),
        (TWO_RANGES, "keep-id", "0:1:1500,1500:0:1,1501:1501:64046", "0:1:1600,1600:0:1,1601:1601:63936"),
        (USER, "nomap", "0:1:65536", "0:1:65536"),
        (TWO_RANGES, "nomap", "0:1:10,10:11:65536", "0:1:65536"),
        (USER, "host", "identity", "identity"),
        (ROOT, "keep-id", "0:0:4294967295", "0:0:4294967295"),
        (ROOT, "keep-id:uid=7", "0:0:4294967295", "0:0:4294967295"),
    ],
)  # fmt: skip
def test_userns_resolves_to_expected_maps(
    context: UsernsContext, userns: str, uid: str, gid: str
) -> None:
    assert maps(context, userns=userns) == (uid, gid)


@pytest.mark.parametrize(
    ("context", "options", "uid", "gid"),
    [
        (ROOT, {"uidmap": ["9:100:5", "0:50:9"]}, "0:50:9,9:100:5", "0:50:9,9:100:5"),
        (OLD_ROOT, {"uidmap": ["9:100:5", "0:50:9"]}, "9:100:5,0:50:9", "9:100:5,0:50:9"),
        (OLD_ROOT, {"gidmap": ["0:50:9", "9:59:5"]}, "0:50:9,9:59:5", "0:50:9,9:59:5"),
        (ROOT, {"gidmap": ["9:59:5", "0:50:9"]}, "0:50:14", "0:50:14"),
        (ROOT, {"uidmap": ["0:50"], "gidmap": ["0:60:2"]}, "0:50:1", "0:60:2"),
        (ROOT, {"uidmap": ["0:50:9", "5:5:0"]}, "0:50:9", "0:50:9"),
        (ROOT, {"uidmap": ["0:100:20", "+10:5:2"]}, "0:100:10,10:5:2,12:112:8", "0:100:10,10:5:2,12:112:8"),
        (ROOT, {"uidmap": ["u0:100:20", "u+5:110:2"]}, "0:100:5,5:110:2,7:107:3,12:112:8", "identity"),
        (ROOT, {"uidmap": ["+0:100:20"]}, "0:100:20", "0:100:20"),
        (ROOT, {"uidmap": ["u0:100:20"]}, "0:100:20", "identity"),
        (ROOT, {"uidmap": ["u0:100:20", "g0:200:20"]}, "0:100:20", "0:200:20"),
        (ROOT, {"uidmap": ["0:@100:20"]}, "0:100:20", "0:100:20"),
        (USER, {"uidmap": ["u0:0:1"]}, "0:0:1", "0:0:1,1:1:65536"),
        (USER, {"gidmap": ["g5:0:1"]}, "0:0:1,1:1:65536", "5:0:1"),
        (USER, {"uidmap": ["+5:0:1"]}, "0:1:5,5:0:1,6:6:65531", "0:1:5,5:0:1,6:6:65531"),
        (USER, {"uidmap": ["u+5:@1500"]}, "0:1:5,5:0:1,6:6:65531", "0:0:1,1:1:65536"),
        (USER, {"uidmap": ["0:1:5", "+9:20:1"]}, "0:1:5,9:20:1", "0:1:5,9:20:1"),
        (USER, {"uidmap": ["0:@100005:3"]}, "0:6:3", "0:6:3"),
        (TWO_RANGES, {"uidmap": ["u0:@9009:1", "u1:@100000:2"]}, "0:10:3", "0:0:1,1:1:65536"),
    ],
)  # fmt: skip
def test_map_options_resolve_to_expected_maps(
    context: UsernsContext, options: t.Any, uid: str, gid: str
) -> None:
    assert maps(context, **options) == (uid, gid)


@pytest.mark.parametrize(
    ("context", "options", "message"),
    [
        (OLD_ROOT, {"userns": "keep-id"}, "podman 4.3.1 supports it only in rootless mode"),
        (ROOT, {"userns": "keep-id:size=5"}, "supports its option size only in rootless mode"),
        (OLD, {"userns": "keep-id:size=5"}, "podman 5.4"),
        (dataclasses.replace(OLD, available=NO_SUBIDS.available), {"userns": "keep-id"}, "needs subordinate IDs"),
        (NO_SUBIDS, {"userns": "nomap"}, "needs subordinate IDs"),
        (ROOT, {"userns": "nomap"}, "only in rootless mode"),
        (ROOT, {"userns": "auto"}, "depends on the image"),
        (OLD, {"uidmap": ["+0:1:1"]}, "podman 4.3.1 does not support flags in maps"),
        (OLD, {"uidmap": ["0:@1:1"]}, "podman 4.3.1 does not support flags in maps"),
        (OLD, {"uidmap": ["0:1"]}, "requires a count"),
        (OLD, {"uidmap": ["0:1:0"]}, "its count is 0"),
        (USER, {"uidmap": ["0:1:65537"]}, "does not have; it has 65537 of them"),
        (USER, {"uidmap": ["0:@99999:1"]}, "has only 0 of these 1 host UIDs"),
        (USER, {"uidmap": ["0:@165535:2"]}, "has only 1 of these 2 host UIDs"),
        (ROOT, {"uidmap": ["0:1:5", "4:100:5"]}, "overlap in their container IDs"),
        (ROOT, {"uidmap": ["0:1:0"]}, "do not map any ID"),
        (ROOT, {"subuidname": "alice"}, "cannot be looked up in this context"),
        (dataclasses.replace(ROOT, kinds=frozenset(("host",))), {"userns": "nomap"}, "is not supported by"),
        (dataclasses.replace(ROOT, gid_map_alone=False), {"gidmap": ["0:1:1"]}, "also requires a UID map"),
    ],
)  # fmt: skip
def test_unsupported_request_is_rejected(
    context: UsernsContext, options: t.Any, message: str
) -> None:
    with pytest.raises(MapError, match=message) as caught:
        maps(context, **options)
    assert caught.value.hint


def test_named_ranges_come_first_and_are_not_merged() -> None:
    def names(name: str, kind: str) -> tuple[SubIDRange, ...]:
        return {
            ("al", "uid"): (SubIDRange(500, 5), SubIDRange(100, 5)),
            ("al", "gid"): (SubIDRange(700, 5),),
            ("bo", "gid"): (SubIDRange(800, 5), SubIDRange(805, 5)),
        }[name, kind]

    context = dataclasses.replace(ROOT, named_ranges=names)
    assert maps(context, subuidname="al") == ("0:100:5,5:500:5", "0:700:5")
    assert maps(context, subgidname="al") == ("0:100:5,5:500:5", "0:700:5")
    assert maps(context, subuidname="al", subgidname="bo") == ("0:100:5,5:500:5", "0:800:5,5:805:5")
    assert maps(context, subuidname="al", uidmap=["10:505:2"]) == (
        "0:100:5,5:500:5,10:505:2",
        "0:700:5,10:505:2",
    )


def test_extras_of_auto_are_resolved() -> None:
    def extras(text: str, context: UsernsContext) -> Mapping:
        return resolve_auto_extras(parse_userns(text), context)

    both = extras("auto:uidmapping=5:6:2,gidmapping=9:1:1,uidmapping=1:9:1", USER)
    assert both == Mapping(IDMap.of((5, 6, 2), (1, 9, 1)), IDMap.of((9, 1, 1)))
    assert extras("auto:uidmapping=5:@1500", USER).uid == IDMap.of((5, 0, 1))
    assert extras("auto", OLD) == Mapping()
    with pytest.raises(MapError, match="does not support flags"):
        extras("auto:uidmapping=5:@1500:1", OLD)
    with pytest.raises(MapError, match="requires a count"):
        extras("auto:uidmapping=5:6", OLD)
    with pytest.raises(MapError, match="overlap"):
        extras("auto:uidmapping=5:6:1,uidmapping=5:7:1", USER)


# Properties

ITEMS = st.lists(
    st.builds(
        lambda flags, c, h, n: f"{flags}{c}:{h}:{n}",
        st.sampled_from(("", "+")),
        st.integers(0, 30),
        st.integers(0, 30),
        st.integers(1, 8),
    ),
    min_size=1,
    max_size=6,
)


@given(ITEMS)
def test_plus_entry_takes_ids_from_earlier_entries(items: list[str]) -> None:
    model: dict[int, int] = {}
    overlaps = False
    for text in items:
        item = parse_map_flags([text])[0]
        piece = {item.container_id + n: item.host_id + n for n in range(item.size or 0)}
        if item.extends:
            hosts = set(piece.values())
            model = {c: h for c, h in model.items() if c not in piece and h not in hosts}
        elif set(piece) & set(model) or set(piece.values()) & set(model.values()):
            overlaps = True
            break
        model.update(piece)
    if overlaps:
        # An overlap is rejected, unless a later entry removes it.
        if not any(text.startswith("+") for text in items):
            with pytest.raises(MapError, match="overlap"):
                maps(ROOT, uidmap=items)
        return
    idmap = parse_request(uidmap=items).resolve(ROOT).uid
    assert {c + n: h + n for c, h, size in idmap.ranges for n in range(size)} == model
    assert idmap == idmap.normal()


@given(st.integers(0, 30), st.integers(0, 20), st.integers(1, 10))
def test_leading_plus_entry_fills_map_of_user(container: int, host: int, size: int) -> None:
    available = namespace_mapping(
        1500, 1500, SubIDs((SubIDRange(7000, 40),), (SubIDRange(7000, 40),))
    )
    context = dataclasses.replace(USER, available=available)
    idmap = parse_request(uidmap=[f"+{container}:{host}:{size}"]).resolve(context).uid
    hosts = [h + n for _c, h, count in idmap.ranges for n in range(count)]
    assert sorted(hosts) == list(range(41))
    assert [idmap.to_host(container + n) for n in range(size)] == list(range(host, host + size))
    # All other IDs keep their order, and no container ID below the highest is skipped unless all
    # IDs are used up.
    others = [c for c in range(container) if idmap.to_host(c) is not None]
    assert others == list(range(min(container, 41 - size)))
    free = [h for h in range(41) if not host <= h < host + size]
    rest = [idmap.to_host(c) for c in range(100) if not container <= c < container + size]
    assert [h for h in rest if h is not None] == free


@given(st.integers(0, 70000), st.integers(0, 70000), st.one_of(st.none(), st.integers(1, 70000)))
def test_keep_id_maps_user_and_no_id_twice(uid: int, gid: int, size: int | None) -> None:
    text = f"keep-id:uid={uid},gid={gid}" + (f",size={size}" if size else "")
    mapping = parse_request(userns=text).resolve(USER)
    for idmap, kept in ((mapping.uid, uid), (mapping.gid, gid)):
        # If the size leaves no other ID, podman's map begins with an empty range.
        idmap.normal().validate()
        assert idmap.to_host(kept) == 0
        assert idmap.size == min(65536, 70000 if size is None else size - 1) + 1
        assert EVERYTHING.compose(idmap).size == idmap.size


@given(st.text(alphabet="0123456789:+ug@,= -abx", max_size=24))
def test_any_text_is_parsed_or_rejected(text: str) -> None:
    for context in (ROOT, USER, OLD):
        for options in ({"userns": text}, {"uidmap": [text]}):
            try:
                mapping = parse_request(**options).resolve(context)
            except MapError:
                continue
            mapping.uid.normal().validate()
            mapping.gid.normal().validate()
