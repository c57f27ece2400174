# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This module util is PRIVATE to the userns.storage collection.
"""Which store is meant, and that store opened: its configuration, records and driver."""

from __future__ import annotations

import contextlib
import os
import pwd
import typing as t
from dataclasses import dataclass

from ..drivers.base import Driver, DriverHome
from ..drivers.registry import open_driver
from ..drivers.view import view_of
from ..errors import ConfigError, PermissionDenied
from ..kernel import files
from ..store.config import Account, StoreConfig, StoreOverrides, discover
from ..store.store import Store
from ..tree.craft import Craft


@dataclass(frozen=True)
class StoreRequest:
    """The store options of a module. Empty strings are options not given.

    :param account: whose rootless store it is; None for the rootful one
    :param lock_timeout: seconds
    """

    account: t.Optional[Account] = None
    storage_conf: str = ""
    graphroot: str = ""
    runroot: str = ""
    driver: str = ""
    storage_options: t.Tuple[str, ...] = ()
    lock_timeout: float = 60.0


@dataclass(frozen=True)
class OpenStore:
    """One store, opened: its configuration, its records and its driver."""

    config: StoreConfig
    store: Store
    driver: Driver
    account: t.Optional[Account]

    def destroy(self, parent: int, name: str) -> bool:
        """Delete an entry of staging or trash in one piece, as ``Driver.destroy`` does. Not under the store's locks.

        If a place is still held for a layer of that name it goes first, so that a kill between the two leaves the
        entry to tell; but it stays while there is a record, for runtimes fail on a record without data.
        """
        if self.driver.holds(name) and name not in self.store.snapshot().layers:
            self.driver.vacate(name)
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
    mine = os.geteuid()
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
            f"its store cannot be entered by UID {mine}",
            f"Run the task with become: true, or with become_user: {name} and without user.",
        )
    if entry.pw_uid == 0:
        return None
    return Account(entry.pw_name, entry.pw_uid, entry.pw_gid, entry.pw_dir)


def configured(request: StoreRequest) -> StoreConfig:
    """The configuration of the store that ``request`` names. Writes nothing.

    :raises StorageError: it cannot be read, or names no store
    """
    return discover(
        StoreOverrides(
            storage_conf=request.storage_conf,
            graphroot=request.graphroot,
            runroot=request.runroot,
            driver=request.driver,
            storage_options=request.storage_options,
        ),
        os.environ,
        request.account,
        rootless=request.account is not None,
    )


@contextlib.contextmanager
def opened(request: StoreRequest, craft: t.Optional[Craft] = None) -> t.Iterator[OpenStore]:
    """Open the store that ``request`` names. Writes nothing.

    To be called inside :func:`..userns.run`: it makes mounts in the caller's private mount namespace.

    :param craft: for those who may make layers, ``tree.workshop.CRAFT``
    :raises StorageError: the store is not to be found, not readable, or of an unsupported kind
    """
    config = configured(request)
    Store.open(config)
    with contextlib.ExitStack() as undo:
        view = undo.enter_context(view_of(config.graphroot, config.driver))
        store = Store.open(config, lock_timeout=request.lock_timeout)
        home = DriverHome(
            graphroot=config.graphroot,
            runroot=config.runroot,
            options=config.options,
            rootless=config.rootless,
            view=view,
            image_stores=tuple(filter(None, (config.imagestore, *config.additional_image_stores))),
            craft=craft,
        )
        yield OpenStore(
            config,
            store,
            open_driver(config.driver, home),
            request.account,
        )
