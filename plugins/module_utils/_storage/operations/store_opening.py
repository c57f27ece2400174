# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Determine the store that a task means, and open it: configuration, records and driver."""

from __future__ import annotations

import contextlib
import functools
import os
import pwd
import shutil
import typing as t
from dataclasses import dataclass, field

from ..drivers.base import Driver, DriverHome
from ..drivers.registry import open_driver
from ..drivers.view import view_of
from ..errors import ConfigError, PermissionDenied, StorageError, StoreError
from ..kernel import files, namespaces
from ..kernel.oserrors import namespace_owner
from ..runtime.detect import PROGRAMS, detect
from ..store.config import Account, StoreConfig, StoreOverrides
from ..store.store import Store
from ..tree.tree_tools import TreeTools
from .configuration import configuration, untested
from .options import Option, as_option, given, options_of


@dataclass(frozen=True)
class StoreRequest:
    """The table of the options of a store. Empty texts are options not given.

    :param account: whose rootless store it is; None for the rootful one
    :param runtime: the program whose store it is, optionally with a version
    :param allow_untested_runtime: write even where a program is newer than was tested
    :param lock_timeout: seconds
    """

    account: t.Optional[Account] = None
    storage_conf: str = field(default="", metadata=as_option(Option("path")))
    graphroot: str = field(default="", metadata=as_option(Option("path")))
    runroot: str = field(default="", metadata=as_option(Option("path")))
    driver: str = field(default="", metadata=as_option(Option()))
    storage_options: t.Tuple[str, ...] = field(default=(), metadata=as_option(Option("list", ())))
    runtime: str = field(default="", metadata=as_option(Option()))
    allow_untested_runtime: bool = field(default=False, metadata=as_option(Option("bool", False)))
    lock_timeout: float = field(default=60.0, metadata=as_option(Option("int", 60)))


STORE_OPTIONS = options_of(StoreRequest, Option)


def store_request(account: t.Optional[Account], params: t.Mapping[str, t.Any]) -> StoreRequest:
    """A request from options as a task or a configuration gives them.

    :param account: as in :class:`StoreRequest`
    """
    return StoreRequest(account, **given(STORE_OPTIONS, params))


@dataclass(frozen=True)
class OpenStore:
    """One store, opened: its configuration, its records and its driver."""

    config: StoreConfig
    store: Store
    driver: Driver
    account: t.Optional[Account]
    # The graphroot, held open so that it is not unmounted meanwhile; None where it cannot be held.
    held: t.Optional[int] = None

    def ensure_still_there(self) -> None:
        """Check that the graphroot is still the directory that was opened, before success is reported.

        :raises StoreError: it was unmounted, or something else lies there now
        """
        if self.held is None:
            return
        wanted, found = os.fstat(self.held), None
        try:
            now = namespaces.open_on_host(os.path.realpath(self.config.graphroot))
            try:
                found = os.fstat(now)
            finally:
                os.close(now)
        except OSError:
            found = None
        if found is None or (found.st_dev, found.st_ino) != (wanted.st_dev, wanted.st_ino):
            raise StoreError(
                self.config.graphroot,
                "was unmounted or replaced while the task was running",
                "Mount the store's filesystem again, then run the task again.",
            )

    def destroy(self, parent: int, name: str) -> bool:
        """Delete an entry of staging or trash in one piece, as ``Driver.destroy`` does. Not under the store's locks.

        If a place is still held for a layer of that name it goes first, so that a kill between the two leaves the
        entry to tell; but it stays while there is a record, for runtimes fail on a record without data.
        """
        if self.driver.is_placeholder(name) and name not in self.store.snapshot().layers:
            self.driver.remove_placeholder(name)
        return self.driver.destroy(parent, name)

    def describe(self, shifting: t.Optional[bool] = None) -> t.Dict[str, t.Any]:
        """The ``store`` entry of a module's result."""
        return {
            "graphroot": self.config.graphroot,
            "runroot": self.config.runroot,
            "driver": self.config.driver,
            "backing_filesystem": files.filesystem_type(self.config.graphroot),
            "rootless": self.config.rootless,
            "shifting": shifting,
        }


def account_named(name: t.Optional[str]) -> t.Optional[Account]:
    """Whose rootless store is meant by the option ``user``; None for the rootful store.

    :param name: a user's name, or None for whoever runs this
    :raises ConfigError: no such user
    :raises PermissionDenied: it is somebody else, and this does not run as root
    """
    # Inside podman unshare root is the user who has started it.
    mine = namespace_owner() or os.geteuid()
    try:
        entry = pwd.getpwnam(name) if name else pwd.getpwuid(mine)
    except KeyError:
        if not name and mine == 0:
            return None
        raise ConfigError(
            f"user {name or mine}", "no such user on this host", "Check: getent passwd"
        ) from None
    if mine not in (0, entry.pw_uid):
        raise PermissionDenied(
            f"user {name}",
            f"its store cannot be used by UID {mine}",
            f"Run the task with become: true, or with become_user: {name} and without user.",
        )
    if entry.pw_uid == 0:
        return None
    return Account(entry.pw_name, entry.pw_uid, entry.pw_gid, entry.pw_dir)


def configured(request: StoreRequest) -> StoreConfig:
    """The configuration of the store that ``request`` names. Writes nothing.

    :raises StorageError: it cannot be read, or names no store
    """
    return configuration(
        StoreOverrides(
            storage_conf=request.storage_conf,
            graphroot=request.graphroot,
            runroot=request.runroot,
            driver=request.driver,
            storage_options=request.storage_options,
        ),
        os.environ,
        request.account,
        request.runtime,
    )


def _need_short_names() -> bool:
    """Whether one of the runtimes of this host reads layers by their short names; so it is where none is known."""
    installed = [name for name, program in PROGRAMS.items() if shutil.which(program)]
    try:
        known = [item for item in map(detect, installed) if item is not None]
    except (StorageError, OSError):
        return True
    return not known or not all(item.capabilities.reads_lower_layers for item in known)


@contextlib.contextmanager
def opened(
    request: StoreRequest, tree_tools: t.Optional[TreeTools] = None, read_only: bool = False
) -> t.Iterator[OpenStore]:
    """Open the store that ``request`` names. Writes nothing.

    To be called inside :func:`..userns.run`: it makes mounts in the caller's private mount namespace.

    :param tree_tools: the functions that make trees, for operations that make layers; see ``layer_building.TREE_TOOLS``
    :param read_only: whether nothing at all may be written later, as in check mode
    :raises StorageError: the store is not to be found, not readable, or of an unsupported kind
    """
    config = configured(request)
    Store.open(config)
    with contextlib.ExitStack() as undo:
        held = _hold(undo, os.path.realpath(config.graphroot))
        view = undo.enter_context(view_of(config.graphroot, config.driver))
        rootless = request.account is not None
        ask = functools.partial(untested, rootless, request.runtime)
        store = Store.open(
            config,
            lock_timeout=request.lock_timeout,
            untested=None if request.allow_untested_runtime else ask,
        )
        home = DriverHome(
            graphroot=config.graphroot,
            runroot=config.runroot,
            options=config.options,
            rootless=config.rootless,
            view=view,
            image_stores=tuple(filter(None, (config.imagestore, *config.additional_image_stores))),
            tree_tools=tree_tools,
            read_only=read_only,
            needs_short_names=functools.lru_cache(maxsize=None)(_need_short_names),
        )
        yield OpenStore(
            config,
            store,
            open_driver(config.driver, home),
            request.account,
            held,
        )


def _hold(undo: contextlib.ExitStack, graphroot: str) -> t.Optional[int]:
    """The graphroot, open as the host sees it; None where it cannot be opened that way."""
    try:
        held = namespaces.open_on_host(graphroot)
    except OSError:
        return None
    undo.callback(os.close, held)
    return held
