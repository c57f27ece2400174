# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Moments and ages in words."""

from __future__ import annotations

import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.operations.moments import (
    from_rfc3339,
    say,
    say_age,
)
from hypothesis import given
from hypothesis import strategies as st


@given(st.integers(0, 4_000_000_000))
def test_what_is_said_is_read_again(moment: int) -> None:
    assert from_rfc3339(say(moment)) == moment


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("1970-01-01T00:01:00Z", 60.0),
        ("1970-01-01T00:01:00.123456789Z", 60.0),
        ("1970-01-01T01:01:00+01:00", 60.0),
        ("1970-01-01T00:01:00", None),
        ("soon", None),
        ("", None),
    ],
)
def test_only_moments_with_a_zone_are_read(text: str, moment: t.Optional[float]) -> None:
    assert from_rfc3339(text) == moment


@pytest.mark.parametrize(
    ("seconds", "words"),
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
def test_ages_are_cut_to_a_whole_number(seconds: float, words: str) -> None:
    assert say_age(seconds) == words
