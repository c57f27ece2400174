# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Files with arbitrary content are read or refused; scripts/bench --soak runs the same tests for longer."""

from __future__ import annotations

import json
import pathlib
import platform
import sys
import typing as t

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import fuzz_atheris
from support.fuzz import READERS, SEEDS, read

IDS = st.sampled_from(
    ["a" * 64, "b" * 64, "c" * 64, "../" * 21 + "x", "a" * 63 + "/", "A" * 64, ""]
)
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([2**63, 2**64, -(2**64), 10**400, 1e308]),
    st.text(max_size=8),
    IDS,
    st.lists(IDS, max_size=3),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
    st.lists(
        st.fixed_dictionaries(
            {key: st.integers(-1, 2**33) for key in ("container_id", "host_id", "size")}
        ),
        max_size=3,
    ),
)
KEYS = (
    "id", "names", "parent", "layer", "image", "mapped-layers", "uidmap", "gidmap", "uidset", "flags",
    "created", "diff-size", "metadata", "big-data-names", "digest", "big-data-digests",
)  # fmt: skip
# Each record has an ID, since a record without an ID fails the first check.
RECORD = st.builds(
    lambda identity, more: {**more, "id": identity},
    st.sampled_from(["a" * 64, "b" * 64, "c" * 64]),
    st.dictionaries(st.sampled_from(KEYS), ODD, max_size=6),
)
FUZZ_SETTINGS = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@pytest.mark.parametrize("name", READERS)
@given(data=st.data())
@FUZZ_SETTINGS
def test_arbitrary_bytes_are_read_or_refused(
    name: str, tmp_path: pathlib.Path, data: st.DataObject
) -> None:
    read(name, data.draw(st.binary(max_size=200)), tmp_path)
    # A valid file of which a part is removed or replaced.
    seed = data.draw(st.sampled_from(SEEDS[name]))
    start, end = sorted(data.draw(st.tuples(st.integers(0, len(seed)), st.integers(0, len(seed)))))
    read(name, seed[:start] + data.draw(st.binary(max_size=4)) + seed[end:], tmp_path)
    read(name, seed, tmp_path)


def test_coverage_guided_input_is_read_or_refused() -> None:
    """Use atheris if it has a wheel for this Python; the test above does not need it."""
    if not fuzz_atheris.available():
        assert (
            sys.version_info < (3, 11)
            or sys.version_info >= (3, 15)
            or platform.machine() != "x86_64"
        )
        print("atheris has no wheel for this Python")
        return
    result = fuzz_atheris.fuzz_readers(list(READERS), 1, "-runs=6000")
    assert result == fuzz_atheris.FuzzResult(6000, "")
    print(f"{result.inputs} inputs passed")


@given(st.tuples(*[st.lists(RECORD, max_size=4, unique_by=lambda item: item["id"])] * 3))
@FUZZ_SETTINGS
def test_records_of_an_attacker_are_read_or_refused(
    tmp_path: pathlib.Path, files: t.Tuple[t.List[t.Dict[str, t.Any]], ...]
) -> None:
    read("store_records", b"\n#\n".join(json.dumps(file).encode() for file in files), tmp_path)
