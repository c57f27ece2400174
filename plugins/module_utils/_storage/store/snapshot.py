# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""All records of a store at one point in time, and the references between them."""

from __future__ import annotations

import re
import typing as t
from dataclasses import dataclass, field

from ..errors import ConfigError, ImageAmbiguous, ImageUnknown, StoreError
from ..printable import command
from .records import Container, Image, Layer
from .references import DOCKER, LOCAL, parse, split_tag

_HEX = re.compile(r"[0-9a-f]+")
_DIGEST = re.compile(r"[a-z0-9]+(?:[+._-][a-z0-9]+)*:[0-9a-fA-F]{32,}")
_SHORTEST_ID = 3
_LIST_LIMIT = 10
_NAME_LIMIT = 300


@dataclass
class Snapshot:
    """Layers, images and containers by full ID, those of read-only stores included.

    If an ID occurs in several files, the first record is used: the store's own, then the image
    store's, the volatile records, and the additional stores in their configured order.

    :ivar podman: the start of a podman command line for this store
    :ivar additional: the IDs of all layers of each additional store, those of layers listed elsewhere included
    """

    layers: t.Dict[str, Layer] = field(default_factory=dict)
    images: t.Dict[str, Image] = field(default_factory=dict)
    containers: t.Dict[str, Container] = field(default_factory=dict)
    # "cri-o" if the store is known to belong to CRI-O; for the commands in messages.
    runtime: str = ""
    podman: t.Tuple[str, ...] = ("podman",)
    additional: t.Mapping[str, t.FrozenSet[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._children: t.Optional[t.Dict[str, t.List[Layer]]] = None
        self._on_layer: t.Optional[t.Dict[str, t.List[Container]]] = None
        self._of_layer: t.Optional[t.Dict[str, t.List[Image]]] = None

    def runtime_command(self, *arguments: str) -> str:
        """A command line of podman, or of crictl, for this store and its owner."""
        return command(*(("crictl",) if self.runtime else self.podman), *arguments)

    def layer(self, layer_id: str) -> Layer:
        """The layer of that full ID.

        :raises StoreError: there is no such layer
        """
        found = self.layers.get(layer_id)
        if found is None:
            raise StoreError(
                f"layer {layer_id}",
                "has no record in the store",
                "See `crio check` for other damage."
                if self.runtime
                else "`contradictions` of userns.storage.image_layers_info lists all damage.",
                layer=layer_id,
            )
        return found

    def chain(self, layer_id: str) -> t.List[Layer]:
        """The layer and all its parents, top first.

        :raises StoreError: a parent has no record, or the parents form a cycle
        """
        result: t.List[Layer] = []
        seen: t.Set[str] = set()
        current = layer_id
        while current:
            if current in seen:
                raise StoreError(
                    f"layer {layer_id}",
                    f"has parents that form a cycle at {current}",
                    "The records are damaged; remove the image and pull it again.",
                    layer=layer_id,
                )
            seen.add(current)
            layer = self.layers.get(current)
            if layer is None:
                what = (
                    f"depends on layer {current}, which has no record"
                    if result
                    else "has no record"
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

    def known_chain(self, layer_id: str) -> t.List[str]:
        """The IDs of the layer and its parents, top first, down to the first without a record, or that occurs again."""
        chain: t.Dict[str, None] = {}
        while layer_id and layer_id not in chain:
            chain[layer_id] = None
            layer = self.layers.get(layer_id)
            layer_id = layer.parent if layer else ""
        return list(chain)

    def _refers_to_another(self, store: str, layer_id: str) -> bool:
        """Whether a record of an additional store refers to another layer than the listed layer of the same ID."""
        if layer_id not in self.additional.get(store, ()):
            return False
        listed = self.layers.get(layer_id)
        return listed is not None and listed.read_only_store != store

    def children(self, layer_id: str) -> t.List[Layer]:
        """The layers whose recorded parent is this layer, including containers' layers."""
        if self._children is None:
            self._children = {}
            for layer in self.layers.values():
                parent, store = layer.parent, layer.read_only_store
                if parent and not (store and self._refers_to_another(store, parent)):
                    self._children.setdefault(parent, []).append(layer)
        return list(self._children.get(layer_id, ()))

    def containers_on(self, layer_id: str) -> t.List[Container]:
        """The containers whose own layer has that layer as its parent, or is that layer."""
        if self._on_layer is None:
            self._on_layer = {}
            for container in self.containers.values():
                own = self.layers.get(container.layer)
                for item in {container.layer, own.parent if own else ""} - {""}:
                    self._on_layer.setdefault(item, []).append(container)
        return list(self._on_layer.get(layer_id, ()))

    def containers_of(self, image_id: str) -> t.List[Container]:
        """The containers whose record names that image."""
        return [container for container in self.containers.values() if container.image == image_id]

    def images_of_layer(self, layer_id: str) -> t.List[Image]:
        """The images that have the layer as their top layer or as a mapped layer."""
        if self._of_layer is None:
            self._of_layer = {}
            for image in self.images.values():
                store = image.read_only_store
                for candidate in dict.fromkeys(image.candidates):
                    if not (store and self._refers_to_another(store, candidate)):
                        self._of_layer.setdefault(candidate, []).append(image)
        return list(self._of_layer.get(layer_id, ()))

    def images_above(self, layers: t.Collection[str], most: int) -> t.Dict[str, t.List[Image]]:
        """For each layer, the first images that have it among their own layers.

        :param most: the maximum number of images for each layer
        """
        found: t.Dict[str, t.List[Image]] = {}
        for image in self.images.values():
            for layer_id in self.known_chain(image.layer):
                if layer_id in layers and len(found.setdefault(layer_id, [])) < most:
                    found[layer_id].append(image)
        return found

    def image_of_layer(self, layer_id: str) -> t.Optional[Image]:
        """The first of ``images_of_layer``; None if there is none."""
        found = self.images_of_layer(layer_id)
        return found[0] if found else None

    def resolve_image(self, reference: str) -> Image:
        """The image that podman would use for this reference.

        Tried in turn: the full ID (with or without ``sha256:``), a recorded name as it stands, an
        unambiguous beginning of an ID of at least 3 digits, a digest, and the name as
        :mod:`.references` completes it, a short one with ``localhost/``, ``docker.io/library/``,
        then any registry.

        :raises ImageUnknown: no image matches
        :raises ImageAmbiguous: several images match; ``candidates`` in the facts lists them
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
        raise self._unknown(reference, list(self.images.values()))

    def _unknown(self, reference: str, images: t.List[Image]) -> ImageUnknown:
        word = re.split(r"[@:]", reference.rpartition("/")[2])[0]
        alike = [image for image in images if word and any(word in name for name in image.names)]
        wrong = _malformed(reference)
        listed = f"`{self.runtime_command('images')}` lists the images."
        hint = f"Did you mean {_listing(alike)}?" if alike else listed
        if not wrong:
            pull = self.runtime_command("pull", reference.strip()[:_NAME_LIMIT])
            hint += (
                f" Pull it{'' if self.runtime else ' as the owner of the store'} with `{pull}`, or with "
                "the module userns.storage.image_layers."
            )
        return ImageUnknown(
            f"image {reference[:_NAME_LIMIT]!r}",
            "is not in the store" + ("" if images else ", which contains no images") + wrong,
            hint,
            candidates=[{"id": image.id, "names": list(image.names)} for image in alike[:100]],
        )

    def _by_id(self, text: str) -> t.List[Image]:
        image = self.images.get(text)
        return [image] if image else []

    def _by_exact_name(self, text: str) -> t.List[Image]:
        found = [image for image in self.images.values() if text and text in image.names]
        # A name may occur in the store and in an additional store; the store's own image is used.
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
        try:
            reference = parse(text)
        except ConfigError:
            return
        images = self.images.values()
        tag = reference.tag or "latest"
        known: t.Dict[str, t.List[Image]] = {}
        for image in images:
            if reference.digest and reference.digest not in image.digests:
                continue
            for name in image.names:
                repository, own_tag = split_tag(name.partition("@")[0])
                # With a digest, tags do not matter.
                if reference.digest or own_tag == tag:
                    known.setdefault(repository, []).append(image)
        if reference.domain:
            yield known.get(reference.repository, [])[:1]
            return
        for domain in (LOCAL, DOCKER):
            yield known.get(f"{domain}/{reference.path}", [])[:1]
        yield known.get(parse(f"{DOCKER}/{reference.path}").repository, [])[:1]
        ending = f"/{reference.path}"
        yield [image for name, found in known.items() if name.endswith(ending) for image in found]


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
        "Use a full name with its tag, or the full ID.",
        candidates=[
            {"id": image.id, "names": list(image.names)} for image in images[: _LIST_LIMIT * 10]
        ],
    )


def _malformed(reference: str) -> str:
    """Why a reference is malformed; empty if it is valid."""
    try:
        parse(reference.strip())
    except ConfigError as error:
        return f", and {error.cause}"
    return ""
