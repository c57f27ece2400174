# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Record in the ledger which mapped layers are in use, in each run that may write."""

from __future__ import annotations

import contextlib
import os
import typing as t
from types import MappingProxyType

from ..errors import StorageError
from ..kernel.clock import Moment
from ..store.ledger import Ledger, Sighting, ledger_key
from ..store.locks import peek_token
from ..store.snapshot import Snapshot
from .store_opening import OpenStore

# The maximum time by which a timestamp may be in the future (seconds).
_SKEW = 600.0


def read_ledger(store_ctx: OpenStore) -> Ledger:
    """Read the store's ledger."""
    path = os.path.join(store_ctx.store.root, "ledger.json")
    return Ledger(path, store_ctx.store.lock_timeout).load()


def known_programs(store_ctx: OpenStore) -> t.Dict[str, str]:
    """The versions that programs reported in earlier runs, for ``detect``; empty if the ledger cannot be read."""
    with contextlib.suppress(StorageError):
        return dict(read_ledger(store_ctx).programs)
    return {}


def record_use(
    store_ctx: OpenStore,
    snapshot: Snapshot,
    moment: Moment,
    write: bool = True,
    begin: bool = True,
    programs: t.Mapping[str, str] = MappingProxyType({}),
) -> Ledger:
    """Observe which layers are in use.

    :param moment: the current time
    :param write: whether to save the observation
    :param begin: whether to create a ledger if there is none
    :param programs: see ``Ledger.learn``
    :raises LockTimeout: another run has locked the collection's folder
    :raises StorageError: the ledger cannot be read or written
    """
    ledger = read_ledger(store_ctx)
    begun = ledger.watched_since is not None
    ledger.observe(
        moment,
        _sightings(store_ctx, snapshot, moment),
        _containers_token(store_ctx),
        _changed_at(store_ctx),
    )
    ledger.learn(programs)
    if write and (begin or begun):
        ledger.save()
    return ledger


def _sightings(store_ctx: OpenStore, snapshot: Snapshot, moment: Moment) -> t.Dict[str, Sighting]:
    keys: t.Dict[str, str] = {}
    for image in snapshot.images.values():
        if image.store:
            continue
        for layer_id in image.mapped_layers:
            layer = snapshot.layers.get(layer_id)
            if layer is not None and not layer.read_only_store:
                keys[layer_id] = ledger_key(image.id, layer.mapping)
    try:
        traces = store_ctx.driver.traces(keys) if keys else {}
    except StorageError:
        traces = {}
    found = {}
    for layer_id, key in keys.items():
        trace = traces.get(layer_id)
        if trace is not None and (trace.at or 0.0) > moment.wall + _SKEW:
            # An access time in the future is not updated before that time.
            trace = None
        used = bool(snapshot.containers_on(layer_id) or snapshot.children(layer_id))
        if trace is None:
            found[layer_id] = Sighting(key, used)
        else:
            found[layer_id] = Sighting(key, used, trace.value, trace.at, trace.coarse)
    return found


def _record_file(store_ctx: OpenStore, kind: str, name: str) -> str:
    return os.path.join(store_ctx.config.graphroot, f"{store_ctx.config.driver}-{kind}", name)


def _containers_token(store_ctx: OpenStore) -> str:
    """A value that changes with each container that any runtime creates or removes; empty if not readable."""
    return peek_token(_record_file(store_ctx, "containers", "containers.lock")).hex()


def _changed_at(store_ctx: OpenStore) -> t.Optional[float]:
    """The time at which a runtime last wrote the store's records, in seconds since the epoch."""
    moments = []
    for kind in ("layers", "images", "containers"):
        for name in (f"{kind}.json", f"{kind}.lock"):
            with contextlib.suppress(OSError):
                moments.append(os.stat(_record_file(store_ctx, kind, name)).st_mtime)
    return max(moments, default=None)
