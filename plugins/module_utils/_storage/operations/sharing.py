# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Find the users of a store, including other stores that use it as an additional image store.

Containers of such stores may use layers of this store, without records in this store.
"""

from __future__ import annotations

import contextlib
import glob
import os
import typing as t
from dataclasses import asdict, dataclass

from ..capabilities import RELEASE_OF_EACH_LOADER
from ..errors import ConfigError, StorageError
from ..kernel import mounts
from ..store import conf_crio
from ..store.conf_values import FILE_VARIABLE, OVERRIDE_VARIABLE, Checked, read_file, split_options
from ..store.config import CRI_O
from .store_opening import OpenStore, StoreRequest, configured

# A file in the collection's folder, with which the owner declares that other stores read the store.
MARKER = "shared"
_FOLDERS = ("/etc/containers", "/usr/share/containers")
_DROP_INS = ("storage.conf.d", "storage.rootful.conf.d", "storage.rootless.conf.d")

# The kinds of uses of a store.
MAIN = "main"
IMAGESTORE = "imagestore"
ADDITIONAL = "additional"
DECLARED = "declared"
MOUNTED = "mounted"
UNKNOWN = "unknown"


@dataclass(frozen=True)
class StoreUse:
    """A use of a store.

    :ivar kind: ``main`` (containers are created in it), ``imagestore``, ``additional`` (read as an additional image
        store), ``declared`` (by the marker file), ``mounted`` (a container of another store is mounted) or ``unknown``
        (a file of the configuration cannot be read; running programs may have read it earlier)
    :ivar program: "cri-o" for CRI-O's configuration; "podman" for storage.conf, which other programs read too;
        otherwise empty
    :ivar source: the file, the mount point, or "default"
    """

    kind: str
    program: str
    source: str

    def __str__(self) -> str:
        return {
            MAIN: f"{self.source} makes this the main store of {self.program}",
            IMAGESTORE: f"{self.source} makes this the imagestore of {self.program}",
            ADDITIONAL: f"{self.source} lists this store in "
            + ("storage_option" if self.program == CRI_O else "additionalimagestores"),
            DECLARED: f"{self.source} declares that other stores use this store",
            MOUNTED: f"the container mounted at {self.source} belongs to another store",
            UNKNOWN: f"{self.source} cannot be read, so it is unknown whether it names this store",
        }[self.kind]


def uses(store_ctx: OpenStore) -> t.List[StoreUse]:
    """The known uses of this store.

    Examines the configuration of the host and of the store's own user, the marker file, and overlay mounts of other
    stores in this mount namespace. Other users' configuration is not read.
    """
    here = _Directory(store_ctx.config.graphroot)
    found = list(_loaded(store_ctx, here))
    marker = os.path.join(store_ctx.store.root, MARKER)
    if os.path.lexists(marker):
        found.append(StoreUse(DECLARED, "", marker))
    for path in _configurations(store_ctx):
        found += _storage_conf(path, here, store_ctx.account is not None)
    if store_ctx.account is None:
        found += _crio(here)
    for variable, program in (("STORAGE_OPTS", "podman"), ("CONTAINER_STORAGE_OPT", CRI_O)):
        if _is_in_options(os.environ.get(variable, "").split(","), here):
            found.append(StoreUse(ADDITIONAL, program, variable))
    for entry in mounts.entries():
        if entry.fstype == "overlay" and _rests_on(entry.super_options, here):
            found.append(StoreUse(MOUNTED, "", entry.mount_point))
    return list(dict.fromkeys(found))


def readers(store_ctx: OpenStore) -> str:
    """The known readers of this store for which it is not the main store, as text; empty if there are none."""
    return next((str(use) for use in uses(store_ctx) if use.kind != MAIN), "")


def uses_result(store_ctx: OpenStore) -> t.List[t.Dict[str, t.Any]]:
    """The uses as modules return them."""
    return [{**asdict(use), "description": str(use)} for use in uses(store_ctx)]


class _Directory:
    """The graph root, identified by any path: a link or a bind mount."""

    def __init__(self, path: str) -> None:
        self.path = os.path.realpath(path)
        self._identity = _identity(path)
        self._found: t.Dict[str, bool] = {"": False}

    def is_named(self, path: str) -> bool:
        """Whether a path leads to it."""
        if path not in self._found:
            same = os.path.realpath(path) == self.path
            self._found[path] = same or (
                self._identity is not None and _identity(path) == self._identity
            )
        return self._found[path]

    def is_named_in(self, paths: str) -> bool:
        """Whether one of the paths between commas leads to it."""
        return any(self.is_named(path.strip()) for path in paths.split(","))


def _identity(path: str) -> t.Optional[t.Tuple[int, int]]:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def _loaded(store_ctx: OpenStore, here: _Directory) -> t.Iterator[StoreUse]:
    """The uses in the configuration as programs load it, with the variables of this process."""
    programs = ["podman"]
    if store_ctx.account is None:
        with contextlib.suppress(ConfigError):
            if any(map(os.path.lexists, conf_crio.files(os.environ))):
                programs.append(CRI_O)
    for program in programs:
        for version in RELEASE_OF_EACH_LOADER[program]:
            with contextlib.suppress(StorageError):
                request = StoreRequest(store_ctx.account, runtime=f"{program} {version}")
                config = configured(request)
                sources = config.sources
                if here.is_named(config.graphroot):
                    yield StoreUse(MAIN, program, sources.get("graphroot", "default"))
                elif here.is_named(config.imagestore):
                    yield StoreUse(IMAGESTORE, program, sources.get("imagestore", "default"))
                elif any(map(here.is_named, config.additional_image_stores)):
                    yield StoreUse(ADDITIONAL, program, sources.get("options", "default"))


def _configurations(store_ctx: OpenStore) -> t.Iterator[str]:
    for variable in (FILE_VARIABLE, OVERRIDE_VARIABLE):
        if os.environ.get(variable):
            yield os.environ[variable]
    folders = list(_FOLDERS)
    if store_ctx.account is not None:
        folders.append(os.path.join(store_ctx.account.home, ".config", "containers"))
    for folder in folders:
        yield os.path.join(folder, "storage.conf")
        for name in _DROP_INS:
            yield from sorted(glob.glob(os.path.join(glob.escape(folder), name, "*.conf")))


def _storage_conf(path: str, here: _Directory, of_user: bool) -> t.Iterator[StoreUse]:
    """The uses that a storage.conf names, even if no runtime of this host reads it.

    :param of_user: whether the store belongs to a user, whose runtimes ignore files that the user cannot read
    """
    if not os.path.exists(path) or (of_user and not os.access(path, os.R_OK)):
        return
    try:
        checked = Checked(path)
        storage = checked.table(read_file(path), "storage")
        imagestore = checked.text(storage, "imagestore") or ""
        named = checked.appended(checked.table(storage, "options"), "additionalimagestores")
    except ConfigError:
        yield StoreUse(UNKNOWN, "podman", path)
        return
    if here.is_named(imagestore):
        yield StoreUse(IMAGESTORE, "podman", path)
    if named and any(map(here.is_named_in, named[0])):
        yield StoreUse(ADDITIONAL, "podman", path)


def _crio(here: _Directory) -> t.Iterator[StoreUse]:
    """The uses that CRI-O's configuration names."""
    try:
        paths = list(conf_crio.files(os.environ))
    except ConfigError as error:
        yield StoreUse(UNKNOWN, CRI_O, error.subject)
        return
    for path in filter(os.path.exists, paths):
        try:
            file = conf_crio.read_crio_file(path)
        except ConfigError:
            yield StoreUse(UNKNOWN, CRI_O, path)
            continue
        if here.is_named(file.values["imagestore"] or ""):
            yield StoreUse(IMAGESTORE, CRI_O, path)
        if _is_in_options(file.options, here):
            yield StoreUse(ADDITIONAL, CRI_O, path)


def _is_in_options(options: t.Iterable[str], here: _Directory) -> bool:
    """Whether options of any driver name the directory as an additional image store."""
    for option in options:
        driver = option.partition(".")[0].strip().lower()
        _options, stores, _layers = split_options(driver, [option])
        if any(map(here.is_named, stores)):
            return True
    return False


def _rests_on(options: t.Sequence[str], here: _Directory) -> bool:
    """Whether an overlay mount of another store has lower layers of this store."""
    upper = lower = False
    for option in options:
        name, _mark, value = option.partition("=")
        inside = any(_is_inside(part, here) for part in value.split(":"))
        if name == "upperdir":
            upper = bool(value) and not inside
        elif name.startswith("lowerdir"):
            lower = lower or inside
    return upper and lower


def _is_inside(path: str, here: _Directory) -> bool:
    """Whether a directory of an overlay mount is inside the store; podman writes GRAPHROOT/overlay/..."""
    graphroot = path.rpartition("/overlay/")[0]
    return path.startswith(f"{here.path}/") or here.is_named(graphroot)
