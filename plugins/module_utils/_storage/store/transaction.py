# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Change records while the locks of a store are held."""

from __future__ import annotations

import copy
import errno
import os
import time
import typing as t

from ..errors import (
    InternalError,
    LayerInUse,
    ReadOnlyStore,
    StoreError,
)
from ..kernel.oserrors import translate_oserror
from .fields import Change, Raw
from .record_files import RecordFile, StoreFiles, sync_directory
from .records import (
    Image,
    Layer,
    R,
    Record,
    changed,
    new_record,
)
from .removal import remove_tree
from .reserve import FULL
from .snapshot import Snapshot

if t.TYPE_CHECKING:
    from .store import Store


class Transaction:
    """The changes that are possible while the store's locks are held; see ``Store.transaction``."""

    def __init__(
        self,
        store: Store,
        files: StoreFiles,
        started: float,
        make_room: t.Optional[t.Callable[[], bool]] = None,
    ) -> None:
        self._store = store
        self._files = files
        self._started = started
        self._make_room = make_room
        self._ended: t.Optional[float] = None

    @property
    def snapshot(self) -> Snapshot:
        """All current records, including the changes of this transaction."""
        return self._store.view()

    @property
    def seconds_held(self) -> float:
        """Seconds from the first lock taken to the last lock released."""
        return (self._ended or time.monotonic()) - self._started

    def end(self) -> None:
        """Record that the locks were released."""
        self._ended = time.monotonic()

    # Layers

    def begin_layer(self, record: Raw) -> Layer:
        """Add an incomplete layer; runtimes delete it if it is not completed.

        :param record: the layer's fields as in JSON
        :raises StoreError: the ID or a name is taken, or the parent is unknown
        :raises RecordError: a field is of a wrong type
        """
        raw = dict(record)
        raw["flags"] = {**(raw.get("flags") or {}), "incomplete": True}
        file = self._files.layers[0]
        layer = new_record(Layer, raw, file.path)
        known = self.snapshot.layers
        if layer.id in known:
            raise StoreError(f"layer {layer.id}", "exists already", layer=layer.id)
        if layer.parent and layer.parent not in known:
            raise StoreError(f"layer {layer.id}", f"has parent {layer.parent}, which has no record")
        if layer.names:
            taken = {name for item in known.values() for name in item.names}
            for name in taken.intersection(layer.names):
                raise StoreError(f"layer {layer.id}", f"has the name {name!r} of another layer")
        self._write(file, [*file.records, layer])
        return layer

    def install_tar_split(self, layer_id: str, staged_path: str) -> None:
        """Move a staged tar-split file to its final path; it is durable when this returns."""
        self._own_layer(layer_id)
        with translate_oserror(self._store.config.graphroot):
            descriptor = os.open(staged_path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                os.fchmod(descriptor, 0o600)
                os.fdatasync(descriptor)
            finally:
                os.close(descriptor)
            os.rename(staged_path, self._store.tar_split_path(layer_id))
            sync_directory(self._store.layers_dir)

    def finish_layer(self, layer_id: str) -> Layer:
        """Mark a layer as complete."""

        def complete(raw: Raw) -> None:
            flags = raw.get("flags") or {}
            flags.pop("incomplete", None)
            if not flags:
                raw.pop("flags", None)

        return self.update_layer(layer_id, complete)

    def mark_incomplete(self, *layer_ids: str) -> None:
        """Mark layers as incomplete, all at once. If this process is killed, the next runtime deletes them."""

        def give_up(raw: Raw) -> None:
            raw["flags"] = {**(raw.get("flags") or {}), "incomplete": True}

        layers = [self._own_layer(layer_id) for layer_id in layer_ids]
        self._update(self._files.layers, [(layer, give_up) for layer in layers])

    def update_layer(self, layer_id: str, change: Change) -> Layer:
        """Change a layer's record in its file; nothing is written if nothing changes.

        :param change: modifies the given copy of the dictionary
        :raises StoreError: there is no such layer
        :raises ReadOnlyStore: it is in an additional store
        :raises RecordError: the change makes it malformed
        """
        return self.update_layers({layer_id: change})[0]

    def update_layers(self, changes: t.Mapping[str, Change]) -> t.List[Layer]:
        """Change the records of several layers by ID, all at once in each file; as ``update_layer``."""
        pairs = [(self._own_layer(layer_id), change) for layer_id, change in changes.items()]
        return self._update(self._files.layers, pairs)

    def remove_layers(self, layer_ids: t.Sequence[str], trash: t.Optional[str]) -> None:
        """Remove the records of layers, all at once, and move their tar-split files and big data to ``trash``.

        The layers are marked incomplete first, so that the next runtime completes the removal after a kill.

        :param trash: an existing directory on the store's filesystem; None to delete at once, on a full disk
        :raises LayerInUse: other layers, images or containers depend on a layer
        """
        layers = [self._own_layer(item) for item in layer_ids]
        for layer in layers:
            self._refuse_if_used(layer.id, layer_ids)
        if not all(layer.incomplete for layer in layers):
            self.mark_incomplete(*layer_ids)
        with translate_oserror(self._store.config.graphroot):
            for layer_id in layer_ids:
                _put_aside(self._store.tar_split_path(layer_id), trash)
                _put_aside(self._store.layer_data_dir(layer_id), trash, f"{layer_id}.data")
        going = set(layer_ids)
        for file in self._files.layers:
            if file.read_only_store is None and any(record.id in going for record in file.records):
                self._write(file, [record for record in file.records if record.id not in going])

    def remove_layer(self, layer_id: str, trash: t.Optional[str]) -> None:
        """The same for a single layer."""
        self.remove_layers([layer_id], trash)

    def _refuse_if_used(self, layer_id: str, going: t.Collection[str]) -> None:
        snapshot = self.snapshot
        layers = [child.id for child in snapshot.children(layer_id) if child.id not in going]
        images = [item.id for item in snapshot.images_of_layer(layer_id)]
        containers = [item.id for item in snapshot.containers_on(layer_id)]
        if layers or images or containers:
            holders = [
                f"{what} {', '.join(identifier[:12] for identifier in ids[:5])}"
                for what, ids in (
                    ("container", containers),
                    ("image", images),
                    ("layer", layers),
                )
                if ids
            ]
            raise LayerInUse(
                f"layer {layer_id}",
                f"is used by {' and '.join(holders)}",
                "Remove the items that use it first.",
                layer=layer_id,
                containers=containers,
                images=images,
                layers=layers,
            )

    # Images

    def append_mapped_layer(self, image_id: str, layer_id: str) -> Image:
        """Append a layer to an image's ``mapped-layers``."""
        self._own_layer(layer_id)

        def append(raw: Raw) -> None:
            mapped = list(raw.get("mapped-layers") or ())
            if layer_id not in mapped:
                raw["mapped-layers"] = [*mapped, layer_id]

        return self.update_image(image_id, append)

    def drop_mapped_layer(self, layer_id: str) -> t.List[str]:
        """Remove an ID from every image's ``mapped-layers``, whether such a layer exists or not.

        :returns: the IDs of the images that listed it
        """

        def drop(raw: Raw) -> None:
            raw["mapped-layers"] = [item for item in raw["mapped-layers"] if item != layer_id]
            if not raw["mapped-layers"]:
                del raw["mapped-layers"]

        holders = [
            (image, drop)
            for file in self._files.images
            if file.read_only_store is None
            for image in file.records
            if layer_id in image.mapped_layers
        ]
        return [image.id for image in self._update(self._files.images, holders)]

    def update_image(self, image_id: str, change: Change) -> Image:
        """Change an image's record; as ``update_layer``."""
        return self.update_images({image_id: change})[0]

    def update_images(self, changes: t.Mapping[str, Change]) -> t.List[Image]:
        """Change the records of several images by ID, all at once in each file; as ``update_layer``."""
        pairs = [(self._own_image(image_id), change) for image_id, change in changes.items()]
        return self._update(self._files.images, pairs)

    def save_images(self) -> t.Callable[[], None]:
        """Save the current records of all images.

        :returns: a function that restores them within this transaction, if they changed
        """
        saved = [(file, file.records) for file in self._files.images if not file.read_only_store]

        def restore() -> None:
            for file, records in saved:
                if file.records is not records:
                    self._write(file, records)

        return restore

    def withdraw_images(self, image_ids: t.Collection[str]) -> None:
        """Remove the records of images, all at once in each file; their big data is kept.

        :raises StoreError: there is no such image
        :raises ReadOnlyStore: it is in an additional store
        """
        paths = {self._own_image(image_id).path for image_id in image_ids}
        for file in self._files.images:
            if file.path in paths:
                self._write(file, [item for item in file.records if item.id not in image_ids])

    def remove_image(self, image_id: str, trash: str) -> None:
        """Remove an image's record and move its big data to ``trash``. Layers are not changed.

        :raises LayerInUse: containers use the image
        """
        image = self._own_image(image_id)
        containers = [item.id for item in self.snapshot.containers_of(image_id)]
        if containers:
            raise LayerInUse(
                f"image {image_id}",
                f"is used by container {', '.join(container[:12] for container in containers[:5])}",
                "Remove the containers first.",
                image=image_id,
                containers=containers,
            )
        data = self._store.image_data_dir(image_id)
        file = self._file(self._files.images, image)
        self._write(file, [record for record in file.records if record.id != image_id])
        with translate_oserror(self._store.config.graphroot):
            _move(data, trash, f"{image_id}.image")

    def remove_image_data(self, image_id: str, trash: str) -> None:
        """Move the remaining files of an image without a record to ``trash``."""
        if image_id not in self.snapshot.images:
            with translate_oserror(self._store.config.graphroot):
                _move(self._store.image_data_dir(image_id), trash, f"{image_id}.image")

    # Internals

    def _own_layer(self, layer_id: str) -> Layer:
        layer = self.snapshot.layer(layer_id)
        if layer.read_only_store is not None:
            raise _read_only(f"layer {layer_id}", layer.read_only_store)
        return layer

    def _own_image(self, image_id: str) -> Image:
        image = self.snapshot.images.get(image_id)
        if image is None:
            raise StoreError(f"image {image_id}", "is no longer in the store", image=image_id)
        if image.read_only_store is not None:
            raise _read_only(f"image {image_id}", image.read_only_store)
        return image

    def _file(self, files: t.Sequence[RecordFile[R]], record: Record) -> RecordFile[R]:
        for file in files:
            if file.path == record.path:
                return file
        raise StoreError(record.path, "is not a file of this store")

    def _update(
        self, files: t.Sequence[RecordFile[R]], changes: t.Sequence[t.Tuple[R, Change]]
    ) -> t.List[R]:
        results = []
        written: t.Dict[str, t.Dict[int, R]] = {}
        for record, change in changes:
            raw = copy.deepcopy(record.raw)
            change(raw)
            result = changed(record, raw)
            if result.id != record.id:
                raise StoreError(f"{record.kind[:-1]} {record.id}", "may not change its ID")
            if result.text != record.text and raw != record.raw:
                written.setdefault(self._file(files, record).path, {})[id(record)] = result
            results.append(result)
        for file in files:
            if file.path in written:
                new = written[file.path]
                self._write(file, [new.get(id(item), item) for item in file.records])
        return results

    def _write(self, file: RecordFile[R], records: t.List[R]) -> None:
        if self._ended is not None:
            raise InternalError(file.path, "would be written after the transaction")
        with translate_oserror(self._store.config.graphroot):
            try:
                file.write(records)
            except OSError as error:
                if error.errno not in FULL or self._make_room is None:
                    raise
                self._write_on_full_disk(file, records)

    def _write_on_full_disk(self, file: RecordFile[R], records: t.List[R]) -> None:
        """Overwrite a reserve file, or delete one to free space."""
        reserve = self._store.reserve
        while True:
            try:
                file.write(records, reserve)
                return
            except OSError as error:
                if error.errno not in FULL:
                    raise
                if not (reserve.release() or (self._make_room and self._make_room())):
                    raise


def _move(path: str, directory: str, name: str = "") -> None:
    """Move a file or folder to the trash; a missing path is ignored."""
    target = os.path.join(directory, name or os.path.basename(path))
    try:
        os.rename(path, target)
    except FileNotFoundError:
        if not os.path.isdir(directory):
            raise
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        remove_tree(path)


def _put_aside(path: str, trash: t.Optional[str], name: str = "") -> None:
    """Move a file or folder to the trash, or delete it if there is no trash folder."""
    if trash is None:
        remove_tree(path)
    else:
        _move(path, trash, name)


def _read_only(subject: str, path: str) -> ReadOnlyStore:
    return ReadOnlyStore(
        subject,
        f"is in the additional store {path}, which is never changed",
        "Pull or copy the image into the store itself first.",
        store=path,
    )
