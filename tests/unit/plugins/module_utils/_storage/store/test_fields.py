# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests that the check of many records at once accepts no record that the check of one record rejects."""

from __future__ import annotations

import typing as t

from ansible_collections.userns.storage.plugins.module_utils._storage.store import fields
from hypothesis import given
from hypothesis import strategies as st

GOOD: t.Dict[str, t.Any] = {
    "id": "a" * 64,
    "parent": "",
    "names": ["b"],
    "created": "2026-01-01T00:00:00Z",
    "diff-size": 5,
    "uidset": [0, 1000],
    "gidset": None,
    "flags": {"incomplete": True},
    "uidmap": [{"container_id": 0, "host_id": 1, "size": 1}],
}
values = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 2**32, 2**63, "", "a" * 64, "A" * 64, "2026-01-01T00:00:00+01:00"]),
    st.lists(st.sampled_from([0, 1, True, -1, 2**32, "a", None]), max_size=3),
    st.dictionaries(st.sampled_from(["size", "a"]), st.sampled_from([1, 2**63, "b"]), max_size=2),
)
record = st.one_of(
    st.just(GOOD),
    st.builds(
        lambda changes: {**GOOD, **changes},
        st.dictionaries(st.sampled_from([*GOOD, "Names", "other"]), values, max_size=2),
    ),
    st.builds(
        lambda omitted: {key: value for key, value in GOOD.items() if key != omitted},
        st.sampled_from(sorted(GOOD)),
    ),
)


@given(st.lists(record, max_size=6))
def test_bulk_check_accepts_only_records_without_faults(
    records: t.List[t.Dict[str, t.Any]],
) -> None:
    if fields.all_good(records, fields.LAYER):
        assert [fields.first_fault(item, fields.LAYER) for item in records] == [None] * len(records)


def test_bulk_check_accepts_records_of_runtimes() -> None:
    others = [{**GOOD, "id": digit * 64, "parent": "a" * 64} for digit in "bcdef"]
    assert fields.all_good([*others, {"id": "0" * 64}], fields.LAYER)
    assert not fields.all_good([*others, {"id": ""}], fields.LAYER)
    assert not fields.all_good([*others, "a"], fields.LAYER)
