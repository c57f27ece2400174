# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The declared forms of results: one for each operation, and equal to what the modules document."""

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
# What no module documents as its own: Ansible's common return values, and those that make it fail.
COMMON = {"changed", "diff", "warnings", "error", "facts"}


def fields(form: Check) -> t.Dict[str, Check]:
    """The fields of a record, wherever it is in the form; of several records, all."""
    if isinstance(form, Items):
        return fields(form.entry)
    if isinstance(form, Maybe):
        return fields(form.form)
    if isinstance(form, Either):
        return {key: one for inner in form.forms for key, one in fields(inner).items()}
    return dict(form.fields) if isinstance(form, Record) else {}


def compare(documented: t.Mapping[str, t.Any], form: Check, path: str = "") -> None:
    found = {key: one for key, one in fields(form).items() if path or key not in COMMON}
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
def test_forms_are_what_is_documented(name: str, form: Check) -> None:
    documented = yaml.safe_load(importlib.import_module(MODULES + name).RETURN)
    if documented.get("stores", {}).get("returned") == "with O(users)":
        # The form is that of a single store's result.
        del documented["stores"]
    if form is inventory_results.IMAGES_REMOVED:
        # Made outside the store, of an image that is present.
        del documented["mappings"]
        conversions = documented.pop("conversions")["contains"]
        assert set(conversions) - {"images"} == set(fields(inventory_results.CONVERSION))
    # It is for a user whose store could not be entered at all.
    documented.get("stores", {}).get("contains", {}).pop("error", None)
    if "orphans" in documented:
        # Said there in words: all that a mapped layer has.
        documented["orphans"]["contains"].update(
            {key: {} for key in fields(inventory_results.MAPPED_LAYER)}
        )
    compare(documented, form)


def test_every_function_that_runs_inside_is_declared() -> None:
    """Whatever is handed to userns.run, and to the modules' run functions."""
    seen = 0
    for path in (ROOT / "module_utils/_storage").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "userns.run":
                where = path.relative_to(ROOT.parents[3]).with_suffix("").parts
                module: t.Any = importlib.import_module(".".join(where))
                for part in ast.unparse(node.args[0]).split("."):
                    module = getattr(module, part)
                assert is_declared(module), (path, ast.unparse(node))
                seen += 1
    assert seen >= 7
    for path in (ROOT / "modules").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("run", "run_for_users"):
                words = [ast.unparse(arg) for arg in node.args]
                operation: t.Any = importlib.import_module(MODULES + path.stem)
                for part in words[3 if "users" in words[1] else 2].split("."):
                    operation = getattr(operation, part)
                assert is_declared(operation), (path, words)
                seen += 1
    assert seen >= 11


def test_a_result_for_another_user() -> None:
    results.refuse_other_users({"layers": [{"user": "alice"}, {}], "stores": []}, "alice")
    for key in ("layers", "stores"):
        with pytest.raises(WorkerError, match="another user"):
            results.refuse_other_users({key: [{"user": "alice"}, {"user": "bob"}]}, "alice")


# Values that modules share, and those of their fields that differ on purpose.
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
    """Each value with its path, and its documentation but for what it contains and when it is returned."""
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


# The record that a value of a module describes, where that is not the last name of its path.
RECORDS: t.Mapping[t.Tuple[str, str], str] = {
    ("layer_template", "stores"): "store",
    ("layer_template", "layers"): "mappings",
    ("layer_gc", "kept"): "removed",
    ("layer_gc", "failures"): "removed",
    ("rootless_stores_info", "stores"): "accounts",
    ("rootless_stores_info", "failures"): "accounts",
}
# Values of one name in one record that differ from module to module, and why.
DIFFERENT: t.Mapping[t.Tuple[str, str], str] = {
    ("", "failures"): "accounts in rootless_stores_info, items to remove in layer_gc",
    ("", "images"): "image_layers returns those of the task",
    ("", "remaining"): "layer_gc counts more than layers",
    ("", "stores"): "rootless_stores_info finds them",
    ("", "users"): "each module about users has values of its own for them",
    ("mappings", "image_id"): "image_layers knows it before the image is in the store",
    ("mappings", "image_names"): "image_layers has the names of the task",
    ("mappings", "uidmap"): "image_layers has a map for the own layers of an image",
    ("mappings", "gidmap"): "image_layers has a map for the own layers of an image",
    ("mapped_layers", "verification"): "only image_layers_info verifies",
    ("users", "images"): "rootless_stores_info has the patterns of the declaration",
    ("store", "shifting"): "only layer_template finds it out",
}


def records(module: str) -> t.Iterator[t.Tuple[t.Tuple[str, str], t.Any]]:
    """Each documented value of a module: its record and name, and what is said of it but for its sample."""

    def values(found: t.Mapping[str, t.Any], record: str) -> t.Iterator[t.Any]:
        for name, value in found.items():
            kept = {key: value.get(key) for key in ("description", "type", "elements")}
            yield (record, name), kept
            yield from values(value.get("contains", {}), RECORDS.get((module, name), name))

    yield from values(yaml.safe_load(importlib.import_module(MODULES + module).RETURN), "")


def test_each_value_is_documented_equally_in_all_modules() -> None:
    told: t.Dict[t.Tuple[str, str], t.Dict[str, t.List[t.Any]]] = {}
    for path in sorted((ROOT / "modules").glob("*.py")):
        for key, value in records(path.stem):
            told.setdefault(key, {}).setdefault(path.stem, []).append(value)
    shared = {key: found for key, found in told.items() if len(found) > 1}
    assert len(shared) > 40
    for key, found in shared.items():
        all_values = [value for values in found.values() for value in values]
        equal = all(value == all_values[0] for value in all_values)
        assert equal != (key in DIFFERENT), (
            f"{key} in {', '.join(found)}: give it the same description in all of them, or say in DIFFERENT why it "
            f"differs: {all_values}"
        )
    assert {*DIFFERENT} <= {*shared}
