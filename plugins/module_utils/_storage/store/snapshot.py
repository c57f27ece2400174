# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This module util is PRIVATE to the userns.storage collection.
"""All records of a store at one moment, and how they hang together."""

from __future__ import annotations

import re
import typing as t
from dataclasses import dataclass, field

from ..errors import ImageAmbiguous, ImageUnknown, StoreError
from .records import Container, Image, Layer

_HEX = re.compile(r"[0-9a-f]+")
_DIGEST = re.compile(r"[a-z0-9]+(?:[+._-][a-z0-9]+)*:[0-9a-fA-F]{32,}")
_SHORTEST_ID = 3
_LIST_LIMIT = 10
_NAME_LIMIT = 300


@dataclass
class Snapshot:
    """Layers, images and containers by full ID, those of read-only stores included.

    Where an ID occurs in several files the first one counts: the store's own, then the image
    store's, the volatile ones, and the additional stores in their configured order.
    """

    layers: t.Dict[str, Layer] = field(default_factory=dict)
    images: t.Dict[str, Image] = field(default_factory=dict)
    containers: t.Dict[str, Container] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._children: t.Optional[t.Dict[str, t.List[Layer]]] = None
        self._on_layer: t.Optional[t.Dict[str, t.List[Container]]] = None
        self._of_layer: t.Optional[t.Dict[str, t.List[Image]]] = None

    def layer(self, layer_id: str) -> Layer:
        """The layer of that full ID.

        :raises StoreError: there is none
        """
        found = self.layers.get(layer_id)
        if found is None:
            raise StoreError(
                f"layer {layer_id}",
                "has no record in the store",
                "See `podman system check` for what else is damaged.",
                layer=layer_id,
            )
        return found

    def chain(self, layer_id: str) -> t.List[Layer]:
        """The layer and all its parents, top first.

        :raises StoreError: a parent has no record, or the parents go in a circle
        """
        result: t.List[Layer] = []
        seen: t.Set[str] = set()
        current = layer_id
        while current:
            if current in seen:
                raise StoreError(
                    f"layer {layer_id}",
                    f"has parents that go in a circle at {current}",
                    "The records are damaged; remove the image and pull it again.",
                    layer=layer_id,
                )
            seen.add(current)
            layer = self.layers.get(current)
            if layer is None:
                what = (
                    f"rests on layer {current}, which has no record" if result else "has no record"
                )
                raise StoreError(
                    f"layer {layer_id}",
                    f"{what} in the store",
                    "The records are damaged; remove the image and pull it again.",
                    layer=layer_id,
                    missing=current,
                )
            result.append(layer)
            current = layer.parent
        return result

    def children(self, layer_id: str) -> t.List[Layer]:
        """The layers whose recorded parent is that one, containers' layers included."""
        if self._children is None:
            self._children = {}
            for layer in self.layers.values():
                if layer.parent:
                    self._children.setdefault(layer.parent, []).append(layer)
        return list(self._children.get(layer_id, ()))

    def containers_on(self, layer_id: str) -> t.List[Container]:
        """The containers whose own layer has that layer as its parent, or is that layer."""
        if self._on_layer is None:
            self._on_layer = {}
            for container in self.containers.values():
                own = self.layers.get(container.layer)
                for one in {container.layer, own.parent if own else ""} - {""}:
                    self._on_layer.setdefault(one, []).append(container)
        return list(self._on_layer.get(layer_id, ()))

    def containers_of(self, image_id: str) -> t.List[Container]:
        """The containers whose record names that image."""
        return [one for one in self.containers.values() if one.image == image_id]

    def images_of_layer(self, layer_id: str) -> t.List[Image]:
        """The images that have the layer as their top layer or as a mapped one."""
        if self._of_layer is None:
            self._of_layer = {}
            for image in self.images.values():
                for one in dict.fromkeys(image.candidates):
                    self._of_layer.setdefault(one, []).append(image)
        return list(self._of_layer.get(layer_id, ()))

    def image_of_layer(self, layer_id: str) -> t.Optional[Image]:
        """The first of ``images_of_layer``, None when there is none."""
        found = self.images_of_layer(layer_id)
        return found[0] if found else None

    def resolve_image(self, reference: str) -> Image:
        """The image that podman would take for this reference.

        Tried in turn: the full ID (with or without ``sha256:``), a recorded name as it stands, an
        unambiguous beginning of an ID of at least 3 digits, a digest, and the name completed with
        tag ``latest`` and with ``localhost/`` or ``docker.io/library/``, then any registry.

        :raises ImageUnknown: nothing answers to it
        :raises ImageAmbiguous: more than one image does; ``candidates`` of the facts lists them
        """
        text = reference.strip()
        bare = text[len("sha256:") :] if text.startswith("sha256:") else text
        for step in (
            self._by_id(bare),
            self._by_exact_name(text),
            self._by_short_id(bare),
            self._by_digest(text),
            *self._by_completed_name(text),
        ):
            distinct = {image.id: image for image in step}
            if len(distinct) == 1:
                return next(iter(distinct.values()))
            if distinct:
                raise _ambiguous(reference, list(distinct.values()))
        raise _unknown(reference, list(self.images.values()))

    def _by_id(self, text: str) -> t.List[Image]:
        image = self.images.get(text)
        return [image] if image else []

    def _by_exact_name(self, text: str) -> t.List[Image]:
        found = [image for image in self.images.values() if text and text in image.names]
        # A name may occur in the store and in an additional one: the store's own counts.
        return found[:1]

    def _by_short_id(self, text: str) -> t.List[Image]:
        if len(text) < _SHORTEST_ID or not _HEX.fullmatch(text):
            return []
        return [image for key, image in self.images.items() if key.startswith(text)]

    def _by_digest(self, text: str) -> t.List[Image]:
        if not _DIGEST.fullmatch(text):
            return []
        return [image for image in self.images.values() if text in image.digests]

    def _by_completed_name(self, text: str) -> t.Iterator[t.List[Image]]:
        name, _mark, digest = text.partition("@")
        if not name or (digest and not _DIGEST.fullmatch(digest)):
            return
        repository, tag = split_tag(name)
        if name.endswith(":"):
            return
        if digest:
            pool = [image for image in self.images.values() if digest in image.digests]
        else:
            pool = list(self.images.values())
        wanted = "" if digest else (tag or "latest")
        known: t.Dict[str, t.List[Image]] = {}
        for image in pool:
            for one in image.names:
                own, own_tag = split_tag(one.partition("@")[0])
                # Where a digest is asked for, its images are the pool and tags do not matter.
                if digest or own_tag == wanted:
                    known.setdefault(own, []).append(image)
        if has_registry(repository):
            yield known.get(repository, [])[:1]
            return
        yield known.get(f"localhost/{repository}", [])[:1]
        yield known.get(f"docker.io/{repository}", [])[:1]
        if "/" not in repository:
            yield known.get(f"docker.io/library/{repository}", [])[:1]
        ending = f"/{repository}"
        yield [image for own, images in known.items() if own.endswith(ending) for image in images]


def split_tag(name: str) -> t.Tuple[str, str]:
    """A name without digest as (repository, tag); the tag is empty when there is none."""
    head, colon, tail = name.rpartition(":")
    if not colon or "/" in tail:
        return name, ""
    return head, tail


def has_registry(repository: str) -> bool:
    """Whether the first part of the name is a registry's host."""
    first, slash, _rest = repository.partition("/")
    return bool(slash) and ("." in first or ":" in first or first == "localhost")


def _label(image: Image) -> str:
    return f"{image.id[:12]} ({image.names[0]})" if image.names else image.id[:12]


def _listing(images: t.List[Image]) -> str:
    shown = ", ".join(_label(image) for image in images[:_LIST_LIMIT])
    more = len(images) - _LIST_LIMIT
    return f"{shown} and {more} more" if more > 0 else shown


def _ambiguous(reference: str, images: t.List[Image]) -> ImageAmbiguous:
    return ImageAmbiguous(
        f"image {reference[:_NAME_LIMIT]!r}",
        f"may be any of {_listing(images)}",
        "Give a full name with its tag, or the full ID.",
        candidates=[
            {"id": image.id, "names": list(image.names)} for image in images[: _LIST_LIMIT * 10]
        ],
    )


def _unknown(reference: str, images: t.List[Image]) -> ImageUnknown:
    word = re.split(r"[@:]", reference.rpartition("/")[2])[0]
    alike = [image for image in images if word and any(word in name for name in image.names)]
    hint = f"Did you mean {_listing(alike)}?" if alike else "`podman images` lists what is there."
    return ImageUnknown(
        f"image {reference[:_NAME_LIMIT]!r}",
        "is not in the store" if images else "is not in the store, which holds no image",
        hint,
        candidates=[{"id": image.id, "names": list(image.names)} for image in alike[:100]],
    )
