# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of image names, and of the layers that are removed with an image."""

from __future__ import annotations

import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.errors import (
    ConfigError,
    LayerInUse,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.operations import (
    image_layers,
    image_removal,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.store.records import (
    Image,
    Layer,
)
from support.made_records import container_record, image_record, layer_record, snapshot_of


def layer(letter: str, parent: str = "") -> Layer:
    return layer_record(letter * 64, parent * 64)


def image(letter: str, top: str, mapped: str = "", names: t.Sequence[str] = ()) -> Image:
    mapped_layers = {"mapped-layers": [item * 64 for item in mapped]}
    return image_record(letter * 64, top * 64, names=list(names), **mapped_layers)


# Layer a is the parent of all others, d and e are mapped layers of b.
LAYERS = [layer("a"), layer("b", "a"), layer("c", "a"), layer("d", "a"), layer("e", "a")]


@pytest.mark.parametrize(
    ("name", "source", "full"),
    [
        ("app", "oci:/x", "localhost/app:latest"),
        ("app:1", "oci:/x", "localhost/app:1"),
        ("team/app:1", "oci:/x", "localhost/team/app:1"),
        ("app", "", "docker.io/library/app:latest"),
        ("team/app:1", "", "docker.io/team/app:1"),
        ("quay.io/app", "", "quay.io/app:latest"),
        ("docker.io/nextcloud:stable", "oci:/x", "docker.io/library/nextcloud:stable"),
        ("docker.io/nextcloud:stable", "", "docker.io/library/nextcloud:stable"),
        ("index.docker.io/nextcloud", "", "docker.io/library/nextcloud:latest"),
        ("docker://docker.io/nextcloud", "", "docker.io/library/nextcloud:latest"),
        ("docker://nextcloud:1", "", "docker.io/library/nextcloud:1"),
        ("localhost:5000/app:2", "", "localhost:5000/app:2"),
    ],
)
def test_image_names_are_completed(name: str, source: str, full: str) -> None:
    assert image_layers._full_name(name, source) == full


@pytest.mark.parametrize(
    "name",
    [
        "",
        " app",
        "sha256:" + "0" * 64,
        "app@sha256:" + "0" * 64,
        "App",
        "quay.io/App:1",
        "app:" + "1" * 129,
    ],
)
def test_invalid_image_name_is_rejected(name: str) -> None:
    with pytest.raises(ConfigError, match="is not an image reference|is an ID|has a digest"):
        image_layers._full_name(name, "oci:/x")


def test_mapped_layers_are_removed_before_template_and_parents() -> None:
    target = image("1", "b", "de")
    found = image_removal.layers_of_removal(snapshot_of(*LAYERS[:2], *LAYERS[3:], target), target)
    assert [name[0] for name in found] == ["d", "e", "b", "a"]


def test_layers_of_other_images_are_kept() -> None:
    target, other = image("1", "b", "d"), image("2", "c")
    found = image_removal.layers_of_removal(snapshot_of(*LAYERS[:4], target, other), target)
    assert [name[0] for name in found] == ["d", "b"]


def test_shared_top_layer_is_kept() -> None:
    target, other = image("1", "b", "d"), image("2", "b")
    found = image_removal.layers_of_removal(
        snapshot_of(*LAYERS[:2], LAYERS[3], target, other), target
    )
    assert [name[0] for name in found] == ["d"]


def test_mapped_layers_without_record_are_skipped() -> None:
    target = image("1", "b", "9d")
    found = image_removal.layers_of_removal(snapshot_of(*LAYERS[:2], LAYERS[3], target), target)
    assert [name[0] for name in found] == ["d", "b", "a"]


def test_error_names_all_containers_that_use_image() -> None:
    target = image("1", "b", "d", ["localhost/app:1"])
    current = snapshot_of(
        *LAYERS[:2],
        LAYERS[3],
        layer("6", "d"),
        layer("7", "b"),
        target,
        container_record("8" * 64, "1" * 64, "6" * 64, "mapped"),
        container_record("9" * 64, "1" * 64, "7" * 64, "plain"),
    )
    with pytest.raises(LayerInUse, match=r"localhost/app:1: .*mapped.*plain") as caught:
        image_layers._refuse(current, target)
    assert len(caught.value.facts["users"]) == 2


def test_tagging_updates_history_like_runtime() -> None:
    raw: t.Dict[str, t.Any] = {"names": ["a:1"], "names-history": ["a:1"]}
    image_layers._add_names(raw, ["b:1", "c:1"])
    assert raw["names"] == ["a:1", "b:1", "c:1"]
    assert raw["names-history"] == ["c:1", "b:1", "a:1"]
    image_layers._drop_names(raw, ["a:1", "b:1", "c:1"])
    assert "names" not in raw


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("localhost/app:1", "localhost/app:1"),
        ("app:1", "localhost/app:1"),
        ("app", ""),
        ("other", "quay.io/x/other:latest"),
        ("1111", ""),
        ("docker.io/next:1", "docker.io/library/next:1"),
        ("index.docker.io/next:1", "docker.io/library/next:1"),
        ("next:1", "docker.io/library/next:1"),
        ("App:1", ""),
        ("sha256:" + "1" * 64, ""),
    ],
)
def test_reference_is_resolved_to_name(reference: str, name: str) -> None:
    target = image(
        "1", "b", "", ["localhost/app:1", "quay.io/x/other:latest", "docker.io/library/next:1"]
    )
    assert image_layers._name_meant(reference, target) == name
