# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Check whether the records of a store agree with each other and with the files on disk.

Everything that a record, a database or a file of the store names is in use. After power loss, a full disk
or a restored backup, a file of records may be empty, missing, or older than the others, and what it named seems
unused. Other parts of the store still refer to it: other records, podman's database, tar-split files,
big data, and the directories of the layers.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import typing as t
from types import MappingProxyType

from ..errors import StorageError
from ..printable import command, printable
from . import libpod_db
from .record_files import RecordFile
from .records import CONTAINERS, IMAGES, LAYERS, SIZE_LIMIT, VOLATILE, Container, Image, Layer
from .snapshot import Snapshot
from .store import KNOWN_DRIVERS, Store

UNREADABLE = "unreadable"
EMPTY = "empty"
FOREIGN = "foreign"
DUPLICATE = "duplicate"
NO_RECORD = "no_record"
NO_DATA = "no_data"
NO_OWNER = "no_owner"

_ID = re.compile(r"[0-9a-f]{64}")
_TAR_SPLIT = re.compile(r"([0-9a-f]{64})\.tar-split\.gz")
# Fields that identify a kind of record, with the kinds that lack them.
_OWN_FIELDS = {
    LAYERS: ("parent", "diff-digest", "diff-size", "uidset", "compressed-diff-digest"),
    IMAGES: ("mapped-layers", "names-history", "digest"),
    CONTAINERS: ("image",),
}
_MOST_FOUND = 1000
_MOST_IDS = 100
_CHUNK = 1 << 20
_ENTRIES_LIMIT = 1000
_CONFIG_LIMIT = 4 * 1024 * 1024
# Seconds by which a file of records may be newer than the token of its lock, which new runtimes write before it.
_FILE_AFTER_TOKEN = 2.0
# Seconds by which it may be older: old runtimes write the token after the file is on disk.
_FILE_BEFORE_TOKEN = 10.0
_TOKEN_SIZE = 64
# If a folder without a record is newer than the records by this time (seconds), it had a record before.
_LATER_FOLDER = 3600.0


class Contradiction(t.NamedTuple):
    """Records that contradict each other or the files on disk.

    :ivar kind: ``unreadable``, ``empty``, ``foreign`` (a file of records of another kind), ``duplicate``,
        ``no_record`` (something names an ID without a record), ``no_data`` (no recorded layer is on disk) or
        ``no_owner`` (a layer whose user has no record)
    :ivar path: the inconsistent file or folder
    :ivar problem: a clause
    :ivar hint: what to do, a sentence
    :ivar ids: the full IDs concerned
    """

    kind: str
    path: str
    problem: str
    hint: str
    ids: t.Tuple[str, ...] = ()


class Disk(t.NamedTuple):
    """The contents of the driver's directory.

    :ivar folder: its path
    :ivar present: the names of the folders in it
    :ivar unrecorded: the IDs of layer folders without a record
    :ivar resting: for each folder, the layers that it depends on by its own files, nearest first
    :ivar changed: when each folder without a record was changed, seconds since the epoch
    """

    folder: str
    present: t.AbstractSet[str]
    unrecorded: t.Sequence[str]
    resting: t.Mapping[str, t.Sequence[str]]
    changed: t.Mapping[str, float] = MappingProxyType({})


class Commands:
    """Command lines for the administrator of the store.

    :param podman: the start of a podman command line for the store
    :param in_user: converts a command line to one that runs as the store's user
    :param rootless: whether files of the store belong to IDs of a user namespace
    :param runtime: "cri-o" for a store of CRI-O; else podman's commands are used
    """

    def __init__(
        self,
        podman: t.Sequence[str] = ("podman",),
        in_user: t.Optional[t.Callable[[str], str]] = None,
        rootless: bool = False,
        runtime: str = "",
    ) -> None:
        self._crio = bool(runtime)
        self._podman = tuple(podman)
        self._in_user = in_user
        self._rootless = rootless

    def podman(self, *arguments: str) -> str:
        """A command line of podman's."""
        return self._line(*self._podman, *arguments)

    def remove_container(self, container: Container) -> str:
        """A command line that removes a container, in the program that created it."""
        short = container.id[:12]
        if container.from_crio:
            return command("crictl", "rmp" if container.is_pod else "rm", "--force", short)
        return self.podman("rm", "--force", short)

    def remove_image(self, image_id: str) -> str:
        """A command line that removes an image."""
        if self._crio:
            return command("crictl", "rmi", image_id[:12])
        return self.podman("rmi", "--force", image_id[:12])

    def remove_everything(self, graphroot: str) -> str:
        """A command line that removes the whole store."""
        if self._crio:
            return (
                f"systemctl stop crio && {command('rm', '-r', graphroot)} && systemctl start crio"
            )
        return self.podman("system", "reset")

    def write_once(self) -> str:
        """How to make the runtime rewrite the records of layers and images without changes; a clause."""
        if self._crio:
            return (
                "let CRI-O write them once: crictl pull IMAGE && crictl rmi IMAGE, with an image that is not in the "
                "store"
            )
        name = "localhost/written:1"
        made = self.podman("import", "/dev/null", name)
        return f"let podman write them once: {made} && {self.podman('rmi', name)}"

    def remove(self, path: str) -> str:
        """A command line that removes a file or folder of the store."""
        inside = ("podman", "unshare") if self._rootless else ()
        return self._line(*inside, "rm", "-r", path)

    def move_away(self, path: str) -> str:
        """A command line that moves a database with its journals to a folder of their own."""
        names = [path, *(f"{path}{end}" for end in ("-wal", "-shm", "-journal"))]
        folder = f"{path}.damaged"
        moved = self._line("mv", "-t", folder, *filter(os.path.lexists, names))
        return f"{self._line('mkdir', folder)} && {moved}"

    def _line(self, *arguments: str) -> str:
        line = command(*arguments)
        return self._in_user(line) if self._in_user else line


def contradictions(
    store: Store,
    snapshot: Snapshot,
    disk: Disk,
    listed_once: t.Callable[[str], str],
    begun: t.Container[str] = (),
    faults: t.Sequence[StorageError] = (),
    commands: t.Optional[Commands] = None,
) -> t.List[Contradiction]:
    """Examine everything in the store that names layers, images or containers. Writes nothing.

    :param snapshot: the current records
    :param listed_once: returns the image that is known to have listed a mapped layer; "" for none
    :param begun: the layers and images whose removal a killed run started
    :param faults: the errors of files of records that could not be read
    :param commands: for the commands in hints
    :raises StorageError: a folder of the store cannot be read
    """
    return _Check(store, snapshot, disk, listed_once, begun, commands or Commands()).all(faults)


class _Check:
    def __init__(
        self,
        store: Store,
        snapshot: Snapshot,
        disk: Disk,
        listed_once: t.Callable[[str], str],
        begun: t.Container[str],
        commands: Commands,
    ) -> None:
        self.store = store
        self.commands = commands
        self.snapshot = snapshot
        self.disk = disk
        self.listed_once = listed_once
        self.begun = begun
        self.files = store.record_files()
        self.found: t.List[Contradiction] = []
        config = store.config
        self.databases = libpod_db.read_databases(config.graphroot, config.runroot)
        self.containers_in_podman = self.databases.containers

    def all(self, faults: t.Sequence[StorageError]) -> t.List[Contradiction]:
        for fault in faults:
            self._add(
                UNREADABLE,
                str(fault.facts.get("path") or fault.subject),
                f"{fault.subject}: {fault.cause}",
                fault.hint or _RESTORE,
            )
        for path, why in self.databases.unreadable.items():
            self._add(
                UNREADABLE,
                path,
                f"podman's database {path} cannot be read: {why}",
                "Restore it from a backup. Or stop all containers and move it away with its journals, after which "
                f"podman does not know its containers, pods and volumes: {self.commands.move_away(path)}",
            )
        self._files()
        self._names()
        self._chains()
        self._folders_of_images()
        self._folders_of_containers()
        self._folders_of_layers()
        self._stacks()
        self._nobodys_layers()
        return self.found

    def _add(
        self, kind: str, path: str, problem: str, hint: str, ids: t.Sequence[str] = ()
    ) -> None:
        if len(self.found) < _MOST_FOUND:
            self.found.append(
                Contradiction(
                    kind, printable(path), printable(problem), hint.strip(), tuple(ids[:_MOST_IDS])
                )
            )

    # Single files

    def _files(self) -> None:
        seen: t.Dict[t.Tuple[str, str], t.Tuple[str, t.Any]] = {}
        for file in self.files:
            if file.blank and (file.location != VOLATILE or self.disk.unrecorded):
                self._add(
                    EMPTY,
                    file.path,
                    "exists but contains no list of records, which no runtime writes: its content was lost",
                    _RESTORE,
                )
            others = {
                name
                for kind, names in _OWN_FIELDS.items()
                if kind != file.kind
                for name in names
                if name not in _OWN_FIELDS[file.kind]
            }
            strange = [item.id for item in file.records if not others.isdisjoint(item.raw)]
            if strange:
                self._add(
                    FOREIGN,
                    file.path,
                    f"holds {len(strange)} records that are not {file.kind}",
                    "Move the files of records back to their original paths.",
                    strange,
                )
            for record in file.records:
                earlier = seen.setdefault((file.kind, record.id), (file.path, record.raw))
                if earlier[0] != file.path and earlier[1] != record.raw:
                    self._add(
                        DUPLICATE,
                        file.path,
                        f"describes {file.kind[:-1]} {record.id[:12]} differently from {earlier[0]}",
                        "Remove the wrong record.",
                        (record.id,),
                    )

    # References between records

    def _names(self) -> None:
        layers = self.snapshot.layers
        for container in self.snapshot.containers.values():
            label = f"container {container.name} ({container.id[:12]})"
            if container.layer not in layers and not self._is_remnant(container):
                self._add(
                    NO_RECORD,
                    container.path,
                    f"{label} has layer {container.layer[:12] or 'none'}, which has no record",
                    f"{_save(self.disk.folder, container.layer)} {_RESTORE} "
                    f"If the container is not needed: {self.commands.remove_container(container)}",
                    (container.id, container.layer),
                )
            elif container.layer in layers and self._lacks_parent(container):
                self._add(
                    NO_RECORD,
                    layers[container.layer].path,
                    f"layer {container.layer[:12]} of {label} has no parent, although the container was made from "
                    "an image with layers",
                    _RESTORE,
                    (container.id, container.layer),
                )
            if container.image and container.image not in self.snapshot.images:
                self._add(
                    NO_RECORD,
                    container.path,
                    f"{label} was made from image {container.image[:12]}, which has no record",
                    f"{_RESTORE} If the image is in an additional image store, add that store to "
                    "the configuration again.",
                    (container.id, container.image),
                )
        for image in self.snapshot.images.values():
            if not image.read_only_store:
                self._names_of_image(image)

    def _lacks_parent(self, container: Container) -> bool:
        """Whether the layer of a container lost its parent."""
        if self.snapshot.layers[container.layer].parent:
            return False
        image = self.snapshot.images.get(container.image)
        if image:
            return bool(image.layer)
        # Working containers may start from scratch, and podman containers may run on a directory.
        known = self.containers_in_podman.get(container.id)
        return known is not None and not known.rootfs

    def _is_remnant(self, container: Container) -> bool:
        """Whether only the record of a container that podman does not know is left.

        A build that was killed while it removed its working container leaves this.
        """
        return not (
            container.id in self.containers_in_podman
            or container.podman_name
            or self.disk.unrecorded
            or self._is_on_disk(container.layer)
        )

    def _names_of_image(self, image: Image) -> None:
        layers = self.snapshot.layers
        label = f"image {image.names[0] if image.names else image.id[:12]}"
        hint = f"{_RESTORE} If the image is not needed: {self.commands.remove_image(image.id)}"
        if image.layer and image.layer not in layers:
            self._add(
                NO_RECORD,
                image.path,
                f"{label} has layer {image.layer[:12]}, which has no record",
                hint,
                (image.id, image.layer),
            )
        elif not image.layer and image.mapped_layers:
            self._add(
                NO_RECORD,
                image.path,
                f"{label} has mapped layers, but not the layer that they were created from",
                hint,
                (image.id,),
            )
        for layer_id in image.mapped_layers:
            # Programs that force the removal of layers leave entries without a record and without data.
            if layer_id not in layers and self._is_on_disk(layer_id):
                self._add(
                    NO_RECORD,
                    image.path,
                    f"{label} lists mapped layer {layer_id[:12]}, which is on disk and which no record "
                    "describes",
                    hint,
                    (image.id, layer_id),
                )

    def _is_on_disk(self, layer_id: str) -> bool:
        return layer_id in self.disk.present or os.path.lexists(self.store.tar_split_path(layer_id))

    def _chains(self) -> None:
        layers = self.snapshot.layers
        whole: t.Set[str] = set()
        for layer in layers.values():
            if layer.read_only_store:
                continue
            parent = layer.parent
            if parent and parent not in layers:
                self._add(
                    NO_RECORD,
                    layer.path,
                    f"layer {layer.id[:12]} depends on layer {parent[:12]}, which has no record",
                    _RESTORE,
                    (layer.id, parent),
                )
            path: t.List[str] = []
            current: t.Optional[Layer] = layer
            while current is not None and current.id not in whole:
                if current.id in path:
                    self._add(
                        NO_RECORD,
                        layer.path,
                        f"the parents of layer {layer.id[:12]} form a cycle",
                        _RESTORE,
                        (layer.id,),
                    )
                    break
                path.append(current.id)
                current = layers.get(current.parent)
            whole.update(path)

    # Files beside the records

    def _folders_of_images(self) -> None:
        for folder in self.store.data_folders(IMAGES):
            for name in _ids_in(folder):
                if name in self.snapshot.images or name in self.begun:
                    continue
                path = os.path.join(folder, name)
                if _holds_files(path):
                    self._add(
                        NO_RECORD,
                        path,
                        f"holds the manifest or configuration of image {name[:12]}, which no record "
                        "describes",
                        f"{_RESTORE} If that image is not needed: {self.commands.remove(path)}",
                        (name,),
                    )

    def _folders_of_containers(self) -> None:
        for folder in self.store.data_folders(CONTAINERS):
            for name in _ids_in(folder):
                if name in self.snapshot.containers:
                    continue
                path = os.path.join(folder, name)
                known = self.containers_in_podman.get(name)
                if known is not None:
                    if known.rootfs:
                        continue
                    self._add(
                        NO_RECORD,
                        path,
                        f"podman's database has container {known.name or name[:12]}, which no record of "
                        "the store describes",
                        f"{_RESTORE} If the container is not needed: "
                        f"{self.commands.podman('rm', '--force', name[:12])}",
                        (name,),
                    )
                elif (
                    # Failed removals leave empty folders; but such a folder may also be the last trace of a container.
                    _holds_files(path) or self.disk.unrecorded
                ) and not self._has_another_root(path):
                    self._add(
                        NO_RECORD,
                        path,
                        f"holds data of container {name[:12]}, which has no record",
                        f"{_RESTORE} If that container is not needed: {self.commands.remove(path)}",
                        (name,),
                    )

    def _has_another_root(self, path: str) -> bool:
        """Whether a container without a record runs on a directory outside the store (``--rootfs``)."""
        try:
            descriptor = os.open(
                os.path.join(path, "userdata", "config.json"), _READ_ONLY | os.O_NONBLOCK
            )
            with os.fdopen(descriptor, "rb") as file:
                root = json.loads(file.read(_CONFIG_LIMIT))["root"]["path"]
            return isinstance(root, str) and not root.startswith(
                os.path.join(self.store.config.graphroot, "")
            )
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return False

    def _folders_of_layers(self) -> None:
        disk = self.disk
        own = [layer for layer in self.snapshot.layers.values() if not layer.read_only_store]
        # A killed removal leaves records of incomplete layers, which the next runtime removes.
        whole = [item for item in own if not item.incomplete]
        if whole and not any(item.id in disk.present for item in own):
            self._add(
                NO_DATA,
                disk.folder,
                f"holds none of the {len(whole)} layers that are recorded",
                "Mount the filesystem that belongs on this path, or correct `graphroot` and `driver`.",
            )
        suspects = [item for item in disk.unrecorded if item not in self.begun]
        if not suspects:
            return
        if not own:
            self._add(
                NO_RECORD,
                disk.folder,
                f"holds {len(suspects)} layers, but no layer is recorded",
                f"{_save(disk.folder, suspects[0])} {_RESTORE} If nothing in this store is needed: "
                f"{self.commands.remove_everything(self.store.config.graphroot)}",
                suspects,
            )
        self._older_records(suspects)
        self._containers_without_records()
        named = self._names_of(suspects)
        for layer_id in suspects:
            if layer_id in named:
                path = os.path.join(disk.folder, layer_id)
                self._add(
                    NO_RECORD,
                    path,
                    f"is the directory of a layer that has no record, and {named[layer_id]}",
                    f"{_save(disk.folder, layer_id)} {_RESTORE}",
                    (layer_id,),
                )

    def _older_records(self, suspects: t.Sequence[str]) -> None:
        """Runtimes write the record of a layer before its folder, or just after it."""
        if self.store.config.transient:
            return  # The records of its layers are lost at a reboot, but not their folders.
        files = [item for item in self.files if item.kind == LAYERS and item.exists]
        if not files:
            return
        file = files[0]
        written = 0.0
        for item in files:
            with contextlib.suppress(FileNotFoundError):
                written = max(written, os.lstat(item.path).st_mtime)
        newest = max(suspects, key=lambda item: self.disk.changed.get(item, 0.0))
        if self.disk.changed.get(newest, 0.0) - written > _LATER_FOLDER:
            problem = f"is older than the folder of layer {newest[:12]}, which it does not describe"
        elif all(map(written_by_others, files)):
            problem = (
                f"does not match the last write that {file.area.lock.path} records, and {self.disk.folder} holds layer "
                f"{newest[:12]}, which it does not describe"
            )
        else:
            return
        self._add(
            NO_RECORD,
            file.path,
            problem,
            f"{_save(self.disk.folder, newest)} {_RESTORE} If they are right as they are, "
            f"{self.commands.write_once()}",
            (newest,),
        )

    def _containers_without_records(self) -> None:
        """A folder without a record may belong to a container that only podman's database contains."""
        for container in self.containers_in_podman.values():
            if container.rootfs or container.id in self.snapshot.containers:
                continue
            self._add(
                NO_RECORD,
                self.disk.folder,
                f"holds layers that no record describes, and podman's database has container "
                f"{container.name or container.id[:12]}, which has no record either",
                f"{_RESTORE} If the container is not needed: "
                f"{self.commands.podman('rm', '--force', container.id[:12])}",
                (container.id,),
            )

    def _names_of(self, suspects: t.Sequence[str]) -> t.Dict[str, str]:
        """The layers among these that something in the store still names, with a description of it."""
        named: t.Dict[str, str] = {}
        layer_ids = set(suspects)
        for name, lowers in self.disk.resting.items():
            for layer_id in layer_ids.intersection(lowers):
                if layer_id != name:
                    named.setdefault(layer_id, f"the directory of layer {name[:12]} depends on it")
        for folder in self.store.data_folders(LAYERS):
            for name in _listed(folder):
                split = _TAR_SPLIT.fullmatch(name)
                layer_id = split.group(1) if split else name
                if layer_id in layer_ids:
                    named.setdefault(layer_id, f"{os.path.join(folder, name)} belongs to it")
        for path in self._texts():
            for layer_id in _mentioned(path, layer_ids):
                named.setdefault(layer_id, f"{path} mentions it")
        return named

    def _texts(self) -> t.Iterator[str]:
        """Every file that may name a layer: records of all drivers, mounts, databases, files of this collection."""
        config = self.store.config
        for base in (config.graphroot, config.runroot, config.imagestore):
            if not base:
                continue
            for driver in dict.fromkeys((config.driver, *KNOWN_DRIVERS)):
                for kind in (LAYERS, IMAGES, CONTAINERS):
                    folder = os.path.join(base, f"{driver}-{kind}")
                    for name in _listed(folder):
                        if name.endswith(".json"):
                            yield os.path.join(folder, name)
        for folder in self.store.data_folders(CONTAINERS):
            for name in _ids_in(folder):
                yield os.path.join(folder, name, "userdata", "config.json")
        for database in libpod_db.databases(config.graphroot, config.runroot):
            yield database
            yield f"{database}-wal"
        yield os.path.join(self.store.root, "ledger.json")
        yield "/proc/self/mountinfo"
        # Mounts in the driver's folder are unmounted in this process's namespace.
        yield f"/proc/{os.getppid()}/mountinfo"
        yield "/proc/1/mountinfo"

    def _stacks(self) -> None:
        """Compare the parents that directories of layers name with the parents in the records."""
        layers = self.snapshot.layers
        for name, lowers in self.disk.resting.items():
            layer = layers.get(name)
            if layer is None or layer.read_only_store:
                continue
            nearest = layers.get(lowers[0])
            if nearest is None:
                if lowers[0] in self.disk.present:
                    continue  # Reported for the folder that is named.
                problem = f"depends on layer {lowers[0][:12]} on disk, which has no record"
            elif nearest.id == layer.parent or nearest.parent == layer.parent:
                # On disk, a mapped layer depends on its template, which is its sibling in the records.
                continue
            else:
                problem = (
                    f"depends on layer {lowers[0][:12]} on disk, but on "
                    f"{layer.parent[:12] or 'none'} by its record"
                )
            self._add(
                NO_RECORD,
                layer.path,
                f"layer {name[:12]} {problem}",
                _RESTORE,
                (name, lowers[0]),
            )

    def _nobodys_layers(self) -> None:
        """Mapped layers that nothing refers to. Only copies of a template are known to be unused."""
        snapshot = self.snapshot
        dangling = [
            image
            for image in snapshot.images.values()
            if not image.read_only_store
            and any(mapped_layer not in snapshot.layers for mapped_layer in image.mapped_layers)
        ]
        for layer in nobodys_mapped_layers(snapshot):
            if layer.id in self.begun or layer.incomplete:
                continue
            image_id = self.listed_once(layer.id)
            if image_id in snapshot.images:
                self._add(
                    NO_OWNER,
                    snapshot.images[image_id].path,
                    f"image {image_id[:12]} no longer lists mapped layer {layer.id[:12]}",
                    _RESTORE,
                    (layer.id, image_id),
                )
            elif dangling:
                self._add(
                    NO_OWNER,
                    dangling[0].path,
                    f"image {dangling[0].id[:12]} lists a mapped layer that has no record, and no "
                    f"image lists mapped layer {layer.id[:12]}",
                    _RESTORE,
                    (layer.id, dangling[0].id),
                )
            elif not _is_copy(snapshot, layer):
                self._add(
                    NO_OWNER,
                    layer.path,
                    f"layer {layer.id[:12]} is not a copy of an image's layer, and no container uses it",
                    f"{_save(self.disk.folder, layer.id)} {_RESTORE} If it is not needed: "
                    f"containers-storage delete-layer {layer.id[:12]}",
                    (layer.id,),
                )
            else:
                self._check_unlisted_copy(layer)

    def _check_unlisted_copy(self, layer: Layer) -> None:
        """A copy that no image lists is a leftover of a crash, unless a file of records was replaced."""
        for file in self.files:
            if file.kind != LAYERS and list(_mentioned(file.path, {layer.id})):
                self._add(
                    NO_OWNER,
                    file.path,
                    f"mentions layer {layer.id[:12]} in an unknown field",
                    _RESTORE,
                    (layer.id,),
                )
            elif file.kind == IMAGES and written_by_others(file):
                self._add(
                    NO_OWNER,
                    file.path,
                    f"does not match the last write that {file.area.lock.path} records, and no image lists mapped "
                    f"layer {layer.id[:12]}",
                    f"{_RESTORE} If nothing but the whole store was copied, "
                    f"{self.commands.write_once()}",
                    (layer.id,),
                )


_RESTORE = "Restore layers.json, images.json and containers.json from the same backup; they belong together."
_READ_ONLY = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW


def _save(folder: str, layer_id: str) -> str:
    path = printable(os.path.join(folder, layer_id))
    return f"Copy what you need from {path} first." if layer_id else ""


def nobodys_mapped_layers(snapshot: Snapshot) -> t.List[Layer]:
    """The store's own mapped layers that no image lists, no container uses and no layer depends on.

    An image's own layers that carry a map, as an interrupted pull leaves them, are not included.
    """
    containers = {container.layer for container in snapshot.containers.values()}
    found = []
    for layer in snapshot.layers.values():
        parent = snapshot.layers.get(layer.parent)
        # Only a copy for another map has another map than its parent. Equal maps are usually the same object.
        if parent is not None and (
            layer.mapping is parent.mapping or layer.mapping == parent.mapping
        ):
            continue
        if (
            (parent or not layer.mapping.identity or layer.diff_digest)
            and not layer.names
            and not layer.read_only_store
            and layer.id not in containers
            and not snapshot.images_of_layer(layer.id)
            and not snapshot.children(layer.id)
            and (parent or _is_mapped_base(snapshot, layer))
        ):
            found.append(layer)
    return found


def _is_mapped_base(snapshot: Snapshot, layer: Layer) -> bool:
    """Whether a layer without a parent is a copy: the ID of an image's own layer is its digest (containers/image)."""
    if layer.id == layer.diff_digest.rpartition(":")[2]:
        return False
    return not layer.mapping.identity or (not layer.parent and _is_copy(snapshot, layer))


def _is_copy(snapshot: Snapshot, layer: Layer) -> bool:
    """Whether a layer has the same recorded content as another layer with the same parent, its template.

    Containers' layers have no recorded content.
    """
    digest = layer.diff_digest or layer.raw.get("toc-digest")
    return bool(digest) and any(
        other.parent == layer.parent
        and digest in (other.diff_digest, other.raw.get("toc-digest"))
        and other.id != layer.id
        for other in snapshot.layers.values()
    )


def written_by_others(file: RecordFile[t.Any]) -> bool:
    """Whether a file of records was changed after the last write under its lock: restored, copied, or truncated.

    Every runtime updates the token of the lock when it writes the file. The first eight bytes of the token are the
    time in nanoseconds. A store that was copied as a whole looks the same until its next change.
    """
    try:
        with open(file.area.lock.path, "rb") as stream:
            token = stream.read(_TOKEN_SIZE)
        modified = os.lstat(file.path).st_mtime
    except OSError:
        return False
    if len(token) < _TOKEN_SIZE or re.fullmatch(rb"[0-9a-f]{64}", token):
        return False
    later = modified - int.from_bytes(token[:8], "little") / 1e9
    return later > _FILE_AFTER_TOKEN or later < -_FILE_BEFORE_TOKEN


def _listed(folder: str) -> t.List[str]:
    """The names in a folder; empty if it does not exist."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return sorted(os.listdir(folder))
    return []


def _ids_in(folder: str) -> t.List[str]:
    return [name for name in _listed(folder) if _ID.fullmatch(name)]


def _holds_files(path: str) -> bool:
    """Whether there is anything but folders below a path; true if it is too large to check."""
    seen = 0
    for _parent, folders, files in os.walk(path):
        seen += 1 + len(folders)
        if files or seen > _ENTRIES_LIMIT:
            return True
    return False


def _mentioned(path: str, layer_ids: t.AbstractSet[str]) -> t.Iterator[str]:
    """The IDs that a file of any format contains as text."""
    try:
        descriptor = os.open(path, _READ_ONLY | os.O_NONBLOCK)
    except OSError:
        return
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return
        left = {item.encode("ascii"): item for item in layer_ids}
        tail, read = b"", 0
        while left and read < SIZE_LIMIT:
            try:
                piece = file.read(_CHUNK)
            except OSError:
                return
            if not piece:
                return
            read += len(piece)
            text = tail + piece
            for item in [item for item in left if item in text]:
                yield left.pop(item)
            tail = text[-63:]
