# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This module util is PRIVATE to the userns.storage collection.
"""Compute the content of a user's read-only image store from the records of the real store. Writes nothing."""

from __future__ import annotations

import hashlib
import typing as t
from dataclasses import dataclass, field

from ..errors import LayerInUse, MapError, StorageError, UnsupportedDriver
from ..idmap.mapping import UNMAPPED, Mapping
from ..idmap.ranges import IDMap
from ..printable import command, user_command
from ..store.records import Image, Layer, encode
from ..store.shared_store import (
    SharedContent,
    SharedImage,
    SharedLayer,
    derived_layer_id,
)
from ..store.snapshot import Snapshot
from .shared_pins import PIN

# The kernel's limit of entries in an ID map.
_MOST_ENTRIES = 340
# The number of digits of a hash in the name of a mount.
_NAME_LENGTH = 12


@dataclass(frozen=True)
class IDMappedView:
    """A view of layers of the real store with the owners that a user's namespace needs.

    :param uid: map of UIDs, ID on disk to host ID of the user
    """

    uid: IDMap
    gid: IDMap

    def name(self, source: str) -> str:
        """A folder name that only depends on the source and the maps.

        :param source: the mounted folder
        """
        text = "\0".join((source, str(self.uid), str(self.gid)))
        digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
        return digest[:_NAME_LENGTH]


@dataclass(frozen=True)
class Mount:
    """A mount of a user's store.

    :param layer_id: the layer of the real store that it shows; empty for all layers
    """

    view: IDMappedView
    layer_id: str = ""


@dataclass(frozen=True)
class Refusal:
    """An image, or a mapping of it, that is refused for a user."""

    image_id: str
    mapping: t.Optional[Mapping]
    error: StorageError


@dataclass
class Wish:
    """An image for a user, with the requested mappings besides that of plain containers.

    :param offered: false for an image that is only kept because the user depends on it
    """

    image: Image
    mappings: t.List[Mapping] = field(default_factory=list)
    offered: bool = True


@dataclass
class Plan:
    """The planned contents of a user's store.

    :param mounts: the mounts that it needs, without duplicates
    """

    content: SharedContent = field(default_factory=SharedContent)
    mounts: t.List[Mount] = field(default_factory=list)
    refusals: t.List[Refusal] = field(default_factory=list)


def view_of(outer: Mapping, mapping: Mapping, stored: Mapping) -> IDMappedView:
    """The view of a layer with the owners that a container with a map needs.

    :param outer: the user's namespace: intermediate ID to host ID
    :param mapping: the container's map: container ID to intermediate ID
    :param stored: the layer's own map: container ID to ID on disk
    :raises MapError: the map has more entries than the kernel accepts
    """
    maps = []
    for kind, around, inner, disk in (
        ("UID", outer.uid, mapping.uid, stored.uid),
        ("GID", outer.gid, mapping.gid, stored.gid),
    ):
        shown = around.compose(inner).compose(disk.invert())
        if len(shown.ranges) > _MOST_ENTRIES:
            raise MapError(
                f"{kind} map {shown}"[:200],
                f"has {len(shown.ranges)} entries, the kernel takes {_MOST_ENTRIES}",
                "Use fewer ranges.",
            )
        maps.append(shown)
    return IDMappedView(*maps)


@dataclass(frozen=True)
class User:
    """A user for whom a store is planned.

    :param name: the login name
    :param outer: the user's namespace: intermediate ID to host ID
    :param most_layers: the maximum number of layers of an image that the user's runtime can mount
    :param images: IDs of the images that the user's own store contains, or that are already shared
    :param mapped: layers of the user's own store that carry a map, each with the label of an image
    """

    name: str
    outer: Mapping
    most_layers: int
    images: t.FrozenSet[str] = frozenset()
    mapped: t.Mapping[str, str] = field(default_factory=dict)


class Planner:
    """Plans the stores of users from a real store.

    :param snapshot: of the real store
    :param overlay: absolute path of the real store's ``overlay`` folder
    :param tar_split: path of the copy of a layer's tar-split file; empty if it has none
    :param image_data: paths of the copies of an image's big data files, by file name
    """

    def __init__(
        self,
        snapshot: Snapshot,
        overlay: str,
        tar_split: t.Callable[[str], str],
        image_data: t.Callable[[Image], t.Dict[str, str]],
    ) -> None:
        self._snapshot = snapshot
        self._overlay = overlay
        self._tar_split = tar_split
        self._image_data = image_data
        self._chains: t.Dict[str, t.List[Layer]] = {}

    def chain(self, image: Image) -> t.List[Layer]:
        """An image's layers, topmost first.

        :raises StoreError: the records are inconsistent
        """
        if image.layer not in self._chains:
            self._chains[image.layer] = self._snapshot.chain(image.layer) if image.layer else []
        return self._chains[image.layer]

    def plan(self, user: User, wishes: t.Iterable[Wish], whole: bool) -> Plan:
        """Plan the store of a user.

        :param whole: whether a mount may show all layers of the real store at once
        """
        return _UserPlan(self, self._overlay, user, whole).make(wishes)

    def tar_split_of(self, layer: Layer) -> str:
        """The path of the copy of a layer's tar-split file; empty if it has none."""
        return self._tar_split(layer.id)

    def image_data_of(self, image: Image) -> t.Dict[str, str]:
        """The paths of the copies of an image's big data files, by file name."""
        return self._image_data(image)


class _UserPlan:
    def __init__(self, planner: Planner, overlay: str, user: User, whole: bool) -> None:
        self._planner = planner
        self._overlay = overlay
        self._user = user
        self._outer = user.outer
        self._whole = whole
        self._layers: t.Dict[str, SharedLayer] = {}
        self._mounts: t.Dict[Mount, None] = {}
        self._plan = Plan()

    def make(self, wishes: t.Iterable[Wish]) -> Plan:
        images = []
        for wish in wishes:
            try:
                images.append(self._image(wish))
            except StorageError as error:
                self._plan.refusals.append(Refusal(wish.image.id, None, error))
        self._plan.content = SharedContent(tuple(self._layers.values()), tuple(images))
        self._plan.mounts = list(self._mounts)
        return self._plan

    def _image(self, wish: Wish) -> SharedImage:
        image = wish.image
        chain = self._planner.chain(image)
        if len(chain) > self._user.most_layers:
            raise UnsupportedDriver(
                f"image {label(image)}",
                f"has {len(chain)} layers, and this runtime can mount {self._user.most_layers} of a shared store",
                "Install a newer podman, or build the image with fewer layers (podman build --squash-all).",
            )
        for layer in chain:
            if image.id not in self._user.images and layer.id in self._user.mapped:
                # Runtimes mount layers of the user's own store below an image of any store (overlay.go, getLowerDirs).
                own = self._user.mapped[layer.id]
                remove = command("podman", "rmi", own)
                raise LayerInUse(
                    f"image {label(image)}",
                    f"shares a layer with image {own} of user {self._user.name}, whose layers carry a map, so files "
                    "would have wrong owners",
                    "Remove that image first, or pull it without a map: "
                    f"{user_command(self._user.name, remove)}",
                )
        _check_ids(image, chain, self._namespace())
        views = [view_of(self._outer, UNMAPPED, layer.mapping) for layer in chain]
        mapped: t.List[str] = []
        found: t.List[t.Tuple[Mapping, t.List[IDMappedView]]] = []
        for mapping in wish.mappings:
            try:
                _check_ids(image, chain, mapping)
                found.append(
                    (mapping, [view_of(self._outer, mapping, layer.mapping) for layer in chain])
                )
            except StorageError as error:
                self._plan.refusals.append(Refusal(image.id, mapping, error))
        self._add_plain(chain, views)
        for mapping, mapped_views in found:
            if chain:
                mapped.append(self._add_mapped(chain, mapped_views, mapping))
        return SharedImage(
            image.id,
            encode(_image_record(image, mapped, wish.offered)),
            self._planner.image_data_of(image),
        )

    def _namespace(self) -> Mapping:
        """All container IDs that a plain container of the user has."""
        return Mapping(
            IDMap(
                tuple(
                    entry._replace(host_id=entry.container_id) for entry in self._outer.uid.ranges
                )
            ),
            IDMap(
                tuple(
                    entry._replace(host_id=entry.container_id) for entry in self._outer.gid.ranges
                )
            ),
        )

    def _add_plain(self, chain: t.Sequence[Layer], views: t.Sequence[IDMappedView]) -> None:
        for index in reversed(range(len(chain))):
            layer = chain[index]
            if layer.id not in self._layers:
                lowers = tuple(below.id for below in chain[index + 1 :])
                self._add(layer, layer.id, views[index], lowers, _layer_record(layer))

    def _add_mapped(
        self, chain: t.Sequence[Layer], views: t.Sequence[IDMappedView], mapping: Mapping
    ) -> str:
        """Layers for a mapping; only the topmost has a record, as a mapped layer of the image."""
        ids = [
            derived_layer_id("shared layer", layer.id, str(mapping.uid), str(mapping.gid))
            for layer in chain
        ]
        for index in reversed(range(len(chain))):
            record: t.Dict[str, t.Any] = {}
            if index == 0:
                record = {
                    **_layer_record(chain[0]),
                    "id": ids[0],
                    "uidmap": mapping.uid.to_record(),
                    "gidmap": mapping.gid.to_record(),
                }
            known = self._layers.get(ids[index])
            if known is None or (record and not known.record):
                lowers = tuple(ids[index + 1 :])
                self._add(chain[index], ids[index], views[index], lowers, record)
        return ids[0]

    def _add(
        self,
        layer: Layer,
        layer_id: str,
        view: IDMappedView,
        lowers: t.Tuple[str, ...],
        record: t.Mapping[str, t.Any],
    ) -> None:
        self._mounts[Mount(view, "" if self._whole else layer.id)] = None
        self._layers[layer_id] = SharedLayer(
            layer_id,
            view.name(self._overlay),
            layer.id,
            lowers,
            encode(dict(record)) if record else b"",
            self._planner.tar_split_of(layer) if record else "",
        )


def _check_ids(image: Image, chain: t.Iterable[Layer], mapping: Mapping) -> None:
    layers = list(chain)
    for kind, ids, id_map in (
        ("UID", (number for layer in layers for number in layer.uidset), mapping.uid),
        ("GID", (number for layer in layers for number in layer.gidset), mapping.gid),
    ):
        missing = id_map.missing(ids)
        if missing:
            shown = ", ".join(map(str, missing[:5])) + (" ..." if len(missing) > 5 else "")
            raise MapError(
                f"image {label(image)}",
                f"has files of {kind} {shown}, which the map {id_map} does not hold",
                "Give the user more subordinate IDs, or the mapping a larger range.",
            )


def _layer_record(layer: Layer) -> t.Dict[str, t.Any]:
    dropped = ("names", "uidmap", "gidmap", "flags", "big-data-names", "mountlabel")
    return {key: value for key, value in layer.raw.items() if key not in dropped}


def _image_record(
    image: Image, mapped_layers: t.Sequence[str], offered: bool
) -> t.Dict[str, t.Any]:
    record = {
        key: value
        for key, value in image.raw.items()
        if key not in ("names", "names-history", "mapped-layers")
    }
    names = names_of(image) if offered else []
    if names:
        record["names"] = names
    if mapped_layers:
        record["mapped-layers"] = list(mapped_layers)
    return record


def names_of(image: Image) -> t.List[str]:
    """The names of an image of the real store, without names of this collection."""
    return [name for name in image.names if not name.startswith(f"{PIN}:")]


def label(image: Image) -> str:
    """An image in a message."""
    names = names_of(image)
    return names[0] if names else image.id[:12]
