# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of userns=auto: size by version, allocated IDs, and slots."""

from __future__ import annotations

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.capabilities import (
    capabilities,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.errors import MapError
from ansible_collections.userns.storage.plugins.module_utils._storage.idmap.mapping import Mapping
from ansible_collections.userns.storage.plugins.module_utils._storage.idmap.ranges import IDMap
from ansible_collections.userns.storage.plugins.module_utils._storage.idmap.subids import (
    SubIDRange,
    SubIDs,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.runtime.auto import (
    ImageIDs,
    accounts_size,
    allocate,
    available_ids,
    image_ids,
    namespace_size,
    slots,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.runtime.detect import runtime
from ansible_collections.userns.storage.plugins.module_utils._storage.store.config import AutoUserns
from hypothesis import given
from hypothesis import strategies as st

OLD = runtime("podman", "4.3.1")
NEW = runtime("podman", "5.4.2")
LIMITS = AutoUserns()


@pytest.mark.parametrize(
    ("passwd", "group", "started_group", "old", "middle", "new"),
    [
        (None, None, None, 0, 0, 0),
        ("root:x:0:0:::\n", "root:x:0:\n", None, 0, 0, 0),
        ("app:x:1500:20:::\n", None, None, 1500, 1500, 1501),
        # An ID that equals the current size is ignored.
        ("app:x:1500:1501:::\n", None, None, 1501, 1501, 1501),
        ("app:x:1500:1502:::\n", None, None, 1502, 1502, 1503),
        ("nobody:x:70000:70000:::\n", "nogroup:x:70000:\n", None, 0, 0, 0),
        ("other:x:65534:65534:::\n", None, None, 65534, 0, 0),
        (None, "team:x:2500:\n", None, 0, 0, 2501),
        (None, "team:x:2500:\n", "nogroup:x:65534:\nlocal:x:1700:\n", 65534, 1700, 2501),
        ("app:x:12x:30:::\n\n \n:::\nshort\nhalf:x:40\n", None, None, 40, 40, 41),
    ],
)
def test_size_from_accounts_depends_on_version(
    passwd: str | None,
    group: str | None,
    started_group: str | None,
    old: int,
    middle: int,
    new: int,
) -> None:
    image = ImageIDs(-1, passwd, group, started_group)
    assert accounts_size(capabilities("podman", (4, 3), (1, 43, 0)), image) == old
    assert accounts_size(capabilities("podman", (5, 2), (1, 55, 0)), image) == middle
    assert accounts_size(capabilities("podman", (5, 3), (1, 56, 0)), image) == new


def test_namespace_size_depends_on_image_limits_and_user() -> None:
    image = image_ids([[0, 33], [], [5000]], {"etc/passwd": "a:x:1500:1500::"}.get)
    assert image == ImageIDs(5000, "a:x:1500:1500::", None, None)
    assert namespace_size(NEW, LIMITS, image) == 5001
    assert namespace_size(NEW, LIMITS, ImageIDs()) == 1024
    assert namespace_size(NEW, AutoUserns(1, 65536), ImageIDs()) == 1
    assert namespace_size(NEW, LIMITS, image, size=7) == 7
    assert namespace_size(NEW, LIMITS, ImageIDs(), user="3000:app") == 3001
    assert namespace_size(NEW, LIMITS, ImageIDs(), user="app:3000") == 3001
    assert namespace_size(runtime("buildah", "1.39"), LIMITS, ImageIDs(), user="3000") == 1024
    assert namespace_size(runtime("cri-o", "1.30"), LIMITS, image) == 65536


def test_image_above_maximum_size_is_rejected() -> None:
    with pytest.raises(MapError, match=r"needs 70001 IDs.*auto:size=70001"):
        namespace_size(NEW, LIMITS, ImageIDs(70000))
    assert namespace_size(NEW, AutoUserns(1024, 0), ImageIDs(70000)) == 70001


def test_available_ids_of_rootful_and_rootless_stores() -> None:
    subids = SubIDs((SubIDRange(500, 10), SubIDRange(100, 10), SubIDRange(110, 5)), ())
    assert available_ids(False, subids) == ([(100, 115), (500, 510)], [])
    assert available_ids(True, subids) == ([(1, 26)], [(1, 1)])


def test_lowest_free_ids_are_allocated() -> None:
    spans = ([(100, 200)], [(1000, 1010), (2000, 2100)])
    used = [Mapping(IDMap.of((0, 100, 5), (5, 110, 5)), IDMap.of((0, 5, 1)))]
    mapping = allocate(20, spans, used)
    assert str(mapping.uid) == "0:105:5,5:115:15"
    assert str(mapping.gid) == "0:1000:10,10:2000:10"


def test_extras_come_last_and_are_not_allocated() -> None:
    extra = Mapping(IDMap.of((5, 102, 2), (0, 7, 1)), IDMap())
    mapping = allocate(10, ([(100, 200)], [(1, 100)]), [], extra)
    assert str(mapping.uid) == "1:100:2,3:104:2,7:106:3,5:102:2,0:7:1"
    assert str(mapping.gid) == "0:1:10"


def test_too_few_free_ids_are_reported() -> None:
    keep = Mapping(IDMap.of((0, 1, 1500), (1500, 0, 1), (1501, 1501, 64036)), IDMap())
    with pytest.raises(
        MapError, match=r"needs 1024 free UIDs, but the store has only 0 left of 65536"
    ):
        allocate(1024, ([(1, 65537)], [(1, 65537)]), [keep])


def test_running_containers_count_as_slots() -> None:
    spans = ([(100, 1000)], [(100, 1000)])
    first, second, third = slots(3, 100, spans, [])
    assert [str(item.uid) for item in (first, second, third)] == [
        "0:100:100",
        "0:200:100",
        "0:300:100",
    ]
    other = Mapping(IDMap.of((0, 400, 100)), IDMap.of((0, 400, 100)))
    keep = Mapping(IDMap.of((0, 1, 99), (99, 0, 1)), IDMap.of((0, 1, 99), (99, 0, 1)))
    assert set(slots(3, 100, spans, [second, other], [second])) == {first, second, third}
    assert set(slots(3, 100, spans, [second, keep], [second, keep])) == {first, second, third}
    assert slots(1, 100, spans, [first, second], [first, second]) == [first]
    assert str(slots(5, 100, spans, [other])[3].uid) == "0:500:100"


def test_error_states_number_of_possible_slots() -> None:
    spans = ([(1, 65537)], [(1, 65537)])
    with pytest.raises(MapError) as caught:
        slots(100, 4096, spans, [])
    assert "100 slots of 4096 IDs each exceed the free IDs, only 16 are possible" in str(
        caught.value
    )
    assert "Set slots to 16, use smaller namespaces (auto:size=N)" in str(caught.value)
    assert "keep-id" not in str(caught.value)
    assert caught.value.facts == {"wanted": 4096, "free": 0}
    whole = Mapping(IDMap.of((0, 1, 65536)), IDMap.of((0, 1, 65536)))
    with pytest.raises(MapError) as caught:
        slots(2, 4096, spans, [whole])
    assert "only 0 are possible" in str(caught.value)
    assert "Set slots" not in str(caught.value)
    assert "set a size for the containers with keep-id" in str(caught.value)


SPANS = st.lists(st.tuples(st.integers(0, 200), st.integers(1, 30)), max_size=6)


@given(SPANS, SPANS, st.integers(1, 60))
def test_requested_number_of_free_ids_is_allocated_in_order(
    owned: list[tuple[int, int]], taken: list[tuple[int, int]], size: int
) -> None:
    subids = SubIDs(tuple(SubIDRange(*item) for item in owned), (SubIDRange(0, 1000),))
    used = [Mapping(IDMap.of((0, start, count)), IDMap()) for start, count in taken]
    free = {start + n for start, count in owned for n in range(count)}
    free -= {start + n for start, count in taken for n in range(count)}
    spans = available_ids(False, subids)
    if len(free) < size:
        with pytest.raises(MapError, match=f"has only {len(free)} left"):
            allocate(size, spans, used)
        return
    idmap = allocate(size, spans, used).uid
    idmap.validate()
    assert [idmap.to_host(number) for number in range(size)] == sorted(free)[:size]
    assert idmap.size == size
    assert idmap == idmap.normal()
