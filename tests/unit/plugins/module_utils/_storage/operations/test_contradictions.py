# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of stores with contradictions: whatever the damage, no layer that a record has referenced is removed."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
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
from support.damaged_store import KINDS, Damage, HandMadeStore, damages, hex_id, lock_token

FREE = hex_id("free copy")
SPARE = hex_id("spare")


def request(store: HandMadeStore) -> StoreRequest:
    return StoreRequest(
        graphroot=str(store.graphroot), runroot=str(store.runroot), driver=store.driver
    )


def try_to_remove(store: HandMadeStore) -> None:
    """Run everything that removes layers, and assert that it removes at most the layers removed from a sound store."""
    store_request, before = request(store), store.folders()
    with contextlib.suppress(StorageError):
        layer_gc.collect(
            layer_gc.GcRequest(
                store_request, {"min_age": "0", "orphans": "remove", "broken": "repair"}
            )
        )
    assert store.folders() >= before
    with contextlib.suppress(StorageError):
        layer_gc.collect(
            layer_gc.GcRequest(
                store_request,
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
            image_layers.remove(image_layers._Step(store_request, (f"localhost/{name}:1",)))
    assert store.folders() >= before - {FREE, SPARE}


@pytest.mark.parametrize("driver", ["overlay", "vfs"])
def test_sound_store_is_collected(driver: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    store = HandMadeStore(tmp_path_factory.mktemp("store"), driver)
    before = store.folders()
    info = image_layers_info.info(image_layers_info.InfoRequest(request(store)))
    assert info["contradictions"] == []
    try_to_remove(store)
    # The tests below rely on the removal of these layers from a sound store.
    assert store.folders() == before - {FREE, SPARE}


@pytest.mark.parametrize("driver", ["overlay", "vfs"])
@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(damage=damages)
@example(damage=[Damage("layers", "key", 0.625, 3)])
def test_no_damage_to_records_leads_to_removal(
    driver: str, damage: t.List[Damage], tmp_path_factory: pytest.TempPathFactory
) -> None:
    store = HandMadeStore(tmp_path_factory.mktemp("store"), driver)
    for item in damage:
        item.apply(store)
    with contextlib.suppress(StorageError):
        image_layers_info.info(image_layers_info.InfoRequest(request(store)))
    try_to_remove(store)


def error_of_refused_run(store: HandMadeStore) -> str:
    """Try to remove everything, assert that nothing is removed, and return the error message."""
    before = store.folders()
    result = layer_gc.collect(
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
    return str(result["error"])


def remove_db(store: HandMadeStore) -> None:
    """Remove the records of container `db` and its layer as a runtime would, and the directory of the container."""
    for kind, name in (("containers", "container db"), ("layers", "layer of db")):
        store.now[kind] = [item for item in store.now[kind] if item["id"] != hex_id(name)]
        store.save(kind)
    shutil.rmtree(store.path("containers").parent / hex_id("container db"))


@pytest.mark.parametrize("driver", ["overlay", "vfs"])
@pytest.mark.parametrize("missing", [("parent",), ("parent", "image")])
def test_container_layer_without_parent_is_contradiction(
    driver: str, missing: t.Tuple[str, ...], tmp_path: pathlib.Path
) -> None:
    """In a vfs store, only the parent shows that the container needs the mapped layer."""
    store = HandMadeStore(tmp_path, driver)
    for kind in ("layers", "containers"):
        for record in store.now[kind]:
            if record["id"] in (hex_id("layer of db"), hex_id("container db")):
                for key in missing:
                    record.pop(key, None)
        store.save(kind)
    message = error_of_refused_run(store)
    assert f"layer {hex_id('layer of db')[:12]} of container db" in message
    assert "has no parent" in message


def test_working_container_from_scratch_is_no_contradiction(tmp_path: pathlib.Path) -> None:
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


def write_lock_token(store: HandMadeStore, kind: str, moment: int) -> None:
    """Write the token of a last write at that time (nanoseconds since the epoch)."""
    store.path(kind).with_suffix(".lock").write_bytes(lock_token(moment))


def backdate_records(store: HandMadeStore, seconds: float) -> None:
    """Set the times of records and lock tokens to a number of seconds ago; directories are new."""
    moment = time.time_ns() - int(seconds * 10**9)
    for kind in KINDS:
        os.utime(store.path(kind), ns=(moment, moment))
        write_lock_token(store, kind, moment)


@pytest.mark.parametrize("driver", ["overlay", "vfs"])
@pytest.mark.parametrize("database", ["db.sql", "other"])
def test_container_only_in_database_is_contradiction(
    driver: str, database: str, tmp_path: pathlib.Path
) -> None:
    store = HandMadeStore(tmp_path, driver)
    remove_db(store)
    backdate_records(store, 60)
    if database == "other":
        # podman now uses BoltDB, after an earlier version used SQLite.
        (store.graphroot / "libpod").mkdir()
        (store.graphroot / "libpod/bolt_state.db").write_bytes(b"")
    message = error_of_refused_run(store)
    assert "podman's database has container db, which has no record" in message
    podman = f"podman --root {store.graphroot} --runroot {store.runroot} --storage-driver {driver}"
    assert f"{podman} rm --force {hex_id('container db')[:12]}" in message


@pytest.mark.parametrize("driver", ["overlay", "vfs"])
def test_records_older_than_layer_are_contradiction(driver: str, tmp_path: pathlib.Path) -> None:
    store = HandMadeStore(tmp_path, driver)
    remove_db(store)
    (store.graphroot / "db.sql").unlink()
    backdate_records(store, 2 * 3600)
    message = error_of_refused_run(store)
    assert f"is older than the folder of layer {hex_id('layer of db')[:12]}" in message
    assert "localhost/written:1" in message


@pytest.mark.parametrize("driver", ["overlay", "vfs"])
def test_records_restored_without_lock_are_contradiction(
    driver: str, tmp_path: pathlib.Path
) -> None:
    store = HandMadeStore(tmp_path, driver)
    remove_db(store)
    (store.graphroot / "db.sql").unlink()
    backdate_records(store, 86400)
    os.utime(store.path("layers"))
    assert "does not match the last write that" in error_of_refused_run(store)


@pytest.mark.parametrize("driver", ["overlay", "vfs"])
def test_directory_left_by_crash_is_removed(driver: str, tmp_path: pathlib.Path) -> None:
    store = HandMadeStore(tmp_path, driver)
    store.make_folder(store.layer_folder("crash"))
    # Volatile layers use the same lock, and their file was written last.
    backdate_records(store, 86400)
    volatile = store.path("layers").with_name("volatile-layers.json")
    volatile.write_text("[]")
    write_lock_token(store, "layers", time.time_ns())
    before = store.folders()
    result = layer_gc.collect(
        layer_gc.GcRequest(request(store), {"min_age": "0", "orphans": "remove"})
    )
    assert result["contradictions"] == []
    assert before - store.folders() == {hex_id("crash")}


@pytest.mark.parametrize("driver", ["overlay", "vfs"])
def test_interrupted_removal_by_runtime_is_no_contradiction(
    driver: str, tmp_path: pathlib.Path
) -> None:
    """The store has a build container without its layer, and the record of an incomplete layer without data."""
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
    result = layer_gc.collect(
        layer_gc.GcRequest(request(store), {"min_age": "0", "max_copies_per_image": 0})
    )
    assert result["contradictions"] == []
    assert before - store.folders() == {FREE}
    # If the layer has data, the container may need it.
    store.make_folder(store.layer_folder("gone"))
    assert "container work" in error_of_refused_run(store)
