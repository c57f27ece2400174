# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of reading subordinate IDs from files and getsubids, and of the lines proposed if there are none."""

from __future__ import annotations

import dataclasses
import pathlib
import subprocess
import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.errors import NamespaceError
from ansible_collections.userns.storage.plugins.module_utils._storage.idmap.ranges import IDMap
from ansible_collections.userns.storage.plugins.module_utils._storage.idmap.subid_file import (
    SHADOW_4_13,
    SHADOW_4_20,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.idmap.subids import (
    Sources,
    SubIDRange,
    SubIDs,
    namespace_mapping,
    nss_service,
    propose,
    ranges_of,
    subordinate_ids,
)
from hypothesis import given
from hypothesis import strategies as st

SourcesFactory = t.Callable[..., Sources]


@pytest.fixture
def files(tmp_path: pathlib.Path) -> SourcesFactory:
    """Create sources with the given texts; getsubids is a shell script, or not installed."""

    def make(
        subuid: str = "", subgid: str = "", nsswitch: str = "", passwd: str = "", script: str = ""
    ) -> Sources:
        for name, text in (
            ("subuid", subuid), ("subgid", subgid), ("nsswitch", nsswitch), ("passwd", passwd),
        ):  # fmt: skip
            (tmp_path / name).write_text(text)
        program = tmp_path / "getsubids"
        if script:
            program.write_text(f"#!/bin/sh\n{script}\n")
            program.chmod(0o755)
        return Sources(
            str(tmp_path / "subuid"),
            str(tmp_path / "subgid"),
            str(tmp_path / "nsswitch"),
            str(tmp_path / "passwd"),
            (str(program),),
        )

    return make


def test_entries_by_name_and_uid_are_found(files: SourcesFactory) -> None:
    sources = files("alice:100000:5\n# no\n\nbob:1:1\n1500:200000:7\nalice:50000:3\n", "1500:9:9\n")
    found = subordinate_ids("alice", 1500, sources=sources)
    assert found.uid == ((100000, 5), (200000, 7), (50000, 3))
    assert found.gid == ((9, 9),)


def test_namespace_maps_user_and_sorted_ranges(files: SourcesFactory) -> None:
    sources = files("alice:100000:5\nalice:50000:3\n", "alice:7000:10\n")
    mapping = namespace_mapping(1500, 1600, subordinate_ids("alice", 1500, sources=sources))
    assert mapping.uid == IDMap.of((0, 1500, 1), (1, 50000, 3), (4, 100000, 5))
    assert mapping.gid == IDMap.of((0, 1600, 1), (1, 7000, 10))


def test_overlapping_ranges_are_rejected() -> None:
    overlapping = (SubIDRange(100, 10), SubIDRange(105, 10))
    with pytest.raises(NamespaceError, match=r"overlap in their host IDs.*/etc/subuid"):
        namespace_mapping(1500, 1500, SubIDs(overlapping, ()))
    with pytest.raises(NamespaceError, match=r"overlap in their host IDs.*/etc/subgid"):
        namespace_mapping(1500, 105, SubIDs((), (SubIDRange(100, 10),)))


def test_missing_range_is_proposed(files: SourcesFactory) -> None:
    sources = files(
        "bob:100000:65536\nal:300000:5\n", "carol:165536:65536\n", passwd="x:x:231073:5:::\n"
    )
    with pytest.raises(NamespaceError) as caught:
        subordinate_ids("alice", 1500, sources=sources)
    error = caught.value
    # The range from 231072 would contain the ID of an account, the next one the range of another user.
    assert error.facts["line"] == "alice:362144:65536"
    assert error.facts["file"] == sources.subuid
    assert f"Add the line alice:362144:65536 to {sources.subuid}" in str(error)
    assert "usermod --add-subuids 362144-427679 alice" in str(error)
    # usermod does not accept names without an account.
    with pytest.raises(NamespaceError) as caught:
        ranges_of("containers", None, "gid", sources=sources)
    command = rf"printf '%s\n' containers:362144:65536 >>{sources.subgid}"
    assert str(caught.value).endswith(f"for example: {command}")


@pytest.mark.parametrize(
    ("content", "form"), [("", r"%s\n"), ("bob:1:5\n", r"%s\n"), ("bob:1:5", r"\n%s\n")]
)
def test_proposed_command_adds_whole_line(files: SourcesFactory, content: str, form: str) -> None:
    sources = files(content, content)
    with pytest.raises(NamespaceError) as caught:
        ranges_of("containers", None, "uid", sources=sources)
    assert f"printf '{form}' containers:" in str(caught.value)
    subprocess.run(str(caught.value).partition("for example: ")[2], shell=True, check=True)
    lines = pathlib.Path(sources.subuid).read_text().splitlines()
    assert [line for line in lines if line][-1].startswith("containers:")
    assert len(lines) == len(content.splitlines()) + 1


def test_file_without_range_is_named_in_error(files: SourcesFactory) -> None:
    sources = files("alice:100000:65536\n", "")
    with pytest.raises(NamespaceError, match=r"subordinate GIDs.*--add-subgids") as caught:
        subordinate_ids("alice", 1500, sources=sources)
    assert caught.value.facts["file"] == sources.subgid


def test_ranges_may_be_optional(files: SourcesFactory) -> None:
    assert subordinate_ids("alice", 1500, required=False, sources=files()) == SubIDs()
    assert namespace_mapping(1500, 1500, SubIDs()).uid == IDMap.of((0, 1500, 1))


def test_missing_files_are_treated_as_empty() -> None:
    sources = Sources("/nonexistent/a", "/nonexistent/b", "/nonexistent/c", "/nonexistent/d")
    assert propose("alice", sources) == (100000, 65536)


@pytest.mark.parametrize(
    "line",
    [
        "alice:x:5",
        "alice:5",
        "alice:100000:65536 ",
        "alice:100000:65536\r",
        " alice:100000:65536",
        "alice :100000:65536",
        "alice:100000:65536\x0b",
        "alice:1_000:5",
        "alice:٣:5",
    ],
)
def test_own_line_that_shadow_ignores_is_named_in_error(files: SourcesFactory, line: str) -> None:
    sources = files(f"bob:zzz\n{line}\n")
    with pytest.raises(NamespaceError, match=r"do not read line 2.*Correct it"):
        subordinate_ids("alice", 1500, sources=sources)
    # The range stays reserved.
    if "100000" in line:
        assert propose("bob", sources).start == 165536


@pytest.mark.parametrize("line", ["alice:4294967290:65536", "alice:4294967295:1"])
def test_own_line_beyond_last_id_is_rejected(files: SourcesFactory, line: str) -> None:
    with pytest.raises(NamespaceError, match=f"{line}: exceeds the last ID"):
        ranges_of("alice", 1500, "uid", sources=files(f"{line}\n"))


@pytest.mark.parametrize(
    ("text", "old", "new"),
    [
        ("alice:100000:5", ((100000, 5),), ()),
        ("alice:0x10:010\n", ((16, 8),), ((16, 8),)),
        ("alice: 100000:\t\r5\n", ((100000, 5),), ((100000, 5),)),
        ("alice:+7:-18446744073709551611\n", ((7, 5),), ()),
        ("alice:1:2:3\n", ((1, 2),), ()),
        ("01500:1:2\n", (), ((1, 2),)),
        ("+alice:1:2\n-alice:1:2\nalice:7:1\n", ((7, 1),), ((7, 1),)),
        ("alice:1:2\0\nalice:7:1\n", (), ()),
        ("alice:1:2\nalice:7:1\0x", ((1, 2), (7, 1)), ()),
        ("alice:9:1\x85alice:7:1\u2028\n", (), ()),
    ],
)
def test_lines_are_read_like_each_version_of_shadow(
    files: SourcesFactory, text: str, old: t.Any, new: t.Any
) -> None:
    sources = files(text)
    for dialect, found in ((SHADOW_4_13, old), (SHADOW_4_20, new)):
        sources = dataclasses.replace(sources, dialect=dialect)
        assert ranges_of("alice", 1500, "uid", required=False, sources=sources) == found


def test_file_that_shadow_ignores_is_reported(files: SourcesFactory) -> None:
    sources = dataclasses.replace(files("alice:100000:5"), dialect=SHADOW_4_20)
    with pytest.raises(NamespaceError, match=r"ignore .*because it does not end in a newline"):
        ranges_of("alice", 1500, "uid", sources=sources)


def test_invalid_lines_of_other_users_are_ignored(files: SourcesFactory) -> None:
    sources = files("bob:zzz\n\udcff:5\n".encode("utf-8", "surrogateescape").decode("latin-1"))
    pathlib.Path(sources.subuid).write_bytes(b"bob:zzz\n\xff\xfe:5\nalice:100000:10\n")
    assert ranges_of("alice", 1500, "uid", sources=sources) == ((100000, 10),)


@pytest.mark.parametrize(
    ("text", "service"),
    [
        ("", ""),
        ("passwd: files sss\n", ""),
        ("subid: files\n", ""),
        ("subid:\n", ""),
        ("subid: sss\n", "sss"),
        ("subid:\tldap files\n", "ldap"),
    ],
)
def test_nss_service_is_read_from_nsswitch(files: SourcesFactory, text: str, service: str) -> None:
    assert nss_service(files(nsswitch=text).nsswitch) == service


def test_nss_service_is_queried(files: SourcesFactory) -> None:
    script = (
        'case "$1" in -g) echo "0: $2 700000 9";; *) echo "0: $1 500000 5"; echo "1: $1 9 1";; esac'
    )
    sources = files("alice:1:1\n", "alice:1:1\n", "subid: sss\n", script=script)
    found = subordinate_ids("alice", 1500, sources=sources)
    assert found == SubIDs((SubIDRange(500000, 5), SubIDRange(9, 1)), (SubIDRange(700000, 9),))


def test_nss_service_without_ranges_is_reported(files: SourcesFactory) -> None:
    sources = files("alice:1:1\n", nsswitch="subid: sss\n", script="echo Error >&2; exit 1")
    with pytest.raises(NamespaceError, match=r"NSS service sss.*ipa subid-generate --owner=alice"):
        subordinate_ids("alice", 1500, sources=sources)


def test_missing_getsubids_is_reported(files: SourcesFactory) -> None:
    with pytest.raises(
        NamespaceError, match=r"getsubids, which queries it, is not installed.*package uidmap"
    ):
        subordinate_ids("alice", 1500, sources=files(nsswitch="subid: sss\n"))


def test_name_without_account_is_reported(files: SourcesFactory) -> None:
    sources = files("ghost:100000:5\n", "ghost:100000:5\n", script="exit 1")
    with pytest.raises(NamespaceError, match=r"no account.*useradd --system.* ghost"):
        ranges_of("ghost", None, "uid", sources=sources)
    assert ranges_of("ghost", None, "uid", required=False, sources=sources) == ()
    assert ranges_of("ghost", 99, "uid", sources=sources) == ((100000, 5),)
    older = files("ghost:100000:5\n", script="echo 0: ghost 100000 5")
    assert ranges_of("ghost", None, "uid", sources=older) == ((100000, 5),)


def test_files_are_trusted_without_getsubids(files: SourcesFactory) -> None:
    assert ranges_of("ghost", None, "uid", sources=files("ghost:9:5\n")) == ((9, 5),)


@given(st.lists(st.tuples(st.integers(0, 900_000), st.integers(1, 200_000)), max_size=12))
def test_proposed_range_is_free(taken: list[tuple[int, int]]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        half = len(taken) // 2
        for name, entries in (("subuid", taken[:half]), ("subgid", taken[half:])):
            text = "".join(f"u{n}:{start}:{size}\n" for n, (start, size) in enumerate(entries))
            pathlib.Path(folder, name).write_text(text)
        start, size = propose("alice", Sources(f"{folder}/subuid", f"{folder}/subgid", "", ""))
    assert start >= 100000
    assert size == 65536
    assert all(other + count <= start or other >= start + size for other, count in taken)
