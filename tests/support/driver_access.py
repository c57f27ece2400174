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


class Place(t.NamedTuple):
    """The description of a store for a child process."""

    driver: str
    graphroot: str
    runroot: str
    options: t.Dict[str, str]
    rootless: bool
    image_stores: t.Tuple[str, ...] = ()


def place_of(store: Store) -> Place:
    """The description of a store for a child process."""
    return Place(
        store.driver,
        str(store.graphroot),
        str(store.runroot),
        dict(store.options),
        store.user is not None,
        tuple(store.read_only),
    )


def inside(store: Store, function: t.Callable[..., t.Any], *arguments: t.Any) -> t.Any:
    """Run a function as the store's owner; its first argument is the description of the store."""
    user = store.user
    account = Account(user.name, user.uid, user.gid, user.home) if user else None
    return userns.run(function, [place_of(store), *arguments], account)


@contextlib.contextmanager
def opened(
    place: Place, make: t.Callable[[str, DriverHome], Driver] = open_driver
) -> t.Iterator[Driver]:
    """The driver of a store, in the view of operations.

    :param make: creates the driver from its name in storage.conf
    """
    with contextlib.ExitStack() as undo:
        view = undo.enter_context(view_of(place.graphroot, place.driver))
        home = DriverHome(
            place.graphroot,
            place.runroot,
            place.options,
            place.rootless,
            view,
            place.image_stores,
            tree_tools=TREE_TOOLS,
        )
        yield make(place.driver, home)


def staging_folder(place: Place, name: str) -> str:
    """A new folder for a layer to be built."""
    path = os.path.join(place.graphroot, "userns-storage", "staging", name)
    os.makedirs(path, mode=0o700)
    return path


def config_of(place: Place) -> StoreConfig:
    """The configuration of a store."""
    return StoreConfig(
        graphroot=place.graphroot,
        runroot=place.runroot,
        driver=place.driver,
        options=place.options,
        imagestore="",
        additional_image_stores=place.image_stores,
        additional_layer_stores=(),
        transient=False,
        rootless=place.rootless,
        sources={},
    )
