# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This module util is PRIVATE to the userns.storage collection.
"""The service's work in one store, as its owner sees it; each function runs inside :func:`..userns.run`."""

from __future__ import annotations

import contextlib
import os
import time
import typing as t
from dataclasses import dataclass, replace

from ..errors import ImageUnknown, StoreUnwritten
from ..operations import gc, template
from ..operations.naming import Patterns, image_words
from ..operations.opening import StoreRequest, configured, opened
from ..store.locks import TOKEN_SIZE
from ..store.records import Image
from ..store.snapshot import Snapshot

# A burst of pulls is over when nothing has come for so long; it is not waited for longer than this (seconds).
_LONGEST_BURST = 60.0
_STEP = 0.2


@dataclass(frozen=True)
class Round:
    """What one look at a store came to.

    :param result: that of layer_template; None where no runtime has written the store yet
    :param waiting: declared images that are not there
    :param settled: nobody has changed the images meanwhile, this work included
    """

    result: t.Optional[t.Dict[str, t.Any]]
    waiting: t.Tuple[str, ...] = ()
    settled: bool = True


def token_path(store: StoreRequest) -> str:
    """The file whose first 64 bytes change with each change of the store's images.

    :raises StorageError: the store's configuration cannot be read
    """
    config = configured(store)
    return os.path.join(config.graphroot, f"{config.driver}-images", "images.lock")


def token(path: str) -> bytes:
    """The token; empty where there is none. Holds no lock, and does not follow a link."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return b""
    try:
        return os.pread(descriptor, TOKEN_SIZE, 0)
    except OSError:
        return b""
    finally:
        os.close(descriptor)


def make_ready(
    request: template.TemplateRequest, images: t.Sequence[str], quiet: float = 0.0
) -> Round:
    """Make the mapped layers that ``request`` wants of those ``images`` that are there.

    :param images: names, IDs or shell patterns
    :param quiet: wait until the images have not changed for so long (seconds)
    :raises StorageError: as :func:`..operations.template.declare`
    """
    path = token_path(request.store)
    _wait_for_quiet(path, quiet)
    before = token(path)
    try:
        found, waiting = _present(request.store, images)
    except StoreUnwritten:
        return Round(None, tuple(images))
    result = template.declare(replace(request, images=found))
    return Round(result, waiting, token(path) == before)


def collect(
    request: gc.GcRequest, ready: t.Sequence[t.Tuple[template.TemplateRequest, t.Tuple[str, ...]]]
) -> t.Optional[t.Dict[str, t.Any]]:
    """Collect mapped layers, save those that are declared.

    :param ready: what is declared for this store, and for which images
    :returns: the result of layer_gc; None where no runtime has written the store yet
    :raises StorageError: as :func:`..operations.gc.collect`
    """
    keep: t.List[str] = []
    try:
        for declared, images in ready:
            found, _waiting = _present(declared.store, images)
            made = template.declare(replace(declared, images=found, check=True))
            keep += [one["layer_id"] for one in made["layers"] if one["layer_id"]]
        return gc.collect(replace(request, keep_layers=tuple(keep)))
    except StoreUnwritten:
        return None


def _wait_for_quiet(path: str, quiet: float) -> None:
    now = time.monotonic()
    end, since, last = now + _LONGEST_BURST, now, token(path)
    while quiet and now < min(end, since + quiet):
        time.sleep(min(_STEP, quiet))
        now, this = time.monotonic(), token(path)
        if this != last:
            since, last = now, this


def _present(
    store: StoreRequest, images: t.Sequence[str]
) -> t.Tuple[t.Tuple[str, ...], t.Tuple[str, ...]]:
    """IDs of the images meant that are there, and which words mean none."""
    with opened(store) as place:
        snapshot = place.store.snapshot()
    found: t.Dict[str, None] = {}
    waiting = []
    for word in images:
        answers = _answering(snapshot, word)
        found.update(dict.fromkeys(answers))
        if not answers:
            waiting.append(word)
    return tuple(found), tuple(waiting)


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
    return pattern.hit(image_words((), image.names)) is not None
