# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Messages name the commands of the program whose store or containers they are about.

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


def record(kind: t.Type[R], **fields: t.Any) -> R:
    full = {"image": "", "layer": "", **fields} if kind is Container else fields
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


def test_who_created_a_container() -> None:
    assert (INFRA.from_crio, INFRA.is_pod) == (True, True)
    assert (WEB.from_crio, WEB.is_pod) == (True, False)
    assert (DB.from_crio, DB.is_pod) == (False, False)
    assert record(Container, id="f" * 64, metadata='{"pod-id": 1}').from_crio is False


def test_hints_for_containers_that_keep_a_layer() -> None:
    assert "podman" not in removal_hint([INFRA, WEB])
    for word in ("crictl pods", "crictl ps --all", "crictl rmp --force"):
        assert word in removal_hint([WEB])
    assert "crictl" not in removal_hint([DB])
    assert "crictl" in removal_hint([DB, WEB])
    assert "podman ps --all --external" in removal_hint([DB, WEB])
    # Layers without containers.
    assert "podman" in removal_hint([])


def test_a_layer_in_use_names_the_program_of_its_containers() -> None:
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
def test_an_image_that_is_not_there(runtime: str, program: str) -> None:
    with pytest.raises(ImageUnknown) as caught:
        Snapshot(runtime=runtime).resolve_image("docker.io/library/nginx:1")
    assert f"`{program} images`" in caught.value.hint
    assert f"`{program} pull docker.io/library/nginx:1`" in caught.value.hint
    other = {"crictl": "podman", "podman": "crictl"}[program]
    assert other not in caught.value.hint
    with pytest.raises(StoreError) as damaged:
        Snapshot(runtime=runtime).layer(LAYER)
    assert ("crio check" in damaged.value.hint) is bool(runtime)


def test_commands_for_a_damaged_store() -> None:
    commands: t.Dict[str, Commands] = {"": Commands(), "cri-o": Commands(runtime="cri-o")}
    told = {
        runtime: [
            made.remove_image("c" * 64),
            made.remove_everything("/var/lib/it's"),
            made.write_once(),
        ]
        for runtime, made in commands.items()
    }
    assert not any("podman" in text for text in told["cri-o"])
    assert not any("crictl" in text for text in told[""])
    assert told["cri-o"][0] == "crictl rmi cccccccccccc"
    assert told[""][0] == "podman rmi --force cccccccccccc"
    assert told["cri-o"][1].startswith("systemctl stop crio && rm -r ")
    # A container is removed by the program that created it, whosever the store is.
    for made in commands.values():
        assert made.remove_container(INFRA) == "crictl rmp --force aaaaaaaaaaaa"
        assert made.remove_container(WEB) == "crictl rm --force dddddddddddd"
        assert made.remove_container(DB) == "podman rm --force eeeeeeeeeeee"


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
def test_advice_names_a_release_of_the_same_program(
    program: str, field: str, version: t.Tuple[int, ...]
) -> None:
    assert first_release(program, field) == version
