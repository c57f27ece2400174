# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Pull images for layer_template that are not in the store.

The programs that pull must not run in the private namespaces of this library, so :func:`declare` runs outside.
"""

from __future__ import annotations

import typing as t
from dataclasses import dataclass, replace

from ..errors import ImageUnknown, StoreUnwritten
from ..store.references import DOCKER, recorded
from ..userns import running as userns
from . import results
from .image_tools import (
    NO_CREDENTIALS,
    Credentials,
    Tools,
    location,
    location_of_unwritten,
    unwritten_store,
)
from .layer_template import TemplateRequest
from .store_opening import StoreRequest, opened

_Result = t.Dict[str, t.Any]


@dataclass(frozen=True)
class _LackingRequest:
    """The images of a task."""

    store: StoreRequest
    images: t.Tuple[str, ...]


def declare(
    request: TemplateRequest,
    operation: t.Callable[[TemplateRequest], _Result],
    credentials: Credentials = NO_CREDENTIALS,
) -> _Result:
    """Pull missing images, then run ``operation``.

    In check mode, the layers of images that are still to be pulled are not predicted.

    :returns: the module's result, with the names of the images in ``pulled``
    :raises ConfigError: a missing image is given by its ID, or no program for pulls is installed
    :raises StorageError: an image could not be pulled, or as ``operation``
    """
    account = request.store.account
    found = userns.run(lacking, (_LackingRequest(request.store, request.images),), account)
    names = {image: recorded(image, DOCKER) for image in found["images"]}
    tools = Tools.at(request.store, found, credentials)
    for name in names.values():
        source = f"docker://{name}"
        if request.check:
            tools.source_image(source)
        else:
            tools.copy(source, name)
    if request.check and names:
        there = tuple(image for image in request.images if image not in names)
        result = operation(replace(request, images=there)) if there else _nothing(request, found)
    else:
        result = operation(request)
    result["pulled"] = list(names.values())
    result["changed"] = result["changed"] or bool(names)
    return result


def _nothing(request: TemplateRequest, found: t.Mapping[str, t.Any]) -> _Result:
    """The result for a store in which no layer can be predicted."""
    account = request.store.account
    store = unwritten_store(request.store, found)
    user = account.name if account is not None else "root"
    return {
        "changed": False,
        "layers": [],
        "partial": False,
        "remaining": 0,
        "store": store,
        "stores": [{"user": user, **store}],
        "warnings": [],
        "diff": {"before": {}, "after": {}},
    }


@userns.returns(results.LACKING)
def lacking(request: _LackingRequest) -> _Result:
    """The missing images and the location of the store. In a store that no runtime has written yet, all are missing."""
    try:
        with opened(request.store) as store_ctx:
            snapshot = store_ctx.store.snapshot()
            images = []
            for image in request.images:
                try:
                    snapshot.resolve_image(image)
                except ImageUnknown:
                    images.append(image)
            return {"images": images, **location(store_ctx.config)}
    except StoreUnwritten as error:
        return {"images": list(request.images), **location_of_unwritten(request.store, error)}
