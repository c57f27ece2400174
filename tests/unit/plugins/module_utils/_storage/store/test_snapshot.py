# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of snapshots: chains and users of layers, and image references as podman resolves them."""

from __future__ import annotations

import json
import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.errors import (
    ImageAmbiguous,
    ImageUnknown,
    StoreError,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.store.records import (
    Container,
    Image,
    Layer,
    parse,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.store.snapshot import (
    Snapshot,
)
from hypothesis import given
from hypothesis import strategies as st
from support.made_records import padded_id


def index(kind: t.Any, *raw: t.Dict[str, t.Any]) -> t.Dict[str, t.Any]:
    return {item.id: item for item in parse(json.dumps(raw).encode(), kind, "f")}


def additional(kind: t.Any, *raw: t.Dict[str, t.Any]) -> t.Dict[str, t.Any]:
    """Records of an additional store."""
    parsed = parse(json.dumps(raw).encode(), kind, "f", read_only_store="/ro")
    return {item.id: item for item in parsed}


def digest(text: str) -> str:
    return "sha256:" + text * 64


def snapshot(images: t.Sequence[t.Dict[str, t.Any]] = ()) -> Snapshot:
    return Snapshot({}, index(Image, *images), {})


# Layers


@pytest.fixture
def tree() -> Snapshot:
    layers = [
        {"id": padded_id("a")},
        {"id": padded_id("b"), "parent": padded_id("a")},
        {"id": padded_id("c"), "parent": padded_id("b")},
        {"id": padded_id("d"), "parent": padded_id("b")},
        {"id": padded_id("e"), "parent": padded_id("d")},
        {"id": padded_id("f"), "parent": padded_id("0badbad")},
        {"id": padded_id("1"), "parent": padded_id("2")},
        {"id": padded_id("2"), "parent": padded_id("1")},
    ]
    images: t.List[t.Dict[str, t.Any]] = [
        {
            "id": padded_id("10"),
            "layer": padded_id("c"),
            "mapped-layers": [padded_id("d"), padded_id("dead")],
        },
        {"id": padded_id("11"), "layer": padded_id("c")},
        {"id": padded_id("12")},
    ]
    containers = [
        {"id": padded_id("20"), "image": padded_id("10"), "layer": padded_id("e")},
        {"id": padded_id("21"), "image": padded_id("10"), "layer": padded_id("beef")},
    ]
    return Snapshot(index(Layer, *layers), index(Image, *images), index(Container, *containers))


class TestAdditionalStore:
    """A store and its additional store contain a layer with the same ID."""

    @pytest.fixture
    def stores(self) -> Snapshot:
        image = {"id": padded_id("11"), "layer": padded_id("a"), "mapped-layers": [padded_id("c")]}
        return Snapshot(
            {
                **index(
                    Layer, {"id": padded_id("a")}, {"id": padded_id("b"), "parent": padded_id("a")}
                ),
                **additional(
                    Layer,
                    {"id": padded_id("c"), "parent": padded_id("a")},
                    {"id": padded_id("d"), "parent": padded_id("b")},
                    {"id": padded_id("e"), "parent": padded_id("c")},
                ),
            },
            {
                **index(Image, {"id": padded_id("10"), "layer": padded_id("a")}),
                **additional(Image, image),
            },
            {},
            additional={"/ro": frozenset(map(padded_id, "acde"))},
        )

    def test_children_are_in_the_same_store(self, stores: Snapshot) -> None:
        assert [item.id for item in stores.children(padded_id("a"))] == [padded_id("b")]
        assert [item.id for item in stores.children(padded_id("c"))] == [padded_id("e")]

    def test_parent_that_is_missing_in_the_additional_store_is_found(
        self, stores: Snapshot
    ) -> None:
        assert [item.id for item in stores.children(padded_id("b"))] == [padded_id("d")]

    def test_images_are_in_the_same_store(self, stores: Snapshot) -> None:
        assert [item.id for item in stores.images_of_layer(padded_id("a"))] == [padded_id("10")]
        assert [item.id for item in stores.images_of_layer(padded_id("c"))] == [padded_id("11")]


def test_chain_ends_with_the_base_layer(tree: Snapshot) -> None:
    assert [item.id for item in tree.chain(padded_id("c"))] == [
        padded_id("c"),
        padded_id("b"),
        padded_id("a"),
    ]
    assert [item.id for item in tree.chain(padded_id("a"))] == [padded_id("a")]
    assert tree.chain("") == []


@pytest.mark.parametrize(
    ("layer", "message"), [("f", "no record"), ("dead", "no record"), ("1", "cycle")]
)
def test_broken_chain_is_an_error(tree: Snapshot, layer: str, message: str) -> None:
    with pytest.raises(StoreError, match=message) as caught:
        tree.chain(padded_id(layer))
    assert padded_id(layer) in str(caught.value)


def test_users_of_layers_are_found(tree: Snapshot) -> None:
    assert [child.id for child in tree.children(padded_id("b"))] == [padded_id("c"), padded_id("d")]
    assert tree.children(padded_id("c")) == []
    assert [item.id for item in tree.containers_on(padded_id("d"))] == [padded_id("20")]
    assert [item.id for item in tree.containers_on(padded_id("e"))] == [padded_id("20")]
    assert [item.id for item in tree.containers_on(padded_id("beef"))] == [padded_id("21")]
    assert tree.containers_on(padded_id("c")) == []
    assert [item.id for item in tree.containers_of(padded_id("10"))] == [
        padded_id("20"),
        padded_id("21"),
    ]
    assert [item.id for item in tree.images_of_layer(padded_id("c"))] == [
        padded_id("10"),
        padded_id("11"),
    ]
    assert [item.id for item in tree.images_of_layer(padded_id("dead"))] == [padded_id("10")]
    first = tree.image_of_layer(padded_id("d"))
    assert first is not None
    assert first.id == padded_id("10")
    assert tree.image_of_layer(padded_id("a")) is None
    assert tree.layer(padded_id("a")).id == padded_id("a")
    with pytest.raises(StoreError):
        tree.layer(padded_id("dead"))


# References

IMAGES: t.List[t.Dict[str, t.Any]] = [
    {
        "id": padded_id("abc1"),
        "names": ["docker.io/library/alpine:latest", "docker.io/library/alpine:3"],
        "digest": digest("1"),
    },
    {"id": padded_id("abc2"), "names": ["localhost/app:latest"], "digest": digest("2")},
    {
        "id": padded_id("def1"),
        "names": ["quay.io/org/app:1", "quay.io/org/tool:latest"],
        "big-data-digests": {"manifest": digest("3"), "manifest-x": digest("4"), "y": digest("5")},
    },
    {"id": padded_id("def2"), "names": ["ghcr.io/org/tool:latest"]},
    {
        "id": padded_id("123456"),
        "names": ["registry.example:5000/team/web:2", "localhost/abc:latest"],
    },
    {"id": padded_id("789"), "digest": digest("1"), "names": ["quay.io/x/alpine@" + digest("1")]},
    {"id": padded_id("76"), "names": ["localhost/abc3:latest"]},
]


@pytest.mark.parametrize(
    ("reference", "image_id"),
    [
        (padded_id("abc1"), "abc1"),
        ("sha256:" + padded_id("abc1"), "abc1"),
        ("abc1", "abc1"),
        ("sha256:abc1", "abc1"),
        ("123", "123456"),
        ("alpine", "abc1"),
        ("alpine:3", "abc1"),
        ("alpine:latest", "abc1"),
        ("library/alpine", "abc1"),
        ("docker.io/library/alpine", "abc1"),
        ("docker.io/alpine", "abc1"),
        ("docker.io/alpine:3", "abc1"),
        ("index.docker.io/alpine", "abc1"),
        ("docker://docker.io/alpine", "abc1"),
        ("docker.io/alpine@" + digest("1"), "abc1"),
        ("app", "abc2"),
        ("localhost/app", "abc2"),
        ("app:1", "def1"),
        ("org/app:1", "def1"),
        ("quay.io/org/app:1", "def1"),
        ("quay.io/org/tool", "def1"),
        ("ghcr.io/org/tool:latest", "def2"),
        ("team/web:2", "123456"),
        ("registry.example:5000/team/web:2", "123456"),
        (digest("2"), "abc2"),
        (digest("3"), "def1"),
        (digest("4"), "def1"),
        ("app@" + digest("2"), "abc2"),
        ("localhost/app:5@" + digest("2"), "abc2"),
        ("quay.io/org/app@" + digest("4"), "def1"),
        ("alpine@" + digest("1"), "abc1"),
        ("quay.io/x/alpine@" + digest("1"), "789"),
        ("  alpine ", "abc1"),
        ("abc3", "76"),
    ],
)
def test_reference_is_resolved(reference: str, image_id: str) -> None:
    assert snapshot(IMAGES).resolve_image(reference).id == padded_id(image_id)


@pytest.mark.parametrize(
    "reference",
    [
        "",
        " ",
        "nothing",
        "app:2",
        "quay.io/org/app",
        "quay.io/app:1",
        "lpine",
        "alpine:",
        "ab",
        "ABC1",
        digest("5"),
        digest("9"),
        "app@" + digest("1"),
        "app@sha256:12",
        "@" + digest("1"),
        padded_id("abc"),
        "a:b:c",
        "//",
        "\ud800",
        "x" * 100000,
    ],
)
def test_unknown_reference_is_an_error(reference: str) -> None:
    with pytest.raises(ImageUnknown) as caught:
        snapshot(IMAGES).resolve_image(reference)
    assert len(str(caught.value)) < 2000


def test_error_for_an_unknown_reference_has_a_hint() -> None:
    with pytest.raises(ImageUnknown, match=r"Did you mean abc1\d* \(docker.io/library/alpine"):
        snapshot(IMAGES).resolve_image("alpine:4")
    with pytest.raises(
        ImageUnknown, match="contains no images.*`podman pull alpine`, or with the module"
    ):
        snapshot().resolve_image("alpine")
    elsewhere = ("podman", "--root", "/my store")
    with pytest.raises(ImageUnknown, match=r"`podman --root '/my store' pull alpine`"):
        Snapshot(podman=elsewhere).resolve_image("alpine")
    with pytest.raises(ImageUnknown) as caught:
        snapshot().resolve_image("al pine; reboot")
    assert "podman pull" not in str(caught.value)


@pytest.mark.parametrize(
    ("reference", "candidates"),
    [
        ("abc", ["abc1", "abc2"]),
        ("sha256:def", ["def1", "def2"]),
        (digest("1"), ["abc1", "789"]),
        ("org/tool", ["def1", "def2"]),
        ("tool:latest", ["def1", "def2"]),
    ],
)
def test_ambiguous_reference_is_an_error(reference: str, candidates: t.List[str]) -> None:
    with pytest.raises(ImageAmbiguous) as caught:
        snapshot(IMAGES).resolve_image(reference)
    assert [fact["id"] for fact in caught.value.facts["candidates"]] == [
        padded_id(candidate) for candidate in candidates
    ]
    for candidate in candidates:
        assert padded_id(candidate)[:12] in str(caught.value)


def test_message_lists_few_of_many_candidates() -> None:
    many = [{"id": padded_id(f"abc{number:x}")} for number in range(0x1000, 0x1400)]
    with pytest.raises(ImageAmbiguous, match="1014 more") as caught:
        snapshot(many).resolve_image("abc")
    assert len(str(caught.value)) < 500


def test_own_image_takes_precedence_over_read_only_images() -> None:
    own = {"id": padded_id("b"), "names": ["localhost/x:1"]}
    other = {"id": padded_id("a"), "names": ["localhost/x:1", "localhost/y:1"]}
    images = {**index(Image, own), **additional(Image, other)}
    stores = Snapshot({}, images, {})
    assert stores.images[padded_id("a")].read_only_store == "/ro"
    for reference in ("x:1", "localhost/x:1"):
        assert stores.resolve_image(reference).id == padded_id("b")
    assert stores.resolve_image("y:1").id == padded_id("a")


@given(st.text(max_size=80))
def test_any_reference_is_resolved_or_rejected(reference: str) -> None:
    try:
        snapshot(IMAGES).resolve_image(reference)
    except (ImageUnknown, ImageAmbiguous) as error:
        str(error)


def test_malformed_references_are_explained() -> None:
    with pytest.raises(ImageUnknown, match="a repository has no uppercase letters"):
        snapshot(IMAGES).resolve_image("Alpine")
