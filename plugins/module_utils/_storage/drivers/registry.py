# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The list of drivers. A new driver needs a module and an entry here."""

from __future__ import annotations

import typing as t

from ..errors import UnsupportedDriver
from .base import Driver, DriverHome
from .btrfs import BtrfsDriver
from .overlay import OverlayDriver
from .vfs import VfsDriver

REGISTRY: t.Dict[str, t.Type[Driver]] = {
    "overlay": OverlayDriver,
    "vfs": VfsDriver,
    "btrfs": BtrfsDriver,
}
_ALIASES = {"overlay2": "overlay"}


def open_driver(name: str, home: DriverHome) -> Driver:
    """The driver of a store.

    :param name: as storage.conf has it
    :raises UnsupportedDriver: there is none of that name
    """
    kind = REGISTRY.get(_ALIASES.get(name, name))
    if kind is None:
        raise UnsupportedDriver(
            f"driver {name}",
            "is not supported",
            f"Supported are {', '.join(sorted(REGISTRY))}.",
            driver=name,
            supported=sorted(REGISTRY),
        )
    return kind(home)
