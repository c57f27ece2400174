# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The ledger: what was seen when, kept with few writes and lost without harm."""

from __future__ import annotations

import json
import os
import pathlib
import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.idmap.mapping import Mapping
from ansible_collections.userns.storage.plugins.module_utils._storage.idmap.ranges import IDMap
from ansible_collections.userns.storage.plugins.module_utils._storage.store.ledger import (
    Ledger,
    ledger_key,
)
from hypothesis import given
from hypothesis import strategies as st

NOW = 1_800_000_000.0
HOUR = 3600.0


@pytest.fixture
def path(tmp_path: pathlib.Path) -> str:
    return str(tmp_path / "userns-storage" / "ledger.json")


def test_empty(path: str) -> None:
    ledger = Ledger(path).load()
    assert ledger.watched_since is None
    assert ledger.last_used("a") is ledger.first_seen("a") is None
    assert not ledger.changed
    assert not ledger.save()
    assert not os.path.exists(os.path.dirname(path))


def test_round_trip(path: str) -> None:
    ledger = Ledger(path)
    ledger.observe(["a"], NOW, {"a": "k1", "b": "k2"})
    assert ledger.save()
    assert os.stat(path).st_mode & 0o777 == 0o600
    again = Ledger(path).load()
    assert again.watched_since == NOW
    assert (again.last_used("a"), again.last_used("b")) == (NOW, None)
    assert again.first_seen("b") == NOW
    assert sorted(os.listdir(os.path.dirname(path))) == ["ledger.json", "lock"]


def test_written_for_news_only(path: str) -> None:
    layers = {"a": "k"}
    ledger = Ledger(path)
    ledger.observe(["a"], NOW, layers)
    assert ledger.save()
    for later, news in ((60, False), (600, False), (601, True), (1100, False), (1300, True)):
        ledger.load()
        ledger.observe(["a"], NOW + later, layers)
        assert ledger.last_used("a") == NOW + later
        assert ledger.save() == news
    ledger.observe([], NOW + HOUR, layers)
    assert not ledger.save()
    assert ledger.last_used("a") == NOW + 1300


def test_vanished_layers_are_forgotten_and_inherited(path: str) -> None:
    ledger = Ledger(path)
    ledger.observe(["a", "b"], NOW, {"a": "k1", "b": "k2", "c": "k3"})
    ledger.observe([], NOW + HOUR, {"a2": "k1", "c": "k3"})
    assert ledger.last_used("a") is ledger.last_used("b") is None
    assert ledger.last_used("a2") == NOW
    assert ledger.first_seen("a2") == NOW + HOUR
    assert ledger.watched_since == NOW
    ledger.observe([], NOW + 2 * HOUR, {"b2": "k2", "c": "k3"})
    assert ledger.last_used("b2") is None


def test_same_id_for_something_else_begins_anew(path: str) -> None:
    ledger = Ledger(path)
    ledger.observe(["a"], NOW, {"a": "k1"})
    ledger.observe([], NOW + HOUR, {"a": "k2"})
    assert ledger.last_used("a") is None


def test_clock_set_back(path: str) -> None:
    ledger = Ledger(path)
    ledger.observe(["a"], NOW, {"a": "k"})
    ledger.observe(["a"], NOW - 100 * HOUR, {"a": "k"})
    assert ledger.watched_since == NOW - 100 * HOUR
    assert ledger.last_used("a") == NOW - 100 * HOUR


def test_two_runs_at_once_lose_nothing(path: str) -> None:
    layers = {"a": "k1", "b": "k2"}
    first, second = Ledger(path), Ledger(path)
    first.observe(["a"], NOW, layers)
    second.observe(["b"], NOW + HOUR, layers)
    assert first.save()
    assert second.save()
    ledger = Ledger(path).load()
    assert ledger.watched_since == NOW
    assert (ledger.last_used("a"), ledger.last_used("b")) == (NOW, NOW + HOUR)
    assert ledger.first_seen("b") == NOW


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff",
        b"[" * 100000,
        b'{"version":2,"watched_since":1,"layers":{}}',
        b'{"version":1,"watched_since":"x","layers":{}}',
        b'{"version":1,"watched_since":1,"layers":[]}',
        b'{"version":1,"watched_since":1,"layers":{"a":1}}',
        b'{"version":1,"watched_since":1,"layers":{"a":{"key":5}}}',
        b'{"version":1,"watched_since":1e400,"layers":{}}',
        b'{"version":1,"watched_since":NaN,"layers":{}}',
        b'{"version":1,"watched_since":' + b"9" * 5000 + b',"layers":{}}',
        b'{"version":1,"watched_since":true,"layers":{}}',
        b'{"version":1,"watched_since":1,"layers":{},"programs":[]}',
        b'{"version":1,"watched_since":1,"layers":{},"programs":{"a":1}}',
    ],
)
def test_broken_file_is_an_empty_ledger(path: str, data: bytes) -> None:
    os.mkdir(os.path.dirname(path))
    pathlib.Path(path).write_bytes(data)
    ledger = Ledger(path).load()
    assert ledger.watched_since is None
    ledger.observe(["a"], NOW, {"a": "k"})
    assert ledger.save()
    assert Ledger(path).load().last_used("a") == NOW


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["version", "layers", "key", "watched_since", "last_used", "a"]), inner
        ),
    ),
    max_leaves=12,
)


@given(json_values)
def test_any_json(tmp_path_factory: pytest.TempPathFactory, value: t.Any) -> None:
    path = tmp_path_factory.mktemp("ledger") / "ledger.json"
    if isinstance(value, dict):
        value["version"] = 1
    path.write_text(json.dumps(value))
    ledger = Ledger(str(path)).load()
    ledger.observe(["a"], NOW, {"a": "k"})
    assert ledger.last_used("a") == NOW


def test_a_link_is_not_followed(path: str, tmp_path: pathlib.Path) -> None:
    os.mkdir(os.path.dirname(path))
    victim = tmp_path / "victim"
    victim.write_text("safe")
    os.symlink(victim, f"{path}.tmp")
    ledger = Ledger(path)
    ledger.observe(["a"], NOW, {"a": "k"})
    ledger.save()
    assert victim.read_text() == "safe"
    assert not os.path.lexists(f"{path}.tmp")


def test_key() -> None:
    one, other = IDMap.of((0, 1, 2)), IDMap.of((0, 1, 3))
    keys = {
        ledger_key(image, Mapping(uid, gid))
        for image in ("a", "b")
        for uid in (one, other)
        for gid in (one, other)
    }
    assert len(keys) == 8


def test_what_programs_said(path: str) -> None:
    ledger = Ledger(path).load()
    ledger.observe([], 1000.0, {})
    ledger.learn({f"program {number}": f"version {number}" for number in range(9)})
    assert ledger.save()
    ledger = Ledger(path).load()
    assert list(ledger.programs) == [f"program {number}" for number in range(1, 9)]
    ledger.learn({"program 3": "version 3"})
    assert not ledger.changed
    ledger.learn({"program 1": "version 10"})
    assert ledger.save()
    assert Ledger(path).load().programs["program 1"] == "version 10"
