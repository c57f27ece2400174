# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whose the top of a mapped layer's tree is; a driver that answers from a table stands in for the disk."""

from __future__ import annotations

import json
import types
import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.drivers.base import Driver
from ansible_collections.userns.storage.plugins.module_utils._storage.idmap.ranges import IDMap
from ansible_collections.userns.storage.plugins.module_utils._storage.operations.root_owners import (
    top_owners,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.store.records import (
    Layer,
    parse,
)

COPY, TEMPLATE, BASE = ("c" * 64, "d" * 64, "e" * 64)
Names = t.Sequence[t.Tuple[str, int, int]]
IMAGE: Names = (("", 0, 0), ("a", 0, 0), ("etc", 0, 0), ("home", 1000, 1000))
FAR = ((0, 100000, 65536),)
# As podman's keep-id of UID 1000 writes it, in IDs of the user's namespace.
KEEP_ID = ((0, 1, 1000), (1000, 0, 1), (1001, 1001, 64536))


def look(copy: Names, ranges: t.Sequence[t.Tuple[int, int, int]], known: bool = True) -> t.Any:
    table = {COPY: copy, TEMPLATE: IMAGE}
    reads: t.List[str] = []

    def owners(chain: t.Sequence[str]) -> Names:
        assert chain[1:] == ([BASE] if known else [])
        reads.append(chain[0])
        return table[chain[0]]

    def layer(name: str, *ranges: t.Tuple[int, int, int]) -> Layer:
        both = IDMap.of(*ranges)
        raw = {"id": name, "uidmap": both.to_record(), "gidmap": both.to_record()}
        return parse(json.dumps([raw]).encode(), Layer, "layers.json")[0]

    driver = t.cast(Driver, types.SimpleNamespace(top_owners=owners))
    template = [layer(TEMPLATE), layer(BASE)] if known else []
    found = top_owners(driver, layer(COPY, *ranges), template)
    return found.outside, found.kept, reads


def moved(by: t.Mapping[int, int], *forgotten: str) -> Names:
    return [
        (name, uid, gid) if name in forgotten else (name, by[uid], by[gid])
        for name, uid, gid in IMAGE
    ]


@pytest.mark.parametrize(
    ("ranges", "by", "reads"),
    [
        (FAR, {0: 100000, 1000: 101000}, [COPY]),
        # Here the right owners might as well be the image's.
        (KEEP_ID, {0: 1, 1000: 0}, [COPY, TEMPLATE]),
    ],
)
def test_a_layer_that_was_mapped(
    ranges: t.Sequence[t.Tuple[int, int, int]], by: t.Mapping[int, int], reads: t.Sequence[str]
) -> None:
    assert look(moved(by), ranges) == ("", "", reads)


def test_unmapped_names_are_listed_individually() -> None:
    outside, kept, _reads = look(moved({0: 100000, 1000: 101000}, "", "a"), FAR)
    assert outside == "outside its map: / belongs to 0:0, /a belongs to 0:0"
    assert kept == ""


@pytest.mark.parametrize("ranges", [FAR, KEEP_ID])
def test_a_layer_in_which_nothing_was_mapped(ranges: t.Sequence[t.Tuple[int, int, int]]) -> None:
    root = ("", ranges[0][1], ranges[0][1])
    kept = look((root, *IMAGE[1:]), ranges)[1]
    assert kept == (
        "its owners are still the owners of the image: /a belongs to 0:0, /etc belongs to 0:0, "
        "/home belongs to 1000:1000"
    )


def test_owners_that_the_map_does_not_change_may_be_the_images() -> None:
    assert look(IMAGE, ((0, 0, 65536),))[:2] == ("", "")


def test_without_a_map_nothing_is_looked_at() -> None:
    assert look(IMAGE, ()) == ("", "", [])


def test_without_a_template_no_owner_is_taken_for_its() -> None:
    outside, kept, reads = look(IMAGE, FAR, known=False)
    assert outside.endswith("/home belongs to 1000:1000")
    assert (kept, reads) == ("", [COPY])


def wrong(names: Names) -> bool:
    driver = t.cast(Driver, types.SimpleNamespace(top_owners=lambda chain: names))
    both = IDMap.of(*FAR).to_record()
    record = {"id": COPY, "uidmap": both, "gidmap": both}
    (layer,) = parse(json.dumps([record]).encode(), Layer, "layers.json")
    return top_owners(driver, layer, ()).wrong


def test_a_root_directory_alone_makes_no_layer_wrong() -> None:
    by = {0: 100000, 1000: 101000}
    assert not wrong(moved(by))
    assert not wrong(moved(by, ""))
    assert wrong(moved(by, "a"))


def test_only_a_few_of_many_names_are_listed() -> None:
    many = [("", 0, 0), *((f"name{number}", 0, 0) for number in range(9))]
    assert look(many, FAR)[0].endswith("/name3 belongs to 0:0 and 5 more")
