# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of the capabilities of each runtime, and that no other module contains version thresholds."""

from __future__ import annotations

import ast
import dataclasses
import typing as t
from pathlib import Path

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage import capabilities as table
from ansible_collections.userns.storage.plugins.module_utils._storage.capabilities import (
    capabilities,
    loader_agrees,
    released_storage,
)

PLUGINS = Path(__file__).resolve().parents[5] / "plugins"


def is_version(node: ast.AST) -> bool:
    """Return whether an expression is a tuple of two or more integers, the form of versions."""
    return (
        isinstance(node, ast.Tuple)
        and len(node.elts) > 1
        and all(
            isinstance(elt, ast.Constant)
            and isinstance(elt.value, int)
            and not isinstance(elt.value, bool)
            for elt in node.elts
        )
    )


def thresholds(source: str) -> t.List[int]:
    """Return the lines that compare a value with such a tuple, directly or through a constant."""
    tree = ast.parse(source)
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and is_version(node.value):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.AnnAssign) and node.value is not None and is_version(node.value):
            names |= {node.target.id} if isinstance(node.target, ast.Name) else set()
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare)
        for operand in (node.left, *node.comparators)
        if is_version(operand) or (isinstance(operand, ast.Name) and operand.id in names)
    ]


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("x = version >= (4, 7)", [1]),
        ("_OLD = (1, 63)\nif storage < _OLD:\n    pass", [2]),
        ("_OLD: Version = (1, 63)\nx = (1, 40) <= version < _OLD", [2, 2]),
        ("x = mode in (1, 2)\ny = a < 4", [1]),
        ("from .capabilities import KERNEL\nx = can.map_flags and a == ('a', 1)", []),
    ],
)
def test_thresholds_in_source_are_found(source: str, lines: t.List[int]) -> None:
    assert thresholds(source) == lines


def test_only_capabilities_contain_thresholds() -> None:
    found = {
        f"{path.relative_to(PLUGINS)}:{line}"
        for path in PLUGINS.rglob("*.py")
        if path.name != "capabilities.py"
        for line in thresholds(path.read_text(encoding="utf-8"))
    }
    assert found == set()


def test_every_capability_has_a_version() -> None:
    never = capabilities("buildah", (0,), (0,))
    always = capabilities("podman", (99,), (99, 0))
    differing = {
        field.name
        for field in dataclasses.fields(never)
        if getattr(never, field.name) != getattr(always, field.name)
    }
    assert differing == {*table._STORAGE_SINCE, *table._PODMAN_SINCE, "tested"}
    assert never.tested
    assert not always.tested


@pytest.mark.parametrize(
    ("field", "podman", "storage"),
    [
        ("reads_drop_ins", (5, 8, 6), (1, 63, 0)),
        ("maps_container_layers", (5, 8, 6), (1, 64, 0)),
        ("named_file_sets_paths", (5, 6), (1, 59, 1)),
        ("counts_accounts_exactly", (5, 3), (1, 56, 0)),
        ("keep_id_size", (5, 4), (1, 57, 0)),
        ("sqlite_first", (5, 8, 0), (1, 62, 0)),
    ],
)
def test_previous_release_lacks_capability(
    field: str, podman: t.Tuple[int, ...], storage: t.Tuple[int, ...]
) -> None:
    assert getattr(capabilities("podman", podman, storage), field)
    below = capabilities("podman", (podman[0], podman[1] - 1, 99), (storage[0], storage[1] - 1, 99))
    assert not getattr(below, field)


def test_buildah_lacks_capabilities_of_podman() -> None:
    found = capabilities("buildah", (99,), (1, 64))
    assert not any(getattr(found, field) for field in table._PODMAN_SINCE)


def test_versions_above_newest_tested_release_are_untested() -> None:
    assert capabilities("podman", (6, 1, 2), (1, 64, 1)).tested
    assert not capabilities("podman", (6, 2), (1, 65, 0)).tested
    assert not capabilities("podman", (7,), (2, 0)).tested


@pytest.mark.parametrize("name", sorted(table._RELEASES))
def test_releases_are_in_ascending_order(name: str) -> None:
    rows = table._RELEASES[name]
    for (start, storage), (later, newer) in zip(rows, rows[1:]):
        assert start < later
        # A patch release may contain a newer containers/storage than the first release of the next line.
        if len(start) == 2 or start[:2] == later[:2]:
            assert storage <= newer
    newest, storage = rows[-1]
    assert released_storage(name, (*newest, 9)) == storage
    assert released_storage(name, (99, 0))[:2] == (storage[0], storage[1] + 1)
    assert released_storage(name, (0, 1)) == (0,)


def test_loader_in_executable_corrects_version_of_table() -> None:
    assert loader_agrees((1, 62, 0), True) == (1, 63)
    assert loader_agrees((1, 64, 0), True) == (1, 64, 0)
    assert loader_agrees((1, 64, 0), False) == (1, 62)
    assert loader_agrees((1, 57, 1), False) == (1, 57, 1)
