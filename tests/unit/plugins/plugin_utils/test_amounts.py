# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of the formatting of bytes and seconds."""

from __future__ import annotations

import pytest
from ansible_collections.userns.storage.plugins.plugin_utils._amounts import duration, human


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (12_000_000, "11.4 MiB"),
        (437 << 20, "437 MiB"),
        (1536 << 20, "1.5 GiB"),
        (5000 << 40, "5000 TiB"),
    ],
)
def test_sizes_are_formatted(number: float, expected: str) -> None:
    assert human(number) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"), [(5, "5 s"), (89.4, "89 s"), (100, "2 min"), (7500, "2 h 5 min")]
)
def test_durations_are_formatted(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected
