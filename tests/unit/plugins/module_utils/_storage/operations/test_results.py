# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of the declared schemas of results: each operation has a schema, which matches the documentation."""

from __future__ import annotations

import ast
import importlib
import pathlib
import typing as t

import pytest
import yaml
from ansible_collections.userns.storage.plugins.module_utils._storage.errors import WorkerError
from ansible_collections.userns.storage.plugins.module_utils._storage.operations import (
    inventory_results,
    results,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.userns.declared import (
    is_declared,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.userns.shapes import (
    Check,
    Either,
    Items,
    Maybe,
    Record,
)

ROOT = pathlib.Path(results.__file__).resolve().parents[3]
MODULES = "ansible_collections.userns.storage.plugins.modules."
# Values that the modules do not document: Ansible's common return values, and those of a failure.
COMMON = {"changed", "diff", "warnings", "error", "facts"}


def fields(form: Check) -> t.Dict[str, Check]:
    """Return the fields of the records in a form, at any depth."""
    if isinstance(form, Items):
        return fields(form.entry)
    if isinstance(form, Maybe):
        return fields(form.form)
    if isinstance(form, Either):
        return {key: value for inner in form.forms for key, value in fields(inner).items()}
    return dict(form.fields) if isinstance(form, Record) else {}


def compare(documented: t.Mapping[str, t.Any], form: Check, path: str = "") -> None:
    found = {key: value for key, value in fields(form).items() if path or key not in COMMON}
    assert set(found) == set(documented), path
    for key, inner in found.items():
        if "contains" in documented[key]:
            compare(documented[key]["contains"], inner, f"{path}.{key}")


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("image_layers_info", inventory_results.INFO),
        ("layer_template", results.TEMPLATE),
        ("layer_gc", inventory_results.GC),
        ("image_layers", inventory_results.IMAGES_REMOVED),
    ],
)
def test_declared_schemas_match_documentation(name: str, form: Check) -> None:
    documented = yaml.safe_load(importlib.import_module(MODULES + name).RETURN)
    if documented.get("stores", {}).get("returned") == "with O(users)":
        # The form is that of a single store's result.
        del documented["stores"]
    if form is inventory_results.IMAGES_REMOVED:
        # The module adds these values outside the store, for state=present.
        del documented["mappings"]
        conversions = documented.pop("conversions")["contains"]
        assert set(conversions) - {"images"} == set(fields(inventory_results.CONVERSION))
    # This value is for a user whose store could not be opened.
    documented.get("stores", {}).get("contains", {}).pop("error", None)
    if "orphans" in documented:
        # The documentation describes these values in its text only: those of a mapped layer.
        documented["orphans"]["contains"].update(
            {key: {} for key in fields(inventory_results.MAPPED_LAYER)}
        )
    compare(documented, form)


def test_functions_run_in_user_namespaces_are_declared() -> None:
    """The functions are those passed to userns.run and to the run functions of the modules."""
    seen = 0
    for path in (ROOT / "module_utils/_storage").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "userns.run":
                parts = path.relative_to(ROOT.parents[3]).with_suffix("").parts
                module: t.Any = importlib.import_module(".".join(parts))
                for part in ast.unparse(node.args[0]).split("."):
                    module = getattr(module, part)
                assert is_declared(module), (path, ast.unparse(node))
                seen += 1
    assert seen >= 7
    for path in (ROOT / "modules").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("run", "run_for_users"):
                arguments = [ast.unparse(arg) for arg in node.args]
                operation: t.Any = importlib.import_module(MODULES + path.stem)
                for part in arguments[3 if "users" in arguments[1] else 2].split("."):
                    operation = getattr(operation, part)
                assert is_declared(operation), (path, arguments)
                seen += 1
    assert seen >= 11


def test_result_for_another_user_is_rejected() -> None:
    results.refuse_other_users({"layers": [{"user": "alice"}, {}], "stores": []}, "alice")
    for key in ("layers", "stores"):
        with pytest.raises(WorkerError, match="another user"):
            results.refuse_other_users({key: [{"user": "alice"}, {"user": "bob"}]}, "alice")


# Values that several modules return, and their fields that differ on purpose.
SHARED: t.Sequence[t.Tuple[t.Tuple[str, ...], str, t.Set[str]]] = (
    (
        ("image_layers", "image_layers_info"),
        "images",
        {"images", "images.mapped_layers.verification"},
    ),
    (("image_layers_info", "layer_gc"), "contradictions", set()),
    (
        ("image_layers", "image_layers_info", "layer_gc", "layer_template", "shared_images"),
        "store",
        {"store.shifting"},
    ),
)


def described(values: t.Mapping[str, t.Any], path: str = "") -> t.Iterator[t.Tuple[str, t.Any]]:
    """Yield the path of each value and its documentation, without the keys `contains` and `returned`."""
    for name, value in values.items():
        kept = {key: text for key, text in value.items() if key not in ("contains", "returned")}
        yield path + name, kept
        yield from described(value.get("contains", {}), f"{path}{name}.")


@pytest.mark.parametrize(("modules", "name", "different"), SHARED)
def test_shared_values_are_documented_equally(
    modules: t.Tuple[str, ...], name: str, different: t.Set[str]
) -> None:
    first: t.Dict[str, t.Any] = {}
    compared = 0
    for module in modules:
        document = yaml.safe_load(importlib.import_module(MODULES + module).RETURN)
        for path, documented in described({name: document[name]}):
            if not any(
                path == item or (path.startswith(f"{item}.") and item != name) for item in different
            ):
                compared += path in first
                assert documented == first.setdefault(path, documented), (module, path)
    assert compared > 3


# The record that a value of a module describes, if it is not named like the value.
RECORDS: t.Mapping[t.Tuple[str, str], str] = {
    ("layer_template", "stores"): "store",
    ("layer_template", "layers"): "mappings",
    ("layer_gc", "kept"): "removed",
    ("layer_gc", "failures"): "removed",
    ("rootless_stores_info", "stores"): "accounts",
    ("rootless_stores_info", "failures"): "accounts",
}
# Values of the same name and record that differ between modules, and the reasons.
DIFFERENT: t.Mapping[t.Tuple[str, str], str] = {
    ("", "failures"): "accounts in rootless_stores_info, items to remove in layer_gc",
    ("", "images"): "image_layers returns the images of the task",
    ("", "remaining"): "layer_gc counts more than layers",
    ("", "stores"): "rootless_stores_info searches for stores",
    ("", "users"): "each module that handles users has its own values for them",
    ("mappings", "image_id"): "image_layers knows it before the image is in the store",
    ("mappings", "image_names"): "image_layers has the names of the task",
    ("mappings", "uidmap"): "image_layers has a map for the own layers of an image",
    ("mappings", "gidmap"): "image_layers has a map for the own layers of an image",
    ("mapped_layers", "verification"): "only image_layers_info verifies",
    ("users", "images"): "rootless_stores_info has the patterns of the declaration",
    ("store", "shifting"): "only layer_template determines it",
}


def records(module: str) -> t.Iterator[t.Tuple[t.Tuple[str, str], t.Any]]:
    """Yield the record and the name of each documented value of a module, and its documentation without the sample."""

    def values(found: t.Mapping[str, t.Any], record: str) -> t.Iterator[t.Any]:
        for name, value in found.items():
            kept = {key: value.get(key) for key in ("description", "type", "elements")}
            yield (record, name), kept
            yield from values(value.get("contains", {}), RECORDS.get((module, name), name))

    yield from values(yaml.safe_load(importlib.import_module(MODULES + module).RETURN), "")


def test_each_value_is_documented_equally_in_all_modules() -> None:
    by_module: t.Dict[t.Tuple[str, str], t.Dict[str, t.List[t.Any]]] = {}
    for path in sorted((ROOT / "modules").glob("*.py")):
        for key, value in records(path.stem):
            by_module.setdefault(key, {}).setdefault(path.stem, []).append(value)
    shared = {key: found for key, found in by_module.items() if len(found) > 1}
    assert len(shared) > 40
    for key, found in shared.items():
        all_values = [value for values in found.values() for value in values]
        equal = all(value == all_values[0] for value in all_values)
        assert equal != (key in DIFFERENT), (
            f"{key} in {', '.join(found)}: use the same description in all of them, or add the reason for the "
            f"difference to DIFFERENT: {all_values}"
        )
    assert {*DIFFERENT} <= {*shared}
