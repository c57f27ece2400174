# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The contents of a store: images, their layers with sizes and users, and damage.

Nothing is changed. Damage is described together with the rest of the store.
"""

from __future__ import annotations

import contextlib
import os
import time
import typing as t
from dataclasses import dataclass, field

from ..drivers.base import Driver
from ..errors import ImageUnknown, StorageError, UntestedRuntime
from ..idmap.mapping import Mapping, Shift
from ..store.consistency import nobodys_mapped_layers
from ..store.records import Container, Image, Layer
from ..store.snapshot import Snapshot
from ..tree.compare import Comparison, compare
from ..tree.measure import Usage, together
from .contradictions import present_layers
from .image_patterns import Patterns, image_terms
from .image_removal import layers_of_removal, users_of_image
from .layer_flags import LEASE_FLAG, ORIGIN, ORIGIN_FLAG
from .root_owners import top_owners
from .store_opening import OpenStore
from .time_formats import format_time, from_rfc3339, is_moment
from .usage_tracking import read_ledger

NONE, APPARENT, EXCLUSIVE = "none", "apparent", "exclusive"

OK = "ok"
MISSING = "missing"
INCOMPLETE = "incomplete"
UNREFERENCED = "unreferenced"
FOREIGN_ROOT = "foreign_root"
DIFFERENT = "different"
DAMAGED = "damaged"
NEWER = "newer_format"

_BLOCK = 512
_MAGIC = frozenset("*?[")


class LayerState:
    """The state of a layer. ``layer`` is None for an ID that an image lists, but that has no record."""

    status: str = OK
    problem: str = ""
    # Whether more than its root directory belongs to the host's root.
    wrong: bool = False
    containers: t.Sequence[Container] = ()
    child_layers: t.Sequence[str] = ()
    images: t.Sequence[Image] = ()
    usage: t.Optional[Usage] = None
    duplicate_of: t.Optional[str] = None
    last_used: t.Optional[float] = None
    dependencies: t.Tuple[str, ...] = ()
    comparison: t.Optional[Comparison] = None

    def __init__(self, layer_id: str, layer: t.Optional[Layer]) -> None:
        self.layer_id = layer_id
        self.layer = layer

    @property
    def mapping(self) -> Mapping:
        """The maps of the layer; empty maps if it has no record."""
        return self.layer.mapping if self.layer else Mapping()

    @property
    def created(self) -> t.Optional[float]:
        """Seconds since the epoch."""
        created = self.layer.created if self.layer else None
        return created.timestamp() if created else None

    @property
    def ours(self) -> bool:
        """Whether layer_template created it."""
        return self.layer is not None and self.layer.flags.get(ORIGIN_FLAG) == ORIGIN

    @property
    def lease(self) -> t.Optional[float]:
        """The end of the lease, in seconds since the epoch. Until then the layer is kept even if it is unused."""
        lease = self.layer.flags.get(LEASE_FLAG) if self.layer else None
        return from_rfc3339(lease) if isinstance(lease, str) else None

    @property
    def created_text(self) -> t.Optional[str]:
        """The time of creation, as the modules return it."""
        text = self.layer.raw.get("created") if self.layer else None
        # The format of containers/storage, converted quickly because there may be ten thousand layers.
        if text and text[-1] == "Z" and not text.startswith("0001") and is_moment(text[:19]):
            return f"{text[:19]}Z"
        return None if self.created is None else format_time(self.created)

    @property
    def in_use(self) -> bool:
        """Whether a container or another layer uses it."""
        return bool(self.containers or self.child_layers)


@dataclass
class Orphan:
    """Something in the store's folders without a record."""

    kind: str
    name: str
    path: str
    changed: float
    usage: t.Optional[Usage] = None


@dataclass
class ImageRemoval:
    """The layers that are removed with an image, and the space that this frees; no usage if layers were not
    measured."""

    layers: t.List[str]
    usage: t.Optional[Usage] = None


@dataclass
class ImageState:
    """An image: its own layers, top first, and its mapped layers in their recorded order."""

    image: Image
    chain: t.List[LayerState]
    mapped: t.List[LayerState]
    problem: str = ""
    removal: t.Optional[ImageRemoval] = None
    private_copies: t.List[t.Tuple[Container, t.Optional[Usage]]] = field(default_factory=list)


@dataclass
class Inventory:
    """The state of the whole store, or of selected images."""

    now: float
    watched_since: t.Optional[float]
    images: t.List[ImageState]
    unreferenced: t.List[LayerState]
    orphans: t.List[Orphan]

    def mapped_layers(self) -> t.List[LayerState]:
        """All mapped layers of the images, without duplicates."""
        found = {layer.layer_id: layer for image in self.images for layer in image.mapped}
        return list(found.values())

    def layers(self) -> t.List[LayerState]:
        """All layers of the images, without duplicates."""
        found = {
            item.layer_id: item for image in self.images for item in image.chain + image.mapped
        }
        return list(found.values())


def take(
    store_ctx: OpenStore,
    images: t.Sequence[str] = (),
    measure: str = NONE,
    removals: bool = False,
    verify: bool = False,
    snapshot: t.Optional[Snapshot] = None,
) -> Inventory:
    """Examine the store.

    :param images: names, IDs, digests or shell patterns; none for all images
    :param measure: ``none``, ``apparent`` or ``exclusive``
    :param removals: whether to determine what is removed together with each image
    :param verify: compare each mapped layer with its template, entry by entry
    :param snapshot: the records; None to read them
    :raises StorageError: the records cannot be read, or a reference is ambiguous
    """
    if snapshot is None:
        snapshot = store_ctx.store.snapshot()
    return _Taker(store_ctx, measure, snapshot, verify, removals).take(images)


def choose(snapshot: Snapshot, references: t.Sequence[str]) -> t.List[Image]:
    """The images that the references name, in the order of the store; missing images are ignored.

    :raises ImageAmbiguous: a reference that is no pattern matches several images
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
        or (patterns and shell.hit([*image_terms((image.id,), image.names), *image.digests]))
    ]


@contextlib.contextmanager
def _errors_described(state: LayerState) -> t.Iterator[None]:
    """Turn errors of the examination of a layer into its status."""
    try:
        yield
    except UntestedRuntime as error:
        state.status, state.problem = NEWER, str(error)
    except StorageError as error:
        state.status, state.problem = DAMAGED, str(error)


class _Taker:
    def __init__(
        self,
        store_ctx: OpenStore,
        measure: str,
        snapshot: Snapshot,
        verify: bool = False,
        removals: bool = False,
    ) -> None:
        self.removals = removals
        self.verify = verify
        self.store_ctx = store_ctx
        self.driver: Driver = store_ctx.driver
        self.measure = measure
        self.now = time.time()
        self.states: t.Dict[str, LayerState] = {}
        # By the id() of a mapping, which is kept alive so that the id() stays unique.
        self.meanings: t.Dict[int, t.Tuple[t.Hashable, Mapping]] = {}
        self.snapshot = snapshot
        self.ledger = read_ledger(store_ctx)
        self.present = self._present()
        self.containers: t.Dict[str, t.List[Container]] = {}
        for container in self.snapshot.containers.values():
            self.containers.setdefault(container.image, []).append(container)

    def _present(self) -> t.Optional[t.Set[str]]:
        try:
            return present_layers(self.store_ctx)
        except StorageError:
            return None

    def take(self, references: t.Sequence[str]) -> Inventory:
        images = [self._image(item) for item in choose(self.snapshot, references)]
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
            chain = [item.id for item in self.snapshot.chain(image.layer)] if image.layer else []
        except StorageError as error:
            problem = str(error)
            chain = self.snapshot.known_chain(image.layer)
        layers = self.snapshot.layers
        template = [layers[item] for item in chain if item in layers]
        mapped = list(dict.fromkeys(image.mapped_layers))
        found = ImageState(
            image=image,
            chain=[self._own_state(item) for item in chain],
            mapped=[self._mapped_state(layer, template) for layer in mapped],
            problem=problem,
        )
        for item in found.chain:
            if item.status != OK and not found.problem:
                found.problem = item.problem
        if found.mapped:
            self._find_duplicates(found)
        found.private_copies = self._private_copies(image)
        if self.measure == EXCLUSIVE:
            # Data that a mapped layer shares with the image is not freed.
            template_usage = [item.usage for item in found.chain if item.usage]
            for layer in found.mapped:
                if layer.usage and layer not in found.chain:
                    layer.usage = together([layer.usage], template_usage)
        found.removal = self._removal(image)
        return found

    def _removal(self, image: Image) -> t.Optional[ImageRemoval]:
        """The layers that are removed with the image; None if it cannot be removed."""
        if not self.removals or image.store or users_of_image(self.snapshot, image):
            return None
        try:
            layers = layers_of_removal(self.snapshot, image)
        except StorageError:
            return None
        if self.measure != EXCLUSIVE:
            return ImageRemoval(layers)
        usages = [self._state(layer).usage for layer in layers]
        try:
            beside = [self.driver.measure_path(self.store_ctx.store.image_data_dir(image.id), True)]
        except StorageError:
            beside = []
        # The rest of the chain may share data with the removed layers.
        chain = {item.id for item in self._layers_below(image.layer)}
        staying = [self._state(item).usage for item in sorted(chain.difference(layers))]
        return ImageRemoval(
            layers,
            together(
                [*(usage for usage in usages if usage), *beside],
                [item for item in staying if item],
            ),
        )

    def _layers_below(self, layer_id: str) -> t.Sequence[Layer]:
        try:
            return self.snapshot.chain(layer_id) if layer_id else ()
        except StorageError:
            return ()

    def _private_copies(self, image: Image) -> t.List[t.Tuple[Container, t.Optional[Usage]]]:
        """Containers whose own layer contains a copy of the image with other maps."""
        found = []
        for container in self.containers.get(image.id, ()):
            own = self.snapshot.layers.get(container.layer)
            parent = self.snapshot.layers.get(own.parent) if own else None
            # Newer runtimes record the map on each container's layer, whether or not they copy.
            if (
                own
                and parent
                and not own.mapping.same_meaning(parent.mapping)
                and self._has_copy(own.id)
            ):
                found.append((container, self._usage(own.id)))
        return found

    def _has_copy(self, layer_id: str) -> bool:
        try:
            return self.driver.has_copy(layer_id)
        except StorageError:
            return False

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
            state.problem = f"the data of layer {layer_id[:12]} is missing"
        state.usage = self._usage(layer_id)
        return state

    def _is_there(self, layer: Layer) -> bool:
        return bool(layer.read_only_store) or self.present is None or layer.id in self.present

    def _own_state(self, layer_id: str) -> LayerState:
        """Examine an image's own layer."""
        known = layer_id in self.states
        state = self._state(layer_id)
        if known or state.layer is None or state.layer.read_only_store:
            return state
        if self.measure != NONE and state.status == OK:
            with _errors_described(state):
                damage = self.driver.damage(layer_id)
                if damage is not None:
                    state.status, state.problem = DAMAGED, damage
        return state

    def _mapped_state(self, layer_id: str, template: t.Sequence[Layer]) -> LayerState:
        """Examine a mapped layer, in more detail than other layers, because runtimes do not check it."""
        known = layer_id in self.states
        state = self._state(layer_id)
        state.images = self.snapshot.images_of_layer(layer_id)
        if known or state.layer is None:
            return state
        own = {container.layer for container in state.containers}
        state.child_layers = [
            child.id for child in self.snapshot.children(layer_id) if child.id not in own
        ]
        state.last_used = self.now if state.containers else self.ledger.last_used(layer_id)
        if self.verify and state.status == OK and template and template[0].id != layer_id:
            self._verify(state, state.layer, template)
        if self.measure == NONE or state.status != OK or state.layer.read_only_store:
            return state
        with _errors_described(state):
            state.dependencies = tuple(self.driver.dependencies(layer_id))
            damage = self.driver.damage(layer_id)
            if damage is not None:
                state.status, state.problem = DAMAGED, damage
                return state
            owners = top_owners(self.driver, state.layer, template)
            if owners.kept:
                state.status, state.problem = DAMAGED, owners.kept
            elif owners.outside:
                state.status, state.problem = FOREIGN_ROOT, owners.outside
                state.wrong = owners.wrong
        return state

    def _verify(self, state: LayerState, layer: Layer, template: t.Sequence[Layer]) -> None:
        """Compare a mapped layer with its template."""
        theirs = [item.id for item in template]
        try:
            with (
                self.driver.tree(theirs) as image,
                self.driver.tree([layer.id, *theirs[1:]]) as own,
            ):
                shift = Shift(template[0].mapping, layer.mapping)
                state.comparison = found = compare(image, own, shift)
        except (StorageError, OSError) as error:
            state.problem = f"could not be verified: {error}"
            return
        if found.different:
            first = found.shown[0]
            state.status = DIFFERENT
            state.problem = (
                f"{found.different} of {found.entries} entries differ from the image with this "
                f"map, first {first.path}, which {' and '.join(first.problems)}"
            )

    def _usage(self, layer_id: str) -> t.Optional[Usage]:
        """The space that a layer uses, with its tar-split file; None if not requested or not readable."""
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
            beside = os.lstat(self.store_ctx.store.tar_split_path(layer_id))
        except OSError:
            return usage
        on_disk = beside.st_blocks * _BLOCK
        if exclusive:
            return usage.plus(on_disk)
        return usage._replace(inodes=usage.inodes + 1, allocated=usage.allocated + on_disk)

    def _find_duplicates(self, found: ImageState) -> None:
        """Mapped layers with the same map as another layer of the image, or with a map of the same meaning.

        The layer to keep is the one with containers, or one that the runtime created, or the last one used.
        """
        template = self.states.get(found.image.layer)
        groups: t.Dict[t.Hashable, t.List[LayerState]] = {}
        if template:
            groups[self._meaning(template.mapping)] = [template]
        for layer in found.mapped:
            if layer.layer is not None and layer is not template:
                groups.setdefault(self._meaning(layer.mapping), []).append(layer)
        for group in groups.values():
            kept = group[0]
            if kept is not template:
                kept = max(
                    group,
                    key=lambda item: (
                        item.status == OK,
                        item.in_use,
                        not item.ours,
                        item.last_used or 0.0,
                    ),
                )
            # If the runtime has not used any form of the map yet, each requested form may be needed.
            forms_known = kept is template or kept.in_use or not kept.ours
            needed = {kept.mapping}
            for layer in group:
                if layer is kept or layer is template:
                    continue
                if not forms_known and layer.mapping not in needed:
                    needed.add(layer.mapping)
                else:
                    layer.duplicate_of = kept.layer_id

    def _meaning(self, mapping: Mapping) -> t.Hashable:
        """A value that is equal for maps of the same meaning; cached, because all images have the same few maps."""
        known = self.meanings.get(id(mapping))
        if known is None:
            known = self.meanings[id(mapping)] = (mapping.meaning, mapping)
        return known[0]

    # Unreferenced data

    def _unreferenced(self) -> t.List[LayerState]:
        """Mapped layers that no image lists and nothing uses."""
        found = []
        for layer in nobodys_mapped_layers(self.snapshot):
            state = self._mapped_state(layer.id, ())
            if state.status not in (INCOMPLETE, MISSING, NEWER):
                state.status = UNREFERENCED
                state.problem = "no image, layer or container references it"
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
            # Except layers that were created after the records were read.
            known = self.store_ctx.store.readable()[0].layers
            names = {orphan.name for orphan in self.driver.orphans(known)}
            for suspect in suspects:
                if suspect.name not in names:
                    continue
                usage = None
                if self.measure != NONE:
                    try:
                        usage = suspect.usage(self.measure == EXCLUSIVE)
                    except StorageError:
                        usage = None
                found.append(
                    Orphan(suspect.kind, suspect.name, suspect.path, suspect.changed, usage)
                )
        for leftover in self.store_ctx.store.leftovers():
            usage = None
            if self.measure != NONE:
                try:
                    usage = self.driver.measure_path(leftover.path, self.measure == EXCLUSIVE)
                except StorageError:
                    usage = None
            name = os.path.basename(leftover.path)
            found.append(Orphan(leftover.kind, name, leftover.path, leftover.modified, usage))
        return found
