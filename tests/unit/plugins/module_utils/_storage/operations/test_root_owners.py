# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of the owners of the root directory and its entries in a mapped layer, with a driver that reads a table."""

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
HIGH_RANGE = ((0, 100000, 65536),)
# The map that podman records for keep-id of UID 1000, in IDs of the user's namespace.
KEEP_ID = ((0, 1, 1000), (1000, 0, 1), (1001, 1001, 64536))


def inspect_layer(
    copy: Names, ranges: t.Sequence[t.Tuple[int, int, int]], with_template: bool = True
) -> t.Any:
    table = {COPY: copy, TEMPLATE: IMAGE}
    reads: t.List[str] = []

    def owners(chain: t.Sequence[str]) -> Names:
        assert chain[1:] == ([BASE] if with_template else [])
        reads.append(chain[0])
        return table[chain[0]]

    def layer(name: str, *ranges: t.Tuple[int, int, int]) -> Layer:
        idmap = IDMap.of(*ranges)
        raw = {"id": name, "uidmap": idmap.to_record(), "gidmap": idmap.to_record()}
        return parse(json.dumps([raw]).encode(), Layer, "layers.json")[0]

    driver = t.cast(Driver, types.SimpleNamespace(top_owners=owners))
    template = [layer(TEMPLATE), layer(BASE)] if with_template else []
    found = top_owners(driver, layer(COPY, *ranges), template)
    return found.outside, found.kept, reads


def mapped_names(ids: t.Mapping[int, int], *unmapped: str) -> Names:
    return [
        (name, uid, gid) if name in unmapped else (name, ids[uid], ids[gid])
        for name, uid, gid in IMAGE
    ]


@pytest.mark.parametrize(
    ("ranges", "ids", "reads"),
    [
        (HIGH_RANGE, {0: 100000, 1000: 101000}, [COPY]),
        # Correct owners may also be owners in the image, so the template is read.
        (KEEP_ID, {0: 1, 1000: 0}, [COPY, TEMPLATE]),
    ],
)
def test_mapped_layer_has_no_findings(
    ranges: t.Sequence[t.Tuple[int, int, int]], ids: t.Mapping[int, int], reads: t.Sequence[str]
) -> None:
    assert inspect_layer(mapped_names(ids), ranges) == ("", "", reads)


def test_unmapped_names_are_listed_individually() -> None:
    outside, kept, _reads = inspect_layer(
        mapped_names({0: 100000, 1000: 101000}, "", "a"), HIGH_RANGE
    )
    assert outside == "outside its map: / belongs to 0:0, /a belongs to 0:0"
    assert kept == ""


@pytest.mark.parametrize("ranges", [HIGH_RANGE, KEEP_ID])
def test_layer_with_owners_of_image_is_reported(ranges: t.Sequence[t.Tuple[int, int, int]]) -> None:
    root = ("", ranges[0][1], ranges[0][1])
    kept = inspect_layer((root, *IMAGE[1:]), ranges)[1]
    assert kept == (
        "its owners are still the owners of the image: /a belongs to 0:0, /etc belongs to 0:0, "
        "/home belongs to 1000:1000"
    )


def test_owners_that_map_does_not_change_are_accepted() -> None:
    assert inspect_layer(IMAGE, ((0, 0, 65536),))[:2] == ("", "")


def test_layer_without_map_is_not_read() -> None:
    assert inspect_layer(IMAGE, ()) == ("", "", [])


def test_owners_are_not_compared_without_template() -> None:
    outside, kept, reads = inspect_layer(IMAGE, HIGH_RANGE, with_template=False)
    assert outside.endswith("/home belongs to 1000:1000")
    assert (kept, reads) == ("", [COPY])


def is_wrong(names: Names) -> bool:
    driver = t.cast(Driver, types.SimpleNamespace(top_owners=lambda chain: names))
    idmap = IDMap.of(*HIGH_RANGE).to_record()
    record = {"id": COPY, "uidmap": idmap, "gidmap": idmap}
    (layer,) = parse(json.dumps([record]).encode(), Layer, "layers.json")
    return top_owners(driver, layer, ()).wrong


def test_layer_is_not_wrong_because_of_root_directory_alone() -> None:
    ids = {0: 100000, 1000: 101000}
    assert not is_wrong(mapped_names(ids))
    assert not is_wrong(mapped_names(ids, ""))
    assert is_wrong(mapped_names(ids, "a"))


def test_list_of_names_is_limited() -> None:
    many = [("", 0, 0), *((f"name{number}", 0, 0) for number in range(9))]
    assert inspect_layer(many, HIGH_RANGE)[0].endswith("/name3 belongs to 0:0 and 5 more")
