# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Tests of variables that are entered as text."""

from __future__ import annotations

import typing as t

import pytest
from ansible_collections.userns.storage.plugins.plugin_utils import _texts


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, []),
        ("", []),
        ("alice", ["alice"]),
        (" alice, bob\ncarol\r\n", ["alice", "bob", "carol"]),
        (["alice", "bob carol"], ["alice", "bob", "carol"]),
    ],
)
def test_text_is_split_into_words(value: t.Any, expected: t.List[str]) -> None:
    assert _texts.words(value) == expected


def test_words_of_another_type_are_rejected() -> None:
    with pytest.raises(ValueError, match="neither a text"):
        _texts.words({"a": 1})


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("", []),
        ("keep-id", [{"userns": "keep-id"}]),
        ("keep-id:uid=1000,gid=1000", [{"userns": "keep-id:uid=1000,gid=1000"}]),
        ("auto:size=4096 slots=3; nomap", [{"userns": "auto:size=4096", "slots": 3}, {"userns": "nomap"}]),
        ("0:100000:65536", [{"uidmap": ["0:100000:65536"]}]),
        (
            "0:1:1000,1000:0:1/0:5:10\n+u1:@2:1",
            [{"uidmap": ["0:1:1000", "1000:0:1"], "gidmap": ["0:5:10"]}, {"uidmap": ["+u1:@2:1"]}],
        ),
        ('subuidname=web runtime="podman 5.4.2"', [{"subuidname": "web", "runtime": "podman 5.4.2"}]),
        (
            ["keep-id", {"userns": "auto", "uidmap": None, "slots": 2}],
            [{"userns": "keep-id"}, {"userns": "auto", "slots": 2}],
        ),
    ],
)  # fmt: skip
def test_mappings_are_parsed(value: t.Any, expected: t.List[t.Dict[str, t.Any]]) -> None:
    assert _texts.mappings(value) == expected


@pytest.mark.parametrize(
    "value", ["keepid", "keep-id 3", "slots=two", [7], 7, "keep-id colour=red"]
)
def test_invalid_mappings_are_rejected(value: t.Any) -> None:
    with pytest.raises(ValueError, match="mapping|neither|invalid literal"):
        _texts.mappings(value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("", {}),
        (
            "alice unused_for=2w keep_images='a:* b:*'; root max_copies_per_image=1\nalice unused_for=",
            {"alice": {"unused_for": "", "keep_images": "a:* b:*"}, "root": {"max_copies_per_image": "1"}},
        ),
        ({"alice": {"duplicates": True}}, {"alice": {"duplicates": True}}),
    ],
)  # fmt: skip
def test_policies_are_parsed(value: t.Any, expected: t.Dict[str, t.Dict[str, t.Any]]) -> None:
    assert _texts.policies(value) == expected


@pytest.mark.parametrize("value", ["unused_for=2w", "alice 2w", [7], 7, {"alice": "2w"}])
def test_invalid_policies_are_rejected(value: t.Any) -> None:
    with pytest.raises(ValueError, match="policy|neither|options"):
        _texts.policies(value)
