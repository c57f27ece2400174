# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Tests of granting subordinate IDs: entries are kept, new ranges are free, files are locked as by shadow's tools."""

from __future__ import annotations

import dataclasses
import errno
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
    NoSpace,
    PermissionDenied,
    StorageError,
    StoreError,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.idmap.subid_file import (
    SHADOW_4_13,
    SHADOW_4_20,
    Dialect,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.idmap.subids import (
    Sources,
    SubIDRange,
    free_range,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.operations import (
    subordinate_ids,
)
from hypothesis import given
from hypothesis import strategies as st

RequestFactory = t.Callable[..., subordinate_ids.AssignRequest]


@pytest.fixture
def request_for(tmp_path: Path) -> RequestFactory:
    """request_for(*users, subuid="", subgid=None, passwd="", group="", **options): a request for files in tmp_path."""

    def make(
        *users: str,
        subuid: str = "",
        subgid: t.Optional[str] = None,
        passwd: str = "",
        group: str = "",
        nsswitch: str = "",
        login_defs: str = "",
        dialect: Dialect = SHADOW_4_13,
        **options: t.Any,
    ) -> subordinate_ids.AssignRequest:
        texts = {
            "subuid": subuid,
            "subgid": subuid if subgid is None else subgid,
            "passwd": passwd,
            "group": group,
            "nsswitch": nsswitch,
            "login.defs": login_defs,
        }
        for name, text in texts.items():
            (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
        sources = Sources(
            str(tmp_path / "subuid"),
            str(tmp_path / "subgid"),
            str(tmp_path / "nsswitch"),
            str(tmp_path / "passwd"),
            (sys.executable, "-c", "print('0: someone 500000 65536')"),
            str(tmp_path / "login.defs"),
            dialect,
        )
        return subordinate_ids.AssignRequest(
            users=users, sources=sources, group=str(tmp_path / "group"), **options
        )

    return make


def test_missing_ranges_are_added_once(request_for: RequestFactory, tmp_path: Path) -> None:
    request = request_for("alice", "bob", subuid="carol:100000:65536")
    result = subordinate_ids.assign(request)
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
    assert not subordinate_ids.assign(request)["changed"]
    assert not list(tmp_path.glob("*.lock"))


def test_existing_ranges_are_kept_and_extended(request_for: RequestFactory, tmp_path: Path) -> None:
    text = "# by hand\nalice:300000:1000\nalice:300500:65536\n4711:165536:65536\nroot:malformed\n"
    subordinate_ids.assign(request_for("alice", subuid=text, subgid="alice:100000:40000\n"))
    assert (tmp_path / "subuid").read_text() == text
    # The ranges from 100000 and 165536 are taken in one of the files.
    assert (tmp_path / "subgid").read_text() == "alice:100000:40000\nalice:231072:25536\n"


def test_ids_of_accounts_and_groups_are_skipped(
    request_for: RequestFactory, tmp_path: Path
) -> None:
    subordinate_ids.assign(
        request_for(
            "alice",
            passwd="dave:x:100500:100:::\n",
            group="staff:x:170000:\n",
            subuid="",
            count=70000,
        )
    )
    assert (tmp_path / "subuid").read_text() == "alice:231072:70000\n"


@pytest.mark.parametrize(
    ("nsswitch", "start"),
    [
        # NSS lists an account with the ID 100500 and a group with the ID 170000.
        ("passwd: files sss\ngroup: files sss\n", 231072),
        ("passwd: files sss\ngroup: files # sss\n", 165536),
        ("passwd: files\ngroup: files sss\n", 100000),
        ("passwd: files\n", 100000),
    ],
)
def test_ids_that_only_nss_lists_are_skipped(
    nsswitch: str, start: int, request_for: RequestFactory, tmp_path: Path
) -> None:
    script = "import sys; print({'passwd': 'x:*:100500:5:::', 'group': 'g:*:170000:'}[sys.argv[1]])"
    request = request_for("alice", nsswitch=nsswitch)
    sources = dataclasses.replace(request.sources, getent=(sys.executable, "-c", script))
    subordinate_ids.assign(dataclasses.replace(request, sources=sources))
    assert f"alice:{start}:65536" in (tmp_path / "subuid").read_text()


def test_failure_of_getent_is_ignored(request_for: RequestFactory, tmp_path: Path) -> None:
    request = request_for("alice", nsswitch="passwd: sss files\n")
    for getent in (str(tmp_path / "none"),), ("false",):
        sources = dataclasses.replace(request.sources, getent=getent)
        assert subordinate_ids.assign(dataclasses.replace(request, sources=sources, check=True))[
            "changed"
        ]


def test_numeric_entry_belongs_to_user(request_for: RequestFactory) -> None:
    assert not subordinate_ids.assign(request_for("root", subuid="0:100000:65536\n"))["changed"]


def test_check_mode_writes_nothing_and_predicts_result(
    request_for: RequestFactory, tmp_path: Path
) -> None:
    request = request_for("alice", "bob")
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    predicted = subordinate_ids.assign(dataclasses.replace(request, check=True))
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    assert predicted == subordinate_ids.assign(request)


def test_missing_files_are_created(request_for: RequestFactory, tmp_path: Path) -> None:
    request = request_for("alice")
    (tmp_path / "subuid").unlink()
    (tmp_path / "subgid").unlink()
    subordinate_ids.assign(request)
    assert (tmp_path / "subuid").read_text() == "alice:100000:65536\n"
    assert (tmp_path / "subgid").stat().st_mode & 0o777 == 0o644


def test_held_lock_times_out_and_stale_lock_is_replaced(
    request_for: RequestFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_for("alice")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / "subuid.lock").write_text(f"{ended.pid}\0")
    subordinate_ids.assign(request)
    (tmp_path / "subgid.lock").write_text(f"{os.getppid()}\0")
    monkeypatch.setattr(subordinate_ids, "_LOCK_TIMEOUT", 0.3)
    with pytest.raises(LockTimeout, match=f"held by process {os.getppid()}"):
        subordinate_ids.assign(dataclasses.replace(request, users=("bob",)))
    assert "bob" not in (tmp_path / "subuid").read_text()
    assert sorted(path.name for path in tmp_path.glob("sub?id.*")) == ["subgid.lock"]


def test_ids_of_nss_service_are_not_changed(request_for: RequestFactory) -> None:
    request = request_for("alice", nsswitch="subid: sss\n")
    result = subordinate_ids.assign(request)
    assert result["source"] == "sss"
    assert not result["changed"]
    assert result["users"][0]["uid"] == [{"start": 500000, "count": 65536}]
    with pytest.raises(NamespaceError, match="has 65536 subordinate UIDs in the NSS service sss"):
        subordinate_ids.assign(dataclasses.replace(request, count=100000))


@pytest.mark.parametrize("name", ["", "a:b", "#x", " alice", "a\nb", "x\udc80"])
def test_invalid_user_name_is_rejected(request_for: RequestFactory, name: str) -> None:
    with pytest.raises(ConfigError, match="is not a valid user name"):
        subordinate_ids.assign(request_for(name))


def test_lock_with_impossible_process_id_is_replaced(
    request_for: RequestFactory, tmp_path: Path
) -> None:
    (tmp_path / "subuid.lock").write_text(str(2**70))
    assert subordinate_ids.assign(request_for("alice"))["changed"]
    assert not (tmp_path / "subuid.lock").exists()


def test_invalid_count_is_rejected(request_for: RequestFactory) -> None:
    with pytest.raises(ConfigError, match="is not a valid number of IDs"):
        subordinate_ids.assign(request_for("alice", count=0))


def test_error_reports_that_no_range_is_left() -> None:
    with pytest.raises(NamespaceError, match="no free range of this size is left"):
        free_range([SubIDRange(100000, 4294800000)], 65536)


@pytest.mark.parametrize(
    "line",
    [
        "alice:100000:65536 ",
        " alice:100000:65536",
        "alice\t:100000:65536",
        "alice:100000:65536\r",
        "alice:100000:65536\x0b",
        "alice:100000:65536\u2028",
    ],
)
def test_line_that_shadow_ignores_grants_no_range_but_stays_reserved(
    request_for: RequestFactory, tmp_path: Path, line: str
) -> None:
    result = subordinate_ids.assign(request_for("alice", "bob", subuid=f"{line}\n"))
    assert (tmp_path / "subuid").read_bytes().decode() == (
        f"{line}\nalice:165536:65536\nbob:231072:65536\n"
    )
    assert "line 1" in result["warnings"][0]
    assert "assigns nothing to alice" in result["warnings"][0]


@pytest.mark.parametrize(
    "line",
    [
        "carol:0x186A0:0200000",
        "carol: 100000:\r65536",
        "carol:+100000:65536:more",
        "carol:-18446744073709451616:65536",
        "carol:0b11000011010100000:65536",
        "carol:99999:4294967296",
        "\udcff:100000:65536",
        "x\x0bcarol:100000:65536",
        "ghost:1:2\0carol:100000:65536",
    ],
)
def test_ranges_that_any_version_of_shadow_reads_are_reserved(
    request_for: RequestFactory, tmp_path: Path, line: str
) -> None:
    content = f"{line}\n# the end\n"
    request = request_for("alice", subuid=content, subgid="", count=1000)
    if "4294967296" in line:
        with pytest.raises(NamespaceError, match="no free range of this size is left"):
            subordinate_ids.assign(request)
        return
    subordinate_ids.assign(request)
    after = (tmp_path / "subuid").read_bytes()
    assert after == f"{content}alice:165536:1000\n".encode("utf-8", "surrogateescape")


def test_overlapping_ranges_of_two_users_are_reported(request_for: RequestFactory) -> None:
    text = "alice:100000:65536\nbob:165535:65536\ncarol:300000:5\n"
    result = subordinate_ids.assign(request_for("alice", "carol", subuid=text, count=5))
    assert not result["changed"]
    (first, second) = result["warnings"]
    assert "subuid: alice (100000-165535) and bob (165535-231070) share subordinate IDs" in first
    assert "subgid: alice" in second
    assert not subordinate_ids.assign(request_for("carol", subuid=text, count=5))["warnings"]


def test_accounts_inside_ranges_and_own_overlaps_are_reported(request_for: RequestFactory) -> None:
    text = "alice:100000:65536\nalice:165000:65536\n"
    request = request_for(
        "alice", subuid=text, passwd="dave:x:100500:1:::\n", group="g:x:165001:\n"
    )
    warnings = "\n".join(subordinate_ids.assign(request)["warnings"])
    assert "ranges of alice overlap each other at 165000-230535" in warnings
    assert "holds the UID 100500 of an account" in warnings
    assert "holds the GID 165001 of an account" in warnings


def test_name_and_uid_of_user_are_same_owner(request_for: RequestFactory) -> None:
    text = "root:100000:65536\n0:100000:65536\n"
    warnings = subordinate_ids.assign(request_for("root", subuid=text))["warnings"]
    assert all("overlap each other" in item for item in warnings)


def test_login_defs_limit_new_ranges(request_for: RequestFactory, tmp_path: Path) -> None:
    login_defs = (
        "# SUB_UID_MIN 1\nSUB_UID_MIN\t\t500000\nSUB_GID_MIN 0x989680\nSUB_UID_MAX 10131071\n"
    )
    subordinate_ids.assign(request_for("alice", login_defs=login_defs))
    assert (tmp_path / "subuid").read_text() == "alice:10000000:65536\n"
    with pytest.raises(NamespaceError, match=r"between 10000000 and 10131071.*raise SUB_UID_MAX"):
        subordinate_ids.assign(
            request_for("bob", subuid="alice:10000000:65536\n", login_defs=login_defs, count=65537)
        )


def test_missing_final_newline_is_added_if_shadow_requires_it(
    request_for: RequestFactory, tmp_path: Path
) -> None:
    old = subordinate_ids.assign(request_for("alice", subuid="alice:100000:65536"))
    assert not old["changed"]
    request = request_for("alice", subuid="alice:100000:65536", dialect=SHADOW_4_20)
    predicted = subordinate_ids.assign(dataclasses.replace(request, check=True))
    result = subordinate_ids.assign(request)
    assert result["changed"]
    assert predicted == result
    assert not result["users"][0]["added"]
    assert (tmp_path / "subuid").read_text() == "alice:100000:65536\n"
    assert not subordinate_ids.assign(request)["changed"]


@pytest.mark.parametrize("content", ["alice:1:2\0\n", "\0"])
def test_file_that_shadow_ignores_is_not_changed(
    request_for: RequestFactory, tmp_path: Path, content: str
) -> None:
    request = request_for("alice", subuid=content, dialect=SHADOW_4_20)
    with pytest.raises(NamespaceError, match="holds a NUL character, so newuidmap"):
        subordinate_ids.assign(request)
    assert (tmp_path / "subuid").read_text() == content


def test_symbolic_link_is_not_replaced(request_for: RequestFactory, tmp_path: Path) -> None:
    request = request_for("alice")
    (tmp_path / "subuid").rename(tmp_path / "real")
    (tmp_path / "subuid").symlink_to(tmp_path / "real")
    with pytest.raises(NamespaceError, match="is a symbolic link"):
        subordinate_ids.assign(request)
    assert (tmp_path / "subuid").is_symlink()


_RANGES = st.builds(SubIDRange, st.integers(0, 2_000_000), st.integers(1, 200_000))


@given(st.lists(_RANGES, max_size=30), st.integers(1, 300_000))
def test_free_range_does_not_overlap_others(taken: t.List[SubIDRange], count: int) -> None:
    found = free_range(taken, count)
    assert found.size == count
    assert found.start >= 100000
    for item in taken:
        assert item.start + item.size <= found.start or found.start + found.size <= item.start


@pytest.mark.parametrize("call", ["link", "rename", "fsync"])
@pytest.mark.parametrize(
    ("number", "kind", "hint"),
    [
        (errno.ENOSPC, NoSpace, "Free space"),
        (errno.EROFS, PermissionDenied, "Mount its filesystem writable."),
        (errno.EIO, StoreError, "dmesg"),
        (errno.EPERM, PermissionDenied, "lsattr -d" if os.geteuid() == 0 else "become: true"),
    ],
)
def test_filesystem_error_keeps_its_cause(
    request_for: RequestFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    number: int,
    kind: t.Type[StorageError],
    hint: str,
) -> None:
    def fail(*_arguments: t.Any) -> t.NoReturn:
        raise OSError(number, os.strerror(number))

    request = request_for("alice")
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(kind, match=os.strerror(number).lower()) as caught:
        subordinate_ids.assign(request)
    assert caught.type is kind
    assert hint in caught.value.hint
    assert caught.value.subject == str(tmp_path / ("subuid.lock" if call == "link" else "subuid"))
    # Neither the lock nor temporary files remain.
    assert not list(tmp_path.glob("sub?id.*"))
    assert not list(tmp_path.glob("sub?id+"))


def test_removed_lock_is_ignored(
    request_for: RequestFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_for("alice")
    rename = os.rename

    def unlock(source: str, target: str) -> None:
        (tmp_path / "subuid.lock").unlink(missing_ok=True)
        rename(source, target)

    monkeypatch.setattr(os, "rename", unlock)
    assert subordinate_ids.assign(request)["changed"]


def test_result_does_not_include_changes_after_unlock(
    request_for: RequestFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_for("alice")
    unlink = os.unlink

    def change_after_unlock(path: str, **options: t.Any) -> None:
        unlink(path, **options)
        if str(path).endswith(".lock"):
            with (tmp_path / "subuid").open("a") as stream:
                stream.write("alice:900000:65536\nbob:100000:65536\n")

    monkeypatch.setattr(os, "unlink", change_after_unlock)
    result = subordinate_ids.assign(request)
    assert result["users"][0]["uid"] == [{"start": 100000, "count": 65536}]
    assert not result["warnings"]


@pytest.mark.parametrize("call", ["rename", "fsync of the folder"])
def test_error_after_first_file_returns_written_changes(
    request_for: RequestFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    request = request_for("alice")
    rename, fsync = os.rename, os.fsync
    renamed: t.List[str] = []

    def fail_at_subgid(source: str, target: str) -> None:
        if call == "rename" and target.endswith("subgid"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rename(source, target)
        renamed.append(target)

    def fail_after_rename(descriptor: int) -> None:
        if call != "rename" and renamed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "rename", fail_at_subgid)
    monkeypatch.setattr(os, "fsync", fail_after_rename)
    result = subordinate_ids.assign(request)
    assert "no space left on device" in result["error"]
    assert result["facts"]["errno"] == errno.ENOSPC
    assert result["changed"]
    assert result["users"] == [
        {"name": "alice", "added": True, "uid": [{"start": 100000, "count": 65536}], "gid": []}
    ]
    assert [item["after_header"] for item in result["diff"]] == [str(tmp_path / "subuid")]
    assert (tmp_path / "subuid").read_text() == "alice:100000:65536\n"
    assert not (tmp_path / "subgid").read_text()
