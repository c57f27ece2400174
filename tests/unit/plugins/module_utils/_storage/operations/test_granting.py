# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Subordinate IDs for users: what is there stays, what is new overlaps nothing, as shadow's tools lock it."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import typing as t
from pathlib import Path

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.errors import (
    ConfigError,
    LockTimeout,
    NamespaceError,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.idmap.subids import (
    Sources,
    SubIDRange,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.operations import granting
from hypothesis import given
from hypothesis import strategies as st


@pytest.fixture
def request_for(tmp_path: Path) -> t.Callable[..., granting.GrantRequest]:
    """request_for(*users, subuid="", subgid=None, passwd="", group="", **options): files in a scratch folder."""

    def make(
        *users: str,
        subuid: str = "",
        subgid: t.Optional[str] = None,
        passwd: str = "",
        group: str = "",
        nsswitch: str = "",
        **options: t.Any,
    ) -> granting.GrantRequest:
        texts = {
            "subuid": subuid,
            "subgid": subuid if subgid is None else subgid,
            "passwd": passwd,
            "group": group,
            "nsswitch": nsswitch,
        }
        for name, text in texts.items():
            (tmp_path / name).write_text(text)
        sources = Sources(
            str(tmp_path / "subuid"),
            str(tmp_path / "subgid"),
            str(tmp_path / "nsswitch"),
            str(tmp_path / "passwd"),
            (sys.executable, "-c", "print('0: someone 500000 65536')"),
        )
        return granting.GrantRequest(
            users=users, sources=sources, group=str(tmp_path / "group"), **options
        )

    return make


def test_gives_what_is_missing_and_nothing_twice(request_for, tmp_path):
    request = request_for("alice", "bob", subuid="carol:100000:65536")
    result = granting.grant(request)
    assert result["changed"]
    assert (tmp_path / "subuid").read_text() == (
        "carol:100000:65536\nalice:165536:65536\nbob:231072:65536\n"
    )
    assert (tmp_path / "subgid").read_text() == (tmp_path / "subuid").read_text()
    assert (tmp_path / "subuid-").read_text() == "carol:100000:65536"
    assert result["users"][1] == {
        "name": "bob",
        "added": True,
        "uid": [{"start": 231072, "count": 65536}],
        "gid": [{"start": 231072, "count": 65536}],
    }
    assert not granting.grant(request)["changed"]
    assert not list(tmp_path.glob("*.lock"))


def test_keeps_odd_ranges_and_tops_up_what_is_short(request_for, tmp_path):
    text = "# by hand\nalice:300000:1000\nalice:300500:65536\n4711:165536:65536\nroot:malformed\n"
    granting.grant(request_for("alice", subuid=text, subgid="alice:100000:40000\n"))
    assert (tmp_path / "subuid").read_text() == text
    # 100000 and 165536 are taken, in one file or the other.
    assert (tmp_path / "subgid").read_text() == "alice:100000:40000\nalice:231072:25536\n"


def test_leaves_accounts_and_groups_alone(request_for, tmp_path):
    granting.grant(
        request_for(
            "alice",
            passwd="dave:x:100500:100:::\n",
            group="staff:x:170000:\n",
            subuid="",
            count=70000,
        )
    )
    assert (tmp_path / "subuid").read_text() == "alice:231072:70000\n"


def test_a_numeric_entry_is_the_users_own(request_for):
    assert not granting.grant(request_for("root", subuid="0:100000:65536\n"))["changed"]


def test_check_mode_writes_nothing_and_predicts_the_same(request_for, tmp_path):
    request = request_for("alice", "bob")
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    predicted = granting.grant(dataclasses.replace(request, check=True))
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    assert predicted == granting.grant(request)


def test_files_that_are_not_there_are_made(request_for, tmp_path):
    request = request_for("alice")
    (tmp_path / "subuid").unlink()
    (tmp_path / "subgid").unlink()
    granting.grant(request)
    assert (tmp_path / "subuid").read_text() == "alice:100000:65536\n"
    assert (tmp_path / "subgid").stat().st_mode & 0o777 == 0o644


def test_waits_for_a_live_lock_and_takes_a_dead_one(request_for, tmp_path, monkeypatch):
    request = request_for("alice")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / "subuid.lock").write_text(f"{ended.pid}\0")
    granting.grant(request)
    (tmp_path / "subgid.lock").write_text(f"{os.getppid()}\0")
    monkeypatch.setattr(granting, "_LOCK_TIMEOUT", 0.3)
    with pytest.raises(LockTimeout, match=f"held by process {os.getppid()}"):
        granting.grant(dataclasses.replace(request, users=("bob",)))
    assert "bob" not in (tmp_path / "subuid").read_text()
    assert sorted(path.name for path in tmp_path.glob("sub?id.*")) == ["subgid.lock"]


def test_a_directory_keeps_its_own_ids(request_for):
    request = request_for("alice", nsswitch="subid: sss\n")
    result = granting.grant(request)
    assert result["source"] == "sss"
    assert not result["changed"]
    assert result["users"][0]["uid"] == [{"start": 500000, "count": 65536}]
    with pytest.raises(NamespaceError, match="has 65536 subordinate UIDs in the NSS service sss"):
        granting.grant(dataclasses.replace(request, count=100000))


@pytest.mark.parametrize("name", ["", "a:b", "#x", " alice", "a\nb"])
def test_refuses_what_is_no_name(request_for, name):
    with pytest.raises(ConfigError, match="is no name of a user"):
        granting.grant(request_for(name))


def test_refuses_what_is_no_count(request_for):
    with pytest.raises(ConfigError, match="is no number of IDs"):
        granting.grant(request_for("alice", count=0))


def test_says_when_no_range_is_left():
    with pytest.raises(NamespaceError, match="no such range left"):
        granting.free_range([SubIDRange(100000, 4294800000)], 65536)


_RANGES = st.builds(SubIDRange, st.integers(0, 2_000_000), st.integers(1, 200_000))


@given(st.lists(_RANGES, max_size=30), st.integers(1, 300_000))
def test_a_free_range_touches_no_other(taken, count):
    found = granting.free_range(taken, count)
    assert found.size == count
    assert found.start >= 100000
    for one in taken:
        assert one.start + one.size <= found.start or found.start + found.size <= one.start
