# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This module util is PRIVATE to the userns.storage collection.
"""One store: its records read under shared locks, and changed in transactions.

Power loss and kills: every change writes the lock's token first, then a temporary file beside the
JSON, syncs its data, renames it over the JSON and syncs the directory before the next change
begins. So no record that refers to another one can be on disk without it.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import errno
import os
import re
import stat
import time
import typing as t
from dataclasses import dataclass

from ..errors import (
    InternalError,
    LayerInUse,
    ReadOnlyStore,
    RecordError,
    StoreError,
    StoreUnwritten,
    UnsupportedDriver,
)
from ..kernel.refusals import explained
from .config import StoreConfig
from .fields import Change, Raw
from .locks import LockFile
from .records import (
    CONTAINERS,
    IMAGES,
    IMAGESTORE,
    LAYERS,
    SIZE_LIMIT,
    STABLE,
    VOLATILE,
    Container,
    Image,
    Layer,
    R,
    Record,
    changed,
    new_record,
    parse,
    serialise,
)
from .removal import Destroy, remove_tree
from .snapshot import Snapshot
from .staging import Leftover, StagingArea

OWN_FOLDER = "userns-storage"

# Folder names of the drivers of containers/storage, past ones too.
KNOWN_DRIVERS = ("overlay", "vfs", "btrfs", "zfs", "overlay2", "aufs", "devicemapper")

# Parsing more than this (bytes) is worth letting the locks go for, this many times.
_MUCH = 1024 * 1024
_RETRIES = 2

_FileKey = t.Tuple[bytes, int, int, int]
_ABSENT: _FileKey = (b"", 0, 0, 0)


class _Area:
    """One lock and the directory it stands for."""

    def __init__(
        self, directory: str, lock_name: str, read_only: bool = False, creates: bool = False
    ) -> None:
        self.directory = directory
        self.read_only = read_only
        self.creates = creates
        self.lock = LockFile(os.path.join(directory, lock_name), read_only)

    def enter(self, stack: contextlib.ExitStack, deadline: float, exclusive: bool) -> bool:
        """Take the lock until the stack ends; False when there is no lock file to take."""
        left = max(deadline - time.monotonic(), 0)
        try:
            if exclusive and self.creates:
                self.lock.create()
            if exclusive:
                stack.enter_context(self.lock.exclusive(left))
            else:
                stack.enter_context(self.lock.shared(left))
        except FileNotFoundError:
            if exclusive and self.creates:
                raise
            return False
        return True


class _File(t.Generic[R]):
    """One JSON file with what was last read from it."""

    def __init__(
        self,
        area: _Area,
        path: str,
        kind: t.Type[R],
        location: str = STABLE,
        read_only_store: t.Optional[str] = None,
    ) -> None:
        self.area = area
        self.path = path
        self.kind = kind
        self.location = location
        self.read_only_store = read_only_store
        self.records: t.List[R] = []
        self.generation = 0
        self._key: t.Optional[_FileKey] = None
        self._fresh: t.Optional[bytes] = None
        self._fresh_key: _FileKey = _ABSENT

    @property
    def temporary(self) -> str:
        """Only the holder of the lock writes it, so that a name of our own cannot clash."""
        directory, name = os.path.split(self.path)
        return os.path.join(directory, f".tmp-{name}{OWN_FOLDER}")

    def load(self) -> int:
        """Read the file if it may have changed, under the lock; the number of bytes read."""
        token = self.area.lock.token() if self.area.lock.held else b""
        try:
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            descriptor = os.open(self.path, flags)
        except FileNotFoundError:
            if self._key != _ABSENT:
                self.records, self._key, self._fresh = [], _ABSENT, None
                self.generation += 1
            return 0
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise RecordError(self.path, "is not a regular file", "Move it away.")
            if found.st_size > SIZE_LIMIT:
                raise RecordError(self.path, f"is larger than {SIZE_LIMIT} bytes")
            key = (token, found.st_ino, found.st_mtime_ns, found.st_size)
            if key == self._key and token:
                return 0
            self._key = None
            pieces = []
            while True:
                piece = os.read(descriptor, max(found.st_size + 1, 65536))
                if not piece:
                    break
                pieces.append(piece)
        finally:
            os.close(descriptor)
        self._fresh = b"".join(pieces)
        self._fresh_key = key
        return len(self._fresh)

    def parse(self) -> None:
        """Parse what ``load`` has read, if anything; needs no lock."""
        if self._fresh is None:
            return
        data, self._fresh = self._fresh, None
        self.records = parse(data, self.kind, self.path, self.location, self.read_only_store)
        self._key = self._fresh_key
        self.generation += 1

    def write(self, records: t.List[R]) -> None:
        """Replace the file, under the exclusive lock: token, data, rename, directory."""
        self._key = None
        directory, temporary = os.path.dirname(self.path), self.temporary
        data = serialise(records)
        token = self.area.lock.touch()
        discard(temporary)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(temporary, flags, 0o600)
        try:
            try:
                os.fchmod(descriptor, 0o600)
                view = memoryview(data)
                while view:
                    view = view[os.write(descriptor, view) :]
                os.fdatasync(descriptor)
                found = os.fstat(descriptor)
            finally:
                os.close(descriptor)
            os.rename(temporary, self.path)
        except BaseException as error:
            if isinstance(error, OSError) and error.filename is None:
                error.filename = self.path
            discard(temporary)
            raise
        # Others see it from here on, whatever becomes of the directory.
        self.records = records
        self.generation += 1
        self._key = (token, found.st_ino, found.st_mtime_ns, found.st_size)
        sync_directory(directory)

    def discard_leftovers(self) -> None:
        """Remove what a killed writer of ours left, under the exclusive lock."""
        discard(self.temporary)


@dataclass
class _Files:
    """The store's files in the order in which their records count, and their locks' order."""

    areas: t.Dict[str, t.List[_Area]]
    layers: t.List[_File[Layer]]
    images: t.List[_File[Image]]
    containers: t.List[_File[Container]]


class Store:
    """A store that a runtime has written, as its configuration describes it.

    :param lock_timeout: seconds to wait for the store's locks
    """

    def __init__(self, config: StoreConfig, lock_timeout: float = 60.0) -> None:
        self.config = config
        self.lock_timeout = lock_timeout
        self._files = self._layout()
        self._snapshot: t.Optional[Snapshot] = None
        self._seen: t.Tuple[int, ...] = ()
        self._staging: t.Optional[StagingArea] = None

    @classmethod
    def open(cls, config: StoreConfig, lock_timeout: float = 60.0) -> Store:
        """The store, after a look at whether it is one. Creates nothing.

        :raises StoreError: nobody has written it yet, or another driver has
        :raises PermissionDenied: it cannot be read
        """
        store = cls(config, lock_timeout)
        with explained(config.graphroot):
            store._check()
        return store

    # Where things are

    @property
    def root(self) -> str:
        """The folder that holds all that is ours: staging, trash and the ledger."""
        return os.path.join(self.config.graphroot, OWN_FOLDER)

    @property
    def staging(self) -> StagingArea:
        """Our own folder of the store: staging and trash; always the same object."""
        if self._staging is None:
            self._staging = StagingArea(self.root, self.lock_timeout)
        return self._staging

    @contextlib.contextmanager
    def trash(self, name: str, destroy: t.Optional[Destroy] = None) -> t.Iterator[str]:
        """A folder to move things into under the locks; deleted at the end, outside of them.

        :param name: what it is for, a plain word or an ID
        :param destroy: see ``removal.remove_tree``
        :raises StoreError: something in it cannot be deleted; the next sweep tries again
        """
        with explained(self.config.graphroot):
            path = self.staging.trash(name)
        try:
            yield path
        finally:
            self.staging.discard(path, destroy)

    def leftovers(self) -> t.List[Leftover]:
        """What killed runs of this collection have left and ``sweep`` would delete. Writes nothing.

        :raises PermissionDenied: our folder cannot be read
        """
        with explained(self.config.graphroot):
            found = self.staging.leftovers()
            for path in self._temporary_files():
                with contextlib.suppress(FileNotFoundError):
                    found.append(Leftover("records", path, os.lstat(path).st_mtime))
            return found

    def sweep(self, destroy: t.Optional[Destroy] = None) -> t.List[str]:
        """Delete what killed runs of this collection have left; live work is left alone.

        :param destroy: see ``removal.remove_tree``
        :returns: the paths that were deleted
        :raises StoreError: something cannot be deleted; everything else has been
        """
        with explained(self.config.graphroot):
            temporary = self._temporary_files()
            if temporary and not self.config.imagestore:
                # Under the locks whoever writes such a file is dead.
                with self.transaction(containers=True):
                    pass
            removed = [path for path in temporary if not os.path.lexists(path)]
            return removed + self.staging.sweep(destroy)

    def _temporary_files(self) -> t.List[str]:
        files = [file for file in self._all_files() if file.read_only_store is None]
        return [file.temporary for file in files if os.path.lexists(file.temporary)]

    def _folder(self, base: str, kind: str) -> str:
        return os.path.join(base, f"{self.config.driver}-{kind}")

    @property
    def layers_dir(self) -> str:
        """The folder of layers.json and of the layers' tar-split files."""
        return self._folder(self.config.graphroot, LAYERS)

    def tar_split_path(self, layer_id: str) -> str:
        """The gzipped tar-split stream of a layer; it may not exist."""
        return os.path.join(self.layers_dir, f"{layer_id}.tar-split.gz")

    def layer_data_dir(self, layer_id: str) -> str:
        """The folder of a layer's big data; it may not exist."""
        return os.path.join(self.layers_dir, layer_id)

    def image_data_dir(self, image_id: str) -> str:
        """The folder of an image's big data; it may not exist."""
        base = self.config.graphroot
        for file in self._files.images:
            if any(image.id == image_id for image in file.records):
                return os.path.join(os.path.dirname(file.path), image_id)
        return os.path.join(self._folder(base, IMAGES), image_id)

    def image_data_path(self, image_id: str, key: str) -> str:
        """The file of one piece of an image's big data; it may not exist.

        A key of other characters than [a-z0-9.] is stored under its base64, behind an equals sign.
        """
        plain = re.fullmatch(r"[a-z0-9.]+", key)
        name = key if plain else "=" + base64.b64encode(key.encode()).decode()
        return os.path.join(self.image_data_dir(image_id), name)

    def _layout(self) -> _Files:
        config = self.config
        graph, run, image_store = config.graphroot, config.runroot, config.imagestore
        layers: t.List[_File[Layer]] = []
        images: t.List[_File[Image]] = []
        containers: t.List[_File[Container]] = []

        main = _Area(self._folder(graph, LAYERS), "layers.lock", creates=True)
        layer_areas = [main]
        layers.append(_File(main, os.path.join(main.directory, "layers.json"), Layer))
        if image_store:
            area = _Area(self._folder(image_store, LAYERS), "layers.lock")
            layer_areas.append(area)
            path = os.path.join(area.directory, "layers.json")
            layers.append(_File(area, path, Layer, IMAGESTORE))
        # Another podman may use the same store as a transient one, or as a lasting one.
        for base in (run, graph) if config.transient else (graph, run):
            path = os.path.join(self._folder(base, LAYERS), "volatile-layers.json")
            layers.append(_File(main, path, Layer, VOLATILE))

        image_areas: t.List[_Area] = []
        for base, location in (
            ((image_store, IMAGESTORE), (graph, STABLE)) if image_store else ((graph, STABLE),)
        ):
            area = _Area(self._folder(base, IMAGES), "images.lock", creates=not image_areas)
            image_areas.append(area)
            path = os.path.join(area.directory, "images.json")
            images.append(_File(area, path, Image, location))

        for extra in config.additional_image_stores:
            area = _Area(self._folder(extra, LAYERS), "layers.lock", read_only=True)
            layer_areas.append(area)
            for name, location in (("layers.json", STABLE), ("volatile-layers.json", VOLATILE)):
                path = os.path.join(area.directory, name)
                layers.append(_File(area, path, Layer, location, extra))
            area = _Area(self._folder(extra, IMAGES), "images.lock", read_only=True)
            image_areas.append(area)
            path = os.path.join(area.directory, "images.json")
            images.append(_File(area, path, Image, STABLE, extra))

        container_areas: t.List[_Area] = []
        for base in (run, graph) if config.transient else (graph, run):
            area = _Area(
                self._folder(base, CONTAINERS), "containers.lock", creates=not container_areas
            )
            container_areas.append(area)
            for name, location in (
                ("containers.json", STABLE),
                ("volatile-containers.json", VOLATILE),
            ):
                path = os.path.join(area.directory, name)
                containers.append(_File(area, path, Container, location))

        areas = {LAYERS: layer_areas, IMAGES: image_areas, CONTAINERS: container_areas}
        return _Files(areas, layers, images, containers)

    def _check(self) -> None:
        config = self.config
        if not config.driver.isalnum():
            raise StoreError(f"driver {config.driver!r}", "is no driver's name")
        try:
            entries = {entry.name for entry in os.scandir(config.graphroot) if _is_dir(entry)}
        except FileNotFoundError:
            raise self._unwritten() from None
        except NotADirectoryError:
            raise StoreError(
                config.graphroot, "is not a directory", "Correct `graphroot`."
            ) from None
        if f"{config.driver}-{LAYERS}" in entries or f"{config.driver}-{IMAGES}" in entries:
            os.stat(os.path.join(self._folder(config.graphroot, LAYERS), "."))
            return
        others = [
            name
            for name in KNOWN_DRIVERS
            if f"{name}-{LAYERS}" in entries or f"{name}-{IMAGES}" in entries
        ]
        if others:
            raise StoreError(
                config.graphroot,
                f"belongs to driver {' and '.join(others)}, not to {config.driver}: "
                f"it holds {', '.join(f'{name}-{LAYERS}' for name in others)}",
                f"Set `driver: {others[0]}`, or another `graphroot`.",
                drivers=others,
            )
        raise self._unwritten()

    def _unwritten(self) -> StoreUnwritten:
        config = self.config
        return StoreUnwritten(
            config.graphroot,
            f"is no store of driver {config.driver} yet, no runtime has written it",
            f"Run `podman --root {config.graphroot} --runroot {config.runroot} "
            f"--storage-driver {config.driver} info` once, or correct `graphroot`.",
            driver=config.driver,
            graphroot=config.graphroot,
            runroot=config.runroot,
        )

    # Reading

    def snapshot(self) -> Snapshot:
        """All records, from under shared locks that are held while bytes are read. Writes nothing.

        :raises LockTimeout: a writer held a lock for longer than ``lock_timeout``
        :raises RecordError: a file of records cannot be understood
        :raises PermissionDenied: a file cannot be read
        """
        with explained(self.config.graphroot):
            deadline = time.monotonic() + self.lock_timeout
            with contextlib.ExitStack() as stack:
                for kind in (LAYERS, IMAGES, CONTAINERS):
                    for area in self._files.areas[kind]:
                        area.enter(stack, deadline, False)
                self._load()
            return self.view()

    def _all_files(self) -> t.Iterator[_File[t.Any]]:
        yield from self._files.layers
        yield from self._files.images
        yield from self._files.containers

    def _load(self) -> int:
        return sum(file.load() for file in self._all_files())

    def view(self) -> Snapshot:
        """What has been read or written last, without a look at the disk."""
        for file in self._all_files():
            file.parse()
        seen = tuple(file.generation for file in self._all_files())
        if self._snapshot is None or seen != self._seen:
            self._snapshot = Snapshot(
                _first(self._files.layers),
                _first(self._files.images),
                _first(self._files.containers),
            )
            self._seen = seen
        return self._snapshot

    # Writing

    @contextlib.contextmanager
    def transaction(self, containers: bool = False) -> t.Iterator[Transaction]:
        """Hold layers and images exclusively, containers too if asked for, and change them.

        Each method of the transaction is on disk when it returns. An exception leaves what has
        been done so far; it is always a state that runtimes take.

        :raises LockTimeout: a lock stayed taken for longer than ``lock_timeout``
        :raises UnsupportedDriver: the store keeps its images in an ``imagestore``
        """
        if self.config.imagestore:
            raise UnsupportedDriver(
                self.config.graphroot,
                f"keeps its images apart in imagestore {self.config.imagestore}, "
                "and such a store is only read here",
                "Work on the image store as a store of its own, or drop `imagestore`.",
            )
        with explained(self.config.graphroot):
            locks, started = self._take(containers)
        transaction = Transaction(self, self._files, started)
        try:
            with locks:
                yield transaction
        finally:
            transaction.end()

    def _take(self, containers: bool) -> t.Tuple[contextlib.ExitStack, float]:
        """Take the locks with all records up to date; with the moment of the first one."""
        self.snapshot()
        deadline = time.monotonic() + self.lock_timeout
        for attempt in range(_RETRIES + 1):
            started = 0.0
            with contextlib.ExitStack() as written, contextlib.ExitStack() as only_read:
                for kind in (LAYERS, IMAGES, CONTAINERS):
                    for area in self._files.areas[kind]:
                        write = not area.read_only and (kind != CONTAINERS or containers)
                        if kind == CONTAINERS and not os.path.isdir(area.directory):
                            continue
                        area.enter(written if write else only_read, deadline, write)
                        started = started or time.monotonic()
                read = self._load()
                only_read.close()
                if read <= _MUCH or attempt == _RETRIES:
                    self.view()
                    for file in self._all_files():
                        if file.area.lock.held:
                            file.discard_leftovers()
                    return written.pop_all(), started
            self.view()
        raise StoreError(self.config.graphroot, "changes faster than it can be read")


class Transaction:
    """What may be done while the store's locks are held; see ``Store.transaction``."""

    def __init__(self, store: Store, files: _Files, started: float) -> None:
        self._store = store
        self._files = files
        self._started = started
        self._ended: t.Optional[float] = None

    @property
    def snapshot(self) -> Snapshot:
        """All records as they are now, with what this transaction has changed."""
        return self._store.view()

    @property
    def seconds_held(self) -> float:
        """Seconds since the first lock was taken, until the last was given back."""
        return (self._ended or time.monotonic()) - self._started

    def end(self) -> None:
        """Note that the locks have been given back."""
        self._ended = time.monotonic()

    # Layers

    def begin_layer(self, record: Raw) -> Layer:
        """Add a layer that is not complete yet; runtimes delete it if it stays so.

        :param record: the layer's fields as JSON has them
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
            taken = {name for one in known.values() for name in one.names}
            for name in taken.intersection(layer.names):
                raise StoreError(f"layer {layer.id}", f"has the name {name!r} of another one")
        self._write(file, [*file.records, layer])
        return layer

    def install_tar_split(self, layer_id: str, staged_path: str) -> None:
        """Move a staged tar-split file to its place; it is durable when this returns."""
        self._own_layer(layer_id)
        with explained(self._store.config.graphroot):
            descriptor = os.open(staged_path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                os.fchmod(descriptor, 0o600)
                os.fdatasync(descriptor)
            finally:
                os.close(descriptor)
            os.rename(staged_path, self._store.tar_split_path(layer_id))
            sync_directory(self._store.layers_dir)

    def finish_layer(self, layer_id: str) -> Layer:
        """Declare a layer complete."""

        def complete(raw: Raw) -> None:
            flags = raw.get("flags") or {}
            flags.pop("incomplete", None)
            if not flags:
                raw.pop("flags", None)

        return self.update_layer(layer_id, complete)

    def mark_incomplete(self, layer_id: str) -> Layer:
        """Give a layer up: if this process dies now, the next runtime deletes the rest of it."""

        def give_up(raw: Raw) -> None:
            raw["flags"] = {**(raw.get("flags") or {}), "incomplete": True}

        return self.update_layer(layer_id, give_up)

    def update_layer(self, layer_id: str, change: Change) -> Layer:
        """Change a layer's record in the file it came from; nothing is written if nothing changes.

        :param change: changes the dictionary it is given, a copy
        :raises StoreError: there is no such layer
        :raises ReadOnlyStore: it lives in an additional store
        :raises RecordError: the change makes it malformed
        """
        return self._update(self._files.layers, [(self._own_layer(layer_id), change)])[0]

    def remove_layer(self, layer_id: str, trash: str) -> None:
        """Take a layer's record away; its tar-split file and big data go into ``trash``.

        The layer is marked incomplete first, so that a kill in between leaves nothing half known.

        :param trash: an existing directory on the store's filesystem
        :raises LayerInUse: layers, images or containers still rest on it
        """
        layer = self._own_layer(layer_id)
        snapshot = self.snapshot
        layers = [one.id for one in snapshot.children(layer_id)]
        images = [one.id for one in snapshot.images_of_layer(layer_id)]
        containers = [one.id for one in snapshot.containers_on(layer_id)]
        if layers or images or containers:
            holders = [
                f"{what} {', '.join(one[:12] for one in ids[:5])}"
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
                "Remove what uses it first.",
                layer=layer_id,
                containers=containers,
                images=images,
                layers=layers,
            )
        if not layer.incomplete:
            layer = self.mark_incomplete(layer_id)
        with explained(self._store.config.graphroot):
            _move(self._store.tar_split_path(layer_id), trash)
            _move(self._store.layer_data_dir(layer_id), trash, f"{layer_id}.data")
        file = self._file(self._files.layers, layer)
        self._write(file, [one for one in file.records if one.id != layer_id])

    # Images

    def append_mapped_layer(self, image_id: str, layer_id: str) -> Image:
        """Enter a layer at the end of an image's ``mapped-layers``."""
        self._own_layer(layer_id)

        def append(raw: Raw) -> None:
            mapped = list(raw.get("mapped-layers") or ())
            if layer_id not in mapped:
                raw["mapped-layers"] = [*mapped, layer_id]

        return self.update_image(image_id, append)

    def drop_mapped_layer(self, layer_id: str) -> t.List[str]:
        """Take an ID out of every image's ``mapped-layers``, whether such a layer exists or not.

        :returns: the IDs of the images that had it
        """

        def drop(raw: Raw) -> None:
            raw["mapped-layers"] = [one for one in raw["mapped-layers"] if one != layer_id]
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

    def remove_image(self, image_id: str, trash: str) -> None:
        """Take an image's record away, its big data goes into ``trash``; layers are left alone.

        :raises LayerInUse: containers still name the image
        """
        image = self._own_image(image_id)
        containers = [one.id for one in self.snapshot.containers_of(image_id)]
        if containers:
            raise LayerInUse(
                f"image {image_id}",
                f"is used by container {', '.join(one[:12] for one in containers[:5])}",
                "Remove the containers first.",
                image=image_id,
                containers=containers,
            )
        data = self._store.image_data_dir(image_id)
        file = self._file(self._files.images, image)
        self._write(file, [one for one in file.records if one.id != image_id])
        with explained(self._store.config.graphroot):
            _move(data, trash, f"{image_id}.image")

    def remove_image_data(self, image_id: str, trash: str) -> None:
        """Put what is left of an image that has no record any more into ``trash``."""
        if image_id not in self.snapshot.images:
            with explained(self._store.config.graphroot):
                _move(self._store.image_data_dir(image_id), trash, f"{image_id}.image")

    # Inside

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

    def _file(self, files: t.Sequence[_File[R]], record: Record) -> _File[R]:
        for file in files:
            if file.path == record.path:
                return file
        raise StoreError(record.path, "is no file of this store")

    def _update(
        self, files: t.Sequence[_File[R]], changes: t.Sequence[t.Tuple[R, Change]]
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
                self._write(file, [new.get(id(one), one) for one in file.records])
        return results

    def _write(self, file: _File[R], records: t.List[R]) -> None:
        if self._ended is not None:
            raise InternalError(file.path, "is to be written after the transaction")
        with explained(self._store.config.graphroot):
            file.write(records)


def _first(files: t.Iterable[_File[R]]) -> t.Dict[str, R]:
    result: t.Dict[str, R] = {}
    for file in files:
        for record in file.records:
            result.setdefault(record.id, record)
    return result


def _is_dir(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False)


def _move(path: str, directory: str, name: str = "") -> None:
    """Put a file or folder aside; one that is not there is no loss."""
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


def _read_only(subject: str, path: str) -> ReadOnlyStore:
    return ReadOnlyStore(
        subject,
        f"lives in the additional store {path}, which is never written",
        "Pull or copy the image into the store itself first.",
        store=path,
    )


def discard(path: str) -> None:
    """Remove a file that may not be there."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def sync_directory(path: str) -> None:
    """Make renames in a directory durable, where the filesystem can."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
