# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of the plan for the content of a user's shared store."""

from __future__ import annotations

import json
import typing as t
from dataclasses import replace

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.errors import MapError
from ansible_collections.userns.storage.plugins.module_utils._storage.idmap.mapping import (
    UNMAPPED,
    Mapping,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.idmap.ranges import IDMap
from ansible_collections.userns.storage.plugins.module_utils._storage.operations.shared_content import (
    Mount,
    Planner,
    User,
    Wish,
    view_of,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.operations.shared_pins import (
    PIN,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.store.records import (
    Image,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.store.shared_store import (
    derived_layer_id,
    short_name,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.store.snapshot import Snapshot
from hypothesis import given
from hypothesis import strategies as st
from support.made_records import image_record, layer_record, snapshot_of

OUTER = Mapping(
    IDMap.of((0, 1000, 1), (1, 100000, 65536)), IDMap.of((0, 1000, 1), (1, 100000, 65536))
)
KEEP = Mapping(
    IDMap.of((0, 1, 1000), (1000, 0, 1), (1001, 1001, 64536)),
    IDMap.of((0, 1, 1000), (1000, 0, 1), (1001, 1001, 64536)),
)
BASE, TOP, IMAGE = "a" * 64, "b" * 64, "c" * 64


def snapshot(**more: t.Any) -> t.Tuple[Snapshot, Image]:
    names = ["localhost/app:1", f"{PIN}:{IMAGE[:12]}"]
    image = image_record(IMAGE, TOP, names=names, **{"mapped-layers": ["d" * 64]})
    owners: t.Dict[str, t.Any] = {"uidset": [0, 1000], "gidset": [0]}
    top = layer_record(TOP, BASE, **{**owners, **more})
    return snapshot_of(layer_record(BASE, **owners), top, image), image


def make_plan(
    mappings: t.Sequence[Mapping], whole: bool = True, most: int = 500, **more: t.Any
) -> t.Any:
    found, image = snapshot(**more)
    planner = Planner(
        found, "/real/overlay", lambda layer_id: f"/copies/{layer_id}", lambda _image: {}
    )
    return planner.plan(User("alice", OUTER, most), [Wish(image, list(mappings))], whole)


@st.composite
def maps(draw: st.DrawFn) -> IDMap:
    """Maps without overlaps that cover the container IDs from 0 without gaps."""
    sizes = draw(st.lists(st.integers(1, 300), min_size=1, max_size=4))
    gaps = draw(st.lists(st.integers(0, 50), min_size=len(sizes), max_size=len(sizes)))
    order = draw(st.permutations(range(len(sizes))))
    hosts, position = {}, draw(st.integers(0, 100))
    for index in order:
        hosts[index] = position + gaps[index]
        position = hosts[index] + sizes[index]
    entries, inside = [], 0
    for index, size in enumerate(sizes):
        entries.append((inside, hosts[index], size))
        inside += size
    return IDMap.of(*entries)


@given(maps(), maps(), maps(), st.integers(0, 1200))
def test_view_shows_owners_of_user_namespace(
    outer: IDMap, inner: IDMap, stored: IDMap, container_id: int
) -> None:
    view = view_of(Mapping(outer, outer), Mapping(inner, inner), Mapping(stored, stored))
    on_disk = stored.to_host(container_id)
    middle = inner.to_host(container_id)
    expected = None if middle is None else outer.to_host(middle)
    if on_disk is not None:
        assert view.uid.to_host(on_disk) == expected
        assert view.gid.to_host(on_disk) == expected


def test_plan_has_plain_and_mapped_layers() -> None:
    plan = make_plan([KEEP])
    assert plan.refusals == []
    layers = {layer.layer_id: layer for layer in plan.content.layers}
    assert layers[TOP].lowers == (BASE,)
    assert "uidmap" not in json.loads(layers[TOP].record)
    (image,) = plan.content.images
    record = json.loads(image.record)
    # The record has the names of the real store except the pin, and only the mapped layers of this plan.
    assert record["names"] == ["localhost/app:1"]
    (mapped_id,) = record["mapped-layers"]
    mapped = layers[mapped_id]
    assert mapped.source == TOP
    assert json.loads(mapped.record)["parent"] == BASE
    assert json.loads(mapped.record)["uidmap"] == KEEP.uid.to_record()
    # The layer below also has other owners, and no record.
    (below,) = mapped.lowers
    assert layers[below].source == BASE
    assert layers[below].record == b""
    assert layers[below].view == mapped.view != layers[TOP].view
    assert len(plan.mounts) == 2
    assert all(mount.layer_id == "" for mount in plan.mounts)


def test_single_layers_are_mounted_if_others_must_be_hidden() -> None:
    plan = make_plan([KEEP], whole=False)
    assert {mount.layer_id for mount in plan.mounts} == {BASE, TOP}
    assert len(plan.mounts) == 4


def test_layer_with_own_map_gets_own_mount() -> None:
    stored = IDMap.of((0, 200000, 65536)).to_record()
    plan = make_plan([], uidmap=stored, gidmap=stored)
    layers = {layer.layer_id: layer for layer in plan.content.layers}
    assert layers[TOP].view != layers[BASE].view
    assert "uidmap" not in json.loads(layers[TOP].record)
    assert len(plan.mounts) == 2


def test_plan_is_deterministic() -> None:
    assert make_plan([KEEP]) == make_plan([KEEP])
    assert make_plan([KEEP]).content != make_plan([Mapping(OUTER.uid, OUTER.gid)]).content


def test_ids_outside_user_namespace_are_refused() -> None:
    plan = make_plan([KEEP], uidset=[70000])
    assert plan.content.images == ()
    (refusal,) = plan.refusals
    assert isinstance(refusal.error, MapError)
    assert "70000" in str(refusal.error)
    small = Mapping(IDMap.of((0, 1, 10)), IDMap.of((0, 1, 10)))
    plan = make_plan([small])
    assert [refusal.mapping for refusal in plan.refusals] == [small]
    assert len(plan.content.images) == 1


def test_image_with_too_many_layers_is_refused() -> None:
    plan = make_plan([], most=1)
    assert plan.content.images == ()
    assert "2 layers" in str(plan.refusals[0].error)


def test_image_is_refused_if_user_has_its_layer_with_map() -> None:
    found, image = snapshot()
    planner = Planner(found, "/real/overlay", lambda _layer: "", lambda _image: {})
    own = User("alice", OUTER, 500, mapped={BASE: "localhost/own:1"})
    plan = planner.plan(own, [Wish(image)], True)
    assert plan.content.images == ()
    assert plan.mounts == []
    assert "localhost/own:1 of user alice" in str(plan.refusals[0].error)
    # Containers use the image in the user's own store, or the image is already shared.
    plan = planner.plan(replace(own, images=frozenset((IMAGE,))), [Wish(image)], True)
    assert plan.refusals == []


def test_image_that_is_no_longer_offered_has_no_name() -> None:
    found, image = snapshot()
    planner = Planner(found, "/real/overlay", lambda _layer: "", lambda _image: {})
    plan = planner.plan(User("alice", OUTER, 500), [Wish(image, [], offered=False)], True)
    assert "names" not in json.loads(plan.content.images[0].record)


@given(st.text(), st.text())
def test_derived_ids_are_stable_and_not_numeric(first: str, second: str) -> None:
    derived = derived_layer_id(first, second)
    assert derived == derived_layer_id(first, second)
    assert not derived[:12].isdigit()
    assert len(short_name(derived)) == 8


def test_view_name_depends_on_source_and_maps() -> None:
    plain, keep = view_of(OUTER, UNMAPPED, UNMAPPED), view_of(OUTER, KEEP, UNMAPPED)
    names = {view.name(source) for view in (plain, keep) for source in ("/one", "/two")}
    assert len(names) == 4
    assert plain.name("/one") == view_of(OUTER, UNMAPPED, UNMAPPED).name("/one")
    assert Mount(plain) != Mount(plain, TOP)


@pytest.mark.parametrize("kind", ["uid", "gid"])
def test_maps_beyond_kernel_limit_are_refused(kind: str) -> None:
    many = IDMap.of(*((index, 2 * index, 1) for index in range(400)))
    wide = IDMap.of((0, 0, 1000))
    mapping = Mapping(many, wide) if kind == "uid" else Mapping(wide, many)
    with pytest.raises(MapError, match="340"):
        view_of(Mapping(wide, wide), mapping, UNMAPPED)
