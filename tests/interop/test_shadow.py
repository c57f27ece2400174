# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Compare the parser of /etc/subuid with getsubids of shadow 4.13, 4.17 and 4.20 on generated files."""

from __future__ import annotations

import pathlib
import re
import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.idmap import (
    subid_file,
    subids,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.idmap.ranges import ID_LIMIT
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support.hosts import Host
from support.lab import Lab
from support.machines import Machine

# Accounts that exist on every Debian, so that the hosts need no changes for shadow 4.20.
USERS = {"daemon": 1, "bin": 2}
DIALECTS = {
    "local": subid_file.SHADOW_4_13,
    "trixie": subid_file.SHADOW_4_17,
    "sid": subid_file.SHADOW_4_20,
}
_BATCH = 60
# Print getsubids' output for both users and each file.
_SCRIPT = """\
for file in "$1"/*; do
  cat "$file" > /etc/subuid
  for user in daemon bin; do
    echo "= ${file##*/} $user"
    getsubids $user 2>/dev/null || true
  done
done
"""

_WHITESPACE = st.sampled_from(
    ["", "", "", "", " ", "\t", "\r", "\v", "\f", "  ", "\x1c", "\x85", "\u2028"]
)
_UNUSUAL_NUMBERS = (
    "0,1,65536,100000,4294967294,4294967295,4294967296,18446744073709551615,18446744073709551616,"
    "99999999999999999999999,-1,-0,-18446744073709451616,+5,--5,+-5,0x,0x1F,0Xa0,0xg,010,08,0b101,0B2,00,"
    "1e5,1_000,,abc,5abc,٣,0x-5,- 5,+ 5,0o17"
)
_DIGITS = st.one_of(st.integers(0, 2**33).map(str), st.sampled_from(_UNUSUAL_NUMBERS.split(",")))
_NUMBERS = st.tuples(_WHITESPACE, _DIGITS, _WHITESPACE).map("".join)
_OWNERS = st.one_of(
    st.sampled_from(
        ["daemon", "daemon", "bin", "1", "2", "01", "+1", " 1", "1 ", "0x1", "-1", "x"]
    ),
    st.tuples(_WHITESPACE, st.sampled_from(["daemon", "bin"]), _WHITESPACE).map("".join),
    st.sampled_from(["+", "+daemon", "-daemon", "#daemon", "", "daemon\0", "d" * 1100, "ф"]),
)
_LINES = st.one_of(
    st.tuples(_OWNERS, _NUMBERS, _NUMBERS).map(":".join),
    st.tuples(_OWNERS, _NUMBERS, _NUMBERS, _NUMBERS).map(":".join),
    st.tuples(_OWNERS, _NUMBERS).map(":".join),
    st.sampled_from(["", "#", "# a comment", "+", "+:::", "\0", "daemon:1:2\0:3", " ", "\r"]),
    st.tuples(
        st.sampled_from([1000, 1010, 1011, 1012, 4070, 4083, 4084, 4085, 9000]), _NUMBERS
    ).map(lambda pair: f"daemon:{pair[1]}:{'0' * pair[0]}7"),
    st.integers(1, 12).map(lambda zeros: f"daemon:5:{'0' * (1010 - zeros)}7"),
)
_LINE_ENDINGS = st.sampled_from(["\n", "\n", "\n", "\n", "\n", "\r\n", "\n\n", "\n\0"])
_ARBITRARY_FILES = st.tuples(
    st.lists(st.tuples(_LINES, _LINE_ENDINGS).map("".join), max_size=6).map("".join),
    st.one_of(st.just(""), st.just(""), _LINES),
).map("".join)
# Without NUL bytes, which make shadow 4.20 reject the whole file.
_READABLE_FILES = st.lists(
    _LINES.filter(lambda line: "\0" not in line), min_size=1, max_size=6
).map(lambda lines: "".join(f"{line}\n" for line in lines))
_FILES = st.one_of(_ARBITRARY_FILES, _READABLE_FILES, _READABLE_FILES).map(str.encode)


def parsed_ranges(
    content: bytes, name: str, dialect: subid_file.Dialect
) -> t.List[t.Tuple[int, int]]:
    try:
        lines = subid_file.parse(content, dialect)
    except subid_file.NotRead:
        return []
    return [
        (line.start, line.size)
        for line in lines
        if subids._is_of(line.owner, name, USERS[name], dialect)
    ]


def getsubids_ranges(
    machine: Machine, folder: pathlib.Path
) -> t.Dict[t.Tuple[int, str], t.List[t.Tuple[int, int]]]:
    output = machine.run(["sh", "-c", _SCRIPT, "sh", str(folder)]).stdout
    found: t.Dict[t.Tuple[int, str], t.List[t.Tuple[int, int]]] = {}
    ranges: t.List[t.Tuple[int, int]] = []
    for line in output.splitlines():
        if line.startswith("= "):
            _mark, number, name = line.split()
            ranges = found.setdefault((int(number), name), [])
        else:
            match = re.fullmatch(r"[0-9]+: \w+ ([0-9]+) ([0-9]+)", line)
            assert match, line
            ranges.append((int(match.group(1)), int(match.group(2))))
    return found


@pytest.mark.parametrize("name", list(DIALECTS))
def test_parser_agrees_with_getsubids(name: str, lab: Lab, host: t.Callable[[str], Host]) -> None:
    machine = lab.machine if name == "local" else host(name)
    # The machine itself may be of another release; experimental has the shadow of sid.
    dialect = DIALECTS["sid" if machine.name == "experimental" else machine.name]
    etc = pathlib.Path(getattr(machine, "root", "/"), "etc/subuid")
    before = etc.read_bytes() if etc.exists() else b""

    # The assertion shows the files that differ; shrinking would start too many processes.
    @settings(
        max_examples=12,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        phases=(Phase.generate,),
    )
    @given(st.lists(_FILES, min_size=_BATCH, max_size=_BATCH))
    def compare(files: t.List[bytes]) -> None:
        folder = lab.folder()
        for number, content in enumerate(files):
            (folder / f"{number:04d}").write_bytes(content)
        reported = getsubids_ranges(machine, folder)
        assert len(reported) == _BATCH * len(USERS)
        assert [
            (user, files[number], ranges)
            for (number, user), ranges in reported.items()
            if parsed_ranges(files[number], user, dialect) != ranges
        ] == []
        found.extend(item for ranges in reported.values() for item in ranges)
        lab.remove(folder)

    found: t.List[t.Tuple[int, int]] = []
    try:
        compare()
    finally:
        etc.write_bytes(before)
    assert len(found) > 50


@pytest.mark.parametrize("name", list(DIALECTS))
def test_shadow_version_is_detected(
    name: str, lab: Lab, host: t.Callable[[str], Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = getattr(host(name), "root", "") if name != "local" else ""
    patterns = tuple(f"{root}{library}" for library in subid_file._LIBRARIES)
    monkeypatch.setattr(subid_file, "_LIBRARIES", patterns)
    assert subid_file.installed() == DIALECTS[name]


@settings(max_examples=200, deadline=None)
@given(_FILES)
def test_ranges_of_any_shadow_version_are_taken(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    folder = tmp_path_factory.mktemp("ids")
    for item in ("subuid", "subgid"):
        (folder / item).write_bytes(content if item == "subuid" else b"")
    sources = subids.Sources(str(folder / "subuid"), str(folder / "subgid"), "", "", ())
    taken = subids.everybodys_ranges("uid", sources)
    for dialect in DIALECTS.values():
        try:
            lines = subid_file.parse(content, dialect)
        except subid_file.NotRead:
            continue
        for line in lines:
            last = min(line.start + line.size, ID_LIMIT) - 1
            if line.size and line.start <= last:
                assert any(
                    item.start <= line.start and last < item.start + item.size for item in taken
                ), line
