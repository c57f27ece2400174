# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Each test that a claim in the documentation names is there."""

from __future__ import annotations

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["durability", "threat-model"])
def test_claims_name_tests_that_exist(name: str) -> None:
    text = (ROOT / "docs" / f"{name}.md").read_text()
    found = re.findall(r"`(tests/[^`:]+)::(\w+)`", text)
    assert len(found) > 5
    for path, test in found:
        assert f"def {test}(" in (ROOT / path).read_text(), f"{path}::{test}"
