# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Open drivers on stores of real runtimes in the child process of operations."""

from __future__ import annotations

import contextlib
import os
import typing as t

from ansible_collections.userns.storage.plugins.module_utils._storage.drivers.base import (
    Driver,
    DriverHome,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.drivers.registry import (
    open_driver,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.drivers.view import view_of
from ansible_collections.userns.storage.plugins.module_utils._storage.operations.layer_building import (
    TREE_TOOLS,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.store.config import (
    Account,
    StoreConfig,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.userns import (
    running as userns,
)

if t.TYPE_CHECKING:
    from .stores import Store


class StoreDescription(t.NamedTuple):
    """The description of a store for a child process."""

    driver: str
    graphroot: str
    runroot: str
    options: t.Dict[str, str]
    rootless: bool
    image_stores: t.Tuple[str, ...] = ()


def describe_store(store: Store) -> StoreDescription:
    """The description of a store for a child process."""
    return StoreDescription(
        store.driver,
        str(store.graphroot),
        str(store.runroot),
        dict(store.options),
        store.user is not None,
        tuple(store.read_only),
    )


def run_as_owner(store: Store, function: t.Callable[..., t.Any], *arguments: t.Any) -> t.Any:
    """Run a function as the store's owner; its first argument is the description of the store."""
    user = store.user
    account = Account(user.name, user.uid, user.gid, user.home) if user else None
    return userns.run(function, [describe_store(store), *arguments], account)


@contextlib.contextmanager
def open_test_driver(
    description: StoreDescription, make: t.Callable[[str, DriverHome], Driver] = open_driver
) -> t.Iterator[Driver]:
    """The driver of a store, in the view of operations.

    :param make: creates the driver from its name in storage.conf
    """
    with contextlib.ExitStack() as undo:
        view = undo.enter_context(view_of(description.graphroot, description.driver))
        home = DriverHome(
            description.graphroot,
            description.runroot,
            description.options,
            description.rootless,
            view,
            description.image_stores,
            tree_tools=TREE_TOOLS,
        )
        yield make(description.driver, home)


def staging_folder(description: StoreDescription, name: str) -> str:
    """A new folder for a layer to be built."""
    path = os.path.join(description.graphroot, "userns-storage", "staging", name)
    os.makedirs(path, mode=0o700)
    return path


def config_of(description: StoreDescription) -> StoreConfig:
    """The configuration of a store."""
    return StoreConfig(
        graphroot=description.graphroot,
        runroot=description.runroot,
        driver=description.driver,
        options=description.options,
        imagestore="",
        additional_image_stores=description.image_stores,
        additional_layer_stores=(),
        transient=False,
        rootless=description.rootless,
        sources={},
    )
