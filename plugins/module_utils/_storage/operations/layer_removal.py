# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Remove layers from a store: detach them under the locks within milliseconds, and delete them afterwards."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import typing as t

from ..errors import LayerInUse, NoSpace, StorageError
from ..kernel import clock, files
from ..kernel.oserrors import translate_oserror
from ..printable import command
from ..store.fields import Raw
from ..store.records import Container, Layer
from ..store.reserve import give_back
from ..store.snapshot import Snapshot
from ..store.staging import TRASH
from ..store.transaction import Transaction
from .layer_flags import REMOVAL_FLAG
from .store_opening import OpenStore

# In a folder of the trash: the layers that are removed with an image.
_NOTE = "removal.json"
_LONGEST = 1024 * 1024
_MARK = re.compile(r"[0-9a-f]{16}")
_ID = re.compile(r"[0-9a-f]{64}")


def users_of(snapshot: Snapshot, layer_id: str) -> t.List[t.Dict[str, t.Any]]:
    """The users of a layer, with an entry for each container or other layer.

    Includes containers of all programs (podman, buildah, CRI-O), running or not.
    """
    containers = {item.layer: item for item in snapshot.containers_on(layer_id)}
    users: t.List[t.Dict[str, t.Any]] = [
        {"kind": "container", "id": container.id, "name": container.name}
        for container in containers.values()
    ]
    users.extend(
        {"kind": "layer", "id": child.id, "name": ""}
        for child in snapshot.children(layer_id)
        if child.id not in containers
    )
    return users


def removal_hint(containers: t.Iterable[Container], podman: t.Sequence[str] = ("podman",)) -> str:
    """How to list and remove containers with the program that created them, whole sentences.

    :param podman: the start of a podman command line for the store
    """
    found = list(containers)
    hints = []
    if not found or not all(container.from_crio for container in found):
        hints.append(
            f"Remove them first: {command(*podman, 'ps', '--all', '--external')} also lists containers that podman "
            "did not create."
        )
    if any(container.from_crio for container in found):
        hints.append(
            "Containers whose names begin with k8s_ belong to pods of CRI-O. Delete the pods, or remove them on this "
            "host: crictl pods and crictl ps --all list them, and crictl rmp --force POD removes a pod."
        )
    return " ".join(hints)


def refuse_if_used(snapshot: Snapshot, layer_id: str) -> None:
    """Raise an error if a mapped layer cannot be removed.

    :raises LayerInUse: containers or layers depend on it, or it is an image's own layer
    """
    users = users_of(snapshot, layer_id)
    if users:
        names = ", ".join(f"{user['kind']} {user['name'] or user['id'][:12]}" for user in users)
        raise LayerInUse(
            f"layer {layer_id[:12]}",
            f"is in use by {names}",
            removal_hint(snapshot.containers_on(layer_id), snapshot.podman),
            layer_id=layer_id,
            users=users,
        )
    for image in snapshot.images.values():
        if image.layer == layer_id:
            raise LayerInUse(
                f"layer {layer_id[:12]}",
                f"is the own layer of image {(image.names or [image.id[:12]])[0]}, not a mapped layer",
                "It can only be removed together with the image.",
                layer_id=layer_id,
            )


def remove_mapped_layer(
    store_ctx: OpenStore, layer_id: str, condition: t.Optional[t.Callable[[Snapshot], None]] = None
) -> t.Optional[float]:
    """Remove a mapped layer from the store.

    The order leaves a valid store after a kill at any point: first it is removed from the images, then marked as
    incomplete (which every program cleans up by itself), then its data is renamed to the trash, and the record is
    removed last.

    On a full disk the first two steps use the reserve, or the space that ``Room`` finds. Then files of the layer are
    deleted in place, under the locks, until there is enough space for the rest.

    :param condition: called under the locks with the current records; raises an error to stop
    :returns: the time for which the store's locks were held, in seconds; None if another program removed the layer
    :raises LayerInUse: it is in use now
    :raises NoSpace: the disk is full, and no space could be freed
    :raises StorageError: raised by ``condition``
    """
    store = store_ctx.store
    layer = store.view().layers.get(layer_id) or store.snapshot().layers.get(layer_id)
    if layer is None:
        return None
    name = f"{layer_id}-{mark_of(layer)}"
    room = Room(store_ctx)
    images: t.List[str] = []
    with contextlib.ExitStack() as after:
        trash = _trash(store_ctx, after, name)
        with store.transaction(containers=True, make_room=room.make) as transaction:
            if layer_id not in transaction.snapshot.layers:
                return None
            refuse_if_used(transaction.snapshot, layer_id)
            if condition is not None:
                condition(transaction.snapshot)
            try:
                if trash is None:
                    transaction.update_layer(layer_id, _flag_removal)
                images = transaction.drop_mapped_layer(layer_id)
                _take_out(store_ctx, transaction, after, layer_id, trash, name, room, images)
            except BaseException:
                if trash is not None and layer_id in transaction.snapshot.layers:
                    # Its name tells the next run which removal to complete.
                    after.pop_all()
                    store.staging.leave(trash)
                raise
    return transaction.seconds_held


def _flag_removal(raw: Raw) -> None:
    raw["flags"] = {**(raw.get("flags") or {}), REMOVAL_FLAG: True}


def _take_out(
    store_ctx: OpenStore,
    transaction: Transaction,
    after: contextlib.ExitStack,
    layer_id: str,
    trash: t.Optional[str],
    name: str,
    room: Room,
    images: t.Sequence[str],
) -> None:
    """The steps of a removal after the layer was removed from the images."""
    driver = store_ctx.driver
    try:
        transaction.mark_incomplete(layer_id)
    except NoSpace:
        # Restored, instead of a complete layer that no image lists.
        with contextlib.suppress(StorageError):
            for image_id in images:
                transaction.append_mapped_layer(image_id, layer_id)
        raise
    if trash is None:
        driver.thin(layer_id, room.enough)
        trash = _trash(store_ctx, after, name)
    if trash is not None and not _detached(store_ctx, layer_id, trash):
        trash = None
    if trash is None:
        driver.erase(layer_id)
    transaction.remove_layer(layer_id, trash)
    remove_placeholder(store_ctx, [layer_id])


def _trash(store_ctx: OpenStore, after: contextlib.ExitStack, name: str) -> t.Optional[str]:
    """Context manager: a folder for removed files, deleted at the end; None on a full disk."""
    found = store_ctx.store.trash_if_room(name)
    if found is not None:
        after.callback(store_ctx.store.staging.discard, found, store_ctx.destroy)
    return found


def _detached(store_ctx: OpenStore, layer_id: str, trash: str) -> bool:
    """Move a layer's data to the trash; false on a full disk."""
    try:
        store_ctx.driver.detach(layer_id, trash)
    except NoSpace:
        store_ctx.driver.thin(layer_id, Room(store_ctx).enough)
        try:
            store_ctx.driver.detach(layer_id, trash)
        except NoSpace:
            return False
    return True


def remove_placeholder(store_ctx: OpenStore, layer_ids: t.Iterable[str]) -> None:
    """Remove the placeholders of layers whose records were just removed, before another program creates
    layers with these IDs. Called under the locks; the next sweep removes the rest.
    """
    with contextlib.suppress(StorageError, OSError):
        for layer_id in layer_ids:
            store_ctx.driver.remove_placeholder(layer_id)


class Room:
    """Frees space on a full disk for two files of records, if there is no reserve.

    First leftovers of killed runs are deleted. Then tar-split files are shared: that of a mapped layer equals its
    template's byte for byte, so that a hard link can replace it without loss.
    """

    def __init__(self, store_ctx: OpenStore) -> None:
        self._store_ctx = store_ctx
        self._sources: t.Optional[t.Iterator[bool]] = None

    def make(self) -> bool:
        """Free some space; called under the store's locks. Returns whether that was possible."""
        if self._sources is None:
            self._sources = self._all()
        return any(self._sources)

    def enough(self) -> bool:
        """Whether there is enough space to continue normally."""
        give_back(self._store_ctx.store.layers_dir)
        return self._store_ctx.store.reserve.has_room()

    def _all(self) -> t.Iterator[bool]:
        store = self._store_ctx.store
        with contextlib.suppress(StorageError):
            yield bool(store.staging.sweep(None, may_be_needed))
        with contextlib.suppress(StorageError):
            yield bool(store.staging.give_up_suspended())
        snapshot = store.view()
        for image in snapshot.images.values():
            template = store.tar_split_path(image.layer)
            for layer_id in image.mapped_layers:
                if layer_id in snapshot.layers and not image.store:
                    yield store.reserve.share(template, store.tar_split_path(layer_id))


class BegunRemoval(t.NamedTuple):
    """A removal that a killed run of this collection started.

    :ivar path: its folder in the trash
    :ivar since: its start, seconds since the epoch
    :ivar marks: the marks of its layers, see :func:`mark_of`
    :ivar ids: the IDs of these layers and of the image
    :ivar image_id: the ID of the image that is removed with them, or ""
    :ivar boot: the boot in which it started, or ""
    """

    path: str
    since: float
    marks: t.FrozenSet[str]
    ids: t.FrozenSet[str] = frozenset()
    image_id: str = ""
    boot: str = ""


def mark_of(layer: Layer) -> str:
    """A mark of 16 hexadecimal digits that distinguishes a layer from all others, also from a later layer of the
    same ID.
    """
    text = f"{layer.id} {layer.raw.get('created')}"
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def begun_removals(store_ctx: OpenStore) -> t.List[BegunRemoval]:
    """The removals that killed runs started, read from their directories in the trash."""
    return [
        _begun(leftover.path, leftover.modified)
        for leftover in store_ctx.store.leftovers()
        if leftover.kind == TRASH
    ]


def begun_ids(store_ctx: OpenStore) -> t.Set[str]:
    """The IDs of all layers and images of such removals."""
    return {identifier for begun in begun_removals(store_ctx) for identifier in begun.ids}


def _begun(path: str, since: float) -> BegunRemoval:
    first, _dash, rest = os.path.basename(path).partition("-")
    mark = rest.partition("-")[0]
    own = first if _ID.fullmatch(first) else ""
    ids = {own} if own else set()
    note = _read_note(path)
    if note is None:
        marks = [mark] if "-" in rest and _MARK.fullmatch(mark) else []
        return BegunRemoval(path, since, frozenset(marks), frozenset(ids))
    boot, layers = note
    return BegunRemoval(
        path, since, frozenset(layers.values()), frozenset(ids.union(layers)), own, boot
    )


def note_removal(trash: str, layers: t.Iterable[Layer]) -> None:
    """Record in a trash directory which layers are removed with an image, for the run that may have to complete it.

    :raises StorageError: it cannot be written
    """
    path = os.path.join(trash, _NOTE)
    content = {"boot": clock.now().boot, "layers": {layer.id: mark_of(layer) for layer in layers}}
    with translate_oserror(path), open(path, "x", encoding="ascii") as stream:
        json.dump(content, stream)
        stream.flush()
        os.fsync(stream.fileno())


def has_note(trash: str) -> bool:
    """Whether a folder of the trash contains such a note."""
    return os.path.lexists(os.path.join(trash, _NOTE))


def may_be_needed(path: str) -> bool:
    """Whether a folder of the trash may still be needed to complete a removal."""
    begun = _begun(path, 0)
    return bool(begun.marks or begun.image_id)


def _read_note(trash: str) -> t.Optional[t.Tuple[str, t.Dict[str, str]]]:
    """The boot of a note, and the marks of its layers by ID; None if there is none."""
    try:
        data = files.read_regular(os.path.join(trash, _NOTE), _LONGEST)
        content = json.loads(data.decode("ascii"))
        boot, layers = content["boot"], content["layers"]
        if not isinstance(boot, str) or not isinstance(layers, dict):
            return None
        return boot, {
            layer_id: mark
            for layer_id, mark in layers.items()
            if _ID.fullmatch(layer_id) and isinstance(mark, str) and _MARK.fullmatch(mark)
        }
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
