# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Determine the store of a task and open it: configuration, records and driver."""

from __future__ import annotations

import contextlib
import functools
import os
import pwd
import shutil
import typing as t
from dataclasses import dataclass, field

from ..drivers.base import Driver, DriverHome, ShortNames
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
    """The table of the options of a store. Empty texts are options that are not given.

    :param account: the owner of the rootless store; None for the rootful store
    :param runtime: the program that uses the store, optionally with a version
    :param allow_untested_runtime: write even if a program is newer than the tested versions
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
    """Create a request from the options of a task or a configuration.

    :param account: as in :class:`StoreRequest`
    """
    return StoreRequest(account, **given(STORE_OPTIONS, params))


@dataclass(frozen=True)
class OpenStore:
    """An open store: its configuration, its records and its driver."""

    config: StoreConfig
    store: Store
    driver: Driver
    account: t.Optional[Account]
    # The open graphroot, which keeps it from being unmounted; None if that is not possible.
    held: t.Optional[int] = None

    def ensure_still_there(self) -> None:
        """Check that the graphroot is still the directory that was opened, before success is reported.

        :raises StoreError: it was unmounted or replaced
        """
        if self.held is None:
            return
        expected, found = os.fstat(self.held), None
        try:
            now = namespaces.open_on_host(os.path.realpath(self.config.graphroot))
            try:
                found = os.fstat(now)
            finally:
                os.close(now)
        except OSError:
            found = None
        if found is None or (found.st_dev, found.st_ino) != (expected.st_dev, expected.st_ino):
            raise StoreError(
                self.config.graphroot,
                "was unmounted or replaced while the task was running",
                "Mount the store's filesystem again, then run the task again.",
            )

    def destroy(self, parent: int, name: str) -> bool:
        """Delete an entry of staging or trash as a whole, as ``Driver.destroy`` does. Not called under the store's
        locks.

        A placeholder for a layer of that name is removed first, so that after a kill between the two steps the entry
        still identifies it. It is kept as long as there is a record, because runtimes fail on a record without data.
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
    """The owner of the rootless store for the option ``user``; None for the rootful store.

    :param name: a user's name, or None for the current user
    :raises ConfigError: no such user
    :raises PermissionDenied: it is another user, and this process does not run as root
    """
    # Inside podman unshare, root is the user who started it.
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


def _short_names() -> ShortNames:
    """How the runtimes of this host use short names; as old runtimes if none is known."""
    installed = [name for name, program in PROGRAMS.items() if shutil.which(program)]
    try:
        known = [item for item in map(detect, installed) if item is not None]
    except (StorageError, OSError):
        known = []
    new = {item.capabilities.reads_lower_layers for item in known}
    return ShortNames(needed=False in new, restored=True not in new) if new else ShortNames()


@contextlib.contextmanager
def opened(
    request: StoreRequest, tree_tools: t.Optional[TreeTools] = None, read_only: bool = False
) -> t.Iterator[OpenStore]:
    """Open the store that ``request`` names. Writes nothing.

    Must be called inside :func:`..userns.run`, because it creates mounts in the caller's private mount namespace.

    :param tree_tools: the functions that create trees, for operations that create layers; see
        ``layer_building.TREE_TOOLS``
    :param read_only: whether nothing may be written later, as in check mode
    :raises StorageError: the store does not exist, is not readable, or of an unsupported kind
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
            short_names=functools.lru_cache(maxsize=None)(_short_names),
        )
        yield OpenStore(
            config,
            store,
            open_driver(config.driver, home),
            request.account,
            held,
        )


def _hold(undo: contextlib.ExitStack, graphroot: str) -> t.Optional[int]:
    """The graphroot, opened through the host's mounts; None if that is not possible."""
    try:
        held = namespaces.open_on_host(graphroot)
    except OSError:
        return None
    undo.callback(os.close, held)
    return held
