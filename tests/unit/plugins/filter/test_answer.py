# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of answers in surveys: as text, and as the types to which ansible-core 2.19 and later convert it."""

from __future__ import annotations

import typing as t

import pytest
from ansible_collections.userns.storage.plugins.filter.answer import answer
from ansible_collections.userns.storage.plugins.plugin_utils._texts import lines, words


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "default"),
        ("", "default"),
        (" \n", "default"),
        ("none", "off"),
        ("None", "off"),
        (0, "0"),
        ("0", "0"),
        (1.5, "1.5"),
        (True, True),
        (["none"], ["none"]),
        ("none,other", "none,other"),
    ],
)
def test_answer_selects_default_off_or_value(value: t.Any, expected: t.Any) -> None:
    assert answer(value, "default", "off") == expected


def test_none_is_an_empty_list_unless_it_is_in_a_list() -> None:
    assert words("none") == words(None) == words("") == lines("none") == []
    # In a list, it is an ordinary name.
    assert words(["none"]) == ["none"]
    assert words(1000) == ["1000"]
