# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of formatting and parsing times and ages."""

from __future__ import annotations

import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.operations.time_formats import (
    format_age,
    format_time,
    from_rfc3339,
    is_moment,
)
from hypothesis import given
from hypothesis import strategies as st


@given(st.integers(0, 4_000_000_000))
def test_formatted_time_can_be_parsed(timestamp: int) -> None:
    assert from_rfc3339(format_time(timestamp)) == timestamp


@given(st.floats())
def test_any_number_can_be_formatted(timestamp: float) -> None:
    assert from_rfc3339(format_time(timestamp)) is not None


@given(st.text(alphabet="0123456789-:.TZ+", max_size=40) | st.datetimes().map(str))
def test_any_text_is_parsed_or_rejected(text: str) -> None:
    for end in ("", "Z", "+23:59", "-23:59"):
        found = from_rfc3339(text + end)
        assert found is None or format_time(found)
    is_moment(text)


def test_times_are_limited_to_first_and_last_time() -> None:
    assert format_time(253402300799.9999) == "9999-12-31T23:59:59Z"
    assert format_time(1e300) == "9999-12-31T23:59:59Z"
    assert format_time(-1e300) == "0001-01-01T00:00:00Z"


@pytest.mark.parametrize(
    ("text", "timestamp"),
    [
        ("1970-01-01T00:01:00Z", 60.0),
        ("1970-01-01T00:01:00.123456789Z", 60.0),
        ("1970-01-01T01:01:00+01:00", 60.0),
        ("1970-01-01T00:01:00", None),
        ("soon", None),
        ("", None),
    ],
)
def test_only_times_with_zone_are_parsed(text: str, timestamp: t.Optional[float]) -> None:
    assert from_rfc3339(text) == timestamp


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 seconds"),
        (119, "119 seconds"),
        (120, "2 minutes"),
        (600, "10 minutes"),
        (86400, "24 hours"),
        (172800, "2 days"),
        (1209600, "2 weeks"),
    ],
)
def test_ages_are_rounded_down_to_whole_units(seconds: float, text: str) -> None:
    assert format_age(seconds) == text
