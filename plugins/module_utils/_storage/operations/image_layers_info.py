# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The module image_layers_info: describe the images of a store, their layers, and damage."""

from __future__ import annotations

import typing as t
from dataclasses import dataclass

from ..kernel import gc_pause
from ..userns.declared import returns
from . import inventory_results, sharing
from .contradictions import describe, shown
from .inventory import APPARENT, NONE, take
from .layer_results import image_result, orphan_result, totals, unreferenced_result
from .store_opening import StoreRequest, opened


@dataclass(frozen=True)
class InfoRequest:
    """The options of a task.

    :param images: names, IDs, digests or shell patterns; none for all images
    :param measure: ``none``, ``apparent`` or ``exclusive``
    :param verify: compare each mapped layer with its template, entry by entry
    """

    store: StoreRequest
    images: t.Tuple[str, ...] = ()
    measure: str = APPARENT
    verify: bool = False


@returns(inventory_results.INFO)
def info(request: InfoRequest) -> t.Dict[str, t.Any]:
    """The result of image_layers_info.

    :raises StorageError: the store cannot be opened, its records cannot be read, or a reference is
        ambiguous
    """
    with opened(request.store) as store_ctx, gc_pause.gc_disabled():
        snapshot, faults = store_ctx.store.readable()
        inventory = take(
            store_ctx,
            request.images,
            request.measure,
            removals=True,
            verify=request.verify,
            snapshot=snapshot,
        )
        return {
            "changed": False,
            "images": [image_result(image) for image in inventory.images],
            "orphans": [orphan_result(orphan, inventory.now) for orphan in inventory.orphans]
            + [unreferenced_result(item, inventory.now) for item in inventory.unreferenced],
            "totals": totals(inventory),
            "contradictions": shown(
                describe(store_ctx, snapshot, faults, thorough=request.measure != NONE)
            ),
            "store": store_ctx.describe(),
            "used_as": sharing.uses_result(store_ctx),
        }
