# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of parsing ages, sizes and percentages."""

from __future__ import annotations

import pytest
from ansible.module_utils.common.text.formatters import human_to_bytes
from ansible_collections.userns.storage.plugins.module_utils._storage.errors import ConfigError
from ansible_collections.userns.storage.plugins.module_utils._storage.operations import (
    gc_policy,
    time_formats,
)
from hypothesis import given
from hypothesis import strategies as st

NOW = 1_800_000_000.0


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        ("90", 90),
        ("90s", 90),
        ("10m", 600),
        ("2H", 7200),
        ("3d", 259200),
        ("2w", 1209600),
        (" 2w ", 1209600),
    ],
)
def test_ages_are_parsed_like_those_of_find(text: str, seconds: int) -> None:
    assert time_formats.age("unused_for", text) == seconds


@pytest.mark.parametrize("text", ["", "w", "1.5d", "2 w", "1y", "1d12h", "-2w", "soon"])
def test_error_for_invalid_age_names_option(text: str) -> None:
    with pytest.raises(ConfigError, match="unused_for"):
        time_formats.age("unused_for", text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1d", NOW - 86400),
        ("2027-01-15", 1799971200.0),
        ("2027-01-15T08:00:00Z", NOW),
        ("2027-01-15T09:00:00+01:00", NOW),
        ("2027-01-15 08:00:00", NOW),
    ],
)
def test_created_before_accepts_age_or_date(text: str, seconds: float) -> None:
    assert gc_policy.moment("created_before", text, NOW) == seconds


@pytest.mark.parametrize("text", ["", "yesterday", "2027-13-01", "-1d"])
def test_error_for_invalid_date_names_option(text: str) -> None:
    with pytest.raises(ConfigError, match="created_before"):
        gc_policy.moment("created_before", text, NOW)


UNITS = [
    "",
    "b",
    "B",
    "k",
    "K",
    "KB",
    "m",
    "MB",
    "gigabyte",
    "G",
    "GB",
    "tB",
    "TB",
    "Kb",
    "x",
    "KX",
]


@given(
    number=st.one_of(
        st.integers(0, 10**6).map(str),
        st.decimals(0, 1000, places=2).map(str),
        st.sampled_from([".5", "", "-1", "1.", "ten"]),
    ),
    gap=st.sampled_from(["", " "]),
    unit=st.sampled_from(UNITS),
)
def test_sizes_are_parsed_like_human_to_bytes(number: str, gap: str, unit: str) -> None:
    text = number + gap + unit
    try:
        expected = human_to_bytes(text)
    except ValueError:
        with pytest.raises(ConfigError, match="max_freed"):
            gc_policy.size("max_freed", text)
    else:
        assert gc_policy.size("max_freed", text) == expected


@pytest.mark.parametrize(
    ("text", "number"), [("10KiB", 10240), ("1.5 MiB", 1572864), ("2GiB", 2 << 30)]
)
def test_binary_units_are_accepted(text: str, number: int) -> None:
    assert gc_policy.size("max_freed", text) == number


@pytest.mark.parametrize("text", ["10Kib", "10iB", "10BiB", "10 %", "1e3"])
def test_error_for_invalid_size_names_option(text: str) -> None:
    with pytest.raises(ConfigError, match="max_freed"):
        gc_policy.size("max_freed", text)


def test_amount_is_bytes_or_percentage_of_filesystem() -> None:
    assert gc_policy.amount("min_free_space", "10G").of(1) == 10 << 30
    assert gc_policy.amount("min_free_space", "12.5%").of(1000) == 125
    assert gc_policy.amount("min_free_space", "0%").of(1000) == 0
    with pytest.raises(ConfigError, match="between 0 and 100"):
        gc_policy.amount("min_free_space", "101%")


def test_low_threshold_must_be_below_high_threshold() -> None:
    assert gc_policy.thresholds(85, 80) == (85, 80)
    assert gc_policy.thresholds(None, None) == (None, None)
    with pytest.raises(ConfigError, match="not below high_threshold"):
        gc_policy.thresholds(80, 80)
    with pytest.raises(ConfigError, match="between 0 and 100"):
        gc_policy.thresholds(185, 80)


def test_negative_number_of_copies_is_rejected() -> None:
    assert gc_policy.copies("max_copies_per_image", 0) == 0
    with pytest.raises(ConfigError, match="max_copies_per_image"):
        gc_policy.copies("max_copies_per_image", -1)
