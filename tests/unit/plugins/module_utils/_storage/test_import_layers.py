# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The layers of the library: each package imports only from lower layers and the standard library.

``MAY_IMPORT`` lists what each package may import. A new package needs an entry, a new module does not.
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

# The packages, or modules of packages, that each package or single module may import. The layers, lowest first:
# kernel, capabilities, printable and errors; idmap; tree and store; drivers, runtime and userns; operations; service.
LOWEST = {"printable", "errors", "capabilities", "kernel"}
FIRST = LOWEST | {"idmap"}
SECOND = FIRST | {"tree", "store"}
MAY_IMPORT: dict[str, set[str]] = {
    "printable": set(),
    "errors": {"printable"},
    "capabilities": set(),
    "kernel": {"printable", "errors"},
    "idmap": LOWEST,
    "tree": FIRST,
    "store": FIRST,
    # Drivers do not read records. From the store they only use the removal of trees.
    "drivers": FIRST | {"tree", "store.removal"},
    "runtime": SECOND,
    "userns": SECOND,
    # Programs that root runs as a user, outside the user's namespace.
    "as_user": SECOND | {"userns"},
    "operations": SECOND | {"drivers", "runtime", "userns", "as_user"},
    # The program for hosts without Ansible.
    "service": SECOND | {"userns", "as_user", "operations"},
}

MODULES = sorted(LIBRARY.rglob("*.py"))


def package_of(path: Path) -> str:
    """Return the package or single module of the library that contains a file; empty for the library's own __init__."""
    first = path.relative_to(LIBRARY).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def parse(path: Path) -> ast.Module:
    """Return the syntax tree of a file, parsed with the grammar of Python 3.9."""
    # Python 3.11 reports an error of its parser if a garbage collection runs at this moment.
    gc.disable()
    try:
        return ast.parse(path.read_bytes(), str(path), feature_version=(3, 9))
    finally:
        gc.enable()


def imports(path: Path) -> t.Iterator[tuple[int, str]]:
    """Yield the line and the absolute name of each import in a file, including imports in functions."""
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


def is_standard(top: str) -> bool:
    """Return whether a package is part of the standard library. Python 3.9 has no list of its modules."""
    names = getattr(sys, "stdlib_module_names", None)
    if names is not None:
        return top in names
    spec = importlib.util.find_spec(top)
    origin = "" if spec is None else str(spec.origin)
    folder = sysconfig.get_paths()["stdlib"]
    return origin in {"built-in", "frozen"} or (
        origin.startswith(folder) and "site-packages" not in origin
    )


def import_problem(path: Path, name: str) -> str:
    """Return why a file may not import a name; empty if it may."""
    if not f"{name}.".startswith(f"{PREFIX}."):
        top = name.partition(".")[0]
        return "" if is_standard(top) else "is not part of the standard library"
    inside = name[len(PREFIX) + 1 :].split(".")
    importer, imported, module = package_of(path), inside[0], ".".join(inside[:2])
    if not importer:
        return "the library's own __init__ may not import anything"
    if imported not in MAY_IMPORT:
        return "is not listed in MAY_IMPORT"
    if imported == importer or {imported, module} & MAY_IMPORT[importer]:
        return ""
    return f"{importer} may not import {imported}"


def test_library_is_found() -> None:
    """The other tests would pass for an empty list of files."""
    assert {"errors", "kernel", "idmap"} <= {package_of(path) for path in MODULES}


def test_every_package_is_listed() -> None:
    assert {package_of(path) for path in MODULES} - {""} <= set(MAY_IMPORT)


def test_no_circular_imports_between_packages() -> None:
    order = list(MAY_IMPORT)
    for name, below in MAY_IMPORT.items():
        packages = {item.partition(".")[0] for item in below}
        assert packages <= set(order[: order.index(name)]), name


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(LIBRARY)))
def test_imports_only_from_lower_layers(path: Path) -> None:
    found = [
        f"line {line}: {name}: {problem}"
        for line, name in imports(path)
        for problem in [import_problem(path, name)]
        if problem
    ]
    assert found == []


@pytest.mark.parametrize(
    ("file", "name", "forbidden"),
    [
        ("store/store.py", f"{PREFIX}.kernel.files", False),
        ("store/store.py", f"{PREFIX}.tree.clone", True),
        ("tree/clone.py", f"{PREFIX}.store.store", True),
        ("drivers/vfs.py", f"{PREFIX}.store.records", True),
        ("drivers/vfs.py", f"{PREFIX}.store.removal.remove_tree", False),
        ("runtime/forms.py", f"{PREFIX}.drivers.base", True),
        ("operations/layer_gc.py", f"{PREFIX}.drivers.registry", False),
        ("operations/layer_gc.py", f"{PREFIX}.service.work", True),
        ("service/store_tasks.py", f"{PREFIX}.drivers.registry", True),
        ("kernel/libc.py", "ansible.module_utils.basic", True),
        ("kernel/libc.py", "ansible_collections.userns.storage.plugins.module_utils._module", True),
        ("kernel/libc.py", "yaml", True),
        ("kernel/libc.py", "ctypes", False),
        ("__init__.py", f"{PREFIX}.errors", True),
    ],
)
def test_allowed_and_forbidden_imports(file: str, name: str, forbidden: bool) -> None:
    assert bool(import_problem(LIBRARY / file, name)) is forbidden
