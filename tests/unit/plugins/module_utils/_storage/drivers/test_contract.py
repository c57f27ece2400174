# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests that docs/architecture.md lists the members that a driver must define and those that drivers override."""

from __future__ import annotations

import pathlib
import re
import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.drivers.base import Driver
from ansible_collections.userns.storage.plugins.module_utils._storage.drivers.registry import (
    REGISTRY,
)

ROOT = pathlib.Path(__file__).resolve().parents[6]
SECTION = (
    (ROOT / "docs/architecture.md")
    .read_text(encoding="utf-8")
    .partition("## What a new driver takes\n")[2]
    .partition("\n## ")[0]
)


def documented_names(after: str) -> t.Set[str]:
    """Return the names in the first column of the table after a sentence."""
    rows = SECTION.partition(after)[2].strip().partition("\n\n")[0].splitlines()[2:]
    return {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}


def test_required_members_are_documented() -> None:
    # These members are declared without a value.
    variables = {name for name in ("name", "folders") if not hasattr(Driver, name)}
    assert documented_names("must define:\n") == {*Driver.__abstractmethods__, *variables}


def test_overridable_methods_are_documented() -> None:
    hooks = documented_names("with the default:\n")
    assert hooks <= {*vars(Driver)}
    inherited = {name for name in vars(Driver) if not name.startswith("__")}
    required = documented_names("must define:\n")
    overridden = {name for driver in REGISTRY.values() for name in vars(driver)} & inherited
    # The table lists methods only.
    overridden -= {"_read_on_use", "_unread_flags", "_abc_impl"}
    assert overridden - required == hooks


@pytest.mark.parametrize("path", re.findall(r"`((?:tests|plugins|roles|docs)/[\w/.]+)`", SECTION))
def test_documented_files_exist(path: str) -> None:
    assert (ROOT / path.replace("NAME", "vfs")).is_file()
