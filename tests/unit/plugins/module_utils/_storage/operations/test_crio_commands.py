# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests that messages name the commands of the program to which the store or the containers belong.

CRI-O cannot be installed here. The records have the form in which CRI-O 1.36 writes them.
"""

from __future__ import annotations

import json
import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.capabilities import (
    first_release,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.errors import (
    ImageUnknown,
    LayerInUse,
    StoreError,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.operations.layer_removal import (
    refuse_if_used,
    removal_hint,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.store.consistency import (
    Commands,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.store.records import (
    Container,
    Layer,
    parse,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.store.snapshot import Snapshot

R = t.TypeVar("R", Container, Layer)
POD, LAYER = "a" * 64, "b" * 64
_DEFAULTS: t.Dict[type, t.Dict[str, str]] = {Container: {"image": "", "layer": ""}}


def record(kind: t.Type[R], **fields: t.Any) -> R:
    full = {**_DEFAULTS.get(kind, {}), **fields}
    return parse(json.dumps([full]).encode(), kind, "/store/records.json")[0]


def crio(container_id: str, name: str, layer: str = LAYER) -> Container:
    metadata = {
        "pod-name": "k8s_web_default_2b5e_0",
        "pod-id": POD,
        "image-name": "docker.io/library/nginx:1.29",
        "image-id": "c" * 64,
        "name": name,
        "metadata-name": "web",
        "created-at": 1764330000,
        "mountlabel": "",
    }
    return record(
        Container, id=container_id, names=[name], layer=layer, metadata=json.dumps(metadata)
    )


def podman(container_id: str, name: str) -> Container:
    metadata = {"image-name": "x", "image-id": "c" * 64, "name": name, "created-at": 1764330000}
    return record(Container, id=container_id, layer=LAYER, metadata=json.dumps(metadata))


INFRA = crio(POD, "k8s_POD_web_default_2b5e_0")
WEB = crio("d" * 64, "k8s_web_web_default_2b5e_0")
DB = podman("e" * 64, "db")


def test_creator_of_container_is_detected() -> None:
    assert (INFRA.from_crio, INFRA.is_pod) == (True, True)
    assert (WEB.from_crio, WEB.is_pod) == (True, False)
    assert (DB.from_crio, DB.is_pod) == (False, False)
    assert record(Container, id="f" * 64, metadata='{"pod-id": 1}').from_crio is False


def test_removal_hint_names_program_of_containers() -> None:
    assert "podman" not in removal_hint([INFRA, WEB])
    for command in ("crictl pods", "crictl ps --all", "crictl rmp --force"):
        assert command in removal_hint([WEB])
    assert "crictl" not in removal_hint([DB])
    assert "crictl" in removal_hint([DB, WEB])
    assert "podman ps --all --external" in removal_hint([DB, WEB])
    # No container uses the layer.
    assert "podman" in removal_hint([])


def test_error_for_layer_in_use_names_program_of_containers() -> None:
    snapshot = Snapshot(
        {LAYER: record(Layer, id=LAYER), "9" * 64: record(Layer, id="9" * 64, parent=LAYER)},
        {},
        {WEB.id: crio(WEB.id, WEB.names[0], "9" * 64)},
    )
    with pytest.raises(LayerInUse) as caught:
        refuse_if_used(snapshot, LAYER)
    assert "k8s_web_web_default_2b5e_0" in str(caught.value)
    assert "crictl" in caught.value.hint


@pytest.mark.parametrize(("runtime", "program"), [("cri-o", "crictl"), ("", "podman")])
def test_error_for_missing_image_names_program_of_store(runtime: str, program: str) -> None:
    with pytest.raises(ImageUnknown) as caught:
        Snapshot(runtime=runtime).resolve_image("docker.io/library/nginx:1")
    assert f"`{program} images`" in caught.value.hint
    assert f"`{program} pull docker.io/library/nginx:1`" in caught.value.hint
    other = {"crictl": "podman", "podman": "crictl"}[program]
    assert other not in caught.value.hint
    with pytest.raises(StoreError) as damaged:
        Snapshot(runtime=runtime).layer(LAYER)
    assert ("crio check" in damaged.value.hint) is bool(runtime)


def test_commands_for_damaged_store_use_program_of_store() -> None:
    commands: t.Dict[str, Commands] = {"": Commands(), "cri-o": Commands(runtime="cri-o")}
    texts = {
        runtime: [
            store_commands.remove_image("c" * 64),
            store_commands.remove_everything("/var/lib/it's"),
            store_commands.write_once(),
        ]
        for runtime, store_commands in commands.items()
    }
    assert not any("podman" in text for text in texts["cri-o"])
    assert not any("crictl" in text for text in texts[""])
    assert texts["cri-o"][0] == "crictl rmi cccccccccccc"
    assert texts[""][0] == "podman rmi --force cccccccccccc"
    assert texts["cri-o"][1].startswith("systemctl stop crio && rm -r ")
    # The program that created a container removes it, whatever the runtime of the store is.
    for store_commands in commands.values():
        assert store_commands.remove_container(INFRA) == "crictl rmp --force aaaaaaaaaaaa"
        assert store_commands.remove_container(WEB) == "crictl rm --force dddddddddddd"
        assert store_commands.remove_container(DB) == "podman rm --force eeeeeeeeeeee"


@pytest.mark.parametrize(
    ("program", "field", "version"),
    [
        ("podman", "idmapped_mounts", (4, 1)),
        ("podman", "shifts_any_map", (5, 6)),
        ("podman", "idmap_can_be_disabled", (4, 5)),
        ("cri-o", "idmapped_mounts", (1, 25)),
        ("cri-o", "shifts_any_map", (1, 34)),
        ("cri-o", "idmap_can_be_disabled", (1, 27)),
        ("buildah", "shifts_any_map", (1, 41)),
    ],
)
def test_first_release_is_of_same_program(
    program: str, field: str, version: t.Tuple[int, ...]
) -> None:
    assert first_release(program, field) == version
