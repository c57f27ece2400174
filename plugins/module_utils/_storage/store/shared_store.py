# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This module util is PRIVATE to the userns.storage collection.
"""The read-only image store of one user: its records, whose layers are in mounts elsewhere.

It is an additional image store of the overlay driver. Root owns every file of it, and the user may
read them. The ``diff`` of each layer is a symbolic link into ``m/VIEW``, where a mount shows the
layers of the real store. Without the mount, the same path is a regular file: a container then fails
to start, whereas runtimes report a missing path as corruption.

Readers may hold shared locks for a long time, so this writer takes no locks: each file is
replaced by rename, and the lock's token changes before and after, so that no reader can keep an old
file with the newest token. Layers are written before the images that name them, and removed after them.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import os
import re
import stat
import typing as t
from dataclasses import dataclass, field

from ..errors import RecordError
from ..kernel import mounts
from ..kernel.oserrors import translate_oserror
from .locks import fresh_token
from .records import Image, Layer, parse
from .removal import remove_tree

_DRIVER = "overlay"
_LAYERS = f"{_DRIVER}-layers"
_IMAGES = f"{_DRIVER}-images"
_CONTAINERS = f"{_DRIVER}-containers"
_LINKS = "l"
_MOUNTS = "m"
_PLACEHOLDER = f"{_MOUNTS}/not-mounted"
_FOLDERS = (_DRIVER, f"{_DRIVER}/{_LINKS}", _LAYERS, _IMAGES, _CONTAINERS, _MOUNTS)
_LOCKS = (f"{_LAYERS}/layers.lock", f"{_IMAGES}/images.lock", f"{_CONTAINERS}/containers.lock")
_LAYER_RECORDS = f"{_LAYERS}/layers.json"
_IMAGE_RECORDS = f"{_IMAGES}/images.json"
_VIEW = re.compile(r"[0-9a-f]{12}")
_ID = re.compile(r"[0-9a-f]{64}")
# The prefix of a new folder or link before it is renamed.
_TEMPORARY = ".new"
SHORT_NAME = 8
_DIRECTORY_MODE = 0o755
_FILE_MODE = 0o644


@dataclass(frozen=True)
class SharedLayer:
    """A layer of the store.

    :param view: the name of the mount with its files
    :param source: its ID in the real store
    :param lowers: IDs of the layers below it, topmost first
    :param record: its JSON record; empty for a layer that is only below others
    :param tar_split: path of its tar-split file, empty for none
    """

    layer_id: str
    view: str
    source: str
    lowers: t.Tuple[str, ...] = ()
    record: bytes = b""
    tar_split: str = ""


@dataclass(frozen=True)
class SharedImage:
    """An image of the store.

    :param record: its JSON record
    :param data: paths of its big data files, by file name
    """

    image_id: str
    record: bytes
    data: t.Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SharedContent:
    """The contents of the store, in the order of the records."""

    layers: t.Tuple[SharedLayer, ...] = ()
    images: t.Tuple[SharedImage, ...] = ()


# Each layer needs the short names of all layers below it.
@functools.lru_cache(maxsize=1 << 14)
def short_name(layer_id: str) -> str:
    """The name of a layer below ``l/``, the same for the same layer at all times.

    containers/storage uses 26 random characters. These are fewer, because the paths of all layers of
    a container must fit into one page.
    """
    digest = hashlib.sha256(f"short name {layer_id}".encode()).digest()
    return base64.b32encode(digest)[:SHORT_NAME].decode()


def derived_layer_id(*parts: str) -> str:
    """A layer ID that only depends on these texts.

    The first 12 characters are never all digits, which runtimes would interpret as a number.
    """
    number = 0
    while True:
        text = "\0".join((*parts, str(number)))
        digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
        if not digest[:12].isdigit():
            return digest
        number += 1


class SharedStore:
    """The store of a user.

    :param path: its graph root; root owns every folder above it
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def mount_point(self, view: str) -> str:
        """Absolute path of the folder where a view is mounted."""
        return self._path(f"{_MOUNTS}/{view}")

    @property
    def mount_points(self) -> str:
        """Absolute path of the folder of all mount points."""
        return self._path(_MOUNTS)

    def images(self) -> t.List[Image]:
        """The recorded images; empty if the store or its records are damaged."""
        return self._records(_IMAGE_RECORDS, Image)

    def layers(self) -> t.List[Layer]:
        """The recorded layers; empty if the store or its records are damaged."""
        return self._records(_LAYER_RECORDS, Layer)

    def _records(self, name: str, kind: t.Any) -> t.List[t.Any]:
        data = self._read(name)
        if not data:
            return []
        try:
            return list(parse(data, kind, self._path(name)))
        except RecordError:
            return []

    def differs(self, content: SharedContent) -> bool:
        """Whether the disk differs from ``content``. Writes nothing."""
        if any(not os.path.isdir(self._path(name)) for name in _FOLDERS):
            return True
        if any(not os.path.exists(self._path(name)) for name in _LOCKS):
            return True
        if self._read(_LAYER_RECORDS) != _layer_records(content):
            return True
        if self._read(_IMAGE_RECORDS) != _image_records(content):
            return True
        expected = {layer.layer_id for layer in content.layers}
        if set(self._folders(_DRIVER)) != expected:
            return True
        if {image.image_id for image in content.images} != set(self._folders(_IMAGES)):
            return True
        return any(not self._is_whole(layer) for layer in content.layers)

    def write_mount_points(self, content: SharedContent, placeholder: str) -> None:
        """Create the folders and the mount points of ``content``, with a placeholder file for each layer.

        :param placeholder: the text of the placeholder files
        :raises StoreError: a file cannot be written
        """
        with translate_oserror(self.path):
            for name in ("", *_FOLDERS):
                with contextlib.suppress(FileExistsError):
                    os.mkdir(self._path(name), _DIRECTORY_MODE)
            if self._read(_PLACEHOLDER) != placeholder.encode():
                _write(self._path(_PLACEHOLDER), placeholder.encode())
            expected = _sources(content)
            with self._below_mounts() as here:
                for view, sources in expected.items():
                    folder = f"{here}/{view}"
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(folder, _DIRECTORY_MODE)
                    for source in sources - set(os.listdir(folder)):
                        os.mkdir(f"{folder}/{source}", _DIRECTORY_MODE)
                        os.link(
                            f"{here}/{os.path.basename(_PLACEHOLDER)}", f"{folder}/{source}/diff"
                        )

    def write(self, content: SharedContent) -> None:
        """Update the records to ``content``, whose views are mounted.

        :raises StoreError: a file cannot be written
        """
        with translate_oserror(self.path):
            for name in _LOCKS:
                self._create_lock(name)
            for layer in content.layers:
                if not self._is_whole(layer):
                    self._write_layer(layer)
            for image in content.images:
                self._write_image_data(image)
            # A layer to be removed may belong to a recorded image to be removed: images first.
            layers, images = _layer_records(content), _image_records(content)
            kept = {layer.layer_id for layer in content.layers}
            if any(layer.id not in kept for layer in self.layers()):
                self._replace(_IMAGE_RECORDS, _LOCKS[1], images)
            self._replace(_LAYER_RECORDS, _LOCKS[0], layers)
            self._replace(_IMAGE_RECORDS, _LOCKS[1], images)

    def drop_others(self, content: SharedContent) -> None:
        """Delete everything that does not belong to ``content`` and is no longer mounted.

        :raises StoreError: a file cannot be deleted
        """
        with translate_oserror(self.path):
            self._drop_others(content)
            expected = _sources(content)
            with self._below_mounts() as here:
                for view in os.listdir(here):
                    if not _VIEW.fullmatch(view):
                        continue
                    if view not in expected:
                        remove_tree(f"{here}/{view}")
                        continue
                    for source in set(os.listdir(f"{here}/{view}")) - expected[view]:
                        remove_tree(f"{here}/{view}/{source}")

    def clear(self) -> None:
        """Remove all images, then all layers, so that no container can start on them any more.

        :raises StoreError: a file cannot be written
        """
        with translate_oserror(self.path):
            for name, lock in ((_IMAGE_RECORDS, _LOCKS[1]), (_LAYER_RECORDS, _LOCKS[0])):
                if os.path.exists(self._path(name)):
                    self._replace(name, lock, b"[]")

    def remove(self) -> None:
        """Delete the store, of which nothing is mounted any more.

        :raises StoreError: something cannot be deleted
        """
        with translate_oserror(self.path):
            remove_tree(self.path)

    # Parts

    @contextlib.contextmanager
    def _below_mounts(self) -> t.Iterator[str]:
        """A path to the folder of mount points through which covered files are visible."""
        bare = mounts.without_submounts(self.mount_points)
        try:
            yield f"/proc/self/fd/{bare}"
        finally:
            os.close(bare)

    def _path(self, name: str) -> str:
        return os.path.join(self.path, name) if name else self.path

    def _read(self, name: str) -> bytes:
        try:
            with open(self._path(name), "rb") as file:
                return file.read()
        except OSError:
            return b""

    def _folders(self, name: str) -> t.Iterator[str]:
        with contextlib.suppress(FileNotFoundError), os.scandir(self._path(name)) as entries:
            for entry in entries:
                if _ID.fullmatch(entry.name):
                    yield entry.name

    def _diff(self, layer: SharedLayer) -> str:
        """The target of a layer's ``diff``; containers/storage only supports absolute links."""
        return os.path.join(self.mount_point(layer.view), layer.source, "diff")

    def _layer_folder(self, layer_id: str) -> str:
        return self._path(f"{_DRIVER}/{layer_id}")

    def _is_whole(self, layer: SharedLayer) -> bool:
        folder = self._layer_folder(layer.layer_id)
        try:
            link = os.readlink(self._path(f"{_DRIVER}/{_LINKS}/{short_name(layer.layer_id)}"))
            if os.readlink(os.path.join(folder, "diff")) != self._diff(layer):
                return False
        except OSError:
            return False
        for name, text in _layer_files(layer).items():
            if self._read(f"{_DRIVER}/{layer.layer_id}/{name}") != text:
                return False
        if layer.tar_split and not os.path.exists(self._tar_split(layer.layer_id)):
            return False
        return link == f"../{layer.layer_id}/diff"

    def _tar_split(self, layer_id: str) -> str:
        return self._path(f"{_LAYERS}/{layer_id}.tar-split.gz")

    def _write_layer(self, layer: SharedLayer) -> None:
        folder = self._layer_folder(layer.layer_id)
        if not os.path.isdir(folder):
            temporary = folder + _TEMPORARY
            _remove(os.path.dirname(temporary), os.path.basename(temporary))
            os.mkdir(temporary, _DIRECTORY_MODE)
            os.symlink(self._diff(layer), os.path.join(temporary, "diff"))
            for name, text in _layer_files(layer).items():
                _write_new(os.path.join(temporary, name), text)
            os.rename(temporary, folder)
        else:
            _replace_link(self._diff(layer), os.path.join(folder, "diff"))
            for name, text in _layer_files(layer).items():
                _write(os.path.join(folder, name), text)
        short = self._path(f"{_DRIVER}/{_LINKS}/{short_name(layer.layer_id)}")
        _replace_link(f"../{layer.layer_id}/diff", short)
        if layer.tar_split:
            _replace_hard_link(layer.tar_split, self._tar_split(layer.layer_id))

    def _write_image_data(self, image: SharedImage) -> None:
        folder = self._path(f"{_IMAGES}/{image.image_id}")
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, _DIRECTORY_MODE)
        for name, source in image.data.items():
            _replace_hard_link(source, os.path.join(folder, name))
        for name in os.listdir(folder):
            if name not in image.data:
                os.unlink(os.path.join(folder, name))

    def _drop_others(self, content: SharedContent) -> None:
        images = {image.image_id for image in content.images}
        for image_id in list(self._folders(_IMAGES)):
            if image_id not in images:
                _remove(self._path(_IMAGES), image_id)
        layers = {layer.layer_id for layer in content.layers}
        links = {short_name(layer_id) for layer_id in layers}
        for name in os.listdir(self._path(f"{_DRIVER}/{_LINKS}")):
            if name not in links:
                os.unlink(self._path(f"{_DRIVER}/{_LINKS}/{name}"))
        for name in os.listdir(self._path(_DRIVER)):
            if name != _LINKS and name not in layers:
                _remove(self._path(_DRIVER), name)
        for name in os.listdir(self._path(_LAYERS)):
            layer_id, _dot, rest = name.partition(".")
            if rest == "tar-split.gz" and layer_id not in layers:
                os.unlink(self._path(f"{_LAYERS}/{name}"))

    def _create_lock(self, name: str) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(self._path(name), flags, _FILE_MODE)
        try:
            os.fchmod(descriptor, _FILE_MODE)
        finally:
            os.close(descriptor)

    def _replace(self, name: str, lock: str, data: bytes) -> None:
        if self._read(name) == data:
            return
        self._touch(lock)
        _write(self._path(name), data, sync=True)
        self._touch(lock)

    def _touch(self, lock: str) -> None:
        descriptor = os.open(self._path(lock), os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            os.pwrite(descriptor, fresh_token(), 0)
        finally:
            os.close(descriptor)


def _sources(content: SharedContent) -> t.Dict[str, t.Set[str]]:
    """The layers of the real store that each view shows."""
    found: t.Dict[str, t.Set[str]] = {}
    for layer in content.layers:
        found.setdefault(layer.view, set()).add(layer.source)
    return found


def _layer_records(content: SharedContent) -> bytes:
    return _array(layer.record for layer in content.layers if layer.record)


def _image_records(content: SharedContent) -> bytes:
    return _array(image.record for image in content.images)


def _array(records: t.Iterable[bytes]) -> bytes:
    return b"[" + b",".join(records) + b"]"


def _layer_files(layer: SharedLayer) -> t.Dict[str, bytes]:
    files = {"link": short_name(layer.layer_id).encode()}
    if layer.lowers:
        links = (f"{_LINKS}/{short_name(lower)}" for lower in layer.lowers)
        files["lower"] = ":".join(links).encode()
        files["lower-layers"] = ":".join(layer.lowers).encode()
    return files


def _write_new(path: str, data: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(path, flags, _FILE_MODE)
    try:
        os.fchmod(descriptor, _FILE_MODE)
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
    finally:
        os.close(descriptor)


def _write(path: str, data: bytes, sync: bool = False) -> None:
    temporary = path + _TEMPORARY
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    _write_new(temporary, data)
    if sync:
        descriptor = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fdatasync(descriptor)
        finally:
            os.close(descriptor)
    os.rename(temporary, path)


def _replace_link(target: str, path: str) -> None:
    with contextlib.suppress(OSError):
        if os.readlink(path) == target:
            return
    temporary = path + _TEMPORARY
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    os.symlink(target, temporary)
    os.rename(temporary, path)


def _replace_hard_link(source: str, path: str) -> None:
    with contextlib.suppress(OSError):
        if os.path.samestat(os.lstat(source), os.lstat(path)):
            return
    temporary = path + _TEMPORARY
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    os.link(source, temporary, follow_symlinks=False)
    os.rename(temporary, path)


def _remove(parent: str, name: str) -> None:
    """Delete a file or a folder without following links."""
    path = os.path.join(parent, name)
    try:
        kind = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(kind):
        os.unlink(path)
        return
    remove_tree(path)
