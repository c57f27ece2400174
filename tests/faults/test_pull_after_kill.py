# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A pull of an image whose removal was killed, while modules run at the same time."""

from __future__ import annotations

import hashlib
import os
import subprocess
import time
import typing as t

import pytest
from support import images
from support.images import Image
from support.injection import KILL, ModuleServer
from support.lab import Lab
from support.registry import Registry
from support.stores import Store
from support.task_stops import MAP, Scene, spread, tiny_image

MakeStore = t.Callable[..., Store]
BLOCKED = "blocked"
GC = {"min_age": "0", "max_copies_per_image": 0, "orphans": "remove", "broken": "repair"}
DAY = 86400


@pytest.fixture(scope="session")
def old_and_new(lab: Lab) -> t.Tuple[Image, Image]:
    """Two images with a common base layer."""
    base = {"etc": images.directory(), "etc/passwd": images.file("root:x:0:0::/:/bin/sh\n")}
    old = images.build(lab.folder(), [base, {"old": images.file("o")}], "localhost/old:1")
    new = images.build(lab.folder(), [base, {"new": images.file("n" * 5000)}], "localhost/new:1")
    return old, new


def digests(image: Image) -> t.List[str]:
    """The digests of the layers' blobs, lowest layer first."""
    return [hashlib.sha256(images.layer_tar(layer)).hexdigest() for layer in image.layers]


@pytest.mark.parametrize("kind", ["overlay-tmpfs", "vfs-tmpfs", "btrfs"])
def test_pull_after_killed_removal_works_without_leftovers(
    kind: str, lab: Lab, make_store: MakeStore, old_and_new: t.Tuple[Image, Image]
) -> None:
    old, new = old_and_new
    base, top = digests(new)
    store = make_store(kind, tiny_image(lab))
    store.load(old)
    modules = ModuleServer(lab)
    store_args = store.module_args()
    absent = {**store_args, "images": [old.name], "state": "absent"}
    below = str(store.graphroot)
    failures: t.List[str] = []
    tried = 0
    try:
        template = {"images": [old.name], "uidmap": [MAP], "runtime": "podman 4.3.1", "force": True}
        assert modules.run("layer_template", {**store_args, **template}).result["changed"]
        scene = Scene(store, tiny_image(lab), modules, [])
        scene.copies.save("before")
        calls = modules.run("image_layers", absent, below=below, record=True).calls
        records = [
            number
            for number, call in enumerate(calls, 1)
            if any("layers.json" in path for path in call.paths)
        ]
        last = max(records) + 3
        points = [*spread(last, 6), *(last + item for item in spread(len(calls) - last, 2))]
        for at in points:
            scene.copies.restore("before")
            run = modules.run("image_layers", absent, below=below, at=at, fault=KILL)
            if run.at is None:
                break
            tried += 1
            registry = Registry(new, (), hold=f"sha256:{top}")
            try:
                failures += pull_failures(store, registry, modules, absent, base, f"{at} {run.at}")
            finally:
                registry.go_on.set()
                registry.close()
    finally:
        modules.close()
    blocked = [failure for failure in failures if failure.startswith(BLOCKED)]
    assert len(blocked) <= 3 * (kind == "btrfs")
    failures = [failure for failure in failures if failure not in blocked]
    assert not failures, "\n".join(failures)
    assert tried >= 6
    print(f"{kind}: {tried} pulls after a kill")


def pull_failures(
    store: Store,
    registry: Registry,
    modules: ModuleServer,
    absent: t.Dict[str, t.Any],
    base: str,
    where: str,
) -> t.List[str]:
    """Pull the image while modules run; returns a description of each failure."""
    failures = []
    address = f"127.0.0.1:{registry.server.server_port}"
    pull = store.machine.popen(
        ["podman", "pull", "-q", "--tls-verify=false", f"{address}/new:1"],
        account=store.account,
        env=store.env(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        if not registry.waits.wait(60):
            return [f"{where}: the pull did not begin: {pull.communicate(timeout=30)[0]!r}"]
        until = time.monotonic() + 20
        while base not in store.layer_ids() and time.monotonic() < until:
            time.sleep(0.05)
        store_args = store.module_args()
        tiny = {"images": ["localhost/tiny:1"], "uidmap": [MAP], "state": "absent"}
        tasks = [
            ("image_layers_info", store_args),
            ("layer_gc", {**store_args, **GC}),
            ("layer_template", {**store_args, **tiny}),
        ]
        if all(image["names"] != absent["images"] for image in store.images()):
            # Otherwise this is a complete removal, which removes the layer during the pull, as podman rmi does.
            tasks.append(("image_layers", absent))
        for module, args in tasks:
            result = modules.run(module, args).result
            if result.get("failed", True) and "changed" not in result:
                failures.append(f"{where}: {module}: {result}")
    finally:
        registry.go_on.set()
    output = pull.communicate(timeout=60)[0].decode()
    if store.driver == "btrfs" and "failed to create btrfs subvolume: file exists" in output:
        # The placeholder of a layer is removed just after its record; a kill at one of three calls leaves it.
        store.podman("pull", "-q", "--tls-verify=false", f"{address}/new:1")
        return [f"{BLOCKED} {where}"]
    if pull.returncode:
        failures.append(f"{where}: podman pull: rc {pull.returncode}: {output}")
        return failures
    for command in (["images", "-a"], ["system", "df", "-v"], ["create", f"{address}/new:1", "x"]):
        done = store.podman(*command, check=False)
        if done.rc:
            failures.append(f"{where}: podman {command[0]}: {done.stderr}")
    # A day later no layer of the old image is left.
    trash = store.graphroot / "userns-storage" / "trash"
    for entry in trash.iterdir() if trash.is_dir() else ():
        os.utime(entry, (time.time() - DAY - 9, time.time() - DAY - 9))
    modules.run("layer_gc", {**store.module_args(), **GC})
    modules.run("image_layers", absent)
    trashed = list(trash.iterdir()) if trash.is_dir() else []
    known = {layer["id"] for layer in store.layers()}
    needed = needed_layers(store)
    if trashed or known - needed:
        failures.append(f"{where}: left: {trashed} {known - needed}")
    return failures


def needed_layers(store: Store) -> t.Set[str]:
    """All layers that an image or a container depends on."""
    layers = {layer["id"]: layer for layer in store.layers()}
    needed: t.Set[str] = set()
    todo = [item["layer"] for item in (*store.images(), *store.containers())]
    todo += [name for image in store.images() for name in image.get("mapped-layers") or ()]
    while todo:
        layer_id = todo.pop()
        if layer_id and layer_id not in needed:
            needed.add(layer_id)
            todo.append(layers[layer_id].get("parent", ""))
    return needed
