# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This module util is PRIVATE to the userns.storage collection.
"""The store of root whose layers are shared with users."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import typing as t

from ..errors import (
    ConfigError,
    StorageError,
    UnsupportedDriver,
)
from ..kernel import namespaces
from ..kernel.oserrors import translate_oserror
from ..runtime.detect import Runtime, detect, installed
from ..store.config import StoreConfig
from ..store.fields import Raw
from ..store.records import Image
from ..store.snapshot import Snapshot
from ..store.store import Store
from ..tree import lookup
from ..tree.merged import LayerStack
from ..tree.opaque import mark_for_users
from .image_patterns import Patterns, image_terms
from .shared_content import Planner, names_of
from .shared_declarations import GRAPHROOT, STORES, store_key
from .shared_pins import PIN
from .store_opening import StoreRequest, configured

_COPIES = "copies"
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
DRIVER = "overlay"


class RealStore:
    """Root's store, whose layers are shown to users.

    :param needed: whether its layers are needed; otherwise the store may be missing

    :raises StorageError: it cannot be read, or its layers cannot be shown
    """

    def __init__(self, request: StoreRequest, needed: bool = True) -> None:
        self.request = request
        self.config: StoreConfig = configured(request)
        self.overlay = os.path.join(self.config.graphroot, DRIVER)
        self.store = Store(self.config, request.lock_timeout)
        self.snapshot = Snapshot()
        try:
            self.store = Store.open(self.config, request.lock_timeout)
            self.snapshot = self.store.snapshot()
        except StorageError:
            if needed:
                raise
        if needed:
            self._refuse_unsupported()
        # Versions reported by programs.
        self.programs: t.Dict[str, str] = {}
        self._account_files: t.Dict[str, t.Mapping[str, t.Optional[str]]] = {}
        self.copies = os.path.join(STORES, _COPIES, store_key(self.config.graphroot))
        self.planner = Planner(self.snapshot, self.overlay, self._tar_split, self._image_data)

    def _refuse_unsupported(self) -> None:
        config = self.config
        if config.driver != DRIVER:
            raise UnsupportedDriver(
                config.graphroot,
                f"is a store of driver {config.driver}, and only those of overlay can be shared",
                f"Name another graphroot, or none for {GRAPHROOT}.",
            )
        for option in ("mount_program", "force_mask", "use_composefs"):
            if config.options.get(option) not in (None, "", "false"):
                raise UnsupportedDriver(
                    config.graphroot,
                    f"is used with {option}, so its files do not carry the owners to be shown",
                    "Share a store without that option.",
                )
        if not namespaces.idmap_probe(self.overlay):
            raise UnsupportedDriver(
                config.graphroot,
                "cannot be shared: the kernel or the filesystem takes no ID-mapped mounts there",
                "ext4, xfs and btrfs take them from Linux 5.19 on. Pre-map images for each user "
                "with userns.storage.layer_template instead.",
            )

    @functools.cached_property
    def runtime(self) -> Runtime:
        """The runtime of the host, which the users are assumed to use.

        :raises ConfigError: no runtime is installed
        """
        runtime = detect(None, self.programs)
        with contextlib.suppress(ConfigError):
            # The processes for users' stores inherit the answers.
            tuple(installed())
        if runtime is None:
            raise ConfigError(
                "podman",
                "is not installed, and how it learns of a shared store depends on its version",
                "Install it first, for example with the role userns.storage.prepare.",
            )
        return runtime

    def account_files(self, image: Image) -> t.Mapping[str, t.Optional[str]]:
        """The texts of an image's passwd and group files, by path.

        :raises StorageError: the image's layers cannot be read
        """
        if image.id not in self._account_files:
            folders = [
                os.path.join(self.overlay, layer.id, "diff") for layer in self.planner.chain(image)
            ]
            with translate_oserror(self.overlay), LayerStack(folders, "trusted") as stack:
                self._account_files[image.id] = {
                    path: lookup.read_text(stack, path) for path in ("etc/passwd", "etc/group")
                }
        return self._account_files[image.id]

    def images(self, patterns: t.Sequence[str]) -> t.List[Image]:
        """The images whose names match patterns, without those of additional stores."""
        chosen = Patterns(patterns)
        return [
            image
            for image in self.snapshot.images.values()
            if not image.store
            and names_of(image)
            and chosen.hit(image_terms((image.id,), names_of(image)))
        ]

    def _tar_split(self, layer_id: str) -> str:
        exists = os.path.exists(self.store.tar_split_path(layer_id))
        return os.path.join(self.copies, f"{layer_id}.tar-split.gz") if exists else ""

    def _image_data(self, image: Image) -> t.Dict[str, str]:
        folder = self.store.image_data_dir(image.id)
        with contextlib.suppress(FileNotFoundError):
            return {
                name: os.path.join(self.copies, f"{image.id}-{name}")
                for name in sorted(os.listdir(folder))
            }
        return {}

    def copy_records(self, images: t.Iterable[Image]) -> None:
        """Copy the files beside the records once for all users, and mark opaque directories for users.

        :raises StoreError: a file cannot be read or written
        """
        with translate_oserror(self.copies):
            os.makedirs(self.copies, 0o700, exist_ok=True)
            for image in images:
                folder = self.store.image_data_dir(image.id)
                for name, target in self._image_data(image).items():
                    _copy(os.path.join(folder, name), target)
                for layer in self.planner.chain(image):
                    done = os.path.join(self.copies, f"{layer.id}.marked")
                    if os.path.exists(done):
                        continue
                    target = self._tar_split(layer.id)
                    if target:
                        _copy(self.store.tar_split_path(layer.id), target)
                    path = os.path.join(self.overlay, layer.id, "diff")
                    descriptor = os.open(path, _DIRECTORY)
                    try:
                        mark_for_users(descriptor)
                    finally:
                        os.close(descriptor)
                    _copy(os.devnull, done)

    def drop_copies(self, kept: t.Iterable[Image]) -> None:
        """Delete the copies that none of these images needs."""
        ids = {image.id for image in kept}
        ids.update(layer.id for image in kept for layer in self.planner.chain(image))
        with contextlib.suppress(OSError):
            for name in os.listdir(self.copies):
                if name[:64] not in ids:
                    os.unlink(os.path.join(self.copies, name))
            if not ids:
                for folder in (self.copies, os.path.dirname(self.copies), STORES):
                    os.rmdir(folder)

    def pin(self, held: t.Container[str]) -> t.List[str]:
        """Set a name of this collection on images in users' stores, and remove it from all others.

        :param held: IDs of the images in users' stores
        :returns: IDs of the images that have no name left
        """
        changes = {}
        for image in self.snapshot.images.values():
            name = f"{PIN}:{image.id[:12]}"
            if not image.store and (name in image.names) != (image.id in held):
                changes[image.id] = name
        nameless = []
        if changes:
            with self.store.transaction() as transaction:
                transaction.update_images(
                    {
                        image_id: functools.partial(_set_name, name=name, add=image_id in held)
                        for image_id, name in changes.items()
                        if image_id in transaction.snapshot.images
                    }
                )
            self.snapshot = self.store.snapshot()
            for image_id in changes:
                left = self.snapshot.images.get(image_id)
                if left is not None and not left.names:
                    nameless.append(image_id)
        return nameless


def _set_name(raw: Raw, name: str, add: bool) -> None:
    names = [known for known in raw.get("names") or () if known != name]
    if add:
        names.append(name)
    if names:
        raw["names"] = names
    else:
        raw.pop("names", None)


def _copy(source: str, target: str) -> None:
    if os.path.exists(target):
        return
    temporary = f"{target}.new"
    with open(source, "rb") as old, open(temporary, "wb") as new:
        shutil.copyfileobj(old, new)
    os.chmod(temporary, 0o644)
    os.rename(temporary, target)
