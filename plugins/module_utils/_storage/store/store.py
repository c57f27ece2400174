# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""One store: its records read under shared locks, and changed in transactions."""

from __future__ import annotations

import base64
import contextlib
import os
import re
import time
import typing as t

from ..errors import (
    LockTimeout,
    NoSpace,
    PermissionDenied,
    StorageError,
    StoreError,
    StoreUnwritten,
    UnsupportedDriver,
    UntestedRuntime,
)
from ..kernel.oserrors import translate_oserror
from .config import StoreConfig
from .record_files import OWN_FOLDER, LockedDirectory, RecordFile, StoreFiles
from .records import (
    CONTAINERS,
    IMAGES,
    IMAGESTORE,
    LAYERS,
    STABLE,
    VOLATILE,
    Container,
    Image,
    Layer,
    R,
)
from .removal import Destroy
from .reserve import Reserve
from .snapshot import Snapshot
from .staging import Leftover, StagingArea
from .transaction import Transaction

# Folder names of the drivers of containers/storage, including former drivers.
KNOWN_DRIVERS = ("overlay", "vfs", "btrfs", "zfs", "overlay2", "aufs", "devicemapper")

# To parse more than this (bytes) the locks are released, up to this many times.
_MUCH = 1024 * 1024
_RETRIES = 2


class Store:
    """A store that a runtime has written, as its configuration describes it.

    :param lock_timeout: seconds to wait for the store's locks
    :param untested: returns why the store is read-only for untested runtimes; called before the first change
    """

    def __init__(
        self,
        config: StoreConfig,
        lock_timeout: float = 60.0,
        untested: t.Optional[t.Callable[[], t.Optional[UntestedRuntime]]] = None,
    ) -> None:
        self.config = config
        self._ask_untested = untested
        self._untested: t.Optional[UntestedRuntime] = None
        self.lock_timeout = lock_timeout
        self._files = self._layout()
        self._snapshot: t.Optional[Snapshot] = None
        self._seen: t.Tuple[int, ...] = ()
        self._staging: t.Optional[StagingArea] = None

    @classmethod
    def open(
        cls,
        config: StoreConfig,
        lock_timeout: float = 60.0,
        untested: t.Optional[t.Callable[[], t.Optional[UntestedRuntime]]] = None,
    ) -> Store:
        """Open the store after a check that it exists. Creates nothing.

        :raises StoreError: no runtime has written it yet, or only with another driver
        :raises PermissionDenied: it cannot be read
        """
        store = cls(config, lock_timeout, untested)
        with translate_oserror(config.graphroot):
            store._check()
        return store

    # Paths

    @property
    def root(self) -> str:
        """The collection's directory in the store, with staging, trash and the ledger."""
        return os.path.join(self.config.graphroot, OWN_FOLDER)

    @property
    def staging(self) -> StagingArea:
        """The staging area of the collection's directory; always the same object."""
        if self._staging is None:
            self._staging = StagingArea(self.root, self.lock_timeout)
        return self._staging

    @property
    def reserve(self) -> Reserve:
        """The reserve files for removals on a full disk."""
        return Reserve(self.root, self.layers_dir)

    def keep_reserve(self) -> None:
        """Create missing reserve files, if there is enough free space.

        :raises StorageError: a file cannot be created
        """
        with translate_oserror(self.config.graphroot):
            self.reserve.keep(max(file.size for file in self.record_files()))

    def trash_if_room(self, name: str) -> t.Optional[str]:
        """A folder as returned by ``trash``, which the caller discards; None on a full disk.

        :raises StorageError: it cannot be created for another reason
        """
        try:
            with translate_oserror(self.config.graphroot):
                return self.staging.trash(name)
        except NoSpace:
            return None

    @contextlib.contextmanager
    def trash(self, name: str, destroy: t.Optional[Destroy] = None) -> t.Iterator[str]:
        """Context manager: a folder for files that are removed under the locks; deleted at the end, without locks.

        :param name: its purpose, a plain word or an ID
        :param destroy: see ``removal.remove_tree``
        :raises StoreError: something in it cannot be deleted; the next sweep tries again
        """
        with translate_oserror(self.config.graphroot):
            path = self.staging.trash(name)
        try:
            yield path
        finally:
            self.staging.discard(path, destroy)

    def leftovers(self) -> t.List[Leftover]:
        """Leftovers of killed runs of this collection, which ``sweep`` would delete. Writes nothing.

        :raises PermissionDenied: the collection's folder cannot be read
        """
        with translate_oserror(self.config.graphroot):
            found = self.staging.leftovers()
            for path in self._temporary_files():
                with contextlib.suppress(FileNotFoundError):
                    found.append(Leftover("records", path, os.lstat(path).st_mtime))
            return found

    def sweep(
        self,
        destroy: t.Optional[Destroy] = None,
        keep: t.Optional[t.Callable[[str], bool]] = None,
    ) -> t.List[str]:
        """Delete leftovers of killed runs of this collection; running work is not affected.

        :param destroy: see ``removal.remove_tree``
        :param keep: returns whether to keep a path of the collection's folder
        :returns: the paths that were deleted
        :raises StoreError: something cannot be deleted; everything else was deleted
        """
        with translate_oserror(self.config.graphroot):
            temporary = self._temporary_files()
            if temporary and not self.config.imagestore:
                # The locks are held, so the writer of such a file must have been killed.
                with self.transaction(containers=True):
                    pass
            removed = [path for path in temporary if not os.path.lexists(path)]
            return removed + self.staging.sweep(destroy, keep)

    def _temporary_files(self) -> t.List[str]:
        files = self.record_files()
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
        """The file of an item of an image's big data; it may not exist.

        A key with other characters than [a-z0-9.] is stored as an equals sign and its base64 encoding.
        """
        plain = re.fullmatch(r"[a-z0-9.]+", key)
        name = key if plain else "=" + base64.b64encode(key.encode()).decode()
        return os.path.join(self.image_data_dir(image_id), name)

    def _layout(self) -> StoreFiles:
        config = self.config
        graph, run, image_store = config.graphroot, config.runroot, config.imagestore
        layers: t.List[RecordFile[Layer]] = []
        images: t.List[RecordFile[Image]] = []
        containers: t.List[RecordFile[Container]] = []

        main = LockedDirectory(self._folder(graph, LAYERS), "layers.lock", creates=True)
        layer_areas = [main]
        layers.append(RecordFile(main, os.path.join(main.directory, "layers.json"), Layer))
        if image_store:
            area = LockedDirectory(self._folder(image_store, LAYERS), "layers.lock")
            layer_areas.append(area)
            path = os.path.join(area.directory, "layers.json")
            layers.append(RecordFile(area, path, Layer, IMAGESTORE))
        # Another podman may use the same store as a transient or a persistent store.
        for base in (run, graph) if config.transient else (graph, run):
            path = os.path.join(self._folder(base, LAYERS), "volatile-layers.json")
            layers.append(RecordFile(main, path, Layer, VOLATILE))

        image_areas: t.List[LockedDirectory] = []
        for base, location in (
            ((image_store, IMAGESTORE), (graph, STABLE)) if image_store else ((graph, STABLE),)
        ):
            area = LockedDirectory(
                self._folder(base, IMAGES), "images.lock", creates=not image_areas
            )
            image_areas.append(area)
            path = os.path.join(area.directory, "images.json")
            images.append(RecordFile(area, path, Image, location))

        for extra in config.additional_image_stores:
            area = LockedDirectory(self._folder(extra, LAYERS), "layers.lock", read_only=True)
            layer_areas.append(area)
            for name, location in (("layers.json", STABLE), ("volatile-layers.json", VOLATILE)):
                path = os.path.join(area.directory, name)
                layers.append(RecordFile(area, path, Layer, location, extra))
            area = LockedDirectory(self._folder(extra, IMAGES), "images.lock", read_only=True)
            image_areas.append(area)
            path = os.path.join(area.directory, "images.json")
            images.append(RecordFile(area, path, Image, STABLE, extra))

        container_areas: t.List[LockedDirectory] = []
        for base in (run, graph) if config.transient else (graph, run):
            area = LockedDirectory(
                self._folder(base, CONTAINERS), "containers.lock", creates=not container_areas
            )
            container_areas.append(area)
            for name, location in (
                ("containers.json", STABLE),
                ("volatile-containers.json", VOLATILE),
            ):
                path = os.path.join(area.directory, name)
                containers.append(RecordFile(area, path, Container, location))

        areas = {LAYERS: layer_areas, IMAGES: image_areas, CONTAINERS: container_areas}
        return StoreFiles(areas, layers, images, containers)

    def _check(self) -> None:
        config = self.config
        if not config.driver.isalnum():
            raise StoreError(f"driver {config.driver!r}", "is not a driver name")
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
                f"it holds {', '.join(f'{name}-{LAYERS}' for name in others)} ({config.origin('driver')})",
                f"Set `driver: {others[0]}`, or another `graphroot`.",
                drivers=others,
            )
        raise self._unwritten()

    def _unwritten(self) -> StoreUnwritten:
        config = self.config
        return StoreUnwritten(
            config.graphroot,
            f"is not a store of driver {config.driver} yet, because no runtime has written to it "
            f"({config.origin('graphroot')})",
            config.missing(),
            driver=config.driver,
            graphroot=config.graphroot,
            runroot=config.runroot,
            files=list(config.files),
        )

    # Reading

    def snapshot(self) -> Snapshot:
        """Read all records under shared locks, which are held while bytes are read. Writes nothing.

        :raises LockTimeout: a writer held a lock for longer than ``lock_timeout``
        :raises RecordError: a file of records cannot be parsed
        :raises PermissionDenied: a file cannot be read
        """
        with translate_oserror(self.config.graphroot):
            deadline = time.monotonic() + self.lock_timeout
            with contextlib.ExitStack() as stack:
                for kind in (LAYERS, IMAGES, CONTAINERS):
                    for area in self._files.areas[kind]:
                        area.enter(stack, deadline, self.lock_timeout, exclusive=False)
                self._load()
            return self.view()

    def readable(self) -> t.Tuple[Snapshot, t.List[StorageError]]:
        """The readable records and the errors of the others, to describe a damaged store.

        The records of a damaged file are missing from the snapshot.

        :raises LockTimeout: as :meth:`snapshot`
        :raises PermissionDenied: a file may not be read, which is no damage
        """
        faults: t.Dict[str, StorageError] = {}
        deadline = time.monotonic() + self.lock_timeout
        with contextlib.ExitStack() as stack:
            for kind in (LAYERS, IMAGES, CONTAINERS):
                for area in self._files.areas[kind]:
                    try:
                        with translate_oserror(self.config.graphroot):
                            area.enter(stack, deadline, self.lock_timeout, exclusive=False)
                    except (LockTimeout, PermissionDenied):
                        raise
                    except StorageError as error:
                        faults[area.directory] = error
            for file in self._all_files():
                self._try(file, file.load, faults)
        for file in self._all_files():
            self._try(file, file.parse, faults)
        return self.view(), list(faults.values())

    def _try(
        self,
        file: RecordFile[t.Any],
        read: t.Callable[[], t.Any],
        faults: t.Dict[str, StorageError],
    ) -> None:
        try:
            with translate_oserror(self.config.graphroot):
                read()
        except PermissionDenied:
            raise
        except StorageError as error:
            faults[file.path] = error
            file.forget()

    def record_files(self) -> t.List[RecordFile[t.Any]]:
        """The files of records of the store itself, as last read; without those of additional stores."""
        return [file for file in self._all_files() if file.read_only_store is None]

    def data_folders(self, kind: str) -> t.List[str]:
        """The folders with the big data, tar-split files or userdata of a kind of records."""
        files = [file for file in self.record_files() if file.kind == kind]
        return list(dict.fromkeys(os.path.dirname(file.path) for file in files))

    def _all_files(self) -> t.Iterator[RecordFile[t.Any]]:
        yield from self._files.layers
        yield from self._files.images
        yield from self._files.containers

    def _load(self) -> int:
        return sum(file.load() for file in self._all_files())

    def view(self) -> Snapshot:
        """The records as last read or written, without reading the disk."""
        for file in self._all_files():
            file.parse()
        seen = tuple(file.generation for file in self._all_files())
        if self._snapshot is None or seen != self._seen:
            self._snapshot = Snapshot(
                _first(self._files.layers),
                _first(self._files.images),
                _first(self._files.containers),
                self.config.runtime,
                self.config.podman,
                _additional(self._files.layers),
            )
            self._seen = seen
        return self._snapshot

    # Writing

    def untested(self) -> t.Optional[UntestedRuntime]:
        """Why this store is only read, None if it may be written; determined once."""
        if self._ask_untested is not None:
            self._untested, self._ask_untested = self._ask_untested(), None
        return self._untested

    def require_tested(self) -> None:
        """Check that the store may be written.

        :raises UntestedRuntime: a program that uses the store is too new
        """
        error = self.untested()
        if error is not None:
            raise error

    @contextlib.contextmanager
    def transaction(
        self, *, containers: bool = False, make_room: t.Optional[t.Callable[[], bool]] = None
    ) -> t.Iterator[Transaction]:
        """Hold the locks of layers and images exclusively, on request those of containers, and change records.

        The changes of each method of the transaction are on disk when it returns. After an exception, the changes made
        so far remain; this state is always valid for runtimes.

        :param make_room: called repeatedly while the disk is too full to write records and the reserve is
            used up; returns whether it freed any space
        :raises LockTimeout: a lock stayed taken for longer than ``lock_timeout``
        :raises UnsupportedDriver: the store keeps its images in an ``imagestore``
        :raises UntestedRuntime: a program that uses the store is too new
        """
        self.require_tested()
        if self.config.imagestore:
            raise UnsupportedDriver(
                self.config.graphroot,
                f"stores its images separately in imagestore {self.config.imagestore}, and this "
                "collection only reads such a store, because runtimes differ in where they store "
                "its mapped layers and their records",
                "Containers run in it as without this collection. To create or remove mapped "
                "layers with this collection, remove `imagestore` from "
                f"{self.config.sources.get('imagestore', 'storage.conf')} and pull the images again.",
            )
        with translate_oserror(self.config.graphroot):
            locks, started = self._take(containers=containers, spare=make_room is not None)
        transaction = Transaction(self, self._files, started, make_room)
        try:
            with locks:
                try:
                    yield transaction
                finally:
                    if make_room is not None and self.reserve.has_room():
                        self.reserve.discard_spares()
        finally:
            transaction.end()

    def _take(self, *, containers: bool, spare: bool) -> t.Tuple[contextlib.ExitStack, float]:
        """Take the locks and update all records.

        :param spare: keep leftovers of a killed run as space for a full disk
        :returns: the locks, and when the first of them was taken, on the monotonic clock
        """
        self.snapshot()
        deadline = time.monotonic() + self.lock_timeout
        retries = _RETRIES
        while True:
            started = 0.0
            with contextlib.ExitStack() as written, contextlib.ExitStack() as only_read:
                for kind in (LAYERS, IMAGES, CONTAINERS):
                    for area in self._files.areas[kind]:
                        write = not area.read_only and (kind != CONTAINERS or containers)
                        if kind == CONTAINERS and not os.path.isdir(area.directory):
                            continue
                        stack = written if write else only_read
                        area.enter(stack, deadline, self.lock_timeout, exclusive=write)
                        started = started or time.monotonic()
                read = self._load()
                only_read.close()
                if read <= _MUCH or not retries:
                    self.view()
                    for file in self._all_files():
                        if file.area.lock.held:
                            file.discard_leftovers(self.reserve if spare else None)
                    if not spare:
                        self.reserve.discard_spares()
                    return written.pop_all(), started
            retries -= 1
            self.view()


def _first(files: t.Iterable[RecordFile[R]]) -> t.Dict[str, R]:
    result: t.Dict[str, R] = {}
    for file in files:
        for record in file.records:
            result.setdefault(record.id, record)
    return result


def _additional(files: t.Iterable[RecordFile[Layer]]) -> t.Dict[str, t.FrozenSet[str]]:
    """The IDs of the layers of each additional store."""
    result: t.Dict[str, t.FrozenSet[str]] = {}
    for file in files:
        if file.read_only_store is not None:
            ids = frozenset(record.id for record in file.records)
            result[file.read_only_store] = result.get(file.read_only_store, frozenset()) | ids
    return result


def _is_dir(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False)
