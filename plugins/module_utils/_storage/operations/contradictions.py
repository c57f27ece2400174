# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Check whether records of a store contradict each other. Nothing may be removed from such a store."""

from __future__ import annotations

import contextlib
import functools
import os
import typing as t

from ..drivers.base import LAYER_ID
from ..errors import StorageError, StoreContradictory
from ..kernel.oserrors import translate_oserror
from ..printable import user_command
from ..store.consistency import UNREADABLE, Commands, Contradiction, Disk, contradictions
from ..store.snapshot import Snapshot
from .layer_removal import begun_ids
from .store_opening import OpenStore
from .usage_tracking import read_ledger

_MOST_NAMED = 3


def examine(store_ctx: OpenStore, thorough: bool = True) -> t.List[Contradiction]:
    """The contradictions of a store. Writes nothing.

    Findings are checked again with the current records, because a runtime may have changed the store
    between the reading of the records and of the folders.

    :param thorough: whether to compare the parents in each layer's folder with its record
    :raises StorageError: records or folders cannot be read
    """
    found = _look(store_ctx, store_ctx.store.snapshot(), (), thorough)
    if not found:
        return []
    again = {(item.kind, item.path, item.ids) for item in found}
    return [
        item
        for item in _look(store_ctx, store_ctx.store.snapshot(), (), thorough)
        if (item.kind, item.path, item.ids) in again
    ]


def describe(
    store_ctx: OpenStore, snapshot: Snapshot, faults: t.Sequence[StorageError], thorough: bool
) -> t.List[Contradiction]:
    """As :func:`examine`, of a store whose records may be unreadable.

    :param snapshot: the readable records
    :param faults: the errors of the other records
    """
    try:
        return (
            _look(store_ctx, snapshot, faults, thorough) if faults else examine(store_ctx, thorough)
        )
    except StorageError as error:
        return [
            Contradiction(
                UNREADABLE, str(item.facts.get("path") or item.subject), str(item), item.hint
            )
            for item in (*faults, error)
        ]


def _look(
    store_ctx: OpenStore, snapshot: Snapshot, faults: t.Sequence[StorageError], thorough: bool
) -> t.List[Contradiction]:
    driver = store_ctx.driver
    try:
        own = driver.present()
        present = present_layers(store_ctx)
        orphans = driver.orphans(snapshot.layers, False, own)
        changed = {orphan.name: orphan.changed for orphan in orphans if orphan.kind == "directory"}
        unrecorded = list(changed)
        layers = filter(LAYER_ID.fullmatch, sorted(own)) if thorough or unrecorded else ()
        disk = Disk(driver.folder, present, unrecorded, driver.resting(layers), changed)
    except StorageError:
        # Without the directory there are no layers.
        disk = Disk(driver.folder, frozenset(), (), {})
    with translate_oserror(store_ctx.config.graphroot):
        return contradictions(
            store_ctx.store,
            snapshot,
            disk,
            read_ledger(store_ctx).image_of,
            begun_ids(store_ctx),
            faults,
            commands_of(store_ctx),
        )


def commands_of(store_ctx: OpenStore) -> Commands:
    """The command lines for the administrator of the store."""
    podman = store_ctx.config.podman
    if store_ctx.account is None or not _is_of_root():
        return Commands(
            podman, rootless=store_ctx.account is not None, runtime=store_ctx.config.runtime
        )
    return Commands(podman, functools.partial(user_command, store_ctx.account.name), True)


def _is_of_root() -> bool:
    """Whether this process works as a user on behalf of root. The parent process then has another owner."""
    try:
        return os.stat(f"/proc/{os.getppid()}").st_uid != os.geteuid()
    except OSError:
        return True


def present_layers(store_ctx: OpenStore) -> t.Set[str]:
    """The names of all folders of the driver, including those in a separate image store.

    :raises StorageError: the driver's folder cannot be read
    """
    found = store_ctx.driver.present()
    if store_ctx.config.imagestore:
        with contextlib.suppress(StorageError):
            found |= store_ctx.driver.present(store_ctx.config.imagestore)
    return found


def contradictory(store_ctx: OpenStore, found: t.Sequence[Contradiction]) -> StoreContradictory:
    """The error with the reason why nothing is removed."""
    named = "; ".join(f"{item.path}: {item.problem}" for item in found[:_MOST_NAMED])
    more = len(found) - _MOST_NAMED
    return StoreContradictory(
        f"store {store_ctx.config.graphroot}",
        "its records are inconsistent with each other or with the files on disk, so nothing was removed: "
        + named
        + (f"; and {more} more" if more > 0 else ""),
        f"{found[0].hint} `contradictions` of userns.storage.image_layers_info lists all of them.",
        contradictions=shown(found),
    )


def refuse_contradictions(store_ctx: OpenStore) -> None:
    """Raise an error if nothing may be removed.

    :raises StoreContradictory: the records contradict each other or the files on disk
    :raises StorageError: as :func:`examine`
    """
    found = examine(store_ctx)
    if found:
        raise contradictory(store_ctx, found)


def shown(found: t.Iterable[Contradiction]) -> t.List[t.Dict[str, t.Any]]:
    """Contradictions as the modules return them."""
    return [{**item._asdict(), "ids": list(item.ids)} for item in found]
