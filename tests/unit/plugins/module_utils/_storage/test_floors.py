# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The floors of the house: each package imports only what lies below it, and nothing from outside.

What a package may import is said here once. A new package needs a line, a new module none.
"""

from __future__ import annotations

import ast
import gc
import importlib.util
import sys
import sysconfig
import typing as t
from pathlib import Path

import pytest

PREFIX = "ansible_collections.userns.storage.plugins.module_utils._storage"
LIBRARY = Path(__file__).resolve().parents[5] / "plugins/module_utils/_storage"

# Package or lone module, and the others, or single modules of others, that it may import. Floors, from the ground:
# kernel and errors; idmap; tree and store; drivers, runtime and userns; operations; service.
GROUND = {"errors", "kernel"}
FIRST = GROUND | {"idmap"}
SECOND = FIRST | {"tree", "store"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "kernel": {"errors"},
    "idmap": GROUND,
    "tree": FIRST,
    "store": FIRST,
    # A driver never reads records; it shares with the store how a tree is removed, nothing else.
    "drivers": FIRST | {"tree", "store.removal"},
    "runtime": SECOND,
    "userns": SECOND,
    "operations": SECOND | {"drivers", "runtime", "userns"},
    # The program for hosts without Ansible: reads its configuration, calls operations, prints lines.
    "service": SECOND | {"userns", "operations"},
}

MODULES = sorted(LIBRARY.rglob("*.py"))


def room(path: Path) -> str:
    """The package or lone module of the library that a file belongs to; empty for the library's own __init__."""
    first = path.relative_to(LIBRARY).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def parse(path: Path) -> ast.Module:
    """The file's syntax tree, as Python 3.9 reads it."""
    # Python 3.11 takes a collection at this moment, and what that runs, for a fault of its parser.
    gc.disable()
    try:
        return ast.parse(path.read_bytes(), str(path), feature_version=(3, 9))
    finally:
        gc.enable()


def imports(path: Path) -> t.Iterator[tuple[int, str]]:
    """All that a file imports, wherever in it: line and absolute dotted name."""
    package = [*PREFIX.split("."), *path.relative_to(LIBRARY).parts[:-1]]
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield node.lineno, name.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for name in node.names:
                yield node.lineno, f"{source}.{name.name}"


def standard(top: str) -> bool:
    """Whether a package is of the standard library; Python 3.9 has no list of that."""
    names = getattr(sys, "stdlib_module_names", None)
    if names is not None:
        return top in names
    spec = importlib.util.find_spec(top)
    origin = "" if spec is None else str(spec.origin)
    folder = sysconfig.get_paths()["stdlib"]
    return origin in {"built-in", "frozen"} or (
        origin.startswith(folder) and "site-packages" not in origin
    )


def complaint(path: Path, name: str) -> str:
    """What is wrong with importing that name there; empty if nothing is."""
    if not f"{name}.".startswith(f"{PREFIX}."):
        top = name.partition(".")[0]
        return "" if standard(top) else "is not of the standard library"
    inside = name[len(PREFIX) + 1 :].split(".")
    here, there, module = room(path), inside[0], ".".join(inside[:2])
    if not here:
        return "the library's own __init__ imports nothing"
    if there not in MAY_IMPORT:
        return "is no room of the library"
    if there == here or {there, module} & MAY_IMPORT[here]:
        return ""
    return f"{here} may not import {there}"


def test_library_is_found() -> None:
    """The other tests would pass on nothing."""
    assert {"errors", "kernel", "idmap"} <= {room(path) for path in MODULES}


def test_every_room_has_its_floor() -> None:
    assert {room(path) for path in MODULES} - {""} <= set(MAY_IMPORT)


def test_floors_hold_no_circle() -> None:
    order = list(MAY_IMPORT)
    for name, below in MAY_IMPORT.items():
        rooms = {one.partition(".")[0] for one in below}
        assert rooms <= set(order[: order.index(name)]), name


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(LIBRARY)))
def test_imports_only_from_below(path: Path) -> None:
    found = [
        f"line {line}: {name}: {problem}"
        for line, name in imports(path)
        for problem in [complaint(path, name)]
        if problem
    ]
    assert found == []


@pytest.mark.parametrize(
    ("file", "name", "wrong"),
    [
        ("store/store.py", f"{PREFIX}.kernel.files", False),
        ("store/store.py", f"{PREFIX}.tree.clone", True),
        ("tree/clone.py", f"{PREFIX}.store.store", True),
        ("drivers/vfs.py", f"{PREFIX}.store.records", True),
        ("drivers/vfs.py", f"{PREFIX}.store.removal.remove_tree", False),
        ("runtime/forms.py", f"{PREFIX}.drivers.base", True),
        ("operations/gc.py", f"{PREFIX}.drivers.registry", False),
        ("operations/gc.py", f"{PREFIX}.service.work", True),
        ("service/work.py", f"{PREFIX}.drivers.registry", True),
        ("kernel/libc.py", "ansible.module_utils.basic", True),
        ("kernel/libc.py", "ansible_collections.userns.storage.plugins.module_utils._module", True),
        ("kernel/libc.py", "yaml", True),
        ("kernel/libc.py", "ctypes", False),
        ("__init__.py", f"{PREFIX}.errors", True),
    ],
)
def test_the_rule_itself(file: str, name: str, wrong: bool) -> None:
    assert bool(complaint(LIBRARY / file, name)) is wrong
