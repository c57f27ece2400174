# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Change the ID map of the own layers of images in place, without a copy.

Under the store's locks, the owners of the files and the records of all layers change, or none of them. During the
change, the records of the images are removed and their layers are marked as incomplete, with the note of a removal in
the trash. A killed process therefore leaves the same state as an interrupted removal of these images, which must then
be pulled again. The conversion is refused if anything else depends on these layers.
"""

from __future__ import annotations

import contextlib
import typing as t
from dataclasses import dataclass

from ..errors import (
    LayerInUse,
    MapError,
    ReadOnlyStore,
    StorageError,
    StoreChanged,
    StoreError,
    UnmappedIDs,
)
from ..idmap.mapping import Mapping, Shift
from ..idmap.ranges import IDMap
from ..kernel import namespaces, steps
from ..store.fields import Raw
from ..store.mount_counts import mounted_layers
from ..store.records import Container, Image, Layer
from ..store.snapshot import Snapshot
from ..store.transaction import Transaction
from ..tree import in_place
from ..tree.own_tree import OwnTree
from ..userns import running as userns
from . import inventory_results
from .cleanup import clean_up
from .contradictions import refuse_contradictions
from .layer_removal import Room, has_note, note_removal, removal_hint, remove_mapped_layer
from .shared_pins import PIN
from .sharing import readers
from .store_opening import OpenStore, StoreRequest, opened

# The maximum ratio of the time to change owners and sync them to the time to read them, and the time for the
# records (seconds).
_CHANGE_TO_READ = 1.5
_RECORDS_SECONDS = 0.05
_ATTEMPTS = 3
_MOST_NAMED = 10


@dataclass(frozen=True)
class ConversionRequest:
    """The images of a store to convert, and the map.

    :param images: full IDs
    :param uidmap: ``C:H:N`` entries in the literal form that the runtime requests; none for no map
    :param gidmap: as ``uidmap``
    :param check: only predict the changes
    """

    store: StoreRequest
    images: t.Tuple[str, ...]
    uidmap: t.Tuple[str, ...]
    gidmap: t.Tuple[str, ...]
    check: bool = False


@dataclass(frozen=True)
class Conversion:
    """The changes of a conversion.

    :ivar layers: IDs of the layers that get the map
    :ivar removed_layers: IDs of mapped layers that are removed
    :ivar inodes: the number of files and directories that get another owner
    :ivar expected_seconds: the predicted time for which the store's locks are held
    :ivar lock_seconds: the measured time; 0 in check mode
    """

    layers: t.Tuple[str, ...] = ()
    removed_layers: t.Tuple[str, ...] = ()
    inodes: int = 0
    expected_seconds: float = 0.0
    lock_seconds: float = 0.0

    def result(self) -> t.Dict[str, t.Any]:
        """The conversion as the module returns it."""
        return {
            "layers": list(self.layers),
            "removed_layers": list(self.removed_layers),
            "inodes": self.inodes,
            "expected_lock_seconds": round(self.expected_seconds, 2),
            "lock_seconds": round(self.lock_seconds, 4),
        }


class _Affected(t.NamedTuple):
    """The layers that a conversion of images affects.

    :ivar changing: the layers that get another map
    :ivar marked: these layers and those that need them, which are marked as incomplete during the change
    :ivar surplus: mapped layers that are useless or wrong afterwards
    """

    images: t.Tuple[Image, ...]
    changing: t.Tuple[Layer, ...]
    marked: t.Tuple[Layer, ...]
    surplus: t.Tuple[Layer, ...]

    @property
    def identity(self) -> t.Tuple[t.Any, ...]:
        """A value that changes with any of the records."""
        images = tuple((image.id, image.text) for image in self.images)
        return images, tuple(layer.id for layer in self.changing), _texts(self.marked)


def _texts(layers: t.Iterable[Layer]) -> t.Tuple[bytes, ...]:
    return tuple(layer.text for layer in layers)


@userns.returns(inventory_results.CONVERSION)
def declare(request: ConversionRequest) -> t.Dict[str, t.Any]:
    """Convert the images of a request; see :func:`convert`.

    To be called inside :func:`..userns.run`.
    """
    mapping = Mapping(_id_map(request.uidmap), _id_map(request.gidmap))
    with opened(request.store, read_only=request.check) as store_ctx:
        return convert(store_ctx, request.images, mapping, request.check).result()


def _id_map(entries: t.Iterable[str]) -> IDMap:
    """A map as in records, where old runtimes also write empty entries."""
    return IDMap.from_record(
        [
            dict(zip(("container_id", "host_id", "size"), map(int, entry.split(":"))))
            for entry in entries
        ]
    )


def convert(
    store_ctx: OpenStore, image_ids: t.Sequence[str], mapping: Mapping, check: bool = False
) -> Conversion:
    """Change the map of all layers of images in place.

    :param image_ids: full IDs; must include all images that share layers
    :param mapping: in the literal form that the runtime requests
    :param check: only predict the changes
    :raises LayerInUse: containers or other images need the layers unchanged, or they are mounted
    :raises UnmappedIDs: the images contain IDs that the map does not cover
    :raises ReadOnlyStore: a layer is in an additional store
    :raises UnsupportedDriver: the layers use a feature that does not allow it
    :raises StoreChanged: the images changed repeatedly
    :raises StorageError: it failed; the message says whether the images must be pulled again
    """
    if not check:
        clean_up(store_ctx, store_ctx.store.snapshot())
    conversion = _Converter(store_ctx, tuple(dict.fromkeys(image_ids)), mapping, check)
    for _attempt in range(_ATTEMPTS):
        try:
            return conversion.carry_out()
        except _Moved:
            continue
    raise StoreChanged(
        _named(conversion.images),
        f"changed {_ATTEMPTS} times while its layers were to be converted",
        "Run the task again when no program pulls or removes images.",
    )


class _Moved(Exception):
    """The records changed after the plan was made."""


class _Converter:
    def __init__(
        self,
        store_ctx: OpenStore,
        image_ids: t.Tuple[str, ...],
        mapping: Mapping,
        check: bool,
    ) -> None:
        self._store_ctx = store_ctx
        self._image_ids = image_ids
        self._mapping = mapping
        self._check = check
        # Kept for a second attempt.
        self._removed: t.List[str] = []
        self.images: t.Tuple[Image, ...] = ()

    def carry_out(self) -> Conversion:
        store_ctx = self._store_ctx
        snapshot = store_ctx.store.snapshot()
        affected = self._affected(snapshot)
        self.images = affected.images
        if not affected.changing:
            return Conversion()
        self._refuse(snapshot, affected)
        store_ctx.store.require_tested()
        refuse_contradictions(store_ctx)
        ids = [layer.id for layer in affected.changing]
        with store_ctx.driver.own_trees(ids) as trees:
            steps.begin(f"reading the layers of {_named(affected.images)}")
            plan = self._plan(affected, trees)
            planned = Conversion(
                tuple(ids),
                tuple(layer.id for layer in affected.surplus),
                plan.changes,
                _RECORDS_SECONDS + _CHANGE_TO_READ * plan.seconds,
            )
            if self._check:
                return planned
            for layer in affected.surplus:
                if remove_mapped_layer(store_ctx, layer.id) is not None:
                    self._removed.append(layer.id)
            seconds = self._commit(self._now(affected), plan, trees)
        store_ctx.ensure_still_there()
        return Conversion(
            planned.layers, tuple(self._removed), planned.inodes, planned.expected_seconds, seconds
        )

    # The affected layers

    def _affected(self, snapshot: Snapshot) -> _Affected:
        images = []
        for image_id in self._image_ids:
            image = snapshot.images.get(image_id)
            if image is None:
                raise StoreError(
                    f"image {image_id[:12]}", "is no longer in the store", "Pull it again."
                )
            images.append(image)
        own: t.Dict[str, Layer] = {}
        copies: t.Dict[str, Layer] = {}
        for image in images:
            # Bottom layers first.
            chain = reversed(snapshot.chain(image.layer)) if image.layer else ()
            own.update((layer.id, layer) for layer in chain)
        for image in images:
            for layer_id in image.mapped_layers:
                if layer_id in snapshot.layers and layer_id not in own:
                    copies[layer_id] = snapshot.layers[layer_id]
        changing = {
            layer_id: layer
            for layer_id, layer in own.items()
            if not layer.mapping.same_form(self._mapping)
        }
        marked: t.Dict[str, Layer] = {}
        for layer_id, layer in own.items():
            if layer_id in changing or layer.parent in marked:
                marked[layer_id] = layer
        surplus = []
        for image in images:
            for layer_id in image.mapped_layers if image.layer in marked else ():
                if layer_id in copies and layer_id not in marked:
                    marked[layer_id] = copies[layer_id]
                    if self._is_surplus(copies[layer_id]):
                        surplus.append(copies[layer_id])
        concerned = [image for image in images if image.layer in marked]
        return _Affected(
            tuple(concerned), tuple(changing.values()), tuple(marked.values()), tuple(surplus)
        )

    def _is_surplus(self, layer: Layer) -> bool:
        if layer.incomplete or layer.mapping.same_form(self._mapping):
            return True
        driver = self._store_ctx.driver
        return not driver.exists(layer.id) or driver.shows_owners_of_lower_layers(layer.id)

    def _now(self, planned: _Affected) -> _Affected:
        """The same layers in the current records, without surplus layers."""
        now = self._affected(self._store_ctx.store.snapshot())
        if now.surplus or _texts(now.changing) != _texts(planned.changing):
            raise _Moved
        return now

    def _plan(self, affected: _Affected, trees: t.Sequence[OwnTree]) -> in_place.Plan:
        shifts = [Shift(layer.mapping, self._mapping) for layer in affected.changing]
        plan = in_place.plan(trees, shifts)
        if all(shift.complete for shift in shifts):
            self._refuse_ids_outside(affected, shifts)
            return plan
        raise self._unmapped(
            affected,
            {number for shift in shifts for number in shift.unmapped_uids},
            {number for shift in shifts for number in shift.unmapped_gids},
            {number for shift in shifts for number in shift.foreign_uids},
            {number for shift in shifts for number in shift.foreign_gids},
        )

    # Refusals

    def _refuse(self, snapshot: Snapshot, affected: _Affected) -> None:
        """Check in the records that the images can be converted.

        :raises StorageError: they cannot
        """
        name = _named(affected.images)
        for record in (*affected.images, *affected.marked):
            if record.read_only_store is not None:
                raise ReadOnlyStore(
                    name,
                    f"has its layers in the read-only store {record.read_only_store}, which is never changed",
                    "Convert the image in that store, or pull it into the store itself.",
                    store=record.read_only_store,
                )
        for layer in affected.changing:
            if layer.incomplete:
                raise StoreError(
                    name,
                    f"its layer {layer.id[:12]} is incomplete",
                    "Remove the image and pull it again.",
                )
        if len({layer.path for layer in affected.marked}) > 1:
            raise StoreError(
                name,
                "the records of its layers are in several files, so they cannot be changed at once",
                "Remove the image and pull it again.",
            )
        self._refuse_shared(affected)
        reading = readers(self._store_ctx)
        if reading:
            raise LayerInUse(
                name,
                f"cannot be converted because containers of other stores may use its layers: {reading}",
                "Pull the image with the mapping into a store that no other store reads.",
            )
        self._refuse_used(snapshot, affected)
        uids = self._mapping.uid.missing(
            item for layer in affected.changing for item in layer.uidset
        )
        gids = self._mapping.gid.missing(
            item for layer in affected.changing for item in layer.gidset
        )
        if uids or gids:
            raise self._unmapped(affected, set(uids), set(gids), set(), set())

    @staticmethod
    def _refuse_shared(affected: _Affected) -> None:
        for image in affected.images:
            for pin in image.names:
                if pin.startswith(f"{PIN}:"):
                    raise LayerInUse(
                        _named([image]),
                        f"is shared with users of this host (it has the name {pin})",
                        "Remove it from the declarations of userns.storage.shared_images first.",
                        image_id=image.id,
                    )

    def _refuse_used(self, snapshot: Snapshot, affected: _Affected) -> None:
        name = _named(affected.images)
        requested = {image.id for image in affected.images}
        marked = {layer.id for layer in affected.marked}
        containers = _containers(snapshot, requested, marked)
        if containers:
            listed = ", ".join(f"{item.name} ({item.id[:12]})" for item in containers[:_MOST_NAMED])
            raise LayerInUse(
                name,
                f"cannot be converted because it is in use by container {listed}{_more(containers)}",
                removal_hint(containers, snapshot.podman),
                users=[
                    {"kind": "container", "id": item.id, "name": item.name} for item in containers
                ],
            )
        images = _other_images(snapshot, requested, marked)
        if images:
            listed = ", ".join(_label(item) for item in images[:_MOST_NAMED])
            raise LayerInUse(
                name,
                f"cannot be converted because image {listed}{_more(images)} needs the same layers as they are",
                "Convert these images in the same task, or remove them first.",
                images=[item.id for item in images],
            )
        others = [
            child.id
            for layer_id in marked
            for child in snapshot.children(layer_id)
            if child.id not in marked
        ]
        if others:
            raise LayerInUse(
                name,
                f"cannot be converted because layer {others[0][:12]}, which no image or container uses, depends "
                "on it",
                "Remove that layer with userns.storage.layer_gc and orphans=remove.",
                layers=others,
            )
        self._refuse_needed_by_additional_stores(snapshot, affected, requested)
        mounted = sorted(mounted_layers(self._store_ctx.config) & marked)
        if mounted:
            raise LayerInUse(
                name,
                f"cannot be converted because its layer {mounted[0][:12]} is mounted",
                "Stop the program that mounted it."
                if snapshot.runtime
                else f"Unmount it: {snapshot.runtime_command('image', 'unmount', '--all')}",
                layers=mounted,
            )

    def _refuse_needed_by_additional_stores(
        self, snapshot: Snapshot, affected: _Affected, requested: t.Collection[str]
    ) -> None:
        """Check that no image of an additional store needs the layers.

        containers/storage looks for a layer in the store itself first, since 1.63 also for the lower layers of an
        additional store (overlay.go, getLowerDirs), so their containers would see the new owners.

        :raises LayerInUse: naming the additional store
        """
        marked = {layer.id for layer in affected.marked}
        for what, store in self._needed_by_additional_stores(snapshot, marked, requested):
            raise LayerInUse(
                _named(affected.images),
                f"cannot be converted because the additional image store {store} has some of its layers too, and "
                f"its {what} needs them as they are",
                "Remove that store from additionalimagestores, or pull the image with the mapping before other "
                "images that share its layers.",
                store=store,
            )

    def _needed_by_additional_stores(
        self, snapshot: Snapshot, marked: t.Set[str], requested: t.Collection[str]
    ) -> t.Iterator[t.Tuple[str, str]]:
        """The images of additional stores that need the layers, each with its store."""
        for image in snapshot.images.values():
            if image.store and image.id not in requested and image.layer in marked:
                yield f"image {_label(image)}", image.store
        for layer in snapshot.layers.values():
            if layer.read_only_store and not marked.isdisjoint(
                self._store_ctx.driver.dependencies(layer.id)
            ):
                owner = snapshot.image_of_layer(layer.id)
                what = f"image {_label(owner)}" if owner else f"layer {layer.id[:12]}"
                yield what, layer.read_only_store

    def _refuse_ids_outside(self, affected: _Affected, shifts: t.Sequence[Shift]) -> None:
        """Check that files can have the IDs of the map in the user namespace of the store.

        :raises MapError: they cannot
        """
        uids: t.Set[int] = set()
        gids: t.Set[int] = set()
        for shift in shifts:
            new_uids, new_gids = shift.new_ids
            uids |= new_uids
            gids |= new_gids
        for kind, ids in (("uid", uids), ("gid", gids)):
            outside = namespaces.unmapped_here(kind, ids)
            if outside:
                raise MapError(
                    _named(affected.images),
                    f"the map {self._mapping} leads to {kind.upper()} {outside[0]}, which is not in the user "
                    "namespace of the store",
                    "Use a map within the subordinate IDs of the user, for example userns: keep-id. Nothing was "
                    "changed.",
                )

    def _unmapped(
        self,
        affected: _Affected,
        uids: t.Set[int],
        gids: t.Set[int],
        foreign_uids: t.Set[int],
        foreign_gids: t.Set[int],
    ) -> UnmappedIDs:
        kinds = (
            ("UID", uids),
            ("GID", gids),
            ("host UID", foreign_uids),
            ("host GID", foreign_gids),
        )
        owners = " and ".join(
            f"{kind}s {', '.join(str(number) for number in sorted(numbers)[:_MOST_NAMED])}"
            f"{_more(sorted(numbers))}"
            for kind, numbers in kinds
            if numbers
        )
        return UnmappedIDs(
            _named(affected.images),
            f"has files of {owners}, which are not covered by the map {self._mapping}",
            "Map more IDs. Nothing was changed.",
            uids=sorted(uids),
            gids=sorted(gids),
            foreign_uids=sorted(foreign_uids),
            foreign_gids=sorted(foreign_gids),
        )

    # The change

    def _commit(
        self, affected: _Affected, plan: in_place.Plan, trees: t.Sequence[OwnTree]
    ) -> float:
        """Change owners and records under the locks; returns the time for which these were held, in seconds."""
        store_ctx = self._store_ctx
        store = store_ctx.store
        store_ctx.driver.flush()
        steps.begin(f"converting {_named(affected.images)} while its store is locked")
        with contextlib.ExitStack() as after:
            trash = {
                image.id: after.enter_context(store.trash(image.id, store_ctx.destroy))
                for image in affected.images
            }
            with store.transaction(containers=True, make_room=Room(store_ctx).make) as transaction:
                snapshot = transaction.snapshot
                if self._affected(snapshot).identity != affected.identity:
                    raise _Moved
                self._refuse_used(snapshot, affected)
                change = _Change(self, transaction, affected, plan, trees)
                try:
                    for folder in trash.values():
                        note_removal(folder, affected.marked)
                    change.carry_out()
                except BaseException as error:
                    try:
                        change.undo()
                    except (StorageError, OSError) as failure:
                        for folder in trash.values():
                            if has_note(folder):
                                # The next run removes the remaining files of the images.
                                store.staging.leave(folder)
                        raise _lost(affected, error, failure) from error
                    if isinstance(error, StoreChanged):
                        raise _Moved from error
                    raise
        return transaction.seconds_held

    def complete(self, raw: Raw, has_map: bool) -> None:
        """Complete a marked record.

        :param has_map: whether its layer has the new map
        """
        flags = {key: value for key, value in raw["flags"].items() if key != "incomplete"}
        if flags:
            raw["flags"] = flags
        else:
            del raw["flags"]
        if has_map:
            for key, ranges in (("uidmap", self._mapping.uid), ("gidmap", self._mapping.gid)):
                if ranges.ranges:
                    raw[key] = ranges.to_record()
                else:
                    raw.pop(key, None)

    def flush(self) -> None:
        """Sync all changes to disk."""
        self._store_ctx.driver.flush()


class _Change:
    """The steps under the locks, which are reverted after an error."""

    def __init__(
        self,
        converter: _Converter,
        transaction: Transaction,
        affected: _Affected,
        plan: in_place.Plan,
        trees: t.Sequence[OwnTree],
    ) -> None:
        self._converter = converter
        self._transaction = transaction
        self._affected = affected
        self._plan = plan
        self._trees = trees
        self._restore_images = transaction.save_images()
        self._applying = False

    def carry_out(self) -> None:
        transaction, affected = self._transaction, self._affected
        transaction.withdraw_images([image.id for image in affected.images])
        # All at once, so that an image never has both complete and incomplete layers.
        transaction.mark_incomplete(*(layer.id for layer in affected.marked))
        self._applying = True
        self._plan.apply(self._trees)
        self._converter.flush()
        changing = {layer.id for layer in affected.changing}
        transaction.update_layers(
            {layer.id: self._completion(layer.id in changing) for layer in affected.marked}
        )
        self._restore_images()

    def _completion(self, has_map: bool) -> t.Callable[[Raw], None]:
        return lambda raw: self._converter.complete(raw, has_map)

    def undo(self) -> None:
        """Restore the previous state.

        :raises StorageError: that failed; the layers are marked as incomplete
        """
        if self._applying:
            self._transaction.mark_incomplete(*(layer.id for layer in self._affected.marked))
            self._plan.apply(self._trees, backwards=True)
            self._converter.flush()
        self._transaction.update_layers(
            {layer.id: _as_before(layer) for layer in self._affected.marked}
        )
        self._restore_images()


def _as_before(layer: Layer) -> t.Callable[[Raw], None]:
    def change(raw: Raw) -> None:
        raw.clear()
        raw.update(layer.raw)

    return change


def _containers(
    snapshot: Snapshot, images: t.Collection[str], layers: t.Collection[str]
) -> t.List[Container]:
    """The containers of images, and those on layers, each once."""
    found = {item.id: item for image_id in images for item in snapshot.containers_of(image_id)}
    for layer_id in layers:
        found.update((item.id, item) for item in snapshot.containers_on(layer_id))
    return sorted(found.values(), key=lambda item: item.name)


def _other_images(
    snapshot: Snapshot, requested: t.Collection[str], layers: t.Set[str]
) -> t.List[Image]:
    """The images that need any of the layers, without the requested images."""
    return [
        image
        for image in snapshot.images.values()
        if image.id not in requested and not image.store and _needs(snapshot, image, layers)
    ]


def _needs(snapshot: Snapshot, image: Image, layers: t.Set[str]) -> bool:
    return not all(layers.isdisjoint(snapshot.known_chain(top)) for top in image.candidates)


def _lost(affected: _Affected, error: BaseException, failure: BaseException) -> StorageError:
    return StoreError(
        _named(affected.images),
        f"could not be converted: {error}; and what was changed could not be restored: {failure}",
        "Fix the cause, then pull the image again: its layers are marked as incomplete, and the next "
        "program that uses the store removes them. Nothing else was changed.",
    )


def _more(items: t.Sequence[t.Any]) -> str:
    more = len(items) - _MOST_NAMED
    return f" and {more} more" if more > 0 else ""


def _label(image: Image) -> str:
    return image.names[0] if image.names else image.id[:12]


def _named(images: t.Sequence[Image]) -> str:
    listed = ", ".join(_label(image) for image in images[:_MOST_NAMED])
    return f"image {listed}{_more(images)}"
