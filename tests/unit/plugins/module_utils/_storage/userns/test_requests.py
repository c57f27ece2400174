# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of the conversion of requests for another process to data."""

from __future__ import annotations

import collections.abc
import dataclasses
import importlib
import inspect
import json
import pkgutil
import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils import _storage
from ansible_collections.userns.storage.plugins.module_utils._storage.errors import InternalError
from ansible_collections.userns.storage.plugins.module_utils._storage.operations import (
    image_layers,
    image_layers_info,
    layer_gc,
    layer_template,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.operations.mapping_options import (
    MappingOptions,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.operations.store_opening import (
    StoreRequest,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.service import store_tasks
from ansible_collections.userns.storage.plugins.module_utils._storage.store.config import Account
from ansible_collections.userns.storage.plugins.module_utils._storage.userns import declared
from ansible_collections.userns.storage.plugins.module_utils._storage.userns.requests import (
    as_data,
    from_data,
)

STORE = StoreRequest(Account("alice", 1000, 1000, "/home/\udcff"), "/c", storage_options=("a=b",))
MAPPINGS = (MappingOptions("keep-id"), MappingOptions(uidmap=("0:1:2",), slots=2))
TEMPLATE = layer_template.TemplateRequest(STORE, ("a", "b"), MAPPINGS, deadline=1.5)
GC = layer_gc.GcRequest(
    STORE,
    {
        "max_copies_per_image": 1,
        "high_threshold": 80,
        "low_threshold": 60.5,
        "images": ("a", "b"),
        "duplicates": True,
    },
)
CALLS: t.Sequence[t.Tuple[t.Callable[..., t.Any], t.Tuple[t.Any, ...]]] = (
    (layer_template.declare, (TEMPLATE,)),
    (layer_gc.collect, (GC,)),
    (image_layers_info.info, (image_layers_info.InfoRequest(StoreRequest()),)),
    (image_layers.look, (image_layers._Step(STORE, ("a",)),)),
    (store_tasks.make_ready, (TEMPLATE, ("a*",), 5.0)),
    (store_tasks.collect, (GC, ((TEMPLATE, ("a",)),))),
    (store_tasks.token_path, (STORE,)),
)


def sent(value: t.Any) -> t.Any:
    return json.loads(json.dumps(as_data(value)))


@pytest.mark.parametrize(
    ("function", "arguments"), CALLS, ids=lambda item: getattr(item, "__qualname__", "")
)
def test_requests_are_restored_from_data(
    function: t.Callable[..., t.Any], arguments: t.Tuple[t.Any, ...]
) -> None:
    assert tuple(from_data(function, sent(arguments))) == arguments


def declared_functions() -> t.List[t.Callable[..., t.Any]]:
    """All functions of the library that run in a namespace, which ``podman unshare`` may have to create."""
    for module in pkgutil.walk_packages(_storage.__path__, f"{_storage.__name__}."):
        importlib.import_module(module.name)
    return [
        getattr(importlib.import_module(module), name)
        for module, name in sorted(declared._FORMS)
        # _watched runs programs as a user, without a namespace.
        if module.startswith(_storage.__name__) and name != "_watched"
    ]


def example(kind: t.Any) -> t.Any:
    """A value of a type."""
    plain = {str: "a", int: 1, float: 1.5, bool: True, t.Any: {"a": [1]}}
    if kind in plain:
        return plain[kind]
    origin, inner = t.get_origin(kind), t.get_args(kind)
    if origin is t.Union:
        return example(inner[0])
    if dataclasses.is_dataclass(kind):
        types = t.get_type_hints(kind)
        return t.cast("t.Any", kind)(
            **{field.name: example(types[field.name]) for field in dataclasses.fields(kind)}
        )
    if origin is tuple and inner[-1:] != (Ellipsis,):
        return tuple(example(item) for item in inner)
    if origin in (tuple, collections.abc.Sequence):
        return (example(inner[0]),)
    if origin in (dict, collections.abc.Mapping):
        return {"a": example(inner[1])}
    raise AssertionError(f"no example for {kind}")


@pytest.mark.parametrize("function", declared_functions(), ids=lambda item: item.__qualname__)
def test_arguments_of_every_declared_function_travel(function: t.Callable[..., t.Any]) -> None:
    types = t.get_type_hints(function)
    required = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is parameter.empty
    ]
    arguments = tuple(example(types[name]) for name in required)
    assert tuple(from_data(function, sent(arguments))) == arguments


@pytest.mark.parametrize(
    "arguments",
    [
        [1],
        [[], []],
        {},
        [{}],
        [{**sent(STORE), "more": 1}],
        [{**sent(STORE), "storage_conf": 1}],
        [{**sent(STORE), "lock_timeout": "1"}],
        [{**sent(STORE), "lock_timeout": True}],
        [{**sent(STORE), "storage_options": "a=b"}],
        [{**sent(STORE), "account": ["alice", 1000, 1000, "/"]}],
    ],
)
def test_arguments_of_other_types_are_rejected(arguments: t.Any) -> None:
    with pytest.raises(InternalError):
        from_data(store_tasks.token_path, arguments)


@pytest.mark.parametrize(
    "options", [[["images", "a"]], {"images": {"a": "b"}}, {"images": [1]}, {"images": None}]
)
def test_options_of_other_types_are_rejected(options: t.Any) -> None:
    with pytest.raises(InternalError):
        from_data(layer_gc.collect, [{**sent(GC), "options": options}])
