# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""layer_template and layer_gc never undo each other's work, whatever maps are asked for and there already."""

from __future__ import annotations

import json
import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.operations import (
    layer_gc,
    layer_template,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.operations.mapping_options import (
    MappingOptions,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.operations.store_opening import (
    StoreRequest,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.damage import HandMadeStore, hex_id
from support.lab import Lab

IMAGE = "localhost/second:1"
# Each row means the same, written in several ways.
FORMS = (
    (
        ("0:100000:65536",),
        ("0:100000:1000", "1000:101000:64536"),
        ("1000:101000:64536", "0:100000:1000"),
    ),
    (("0:0:4294967295",), ("0:0:1000", "1000:1000:4294966295")),
    (("0:200000:1", "1:300000:65535"), ("1:300000:65535", "0:200000:1")),
    (("0:0:65536",), ("0:0:1", "1:1:65535")),
)
SPELT = [form for row in FORMS for form in row]
RUNTIMES = ("podman 4.3.1", "podman 5.4.2", "podman 5.8.6", "podman 6.1.1", "buildah 1.28.2")


def record(form: t.Sequence[str]) -> t.List[t.Dict[str, int]]:
    keys = ("container_id", "host_id", "size")
    return [dict(zip(keys, map(int, entry.split(":")))) for entry in form]


def add(store: HandMadeStore, number: int, form: t.Sequence[str]) -> None:
    """A mapped layer as a runtime has made it, in this spelling."""
    store.mapped(f"there {number}", "other", 100000, "second")
    for layer in store.now["layers"]:
        if layer["id"] == hex_id(f"there {number}"):
            layer["uidmap"] = layer["gidmap"] = record(form)
    store.save("layers")


@example(there=[], asked=list(FORMS[0][:2]), runtime="podman 4.3.1")
@example(there=[FORMS[0][2]], asked=list(FORMS[0][:2]), runtime="podman 4.3.1")
@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(
    there=st.lists(st.sampled_from(SPELT), max_size=3),
    asked=st.lists(st.sampled_from(SPELT), min_size=1, max_size=3),
    runtime=st.sampled_from(RUNTIMES),
)
def test_neither_undoes_what_the_other_has_done(
    lab: Lab,
    tmp_path_factory: pytest.TempPathFactory,
    there: t.List[t.Tuple[str, ...]],
    asked: t.List[t.Tuple[str, ...]],
    runtime: str,
) -> None:
    store = HandMadeStore(tmp_path_factory.mktemp("store"), "vfs")
    for number, form in enumerate(there):
        add(store, number, form)
    where = StoreRequest(
        graphroot=str(store.graphroot), runroot=str(store.runroot), driver=store.driver
    )
    make = layer_template.TemplateRequest(
        where,
        (IMAGE,),
        tuple(MappingOptions(uidmap=form, gidmap=form, runtime=runtime) for form in asked),
    )
    collect = layer_gc.GcRequest(
        where,
        {
            "min_age": "0",
            "duplicates": True,
            "broken": "repair",
            "orphans": "remove",
            "images": (IMAGE,),
        },
    )
    assert not layer_template.declare(make).get("error")
    made = {item["layer_id"] for item in layer_template.declare(make)["layers"]} - {""}
    removed = {item["id"] for item in layer_gc.collect(collect)["removed"]}
    again = layer_template.declare(make)
    assert (again["changed"], again.get("error")) == (False, None), json.dumps(again["layers"])
    assert not layer_gc.collect(collect)["changed"]
    assert not removed & made or {item["layer_id"] for item in again["layers"]} - {""}
