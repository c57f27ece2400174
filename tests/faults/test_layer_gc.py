# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""layer_gc beside podman at work, and killed at each step of a removal."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import typing as t

import pytest
from support.beside import Rounds
from support.images import Image
from support.lab import Lab
from support.stores import Store

MakeStore = t.Callable[..., Store]
RunModule = t.Callable[..., t.Dict[str, t.Any]]

MAPS = [f"0:{start}:65536" for start in (100000, 200000, 300000)]
KINDS = ["vfs", "overlay-forced"]

# Runs one collection in which the Nth write of a record, or move of data, is the last thing done.
KILLED = """
import os, signal, sys, json
from ansible_collections.userns.storage.plugins.module_utils._storage import userns
from ansible_collections.userns.storage.plugins.module_utils._storage.operations import gc
from ansible_collections.userns.storage.plugins.module_utils._storage.operations.opening import StoreRequest
from ansible_collections.userns.storage.plugins.module_utils._storage.store import staging, store
from ansible_collections.userns.storage.plugins.module_utils._storage.drivers import base

place, last, after = json.loads(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "after"
steps = 0

def counted(function):
    def step(*args, **kwargs):
        global steps
        steps += 1
        if steps == last and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        if steps == last and after:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return step

store._File.write = counted(store._File.write)
store._move = counted(store._move)
base.Driver.detach = counted(base.Driver.detach)
staging.StagingArea.discard = counted(staging.StagingArea.discard)
staging.remove_tree = counted(staging.remove_tree)
request = gc.GcRequest(store=StoreRequest(**place), min_age="0", max_copies_per_image=0)
try:
    userns.run(gc.collect, (request,), None)
except Exception as error:
    print(error)
    sys.exit(9)
sys.exit(0)
"""


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_kill_at_any_step_leaves_the_old_state_or_the_new_one(
    kind: str,
    when: str,
    make_store: MakeStore,
    run_module: RunModule,
    small_image: Image,
) -> None:
    store = make_store(kind, small_image)
    place = json.dumps(
        {
            "graphroot": str(store.graphroot),
            "runroot": str(store.runroot),
            "driver": store.driver,
        }
    )
    for last in range(1, 40):
        store.podman("rm", store.create(small_image.name, "--uidmap", MAPS[0], "--gidmap", MAPS[0]))
        (layer,) = store.mapped_layers(small_image.name)
        done = subprocess.run(
            [sys.executable, "-c", KILLED, place, str(last), when],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode == 0:
            break
        assert done.returncode == 9, done.stderr
        # podman first: it may find a layer that is half gone, and must cope with it.
        store.podman("images", "-a")
        store.podman("system", "df", "-v")
        store.podman("rm", store.create(small_image.name, "--uidmap", MAPS[1], "--gidmap", MAPS[1]))
        run_module(
            "layer_gc",
            {
                **store.module_args(),
                "min_age": "0",
                "max_copies_per_image": 0,
                "broken": "repair",
                "orphans": "remove",
            },
        )
        assert store.mapped_layers(small_image.name) == [], last
        assert store.leftovers(layer) == [], last
        trash = store.graphroot / "userns-storage" / "trash"
        assert not trash.exists() or list(trash.iterdir()) == [], last
    else:
        raise AssertionError("the collection never came to its end")
    assert last >= 7
    store.podman("rmi", small_image.name)
    assert store.layer_ids() == set()


@pytest.mark.parametrize("kind", KINDS)
def test_podman_beside_it_never_fails_and_loses_no_layer(
    kind: str, lab: Lab, make_store: MakeStore, small_image: Image
) -> None:
    store = make_store(kind, small_image)
    rounds = Rounds(lab, store, small_image.name, MAPS)
    worker = threading.Thread(target=rounds.collect_all_the_while)
    worker.start()
    try:
        rounds.run(15)
        while not rounds.failures and rounds.collections <= 5:
            rounds.run(1)
    finally:
        rounds.stop()
        worker.join()
    assert rounds.failures == []
    assert rounds.collections > 5
    assert rounds.removed > 0
