# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests that claims in the documentation name existing tests, and that pages name existing files."""

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


@pytest.mark.parametrize(
    "page",
    [
        *("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "MAINTAINERS.md", "README.md"),
        *("docs/architecture.md", "docs/releasing.md"),
        ".github/PULL_REQUEST_TEMPLATE.md",
    ],
)
def test_pages_name_files_that_exist(page: str) -> None:
    """Checks paths below the folders of the repository, and links between pages."""
    text = (ROOT / page).read_text(encoding="utf-8")
    folders = "changelogs|docs|extensions|plugins|roles|scripts|tests"
    named = re.findall(rf"`((?:{folders})/[\w./-]+)`", text)
    linked = re.findall(r"\]\((?!https?:|#)([\w./-]+)(?:#[\w-]+)?\)", text)
    # NAME is a placeholder, and ... stands for omitted folders.
    missing = [
        path
        for path in named
        if "NAME" not in path and "..." not in path and not (ROOT / path).exists()
    ]
    missing += [path for path in linked if not ((ROOT / page).parent / path).exists()]
    assert not missing


def test_names_in_contributing_exist() -> None:
    """The steps for adding a rule or a runtime version refer to existing code."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"`(\w+)`[^`\n]{0,12}(?:in|of) `((?:tests|plugins)/[\w./-]+\.py)`", text)
    assert len(named) >= 3
    for name, path in named:
        assert re.search(rf"\b{name}\b", (ROOT / path).read_text(encoding="utf-8")), (name, path)


def test_coverage_in_readme_is_the_enforced_minimum() -> None:
    (minimum,) = re.findall(
        r"fails below (\d+) %", (ROOT / "README.md").read_text(encoding="utf-8")
    )
    assert f"\nfail_under = {minimum}\n" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
