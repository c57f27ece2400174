# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The work of the service in one store, as its owner. Each function runs inside :func:`..userns.run`."""

from __future__ import annotations

import contextlib
import os
import time
import typing as t
from dataclasses import replace

from ..errors import ImageUnknown, StoreUnwritten
from ..operations import image_layers, inventory_results, layer_gc, layer_template, results
from ..operations.image_patterns import Patterns, image_terms
from ..operations.store_opening import StoreRequest, configured, opened
from ..store.locks import peek_token
from ..store.records import Image
from ..store.snapshot import Snapshot
from ..userns.declared import returns
from ..userns.shapes import Maybe, Record, flag, text

# A burst of pulls ends after a time without changes; the maximum time to wait for its end (seconds).
_LONGEST_BURST = 60.0
_STEP = 0.2


@returns(text)
def token_path(store: StoreRequest) -> str:
    """The file whose first 64 bytes change with each change of the store's images.

    :raises StorageError: the store's configuration cannot be read
    """
    config = configured(store)
    return os.path.join(config.graphroot, f"{config.driver}-images", "images.lock")


token = peek_token


@returns(Record({"result": Maybe(results.TEMPLATE), "settled": flag}))
def make_ready(
    request: layer_template.TemplateRequest, images: t.Sequence[str], quiet: float = 0.0
) -> t.Dict[str, t.Any]:
    """Create the mapped layers of ``request`` for the existing images among ``images``.

    :param images: names, IDs or shell patterns
    :param quiet: wait until the images have not changed for this time (seconds)
    :returns: ``result`` of layer_template, None if no runtime has written the store yet; ``settled``, whether
        the images did not change during the work
    :raises StorageError: as :func:`..operations.layer_template.declare`
    """
    path = token_path(request.store)
    _wait_for_quiet(path, quiet)
    before = token(path)
    try:
        found = _present(request.store, images)
    except StoreUnwritten:
        return {"result": None, "settled": True}
    result = layer_template.declare(replace(request, images=found))
    return {"result": result, "settled": token(path) == before}


@returns(Maybe(inventory_results.GC))
def collect(
    request: layer_gc.GcRequest,
    ready: t.Sequence[t.Tuple[layer_template.TemplateRequest, t.Tuple[str, ...]]],
) -> t.Optional[t.Dict[str, t.Any]]:
    """Collect mapped layers, except declared layers.

    :param ready: the declared layers of this store and their images
    :returns: the result of layer_gc; None if no runtime has written the store yet
    :raises StorageError: as :func:`..operations.layer_gc.collect`
    """
    keep: t.List[str] = []
    try:
        for declared, images in ready:
            found = _present(declared.store, images)
            made = layer_template.declare(replace(declared, images=found, check=True))
            keep += [item["layer_id"] for item in made["layers"] if item["layer_id"]]
        return layer_gc.collect(replace(request, keep_layers=tuple(keep)))
    except StoreUnwritten:
        return None


def remove_images(store: StoreRequest, image_ids: t.Sequence[str]) -> None:
    """Remove images of root's store with all their layers.

    :raises StorageError: as :func:`..operations.image_layers.declare`
    """
    for image_id in image_ids:
        image_layers.declare(
            image_layers.ImagesRequest(store=store, images=(image_id,), state="absent")
        )


def _wait_for_quiet(path: str, quiet: float) -> None:
    now = time.monotonic()
    end, since, last = now + _LONGEST_BURST, now, token(path)
    while quiet and now < min(end, since + quiet):
        time.sleep(min(_STEP, quiet))
        now, this = time.monotonic(), token(path)
        if this != last:
            since, last = now, this


def _present(store: StoreRequest, images: t.Sequence[str]) -> t.Tuple[str, ...]:
    """The IDs of the existing images among these."""
    with opened(store) as store_ctx:
        snapshot = store_ctx.store.snapshot()
    found: t.Dict[str, None] = {}
    for word in images:
        found.update(dict.fromkeys(_answering(snapshot, word)))
    return tuple(found)


def _answering(snapshot: Snapshot, word: str) -> t.List[str]:
    with contextlib.suppress(ImageUnknown):
        return [snapshot.resolve_image(word).id]
    pattern = Patterns((word,))
    return [
        image.id
        for image in snapshot.images.values()
        if not image.store and image.names and _hit(pattern, image)
    ]


def _hit(pattern: Patterns, image: Image) -> bool:
    return pattern.hit(image_terms((), image.names)) is not None
