# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Test that layer_template and layer_gc do not undo each other's changes, for any requested and existing maps."""

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
from support.damaged_store import HandMadeStore, hex_id
from support.lab import Lab

IMAGE = "localhost/second:1"
# Each row contains equivalent forms of one map.
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
ALL_FORMS = [form for row in FORMS for form in row]
RUNTIMES = ("podman 4.3.1", "podman 5.4.2", "podman 5.8.6", "podman 6.1.1", "buildah 1.28.2")


def record(form: t.Sequence[str]) -> t.List[t.Dict[str, int]]:
    keys = ("container_id", "host_id", "size")
    return [dict(zip(keys, map(int, entry.split(":")))) for entry in form]


def add_mapped_layer(store: HandMadeStore, number: int, form: t.Sequence[str]) -> None:
    """Add a mapped layer as a runtime creates it, with the map in this form."""
    store.mapped(f"there {number}", "other", 100000, "second")
    for layer in store.now["layers"]:
        if layer["id"] == hex_id(f"there {number}"):
            layer["uidmap"] = layer["gidmap"] = record(form)
    store.save("layers")


@example(existing=[], requested=list(FORMS[0][:2]), runtime="podman 4.3.1")
@example(existing=[FORMS[0][2]], requested=list(FORMS[0][:2]), runtime="podman 4.3.1")
@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(
    existing=st.lists(st.sampled_from(ALL_FORMS), max_size=3),
    requested=st.lists(st.sampled_from(ALL_FORMS), min_size=1, max_size=3),
    runtime=st.sampled_from(RUNTIMES),
)
def test_layer_template_and_layer_gc_agree(
    lab: Lab,
    tmp_path_factory: pytest.TempPathFactory,
    existing: t.List[t.Tuple[str, ...]],
    requested: t.List[t.Tuple[str, ...]],
    runtime: str,
) -> None:
    store = HandMadeStore(tmp_path_factory.mktemp("store"), "vfs")
    for number, form in enumerate(existing):
        add_mapped_layer(store, number, form)
    store_request = StoreRequest(
        graphroot=str(store.graphroot), runroot=str(store.runroot), driver=store.driver
    )
    template_request = layer_template.TemplateRequest(
        store_request,
        (IMAGE,),
        tuple(MappingOptions(uidmap=form, gidmap=form, runtime=runtime) for form in requested),
    )
    gc_request = layer_gc.GcRequest(
        store_request,
        {
            "min_age": "0",
            "duplicates": True,
            "broken": "repair",
            "orphans": "remove",
            "images": (IMAGE,),
        },
    )
    assert not layer_template.declare(template_request).get("error")
    created = {item["layer_id"] for item in layer_template.declare(template_request)["layers"]} - {
        ""
    }
    removed = {item["id"] for item in layer_gc.collect(gc_request)["removed"]}
    repeated = layer_template.declare(template_request)
    assert (repeated["changed"], repeated.get("error")) == (False, None), json.dumps(
        repeated["layers"]
    )
    assert not layer_gc.collect(gc_request)["changed"]
    assert not removed & created or {item["layer_id"] for item in repeated["layers"]} - {""}
