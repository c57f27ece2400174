# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This module util is PRIVATE to the userns.storage collection.
"""What a store holds: images, their layers with the real cost, who uses them, and what is broken.

Nothing is changed. What is damaged is described, and the rest of the store with it.
"""

from __future__ import annotations

import os
import time
import typing as t
from dataclasses import dataclass, field

from ..drivers.base import Driver
from ..errors import ImageUnknown, StorageError
from ..idmap.mapping import UNMAPPED, Mapping
from ..kernel import cycles
from ..store.records import Container, Image, Layer
from ..store.snapshot import Snapshot
from ..tree.measure import Usage
from .moments import from_rfc3339, say
from .naming import Patterns, image_words
from .opening import OpenStore, StoreRequest, opened
from .owners import top_owners
from .records import LEASE_FLAG, ORIGIN, ORIGIN_FLAG
from .watching import ledger_of

NONE, APPARENT, EXCLUSIVE = "none", "apparent", "exclusive"

OK = "ok"
MISSING = "missing"
INCOMPLETE = "incomplete"
UNREFERENCED = "unreferenced"
FOREIGN_ROOT = "foreign_root"
DAMAGED = "damaged"

_BLOCK = 512
_NO_SIZES: t.Dict[str, t.Optional[int]] = dict.fromkeys(
    ("size_apparent", "size_exclusive", "inodes")
)
_MAGIC = frozenset("*?[")


@dataclass(frozen=True)
class InfoRequest:
    """What a task asks.

    :param images: names, IDs, digests or shell patterns; none for all images
    :param measure: ``none``, ``apparent`` or ``exclusive``
    """

    store: StoreRequest
    images: t.Tuple[str, ...] = ()
    measure: str = APPARENT


class LayerState:
    """One layer as found. ``layer`` is None for an ID that an image lists and no record has."""

    status: str = OK
    problem: str = ""
    containers: t.Sequence[Container] = ()
    child_layers: t.Sequence[str] = ()
    images: t.Sequence[Image] = ()
    usage: t.Optional[Usage] = None
    duplicate_of: t.Optional[str] = None
    last_used: t.Optional[float] = None
    dependencies: t.Tuple[str, ...] = ()

    def __init__(self, layer_id: str, layer: t.Optional[Layer]) -> None:
        self.layer_id = layer_id
        self.layer = layer

    @property
    def mapping(self) -> Mapping:
        """Its maps; those of a layer without a record are not known, and told as none."""
        return self.layer.mapping if self.layer else Mapping()

    @property
    def created(self) -> t.Optional[float]:
        """Seconds since the epoch."""
        created = self.layer.created if self.layer else None
        return created.timestamp() if created else None

    @property
    def ours(self) -> bool:
        """Whether layer_template made it."""
        return self.layer is not None and self.layer.flags.get(ORIGIN_FLAG) == ORIGIN

    @property
    def lease(self) -> t.Optional[float]:
        """Until when it is kept though nobody uses it; seconds since the epoch."""
        lease = self.layer.flags.get(LEASE_FLAG) if self.layer else None
        return from_rfc3339(lease) if isinstance(lease, str) else None

    @property
    def created_in_words(self) -> t.Optional[str]:
        """When it was made, as the modules return it."""
        text = self.layer.raw.get("created") if self.layer else None
        # As containers/storage writes it; there may be ten thousand of them.
        if text and text[-1] == "Z" and not text.startswith("0001"):
            return f"{text[:19]}Z"
        return None if self.created is None else say(self.created)

    @property
    def in_use(self) -> bool:
        """Whether a container or another layer rests on it."""
        return bool(self.containers or self.child_layers)


@dataclass
class Orphan:
    """Something in the store's folders that no record accounts for."""

    kind: str
    name: str
    path: str
    changed: float
    usage: t.Optional[Usage] = None


@dataclass
class ImageState:
    """One image: its own layers, top first, and its mapped ones in their recorded order."""

    image: Image
    chain: t.List[LayerState]
    mapped: t.List[LayerState]
    problem: str = ""
    private_copies: t.List[t.Tuple[Container, t.Optional[Usage]]] = field(default_factory=list)


@dataclass
class Inventory:
    """The whole store, or the chosen images of it, at one moment."""

    now: float
    watched_since: t.Optional[float]
    images: t.List[ImageState]
    unreferenced: t.List[LayerState]
    orphans: t.List[Orphan]

    def mapped_layers(self) -> t.List[LayerState]:
        """All mapped layers of the images, each once."""
        found = {one.layer_id: one for image in self.images for one in image.mapped}
        return list(found.values())

    def layers(self) -> t.List[LayerState]:
        """All layers of the images, each once."""
        found = {one.layer_id: one for image in self.images for one in image.chain + image.mapped}
        return list(found.values())


def info(request: InfoRequest) -> t.Dict[str, t.Any]:
    """The result of image_layers_info.

    :raises StorageError: the store cannot be opened, its records cannot be read, or a reference is
        ambiguous
    """
    with opened(request.store) as place, cycles.unsearched():
        inventory = take(place, request.images, request.measure)
        return {
            "changed": False,
            "images": [image_result(one) for one in inventory.images],
            "orphans": [orphan_result(one, inventory.now) for one in inventory.orphans]
            + [unreferenced_result(one, inventory.now) for one in inventory.unreferenced],
            "totals": totals(inventory),
            "store": place.describe(),
        }


def take(place: OpenStore, images: t.Sequence[str] = (), measure: str = NONE) -> Inventory:
    """Look at the store.

    :param images: as in :class:`InfoRequest`
    :raises StorageError: as :func:`info`
    """
    return _Taker(place, measure).take(images)


def choose(snapshot: Snapshot, references: t.Sequence[str]) -> t.List[Image]:
    """The images that the references name, in the order of the store; those not there are left out.

    :raises ImageAmbiguous: a reference that is no pattern fits several images
    """
    if not references:
        return list(snapshot.images.values())
    chosen = set()
    patterns = []
    for reference in references:
        if _MAGIC.intersection(reference):
            patterns.append(reference)
            continue
        try:
            chosen.add(snapshot.resolve_image(reference).id)
        except ImageUnknown:
            continue
    shell = Patterns(patterns)
    return [
        image
        for image in snapshot.images.values()
        if image.id in chosen
        or (patterns and shell.hit([*image_words((image.id,), image.names), *image.digests]))
    ]


class _Taker:
    def __init__(self, place: OpenStore, measure: str) -> None:
        self.place = place
        self.driver: Driver = place.driver
        self.measure = measure
        self.now = time.time()
        self.states: t.Dict[str, LayerState] = {}
        # By the identity of a mapping, which is kept so that it stays unique.
        self.meanings: t.Dict[int, t.Tuple[t.Hashable, Mapping]] = {}
        self.snapshot = place.store.snapshot()
        self.ledger = ledger_of(place)
        self.present = self._present()
        self.containers: t.Dict[str, t.List[Container]] = {}
        for container in self.snapshot.containers.values():
            self.containers.setdefault(container.image, []).append(container)

    def _present(self) -> t.Optional[t.Set[str]]:
        try:
            return self.driver.present()
        except StorageError:
            return None

    def take(self, references: t.Sequence[str]) -> Inventory:
        images = [self._image(one) for one in choose(self.snapshot, references)]
        everything = not references
        return Inventory(
            now=self.now,
            watched_since=self.ledger.watched_since,
            images=images,
            unreferenced=self._unreferenced() if everything else [],
            orphans=self._orphans() if everything else [],
        )

    # Images

    def _image(self, image: Image) -> ImageState:
        problem = ""
        try:
            chain = [one.id for one in self.snapshot.chain(image.layer)] if image.layer else []
        except StorageError as error:
            problem = str(error)
            chain = self._as_far_as_it_goes(image.layer)
        layers = self.snapshot.layers
        template = [layers[one] for one in chain if one in layers]
        mapped = list(dict.fromkeys(image.mapped_layers))
        found = ImageState(
            image=image,
            chain=[self._state(one) for one in chain],
            mapped=[self._mapped_state(one, template) for one in mapped],
            problem=problem,
        )
        for one in found.chain:
            if one.status != OK and not found.problem:
                found.problem = one.problem
        if found.mapped:
            self._find_duplicates(found)
        found.private_copies = self._private_copies(image)
        return found

    def _as_far_as_it_goes(self, layer_id: str) -> t.List[str]:
        """The chain up to the layer that is gone, that one included."""
        chain: t.List[str] = []
        while layer_id and layer_id not in chain:
            chain.append(layer_id)
            layer = self.snapshot.layers.get(layer_id)
            layer_id = layer.parent if layer else ""
        return chain

    def _private_copies(self, image: Image) -> t.List[t.Tuple[Container, t.Optional[Usage]]]:
        """Containers whose own layer carries the image once more, under other maps."""
        found = []
        for container in self.containers.get(image.id, ()):
            own = self.snapshot.layers.get(container.layer)
            parent = self.snapshot.layers.get(own.parent) if own else None
            if own and parent and not own.mapping.same_meaning(parent.mapping):
                found.append((container, self._usage(own.id)))
        return found

    # Layers

    def _state(self, layer_id: str) -> LayerState:
        known = self.states.get(layer_id)
        if known is not None:
            return known
        layer = self.snapshot.layers.get(layer_id)
        state = LayerState(layer_id, layer)
        self.states[layer_id] = state
        if layer is None:
            state.status = MISSING
            state.problem = f"layer {layer_id[:12]} has no record"
            return state
        if self.containers:
            state.containers = self.snapshot.containers_on(layer_id)
        if layer.incomplete:
            state.status, state.problem = INCOMPLETE, f"layer {layer_id[:12]} was never finished"
        elif not self._is_there(layer):
            state.status = MISSING
            state.problem = f"the data of layer {layer_id[:12]} is gone"
        state.usage = self._usage(layer_id)
        return state

    def _is_there(self, layer: Layer) -> bool:
        return bool(layer.read_only_store) or self.present is None or layer.id in self.present

    def _mapped_state(self, layer_id: str, template: t.Sequence[Layer]) -> LayerState:
        """A mapped layer: looked at more closely than others, since runtimes do not."""
        known = layer_id in self.states
        state = self._state(layer_id)
        state.images = self.snapshot.images_of_layer(layer_id)
        if known or state.layer is None:
            return state
        own = {one.layer for one in state.containers}
        state.child_layers = [
            one.id for one in self.snapshot.children(layer_id) if one.id not in own
        ]
        state.last_used = self.now if state.containers else self.ledger.last_used(layer_id)
        if self.measure == NONE or state.status != OK or state.layer.read_only_store:
            return state
        try:
            state.dependencies = tuple(self.driver.dependencies(layer_id))
            damage = self.driver.damage(layer_id)
            if damage is not None:
                state.status, state.problem = DAMAGED, damage
                return state
            outside, kept = top_owners(self.driver, state.layer, template)
            if kept:
                state.status, state.problem = DAMAGED, kept
            elif outside:
                state.status, state.problem = FOREIGN_ROOT, outside
        except StorageError as error:
            state.status, state.problem = DAMAGED, str(error)
        return state

    def _usage(self, layer_id: str) -> t.Optional[Usage]:
        """What a layer costs, its tar-split file included; None when not asked for or not readable."""
        if self.measure == NONE:
            return None
        layer = self.snapshot.layers.get(layer_id)
        if layer is None or not self._is_there(layer):
            return None
        exclusive = self.measure == EXCLUSIVE
        try:
            usage = self.driver.measure(layer_id, exclusive=exclusive)
        except StorageError:
            return None
        try:
            beside = os.lstat(self.place.store.tar_split_path(layer_id))
        except OSError:
            return usage
        on_disk = beside.st_blocks * _BLOCK
        return usage._replace(
            inodes=usage.inodes + 1,
            allocated=usage.allocated + on_disk,
            exclusive=usage.exclusive + on_disk if exclusive else 0,
        )

    def _find_duplicates(self, found: ImageState) -> None:
        """Mapped layers whose map another layer of the image has, or one that means the same.

        Containers are on the one that stays, or were last; else it is the first one recorded.
        """
        template = self.states.get(found.image.layer)
        groups: t.Dict[t.Hashable, t.List[LayerState]] = {}
        if template:
            groups[self._meaning(template.mapping)] = [template]
        for one in found.mapped:
            if one.layer is not None and one is not template:
                groups.setdefault(self._meaning(one.mapping), []).append(one)
        for group in groups.values():
            kept = group[0]
            if kept is not template:
                kept = max(
                    group, key=lambda one: (one.status == OK, one.in_use, one.last_used or 0.0)
                )
            for one in group:
                if one is not kept and one is not template:
                    one.duplicate_of = kept.layer_id

    def _meaning(self, mapping: Mapping) -> t.Hashable:
        """What is equal for maps that mean the same; the same few maps come with each image."""
        known = self.meanings.get(id(mapping))
        if known is None:
            known = self.meanings[id(mapping)] = (mapping.meaning, mapping)
        return known[0]

    # What nothing refers to

    def _unreferenced(self) -> t.List[LayerState]:
        """Mapped layers that no image lists and nothing rests on."""
        containers = {one.layer for one in self.snapshot.containers.values()}
        found = []
        for layer in self.snapshot.layers.values():
            if (
                layer.mapping.identity
                or layer.names
                or layer.read_only_store
                or layer.id in containers
                or self.snapshot.images_of_layer(layer.id)
                or self.snapshot.children(layer.id)
            ):
                continue
            state = self._mapped_state(layer.id, ())
            if state.status not in (INCOMPLETE, MISSING):
                state.status = UNREFERENCED
                state.problem = "no image, layer or container refers to it"
            found.append(state)
        return found

    def _orphans(self) -> t.List[Orphan]:
        found: t.List[Orphan] = []
        try:
            thorough = self.measure != NONE
            suspects = self.driver.orphans(self.snapshot.layers, thorough, self.present)
        except StorageError:
            suspects = []
        if suspects:
            # A layer that came after the records were read is none of them.
            known = self.place.store.snapshot().layers
            names = {one.name for one in self.driver.orphans(known)}
            for suspect in suspects:
                if suspect.name not in names:
                    continue
                usage = None
                if self.measure != NONE:
                    try:
                        usage = suspect.usage()
                    except StorageError:
                        usage = None
                found.append(
                    Orphan(suspect.kind, suspect.name, suspect.path, suspect.changed, usage)
                )
        for leftover in self.place.store.leftovers():
            usage = None
            if self.measure != NONE:
                try:
                    usage = self.driver.measure_path(leftover.path)
                except StorageError:
                    usage = None
            name = os.path.basename(leftover.path)
            found.append(Orphan(leftover.kind, name, leftover.path, leftover.modified, usage))
        return found


# Results


def image_result(found: ImageState) -> t.Dict[str, t.Any]:
    """An image as image_layers_info and image_layers return it."""
    image = found.image
    created = image.created
    return {
        "id": image.id,
        "names": list(image.names),
        "digests": list(image.digests),
        "created": say(created.timestamp()) if created else None,
        "read_only_store": image.store,
        "problem": found.problem or None,
        "layers": [layer_result(one) for one in found.chain],
        "mapped_layers": [mapped_result(one) for one in found.mapped],
        "private_copies": [
            {**container_result(container), "layer": container.layer, **_sizes(usage)}
            for container, usage in found.private_copies
        ],
    }


def layer_result(found: LayerState) -> t.Dict[str, t.Any]:
    """A layer as the modules return it."""
    layer, containers = found.layer, found.containers
    mapping = layer.mapping if layer and layer.mapping is not UNMAPPED else None
    return {
        "id": found.layer_id,
        "uidmap": mapping.uid.to_strings() if mapping else [],
        "gidmap": mapping.gid.to_strings() if mapping else [],
        "created": found.created_in_words,
        "recorded_size": layer.diff_size if layer else None,
        **_sizes(found.usage),
        "status": found.status,
        "problem": found.problem or None,
        "containers": [container_result(one) for one in containers] if containers else [],
    }


def mapped_result(found: LayerState) -> t.Dict[str, t.Any]:
    """A mapped layer as the modules return it."""
    return {
        **layer_result(found),
        "duplicate_of": found.duplicate_of,
        "depends_on": list(found.dependencies),
        "origin": "ours" if found.ours else "runtime",
        "last_used": None if found.last_used is None else say(found.last_used),
        "lease": None if found.lease is None else say(found.lease),
    }


def container_result(container: Container) -> t.Dict[str, t.Any]:
    """A container as the modules return it."""
    return {
        "id": container.id,
        "name": container.name,
        "known_to_podman": _known_to_podman(container),
    }


def _known_to_podman(container: Container) -> bool:
    """Podman notes its name for a container in the record; CRI-O does so as well, with a pod."""
    return bool(container.podman_name) and '"pod-id"' not in container.metadata


def orphan_result(found: Orphan, now: float) -> t.Dict[str, t.Any]:
    """Something that no record accounts for, as the modules return it."""
    return {
        "kind": found.kind,
        "id": found.name,
        "path": found.path,
        "age": max(int(now - found.changed), 0),
        **_sizes(found.usage),
    }


def unreferenced_result(found: LayerState, now: float) -> t.Dict[str, t.Any]:
    """A mapped layer of no image, among the orphans."""
    return {
        "kind": "layer",
        "path": None,
        "age": None if found.created is None else max(int(now - found.created), 0),
        **mapped_result(found),
    }


def totals(inventory: Inventory) -> t.Dict[str, t.Any]:
    """Sums over the layers of the images, each layer once; bytes and inodes."""
    every, mapped = inventory.layers(), inventory.mapped_layers()
    own = {image.image.layer for image in inventory.images}
    free = [one for one in mapped if not one.in_use and one.layer_id not in own]
    return {
        **_sum(every),
        "mapped": {"layers": len(mapped), **_sum(mapped)},
        "reclaimable": sum(one.usage.exclusive for one in free if one.usage),
        "reclaimable_inodes": sum(one.usage.inodes for one in free if one.usage),
    }


def _sum(layers: t.Sequence[LayerState]) -> t.Dict[str, int]:
    measured = [one.usage for one in layers if one.usage]
    return {
        "recorded": sum((one.layer.diff_size or 0) if one.layer else 0 for one in layers),
        "apparent": sum(one.apparent for one in measured),
        "exclusive": sum(one.exclusive for one in measured),
        "inodes": sum(one.inodes for one in measured),
    }


def _sizes(usage: t.Optional[Usage]) -> t.Dict[str, t.Optional[int]]:
    if usage is None:
        return _NO_SIZES
    return {
        "size_apparent": usage.apparent,
        "size_exclusive": usage.exclusive,
        "inodes": usage.inodes,
    }
