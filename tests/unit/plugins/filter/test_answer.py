# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Answers of surveys, as texts and as what ansible-core 2.19 and later make of them."""

from __future__ import annotations

import typing as t

import pytest
from ansible_collections.userns.storage.plugins.filter.answer import answer
from ansible_collections.userns.storage.plugins.plugin_utils._texts import lines, words


@pytest.mark.parametrize(
    ("value", "wanted"),
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
def test_answers(value: t.Any, wanted: t.Any) -> None:
    assert answer(value, "default", "off") == wanted


def test_lists_in_answers() -> None:
    assert words("none") == words(None) == words("") == lines("none") == []
    # In a list, it is a name like any other.
    assert words(["none"]) == ["none"]
    assert words(1000) == ["1000"]
