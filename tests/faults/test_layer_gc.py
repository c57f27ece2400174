# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""layer_gc while podman is busy; scripts/bench --soak runs 500 rounds."""

from __future__ import annotations

import threading
import typing as t

import pytest
from support.images import Image
from support.lab import Lab
from support.podman_load import Rounds
from support.stores import Store

MakeStore = t.Callable[..., Store]

MAPS = [f"0:{start}:65536" for start in (100000, 200000, 300000)]
KINDS = ["vfs-tmpfs", "overlay-tmpfs"]


@pytest.mark.parametrize("kind", KINDS)
def test_concurrent_podman_never_fails_and_loses_no_layer(
    kind: str, lab: Lab, make_store: MakeStore, small_image: Image
) -> None:
    store = make_store(kind, small_image)
    rounds = Rounds(lab, store, small_image.name, MAPS)
    worker = threading.Thread(target=rounds.collect_until_stopped)
    worker.start()
    try:
        rounds.run(8)
        while not rounds.failures and rounds.collections <= 3:
            rounds.run(1)
    finally:
        rounds.stop()
        worker.join()
    assert rounds.failures == []
    assert rounds.collections > 3
    assert rounds.removed > 0
