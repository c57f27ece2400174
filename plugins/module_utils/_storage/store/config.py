# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This module util is PRIVATE to the userns.storage collection.
"""Where the store is and how it is set up: storage.conf, environment, defaults, podman's database.

Follows containers/storage 1.43 to 1.62 (pkg/config, types/options.go) and podman's own rules of
what its database and its command line override.
"""

from __future__ import annotations

import typing as t
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Account:
    """The account in whose name a runtime would run."""

    name: str
    uid: int
    gid: int
    home: str


@dataclass(frozen=True)
class StoreOverrides:
    """What the caller gave explicitly, as podman's global options; empty means not given."""

    storage_conf: str = ""
    graphroot: str = ""
    runroot: str = ""
    driver: str = ""
    storage_options: t.Tuple[str, ...] = ()


@dataclass(frozen=True)
class StoreConfig:
    """One store as a runtime would open it.

    :ivar options: the driver's options, without the driver's name, lower-case keys
    :ivar additional_image_stores: read-only stores, in order
    :ivar sources: for each field, where its value comes from
    """

    graphroot: str
    runroot: str
    driver: str
    options: t.Dict[str, str] = field(default_factory=dict)
    imagestore: str = ""
    additional_image_stores: t.Tuple[str, ...] = ()
    additional_layer_stores: t.Tuple[str, ...] = ()
    transient: bool = False
    rootless: bool = False
    auto_userns: t.Dict[str, t.Any] = field(default_factory=dict)
    sources: t.Dict[str, str] = field(default_factory=dict)
