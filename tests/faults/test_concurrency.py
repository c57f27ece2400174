# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Concurrent tasks of the collection, and tasks that wait for a stuck process."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import typing as t

import pytest
from support.images import Image
from support.lab import Lab
from support.modules import finish_module, run_module, start_module
from support.stores import Store
from support.task_stops import MAP
from support.waiting import wait_until

MakeStore = t.Callable[..., Store]

# Holds a lock of containers/storage or of the collection until it is killed.
HOLD = """
import fcntl, os, signal, sys
descriptor = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o644)
fcntl.lockf(descriptor, fcntl.LOCK_SH if sys.argv[2:] else fcntl.LOCK_EX)
print("held", flush=True)
os.kill(os.getpid(), signal.SIGSTOP)
"""


@pytest.mark.parametrize("kind", ["vfs-tmpfs", "overlay-tmpfs", "rootless-overlay"])
def test_equal_concurrent_tasks_create_one_layer(
    kind: str, lab: Lab, make_store: MakeStore, many_files_image: t.Callable[[int], Image]
) -> None:
    """Independent controllers may run the same task at the same time."""
    image = many_files_image(3000)
    store = make_store(kind, image)
    options = (
        {"userns": "keep-id", "force": True} if store.user else {"uidmap": [MAP], "force": True}
    )
    args = {**store.module_args(), "images": [image.name], **options}
    before = store.layer_ids()
    tasks = [start_module(lab, "layer_template", args, environ=store.env()) for _number in range(4)]
    results = [finish_module(task) for task in tasks]
    assert [result.get("msg") for result in results] == [None] * 4
    assert sorted(result["changed"] for result in results) == [False, False, False, True]
    created = {result["layers"][0]["layer_id"] for result in results}
    assert len(created) == 1
    assert store.layer_ids() - before == created
    assert store.mapped_layers(image.name) == list(created)
    for folder in ("staging", "trash"):
        assert os.listdir(store.graphroot / "userns-storage" / folder) == []
    folders = [path for path in store.layer_folder("x").parent.iterdir() if len(path.name) == 64]
    assert len(folders) == len(store.layer_ids())


@contextlib.contextmanager
def stuck(path: t.Any, shared: bool = False) -> t.Iterator[int]:
    """Run a stopped process that holds an exclusive or a shared lock; yields its PID."""
    command = [sys.executable, "-c", HOLD, str(path), *(["shared"] if shared else [])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process.pid
        finally:
            process.send_signal(signal.SIGKILL)


@pytest.mark.parametrize("module", ["layer_template", "layer_gc", "image_layers"])
def test_equal_concurrent_removals_remove_once(
    module: str, lab: Lab, make_store: MakeStore, small_image: Image
) -> None:
    """Both tasks find the objects to remove before either of them can write."""
    store = make_store("vfs-tmpfs", small_image)
    before = store.layer_ids()
    store.podman("rm", store.create(small_image.name, f"--uidmap={MAP}", f"--gidmap={MAP}"))
    options: t.Mapping[str, t.Mapping[str, t.Any]] = {
        "layer_template": {"images": [small_image.name], "uidmap": [MAP], "state": "absent"},
        "layer_gc": {"min_age": "0", "max_copies_per_image": 0},
        "image_layers": {"images": [small_image.name], "state": "absent"},
    }
    args = {**store.module_args(), **options[module]}
    trash = store.graphroot / "userns-storage/trash"
    with stuck(store.graphroot / "vfs-layers/layers.lock", shared=True):
        tasks = [start_module(lab, module, args) for _number in range(2)]
        wait_until(lambda: trash.is_dir() and len(os.listdir(trash)) == 2)
    results = [finish_module(task) for task in tasks]
    assert [result.get("msg") for result in results] == [None] * 2
    assert sorted(result["changed"] for result in results) == [False, True]
    assert store.layer_ids() == (set() if module == "image_layers" else before)
    assert os.listdir(trash) == []


@pytest.mark.parametrize("lock", ["vfs-layers/layers.lock", "vfs-images/images.lock", "own"])
@pytest.mark.parametrize("module", ["layer_template", "layer_gc", "image_layers_info"])
def test_stuck_lock_holder_is_reported_after_lock_timeout(
    module: str, lock: str, lab: Lab, make_store: MakeStore, small_image: Image
) -> None:
    store = make_store("vfs-tmpfs", small_image)
    args = {**store.module_args(), "lock_timeout": 1}
    if module == "layer_template":
        args.update(images=[small_image.name], uidmap=[MAP])
    if module == "layer_gc":
        store.podman("rm", store.create(small_image.name, f"--uidmap={MAP}", f"--gidmap={MAP}"))
        args.update(min_age="0", max_copies_per_image=0)
    if lock == "own":
        (store.graphroot / "userns-storage").mkdir(mode=0o700)
    path = store.graphroot / ("userns-storage/lock" if lock == "own" else lock)
    layers = store.layers()
    with stuck(path) as pid:
        fails = not (module == "image_layers_info" and lock == "own")
        result = run_module(lab, module, args, fails=fails)
        if fails:
            assert f"process {pid}" in result["msg"]
            assert str(path) in result["msg"]
            # The time that the run waited for earlier locks counts too.
            waited = re.search(r"for ([0-9.]+) s", result["msg"])
            assert waited
            assert float(waited[1]) <= 1
            assert "lock_timeout" in result["msg"]
        assert store.layers() == layers
    assert run_module(lab, module, args)["changed"] == (module != "image_layers_info")


def test_stuck_equal_task_is_reported(
    lab: Lab, make_store: MakeStore, many_files_image: t.Callable[[int], Image]
) -> None:
    image = many_files_image(3000)
    store = make_store("vfs-tmpfs", image)
    args = {**store.module_args(), "images": [image.name], "uidmap": [MAP], "lock_timeout": 1}
    staging = store.graphroot / "userns-storage" / "staging"
    first = start_module(lab, "layer_template", args)
    try:
        wait_until(lambda: staging.is_dir() and list(staging.glob("*/*/*")), pause=0.002)
        os.killpg(first.pid, signal.SIGSTOP)
        result = run_module(lab, "layer_template", args, fails=True)
        assert "stayed locked by process" in result["msg"]
        assert str(staging) in result["msg"]
    finally:
        os.killpg(first.pid, signal.SIGCONT)
    assert finish_module(first)["changed"]
    assert len(store.mapped_layers(image.name)) == 1
