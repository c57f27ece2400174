# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The page about the architecture lists what a driver must define, and all that any driver overrides."""

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


def listed(after: str) -> t.Set[str]:
    """The names in the first column of the table after a sentence."""
    rows = SECTION.partition(after)[2].strip().partition("\n\n")[0].splitlines()[2:]
    return {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}


def test_the_page_lists_what_a_driver_must_define() -> None:
    # Declared without a value.
    variables = {name for name in ("name", "folders") if not hasattr(Driver, name)}
    assert listed("must define:\n") == {*Driver.__abstractmethods__, *variables}


def test_the_page_lists_what_drivers_override() -> None:
    hooks = listed("with the default:\n")
    assert hooks <= {*vars(Driver)}
    inherited = {name for name in vars(Driver) if not name.startswith("__")}
    required = listed("must define:\n")
    overridden = {name for driver in REGISTRY.values() for name in vars(driver)} & inherited
    # Values, not methods.
    overridden -= {"_read_on_use", "_unread_flags", "_abc_impl"}
    assert overridden - required == hooks


@pytest.mark.parametrize("path", re.findall(r"`((?:tests|plugins|roles|docs)/[\w/.]+)`", SECTION))
def test_the_files_that_it_names_exist(path: str) -> None:
    assert (ROOT / path.replace("NAME", "vfs")).is_file()
