# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This module util is PRIVATE to the userns.storage collection.
"""Noting in the ledger which mapped layers are in use, at each run that may write."""

from __future__ import annotations

import os
import typing as t
from types import MappingProxyType

from ..store.ledger import Ledger, ledger_key
from ..store.snapshot import Snapshot
from .opening import OpenStore


def ledger_of(place: OpenStore) -> Ledger:
    """The store's ledger, read."""
    path = os.path.join(place.store.root, "ledger.json")
    return Ledger(path, place.store.lock_timeout).load()


def watch(
    place: OpenStore,
    snapshot: Snapshot,
    now: float,
    write: bool = True,
    begin: bool = True,
    programs: t.Mapping[str, str] = MappingProxyType({}),
) -> t.Tuple[Ledger, t.Optional[float]]:
    """Look at what is in use.

    :param now: seconds since the epoch
    :param write: whether to keep what was seen
    :param begin: whether to begin a ledger where there is none
    :param programs: see ``Ledger.learn``
    :returns: the ledger, and since when it had watched before this
    :raises LockTimeout: another run holds our folder
    :raises OSError: the ledger cannot be written
    """
    ledger = ledger_of(place)
    since = ledger.watched_since
    keys = {}
    for image in snapshot.images.values():
        if image.store:
            continue
        for layer_id in image.mapped_layers:
            layer = snapshot.layers.get(layer_id)
            if layer is not None:
                keys[layer_id] = ledger_key(image.id, layer.mapping)
    ledger.observe([one for one in keys if snapshot.containers_on(one)], now, keys)
    ledger.learn(programs)
    if write and (begin or since is not None):
        ledger.save()
    return ledger, since
