# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Stores whose records contradict each other: whatever the damage, nothing that was named goes."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import struct
import time
import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.errors import StorageError
from ansible_collections.userns.storage.plugins.module_utils._storage.operations import (
    image_layers,
    image_layers_info,
    layer_gc,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.operations.store_opening import (
    StoreRequest,
)
from hypothesis import HealthCheck, example, given, settings
from support.damage import KINDS, Damage, HandMadeStore, damages, hex_id

FREE = hex_id("free copy")
SPARE = hex_id("spare")


def request(store: HandMadeStore) -> StoreRequest:
    return StoreRequest(
        graphroot=str(store.graphroot), runroot=str(store.runroot), driver=store.driver
    )


def try_to_remove(store: HandMadeStore) -> None:
    """All that this collection has to remove anything, and what may go of a sound store."""
    asked, before = request(store), store.folders()
    with contextlib.suppress(StorageError):
        layer_gc.collect(
            layer_gc.GcRequest(asked, {"min_age": "0", "orphans": "remove", "broken": "repair"})
        )
    assert store.folders() >= before
    with contextlib.suppress(StorageError):
        layer_gc.collect(
            layer_gc.GcRequest(
                asked,
                {
                    "min_age": "0",
                    "orphans": "remove",
                    "broken": "repair",
                    "max_copies_per_image": 0,
                    "duplicates": True,
                    "created_before": "0",
                    "unusable_maps": True,
                },
            )
        )
    assert store.folders() >= before - {FREE}
    for name in ("unused", "first", "second"):
        with contextlib.suppress(StorageError):
            image_layers.remove(image_layers._Step(asked, (f"localhost/{name}:1",)))
    assert store.folders() >= before - {FREE, SPARE}


@pytest.mark.parametrize("driver", ["overlay", "vfs"])
def test_a_sound_store(driver: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    store = HandMadeStore(tmp_path_factory.mktemp("store"), driver)
    before = store.folders()
    info = image_layers_info.info(image_layers_info.InfoRequest(request(store)))
    assert info["contradictions"] == []
    try_to_remove(store)
    # What the tests below rest on: this would have gone.
    assert store.folders() == before - {FREE, SPARE}


@pytest.mark.parametrize("driver", ["overlay", "vfs"])
@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(what=damages)
@example(what=[Damage("layers", "key", 0.625, 3)])
def test_any_damage_of_any_file_of_records(
    driver: str, what: t.List[Damage], tmp_path_factory: pytest.TempPathFactory
) -> None:
    store = HandMadeStore(tmp_path_factory.mktemp("store"), driver)
    for item in what:
        item.apply(store)
    with contextlib.suppress(StorageError):
        image_layers_info.info(image_layers_info.InfoRequest(request(store)))
    try_to_remove(store)


def refused(store: HandMadeStore) -> str:
    """The message of a run that was to remove all it can, and that left everything."""
    before = store.folders()
    done = layer_gc.collect(
        layer_gc.GcRequest(
            request(store),
            {
                "min_age": "0",
                "orphans": "remove",
                "broken": "repair",
                "max_copies_per_image": 0,
                "created_before": "0",
            },
        )
    )
    assert store.folders() == before
    return str(done["error"])


def without_db(store: HandMadeStore) -> None:
    """Take the records of container `db` and its layer away, as a runtime would write them, and its folder."""
    for kind, gone in (("containers", "container db"), ("layers", "layer of db")):
        store.now[kind] = [item for item in store.now[kind] if item["id"] != hex_id(gone)]
        store.save(kind)
    shutil.rmtree(store.path("containers").parent / hex_id("container db"))


@pytest.mark.parametrize("driver", ["overlay", "vfs"])
@pytest.mark.parametrize("lost", [("parent",), ("parent", "image")])
def test_a_containers_layer_that_lost_its_parent(
    driver: str, lost: t.Tuple[str, ...], tmp_path: pathlib.Path
) -> None:
    """Nothing else says on a vfs store that the container needs the mapped layer."""
    store = HandMadeStore(tmp_path, driver)
    for kind in ("layers", "containers"):
        for record in store.now[kind]:
            if record["id"] in (hex_id("layer of db"), hex_id("container db")):
                for key in lost:
                    record.pop(key, None)
        store.save(kind)
    said = refused(store)
    assert f"layer {hex_id('layer of db')[:12]} of container db" in said
    assert "has no parent" in said


def test_a_working_container_from_scratch_is_no_contradiction(tmp_path: pathlib.Path) -> None:
    store = HandMadeStore(tmp_path, "vfs")
    store.layer("layer of scratch")
    store.now["containers"].append(
        {"id": hex_id("scratch"), "names": ["scratch"], "layer": hex_id("layer of scratch")}
    )
    store.save("containers")
    assert (
        image_layers_info.info(image_layers_info.InfoRequest(request(store)))["contradictions"]
        == []
    )


def let_them_be_old(store: HandMadeStore, seconds: float) -> None:
    """Records and tokens were written that long ago, and folders just now."""
    moment = time.time_ns() - int(seconds * 10**9)
    for kind in KINDS:
        os.utime(store.path(kind), ns=(moment, moment))
        token = struct.pack("<QQI", moment, 1, 1).ljust(64, b"r")
        store.path(kind).with_suffix(".lock").write_bytes(token)


@pytest.mark.parametrize("driver", ["overlay", "vfs"])
@pytest.mark.parametrize("database", ["db.sql", "other"])
def test_a_container_that_only_the_database_has(
    driver: str, database: str, tmp_path: pathlib.Path
) -> None:
    store = HandMadeStore(tmp_path, driver)
    without_db(store)
    let_them_be_old(store, 60)
    if database == "other":
        # A podman that takes the bolt file, after one that took SQLite.
        (store.graphroot / "libpod").mkdir()
        (store.graphroot / "libpod/bolt_state.db").write_bytes(b"")
    said = refused(store)
    assert "podman's database has container db, which has no record" in said
    by_hand = f"podman --root {store.graphroot} --runroot {store.runroot} --storage-driver {driver}"
    assert f"{by_hand} rm --force {hex_id('container db')[:12]}" in said


@pytest.mark.parametrize("driver", ["overlay", "vfs"])
def test_everything_is_older_than_a_layer(driver: str, tmp_path: pathlib.Path) -> None:
    store = HandMadeStore(tmp_path, driver)
    without_db(store)
    (store.graphroot / "db.sql").unlink()
    let_them_be_old(store, 2 * 3600)
    said = refused(store)
    assert f"is older than the folder of layer {hex_id('layer of db')[:12]}" in said
    assert "localhost/written:1" in said


@pytest.mark.parametrize("driver", ["overlay", "vfs"])
def test_records_were_put_back_and_the_lock_was_not(driver: str, tmp_path: pathlib.Path) -> None:
    store = HandMadeStore(tmp_path, driver)
    without_db(store)
    (store.graphroot / "db.sql").unlink()
    let_them_be_old(store, 86400)
    os.utime(store.path("layers"))
    assert "does not match the last write that" in refused(store)


@pytest.mark.parametrize("driver", ["overlay", "vfs"])
def test_a_folder_that_a_crash_has_left_goes(driver: str, tmp_path: pathlib.Path) -> None:
    store = HandMadeStore(tmp_path, driver)
    store.make_folder(store.layer_folder("crash"))
    # Volatile layers share the lock, and their file is the one that was written last.
    let_them_be_old(store, 86400)
    volatile = store.path("layers").with_name("volatile-layers.json")
    volatile.write_text("[]")
    moment = time.time_ns()
    token = struct.pack("<QQI", moment, 1, 1).ljust(64, b"r")
    store.path("layers").with_suffix(".lock").write_bytes(token)
    before = store.folders()
    done = layer_gc.collect(
        layer_gc.GcRequest(request(store), {"min_age": "0", "orphans": "remove"})
    )
    assert done["contradictions"] == []
    assert before - store.folders() == {hex_id("crash")}


@pytest.mark.parametrize("driver", ["overlay", "vfs"])
def test_what_killed_removals_of_runtimes_leave(driver: str, tmp_path: pathlib.Path) -> None:
    """A build's container whose layer is gone, and the record of an incomplete layer without data."""
    store = HandMadeStore(tmp_path, driver)
    created = "2021-01-01T00:00:00Z"
    store.now["containers"].append(
        {"id": hex_id("work"), "names": ["work"], "layer": hex_id("gone"), "created": created}
    )
    store.save("containers")
    half = {"id": hex_id("half"), "flags": {"incomplete": True}, "created": created}
    store.now["layers"].append(half)
    store.save("layers")
    before = store.folders()
    done = layer_gc.collect(
        layer_gc.GcRequest(request(store), {"min_age": "0", "max_copies_per_image": 0})
    )
    assert done["contradictions"] == []
    assert before - store.folders() == {FREE}
    # Had its layer data, it would be somebody's.
    store.make_folder(store.layer_folder("gone"))
    assert "container work" in refused(store)
