# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Each claim in the documentation names a test, and that is there."""

from __future__ import annotations

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["durability", "threat-model"])
def test_claims_name_tests_that_exist(name: str) -> None:
    text = (ROOT / "docs" / f"{name}.md").read_text()
    claims = text.partition("## The claims\n")[2].partition("\n## ")[0]
    rows = [line for line in claims.splitlines() if line.startswith("| ")]
    assert [
        row
        for row in rows
        if row not in ("| claim | test |", "| --- | --- |") and "`tests/" not in row
    ] == []
    found = re.findall(r"`(tests/[^`:]+)::(\w+)`", text)
    assert len(found) > 5
    for path, test in found:
        assert f"def {test}(" in (ROOT / path).read_text(), f"{path}::{test}"
