# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Test transactions with podman: locks, concurrent and killed writers, and their cost."""

from __future__ import annotations

import json
import os
import pathlib
import secrets
import shutil
import signal
import subprocess
import traceback
import typing as t

import pytest
from support.images import Image
from support.mapped_layers import (
    MAP,
    add_mapped_layer,
    copy_tree,
    open_store,
    remove_mapped_layer,
)
from support.stores import Store as RealStore
from support.stores import disk_state
from support.waiting import LIMIT, wait_until

MakeStore = t.Callable[..., RealStore]


def test_podman_waits_for_transaction(make_store: MakeStore, small_image: Image) -> None:
    real = make_store("vfs", small_image)
    store = open_store(real)
    with store.transaction():
        process = real.machine.popen(
            ["podman", "images", "-q"], env=real.env(), stdout=subprocess.PIPE
        )
        # A line with an arrow in /proc/locks shows that podman waits in the kernel's queue.
        wait_until(lambda: waits_for_a_lock(process.pid), while_running=process)
        assert process.poll() is None
    assert process.communicate(timeout=LIMIT)[0].strip()


def waits_for_a_lock(pid: int) -> bool:
    """Whether a process waits for a POSIX lock that another process holds."""
    lines = pathlib.Path("/proc/locks").read_text().splitlines()
    return any(line.split()[1] == "->" and str(pid) in line.split() for line in lines)


def test_concurrent_podman_and_transactions_succeed(
    make_store: MakeStore, small_image: Image
) -> None:
    """podman commands and transactions run at the same time without errors or lost changes."""
    real = make_store("vfs", small_image)
    store = open_store(real)
    script = (
        "for i in 1 2 3 4 5 6; do"
        f" podman create --name $0-$i {small_image.name} true && podman rm $0-$i || exit 1;"
        " done"
    )
    processes = [
        real.machine.popen(
            ["sh", "-c", script, f"w{number}"],
            env=real.env(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for number in range(2)
    ]
    rounds = 0
    while any(process.poll() is None for process in processes):
        layer_id = add_mapped_layer(store, small_image.name)
        remove_mapped_layer(store, layer_id)
        rounds += 1
    for process in processes:
        assert process.wait() == 0, process.communicate()[1]
    assert rounds
    assert len(real.layers()) == len(small_image.layers)
    assert real.containers() == []
    assert real.mapped_layers(small_image.name) == []


_CALLS = (
    "open",
    "write",
    "pwrite",
    "fdatasync",
    "fsync",
    "rename",
    "unlink",
    "mkdir",
    "rmdir",
    "fchmod",
    "ftruncate",
)


def killed_after(number: int, work: t.Callable[[], t.Any]) -> bool:
    """Run `work` in a child that is killed before its call of this number; False if it made fewer calls."""
    child = os.fork()
    if child == 0:
        count = 0

        def wrapped(real: t.Callable[..., t.Any]) -> t.Callable[..., t.Any]:
            def call(*args: t.Any, **options: t.Any) -> t.Any:
                nonlocal count
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1
                return real(*args, **options)

            return call

        code = 1
        try:
            for name in _CALLS:
                setattr(os, name, wrapped(getattr(os, name)))
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL, status
    return status != 0


def test_store_is_valid_after_kill_at_every_call(make_store: MakeStore) -> None:
    """After each kill podman accepts the store, and the next run completes the change without leftovers."""
    real = make_store("vfs")
    tar = real.base / "tmp" / "tiny.tar"
    subprocess.run(["tar", "-C", "/etc", "-cf", str(tar), "hostname"], check=True)
    name = "localhost/tiny:1"
    real.podman("import", tar, name)
    saved = real.base / "saved"
    copy_tree(real.graphroot, saved)
    plain = {layer["id"] for layer in real.layers()}

    def reset() -> None:
        shutil.rmtree(real.graphroot)
        copy_tree(saved, real.graphroot)

    def assert_podman_accepts_store() -> None:
        listed = real.podman("images", "-aq", "--no-trunc")
        assert listed.stdout.split() == [f"sha256:{real.image(name)['id']}"]
        assert "rror" not in listed.stderr
        known = real.layer_ids()
        assert plain <= known
        assert set(real.mapped_layers(name)) <= known
        # podman has deleted incomplete layers, and no other record has changed.
        assert not any(layer.get("flags", {}).get("incomplete") for layer in real.layers())
        for layer_id in known:
            assert real.layer_folder(layer_id).is_dir()

    def add() -> None:
        add_mapped_layer(open_store(real), name)

    def leftovers() -> t.List[str]:
        store = open_store(real)
        store.sweep()
        known = real.layer_ids()
        found = [name for name in os.listdir(real.graphroot / "vfs" / "dir") if name not in known]
        # Since containers/storage 1.62 runtimes remove layers through this folder, and leave it empty.
        removals = os.path.join(store.layers_dir, "tmp")
        empty = {"tmp"} if os.path.isdir(removals) and not os.listdir(removals) else set()
        found += [
            name
            for name in os.listdir(store.layers_dir)
            if name.partition(".")[0] not in {*known, "layers", *empty}
        ]
        for folder in ("staging", "trash"):
            path = os.path.join(store.root, folder)
            found += os.listdir(path) if os.path.isdir(path) else []
        return found

    number = 0
    while killed_after(number, add):
        open_store(real).snapshot()
        assert_podman_accepts_store()
        mapped = real.mapped_layers(name)
        if not mapped:
            # Without an entry in the image's record, a finished layer is a plain layer to all programs.
            for layer_id in real.layer_ids() - plain:
                remove_mapped_layer(open_store(real), layer_id)
            add()
            mapped = real.mapped_layers(name)
        assert real.layer_ids() == plain | set(mapped)
        assert len(mapped) == 1
        assert leftovers() == []
        number += 1
        reset()
    added = number
    assert added > 25

    shutil.rmtree(saved)
    (layer_id,) = real.mapped_layers(name)
    copy_tree(real.graphroot, saved)
    number = 0
    while killed_after(number, lambda: remove_mapped_layer(open_store(real), layer_id)):
        open_store(real).snapshot()
        assert_podman_accepts_store()
        if layer_id in real.layer_ids():
            remove_mapped_layer(open_store(real), layer_id)
        assert real.layer_ids() == plain
        assert real.mapped_layers(name) == []
        assert leftovers() == []
        number += 1
        reset()
    assert number > 25
    assert real.layer_ids() == plain


def write_large(real: RealStore, count: int) -> t.List[t.Dict[str, t.Any]]:
    """Write records of images with 45 layers and five mapped layers each; returns the layer records."""
    layers: t.List[t.Dict[str, t.Any]] = []
    images = []
    for number in range(count):
        parent = before = ""
        for _round in range(45):
            layer = {"id": secrets.token_hex(32), "created": "2026-01-02T03:04:05.123456789Z"}
            if parent:
                layer["parent"] = parent
            layer["diff-digest"] = layer["compressed-diff-digest"] = (
                f"sha256:{secrets.token_hex(32)}"
            )
            layers.append({**layer, "diff-size": 10240, "uidset": [0, 1, 33], "gidset": [0, 1, 33]})
            before, parent = parent, layer["id"]
        mapped = []
        for _round in range(5):
            mapped.append(secrets.token_hex(32))
            layers.append(
                {**layers[-1], "id": mapped[-1], "parent": before, "uidmap": MAP, "gidmap": MAP}
            )
        images.append(
            {
                "id": secrets.token_hex(32),
                "names": [f"localhost/i{number}:1"],
                "layer": parent,
                "mapped-layers": mapped,
            }
        )
    for kind, records in (("layers", layers), ("images", images)):
        folder = real.graphroot / f"vfs-{kind}"
        (folder / f"{kind}.json").write_text(json.dumps(records, separators=(",", ":")))
        (folder / f"{kind}.lock").write_bytes(os.urandom(64))
    return layers


def test_cost_of_reading_and_writing_is_linear(
    make_store: MakeStore,
    monkeypatch: pytest.MonkeyPatch,
    count_calls: t.Callable[[t.Callable[[], t.Any]], int],
) -> None:
    """Reading a store and changing a layer open each record file once, and cost the same for each layer."""
    real = make_store("vfs")
    real.podman("info")
    opens: t.List[str] = []
    os_open = os.open

    def logged_open(path: t.Any, *args: t.Any, **options: t.Any) -> int:
        opens.append(os.path.basename(os.fsdecode(path)))
        return os_open(path, *args, **options)

    def count_work(count: int) -> t.Tuple[int, int]:
        """The number of function calls for reading a store of `count` images, and for a change."""
        layers = write_large(real, count)
        opens.clear()
        store = open_store(real)
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", logged_open)
            reading = count_calls(store.snapshot)
        assert (opens.count("layers.json"), opens.count("images.json")) == (1, 1)
        assert len(store.snapshot().layers) == count * 50
        before = disk_state(real.graphroot)

        def change() -> None:
            with store.transaction() as transaction:
                transaction.update_layer(layers[0]["id"], lambda raw: raw.update(metadata="x"))

        changing = count_calls(change)
        changes = before.changes(disk_state(real.graphroot))
        written = {os.path.basename(line.partition(": ")[0]) for line in changes}
        assert {name for name in written if name.endswith((".json", ".lock"))} == {
            "layers.json",
            "layers.lock",
        }
        return reading, changing

    # There are eight times as many layers; a quadratic cost would be 64 times as high.
    for few, many in zip(count_work(20), count_work(160)):
        assert many < 10 * few
