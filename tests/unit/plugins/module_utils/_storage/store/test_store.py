# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of Store: reading changes nothing, and the order of writes is safe if the process is killed."""

from __future__ import annotations

import json
import operator
import os
import pathlib
import stat
import subprocess
import sys
import tempfile
import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.errors import (
    LayerInUse,
    LockTimeout,
    NoSpace,
    PermissionDenied,
    ReadOnlyStore,
    RecordError,
    StorageError,
    StoreError,
    UnsupportedDriver,
    UntestedRuntime,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.store import (
    record_files,
    records,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.store import (
    store as store_module,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.store.config import (
    StoreConfig,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.store.store import Store
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.made_records import padded_id

Json = t.Dict[str, t.Any]


A, B, C, D, ONE, TWO = (padded_id(item) for item in ("a", "b", "c", "d", "1", "2"))

LAYERS: t.List[Json] = [{"id": A, "x-new": 1.50}, {"id": B, "parent": A}]
IMAGES: t.List[Json] = [{"id": ONE, "names": ["localhost/a:1"], "layer": B}]


class Disk:
    """The files of a store, written by the test."""

    def __init__(self, base: pathlib.Path) -> None:
        self.graphroot = base / "g"
        self.runroot = base / "r"
        for kind in ("layers", "images", "containers"):
            (self.graphroot / f"vfs-{kind}").mkdir(parents=True)
            (self.graphroot / f"vfs-{kind}" / f"{kind}.lock").write_bytes(os.urandom(64))
        self.runroot.mkdir()
        self.write("layers", LAYERS)
        self.write("images", IMAGES)

    def config(self, **options: t.Any) -> StoreConfig:
        return StoreConfig(str(self.graphroot), str(self.runroot), "vfs", **options)

    def open(self, **options: t.Any) -> Store:
        return Store.open(self.config(**options), lock_timeout=600)

    def path(
        self, kind: str, name: str = "", base: t.Optional[pathlib.Path] = None
    ) -> pathlib.Path:
        return (base or self.graphroot) / f"vfs-{kind}" / (name or f"{kind}.json")

    def write(self, kind: str, records: t.Any, name: str = "", base: t.Any = None) -> pathlib.Path:
        path = self.path(kind, name, base)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(records, separators=(",", ":")))
        return path

    def read(self, kind: str, name: str = "", base: t.Any = None) -> t.Any:
        return json.loads(self.path(kind, name, base).read_bytes())

    def token(self, kind: str) -> bytes:
        return self.path(kind, f"{kind}.lock").read_bytes()

    def state(self) -> t.Dict[str, t.Tuple[t.Any, ...]]:
        result = {}
        for folder, folders, files in os.walk(self.graphroot.parent):
            for name in [*folders, *files]:
                path = os.path.join(folder, name)
                found = os.lstat(path)
                data = pathlib.Path(path).read_bytes() if stat.S_ISREG(found.st_mode) else b""
                result[path] = (found.st_ino, found.st_mtime_ns, found.st_ctime_ns, data)
        return result


@pytest.fixture
def disk(tmp_path: pathlib.Path) -> Disk:
    return Disk(tmp_path)


# Opening


def test_store_of_an_untested_runtime_is_only_read(disk: Disk) -> None:
    calls = []

    def untested() -> UntestedRuntime:
        calls.append(1)
        return UntestedRuntime("podman", "is too new")

    before = disk.state()
    store = Store.open(disk.config(), untested=untested)
    assert store.snapshot().images
    assert calls == []
    for _time in range(2):
        with pytest.raises(UntestedRuntime), store.transaction():
            pass
    assert calls == [1]
    assert disk.state() == before
    with Store.open(disk.config(), untested=lambda: None).transaction():
        pass


def test_store_without_records_is_rejected(tmp_path: pathlib.Path) -> None:
    for path in (tmp_path, tmp_path / "no"):
        with pytest.raises(StoreError, match="no runtime has written to it") as caught:
            Store.open(StoreConfig(str(path), str(tmp_path / "r"), "overlay"))
        assert "podman info" in caught.value.hint
        assert "--root" not in caught.value.hint
    assert os.listdir(tmp_path) == []


def test_store_of_another_driver_is_rejected(disk: Disk) -> None:
    before = disk.state()
    with pytest.raises(StoreError, match="belongs to driver vfs") as caught:
        Store.open(StoreConfig(str(disk.graphroot), "/r", "overlay"))
    assert "vfs-layers" in str(caught.value)
    assert "driver: vfs" in caught.value.hint
    assert disk.state() == before


@pytest.mark.parametrize("driver", ["", "../vfs", "vfs/..", "a b"])
def test_invalid_driver_names_are_rejected(disk: Disk, driver: str) -> None:
    with pytest.raises(StoreError):
        Store.open(StoreConfig(str(disk.graphroot), "/r", driver))


def test_graphroot_that_is_a_file_is_rejected(tmp_path: pathlib.Path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(StoreError, match="not a directory"):
        Store.open(StoreConfig(str(tmp_path / "f"), "/r", "vfs"))


# Reading


def test_snapshot_has_all_records_and_changes_nothing(disk: Disk) -> None:
    before = disk.state()
    store = disk.open()
    snapshot = store.snapshot()
    assert list(snapshot.layers) == [A, B]
    assert list(snapshot.images) == [ONE]
    assert snapshot.containers == {}
    assert store.snapshot() is snapshot
    assert disk.state() == before


def test_missing_lock_files_are_not_created_for_reading(disk: Disk) -> None:
    for kind in ("layers", "images", "containers"):
        disk.path(kind, f"{kind}.lock").unlink()
    before = disk.state()
    assert list(disk.open().snapshot().layers) == [A, B]
    assert disk.state() == before


def test_changes_of_other_programs_are_read(disk: Disk) -> None:
    store = disk.open()
    assert list(store.snapshot().layers) == [A, B]
    disk.write("layers", [*LAYERS, {"id": C}])
    assert list(store.snapshot().layers) == [A, B, C]
    disk.write("layers", [])
    assert list(store.snapshot().layers) == []
    disk.path("layers").unlink()
    assert list(store.snapshot().layers) == []
    disk.write("containers", [{"id": D}])
    assert list(store.snapshot().containers) == [D]


def test_same_file_with_another_token_is_read_again(disk: Disk) -> None:
    store = disk.open()
    store.snapshot()
    path = disk.path("images")
    times = os.stat(path)
    data = path.read_bytes().replace(b"a:1", b"a:2")
    with open(path, "r+b") as file:
        file.write(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    disk.path("images", "images.lock").write_bytes(os.urandom(64))
    assert store.snapshot().images[ONE].names == ("localhost/a:2",)


def test_volatile_records_are_read(disk: Disk) -> None:
    disk.write("layers", [{"id": C, "names": ["x"]}, {"id": A}], "volatile-layers.json")
    disk.write("containers", [{"id": C, "layer": C}], "volatile-containers.json")
    disk.write("layers", [{"id": D}], "volatile-layers.json", disk.runroot)
    disk.write("containers", [{"id": D, "layer": D}], "volatile-containers.json", disk.runroot)
    snapshot = disk.open().snapshot()
    assert {key: item.location for key, item in snapshot.layers.items()} == {
        A: "stable",
        B: "stable",
        C: "volatile",
        D: "volatile",
    }
    assert snapshot.layers[A].raw == LAYERS[0]
    assert all(container.volatile for container in snapshot.containers.values())
    assert list(snapshot.containers) == [C, D]


def test_records_of_a_transient_store_are_in_the_run_root(disk: Disk) -> None:
    disk.write("containers", [{"id": C}], "volatile-containers.json", disk.runroot)
    disk.path("containers", "containers.lock", disk.runroot).write_bytes(b"")
    disk.write("layers", [{"id": D}], "volatile-layers.json", disk.runroot)
    store = disk.open(transient=True)
    assert list(store.snapshot().containers) == [C]
    with store.transaction(containers=True) as transaction:
        transaction.update_layer(D, lambda raw: raw.update(metadata="x"))
        transaction.update_layer(A, lambda raw: raw.update(metadata="y"))
    assert disk.read("layers", "volatile-layers.json", disk.runroot)[0]["metadata"] == "x"
    assert [item["id"] for item in disk.read("layers")] == [A, B]


def test_store_with_an_imagestore_is_only_read(disk: Disk, tmp_path: pathlib.Path) -> None:
    other = tmp_path / "i"
    disk.write("images", [{"id": TWO, "layer": C}], base=other)
    disk.write("layers", [{"id": C}, {"id": A, "metadata": "hidden"}], base=other)
    store = disk.open(imagestore=str(other))
    snapshot = store.snapshot()
    assert {key: item.location for key, item in snapshot.layers.items()} == {
        A: "stable",
        B: "stable",
        C: "imagestore",
    }
    assert {key: item.location for key, item in snapshot.images.items()} == {
        TWO: "imagestore",
        ONE: "stable",
    }
    assert store.image_data_dir(TWO) == str(other / "vfs-images" / TWO)
    before = disk.state()
    with pytest.raises(UnsupportedDriver, match="imagestore"), store.transaction():
        pass
    assert disk.state() == before


def test_additional_stores_are_only_read(disk: Disk, tmp_path: pathlib.Path) -> None:
    extra = tmp_path / "ro"
    disk.write("layers", [{"id": C}, {"id": A, "metadata": "hidden"}], base=extra)
    disk.write("images", [{"id": TWO, "layer": C}], base=extra)
    # Without lock files, as in a copy from a read-only medium.
    before = disk.state()
    store = disk.open(additional_image_stores=(str(extra), str(tmp_path / "gone")))
    snapshot = store.snapshot()
    assert snapshot.layers[C].read_only_store == snapshot.images[TWO].store == str(extra)
    assert snapshot.layers[A].read_only_store is None
    assert disk.state() == before
    with store.transaction() as transaction:
        for attempt in (
            lambda: transaction.update_layer(C, lambda raw: raw.clear()),
            lambda: transaction.append_mapped_layer(TWO, A),
            lambda: transaction.append_mapped_layer(ONE, C),
            lambda: transaction.remove_layer(C, str(tmp_path)),
        ):
            with pytest.raises(ReadOnlyStore, match=str(extra)):
                attempt()
        assert transaction.drop_mapped_layer(C) == []
        transaction.begin_layer({"id": D, "parent": C})
    assert disk.read("layers")[-1]["parent"] == C
    changed = {path for path, value in disk.state().items() if before.get(path) != value}
    assert not any(path.startswith(str(extra)) for path in changed)


def test_own_image_takes_precedence_over_image_of_additional_store(
    disk: Disk, tmp_path: pathlib.Path
) -> None:
    extra = tmp_path / "ro"
    names = [*IMAGES[0]["names"], "localhost/b:1"]
    disk.write("images", [{"id": A, "names": names}], base=extra)
    snapshot = disk.open(additional_image_stores=(str(extra),)).snapshot()
    assert snapshot.resolve_image("localhost/a:1").id == ONE
    assert snapshot.resolve_image("localhost/b:1").id == A


@pytest.mark.parametrize("data", [b"[", b"{}", b'[{"id":"../x"}]', b"[" * 50000])
def test_damaged_records_are_an_error_until_they_are_repaired(disk: Disk, data: bytes) -> None:
    store = disk.open()
    store.snapshot()
    disk.path("layers").write_bytes(data)
    before = disk.state()
    for _round in range(2):
        with pytest.raises(RecordError, match=r"layers\.json"):
            store.snapshot()
        with pytest.raises(RecordError), store.transaction():
            pass
    assert disk.state() == before
    disk.write("layers", LAYERS)
    assert list(store.snapshot().layers) == [A, B]
    with store.transaction():
        pass


@pytest.mark.parametrize("replacement", ["link", "fifo", "dir", "large"])
def test_irregular_record_files_are_rejected(disk: Disk, replacement: str) -> None:
    path = disk.path("layers")
    os.rename(path, disk.graphroot / "away")
    if replacement == "link":
        path.symlink_to(disk.graphroot / "away")
    elif replacement == "fifo":
        os.mkfifo(path)
    elif replacement == "dir":
        path.mkdir()
    else:
        path.write_bytes(b"")
        os.truncate(path, 10**12)
    with pytest.raises(StoreError):
        disk.open().snapshot()


def test_locks_are_not_held_while_parsing(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    store = disk.open()
    states = []
    parse = records.parse

    def watch(*args: t.Any) -> t.Any:
        states.append([area.lock.held for areas in store._files.areas.values() for area in areas])
        return parse(*args)

    monkeypatch.setattr(record_files, "parse", watch)
    with store.transaction():
        held = [area.lock.held for areas in store._files.areas.values() for area in areas]
    assert states
    assert not any(any(state) for state in states)
    assert any(held)


def test_large_change_is_parsed_outside_the_locks(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_MUCH", 10)
    store = disk.open()
    loads = 0
    load = Store._load

    def interfere(self: Store) -> int:
        nonlocal loads
        loads += 1
        if loads in (2, 3):
            disk.write("layers", [*LAYERS, {"id": padded_id(f"c{loads}")}])
        return load(self)

    monkeypatch.setattr(Store, "_load", interfere)
    with store.transaction() as transaction:
        assert list(transaction.snapshot.layers) == [A, B, padded_id("c3")]
    assert loads == 4


# Writing


def mapped(layer_id: str) -> Json:
    return {
        "id": layer_id,
        "parent": A,
        "created": "2026-01-02T03:04:05Z",
        "uidmap": [{"container_id": 0, "host_id": 100000, "size": 65536}],
    }


def test_layer_is_added_and_removed(disk: Disk, tmp_path: pathlib.Path) -> None:
    trash = tmp_path / "trash"
    trash.mkdir()
    split = tmp_path / "split"
    split.write_bytes(b"gz")
    split.chmod(0o644)
    store = disk.open()
    tokens = {kind: disk.token(kind) for kind in ("layers", "images", "containers")}
    with store.transaction() as transaction:
        layer = transaction.begin_layer(mapped(C))
        assert layer.incomplete
        assert disk.read("layers")[-1] == {**mapped(C), "flags": {"incomplete": True}}
        transaction.install_tar_split(C, str(split))
        assert not transaction.finish_layer(C).incomplete
        assert disk.read("layers") == [*LAYERS, mapped(C)]
        transaction.append_mapped_layer(ONE, C)
        transaction.append_mapped_layer(ONE, C)
        assert transaction.snapshot.images[ONE].mapped_layers == (C,)
        assert 0 < transaction.seconds_held < 5
    held = transaction.seconds_held
    assert held == transaction.seconds_held
    assert disk.read("images") == [{**IMAGES[0], "mapped-layers": [C]}]
    assert stat.S_IMODE(os.stat(store.tar_split_path(C)).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(disk.path("layers")).st_mode) == 0o600
    assert disk.token("layers") != tokens["layers"]
    assert disk.token("images") != tokens["images"]
    assert disk.token("containers") == tokens["containers"]
    # Fields that are not changed keep their notation.
    assert b'"x-new":1.5' in disk.path("layers").read_bytes()

    os.mkdir(store.layer_data_dir(C))
    with store.transaction(containers=True) as transaction:
        with pytest.raises(LayerInUse) as caught:
            transaction.remove_layer(C, str(trash))
        assert caught.value.facts["images"] == [ONE]
        assert transaction.drop_mapped_layer(C) == [ONE]
        transaction.remove_layer(C, str(trash))
    assert disk.read("layers") == LAYERS
    assert disk.read("images") == IMAGES
    assert sorted(os.listdir(trash)) == [f"{C}.data", f"{C}.tar-split.gz"]
    assert sorted(os.listdir(disk.path("layers").parent)) == ["layers.json", "layers.lock"]


def test_transaction_without_changes_writes_nothing(disk: Disk) -> None:
    before = disk.state()
    store = disk.open()
    with store.transaction(containers=True) as transaction:
        transaction.update_layer(A, lambda raw: None)
        transaction.update_image(ONE, lambda raw: raw.update(raw))
        transaction.finish_layer(B)
        assert transaction.drop_mapped_layer(D) == []
    assert disk.state() == before


def test_several_images_are_changed_in_a_single_write(disk: Disk) -> None:
    two = "5" * 64
    disk.write("images", [*IMAGES, {"id": two, "names": ["localhost/b:1"], "layer": B}])
    store = disk.open()
    with store.transaction() as transaction:
        inode = os.stat(disk.path("images")).st_ino
        done = transaction.update_images(
            {
                ONE: lambda raw: raw.update(names=["localhost/b:1"]),
                two: lambda raw: raw.update(names=["localhost/a:1"]),
            }
        )
        assert os.stat(disk.path("images")).st_ino != inode
        assert [image.names for image in done] == [("localhost/b:1",), ("localhost/a:1",)]
    written = {record["id"]: record["names"] for record in disk.read("images")}
    assert (written[ONE], written[two]) == (["localhost/b:1"], ["localhost/a:1"])


def test_begin_layer_rejects_invalid_records(disk: Disk) -> None:
    disk.write("layers", [{"id": A, "names": ["taken"]}, LAYERS[1]])
    before = disk.state()
    with disk.open().transaction() as transaction:
        for record in (
            {"id": A},
            {"id": C, "parent": D},
            {"id": C, "names": ["taken"]},
            {"id": "../x"},
            {"id": C, "uidmap": [{"container_id": "0"}]},
        ):
            with pytest.raises(StoreError):
                transaction.begin_layer(record)
    assert disk.state() == before


def test_invalid_changes_are_rejected(disk: Disk) -> None:
    before = disk.state()
    with disk.open().transaction() as transaction:
        changes: t.List[Json] = [{"id": C}, {"parent": "x"}, {"diff-size": 1.5}, {"flags": []}]
        for change in changes:
            with pytest.raises(StoreError):
                transaction.update_layer(A, operator.methodcaller("update", change))
        for layer_id in (C, "", "../x"):
            with pytest.raises(StoreError):
                transaction.finish_layer(layer_id)
            with pytest.raises(StoreError):
                transaction.append_mapped_layer(ONE, layer_id)
        with pytest.raises(StoreError):
            transaction.append_mapped_layer(TWO, A)
    with pytest.raises(StorageError):
        transaction.mark_incomplete(A)
    assert disk.state() == before


def test_remove_layer_rejects_layers_in_use(disk: Disk, tmp_path: pathlib.Path) -> None:
    disk.write("layers", [*LAYERS, {"id": C, "parent": A}, {"id": D, "parent": C}])
    disk.write("containers", [{"id": D, "layer": D}])
    with disk.open().transaction(containers=True) as transaction:
        for layer_id, holder in ((A, B), (B, ONE), (C, D), (D, D)):
            with pytest.raises(LayerInUse, match=holder[:12]):
                transaction.remove_layer(layer_id, str(tmp_path))


def test_image_is_removed_unless_it_is_in_use(disk: Disk, tmp_path: pathlib.Path) -> None:
    trash = tmp_path / "trash"
    trash.mkdir()
    store = disk.open()
    store.snapshot()
    os.mkdir(store.image_data_dir(ONE))
    disk.write("containers", [{"id": D, "image": ONE}])
    with store.transaction(containers=True) as transaction, pytest.raises(LayerInUse, match=D[:12]):
        transaction.remove_image(ONE, str(trash))
    disk.write("containers", [])
    with store.transaction(containers=True) as transaction:
        transaction.remove_image(ONE, str(trash))
    assert disk.read("images") == []
    assert os.listdir(trash) == [f"{ONE}.image"]


def test_trash_directory_is_removed_on_exit(disk: Disk) -> None:
    store = disk.open()
    with store.trash("x") as path:
        assert path.startswith(f"{store.root}/trash/x-")
        (pathlib.Path(path) / "y").mkdir()
    assert not os.path.exists(path)
    with pytest.raises(ZeroDivisionError), store.trash("x") as path:
        raise ZeroDivisionError
    assert os.listdir(os.path.dirname(path)) == []


_HOLD = """
import fcntl, os, sys
descriptor = os.open(sys.argv[1], os.O_RDWR)
fcntl.lockf(descriptor, fcntl.LOCK_EX)
print(flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("kind", ["layers", "images", "containers"])
def test_held_lock_is_reported_after_the_timeout(
    disk: Disk, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(disk.path(kind, f"{kind}.lock"))
    store = Store.open(disk.config(), lock_timeout=0.2)
    store.snapshot()
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        # The message contains the configured timeout, not the time that remained after earlier locks.
        with pytest.raises(LockTimeout, match=f"by process {process.pid} for 0.2 s"):
            store.snapshot()
        with pytest.raises(LockTimeout, match="for 0.2 s"):
            store.readable()
        monkeypatch.setattr(Store, "snapshot", lambda _store: None)
        with (
            pytest.raises(LockTimeout, match=f"{path}.* for 0.2 s"),
            store.transaction(containers=True),
        ):
            pass
        monkeypatch.undo()
        process.kill()
        process.wait()
    with store.transaction(containers=True):
        pass


def test_transaction_holds_only_the_required_locks(disk: Disk) -> None:
    with disk.open().transaction():
        for kind, is_locked in (("layers", True), ("images", True), ("containers", False)):
            script = (
                "import fcntl,os,sys;"
                "fcntl.lockf(os.open(sys.argv[1], os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)"
            )
            done = subprocess.run(
                [sys.executable, "-c", script, str(disk.path(kind, f"{kind}.lock"))],
                stderr=subprocess.DEVNULL,
                check=False,
            )
            assert (done.returncode != 0) == is_locked


# The order of system calls


class Steps:
    """Records the system calls that change files, with the names of the files."""

    NAMES = ("open", "write", "pwrite", "fdatasync", "fsync", "rename", "unlink", "mkdir", "rmdir")

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: t.List[t.Tuple[str, t.Any]] = []
        for name in self.NAMES:
            self._wrap(monkeypatch, name)

    def _wrap(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        real = getattr(os, name)

        def call(*args: t.Any, **options: t.Any) -> t.Any:
            path = args[0] if isinstance(args[0], str) else ""
            if not path and isinstance(args[0], int):
                path = os.readlink(f"/proc/self/fd/{args[0]}")
            self.log.append((name, os.path.basename(path)))
            return real(*args, **options)

        monkeypatch.setattr(os, name, call)


def test_token_is_written_before_the_records(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    with disk.open().transaction() as transaction:
        steps = Steps(monkeypatch)
        transaction.begin_layer(mapped(C))
        monkeypatch.undo()
    temporary = ".tmp-layers.jsonuserns-storage"
    assert [step for step in steps.log if step != ("unlink", temporary)] == [
        ("pwrite", "layers.lock"),
        ("open", temporary),
        ("write", temporary),
        ("fdatasync", temporary),
        ("rename", temporary),
        ("open", "vfs-layers"),
        ("fsync", "vfs-layers"),
    ]


def test_records_always_refer_to_existing_layers(
    disk: Disk, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    """At each rename, the token has already changed, and no image refers to a layer without a record."""
    split = tmp_path / "split"
    split.write_bytes(b"gz")
    trash = tmp_path / "trash"
    trash.mkdir()
    tokens = {kind: disk.token(kind) for kind in ("layers", "images")}
    real = os.rename

    def rename(source: str, target: str, **options: t.Any) -> None:
        kind = os.path.basename(target).partition(".")[0]
        if kind in tokens:
            assert disk.token(kind) != tokens[kind]
            tokens[kind] = disk.token(kind)
        real(source, target, **options)
        known = {item["id"] for item in disk.read("layers")}
        for image in disk.read("images"):
            assert {image["layer"], *image.get("mapped-layers", ())} <= known

    monkeypatch.setattr(os, "rename", rename)
    store = disk.open()
    with store.transaction() as transaction:
        transaction.begin_layer(mapped(C))
        transaction.install_tar_split(C, str(split))
        transaction.finish_layer(C)
        transaction.append_mapped_layer(ONE, C)
    with store.transaction(containers=True) as transaction:
        transaction.drop_mapped_layer(C)
        transaction.mark_incomplete(C)
        transaction.remove_layer(C, str(trash))


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (28, NoSpace),
        (122, NoSpace),
        (13, PermissionDenied),
        (30, PermissionDenied),
        (5, StoreError),
    ],
)
@pytest.mark.parametrize("step", ["pwrite", "open", "write", "fdatasync", "rename"])
def test_failed_write_changes_nothing(
    disk: Disk, monkeypatch: pytest.MonkeyPatch, step: str, number: int, kind: t.Any
) -> None:
    before = {name: data for name, (*_rest, data) in disk.state().items() if "lock" not in name}
    store = disk.open()
    real = getattr(os, step)
    broken = False

    def fail(*args: t.Any, **options: t.Any) -> t.Any:
        if broken and (step != "open" or ".tmp-" in str(args[0])):
            raise OSError(number, os.strerror(number))
        return real(*args, **options)

    monkeypatch.setattr(os, step, fail)
    with store.transaction() as transaction:
        broken = True
        with pytest.raises(StoreError) as caught:
            transaction.begin_layer(mapped(C))
        broken = False
        assert isinstance(caught.value, kind)
        assert caught.value.hint
        assert str(disk.graphroot) in caught.value.subject
        assert list(transaction.snapshot.layers) == [A, B]
    after = {name: data for name, (*_rest, data) in disk.state().items() if "lock" not in name}
    assert after == before
    assert list(store.snapshot().layers) == [A, B]
    with store.transaction() as transaction:
        transaction.begin_layer(mapped(C))


def test_visible_records_are_known_if_their_directory_cannot_be_synced(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = disk.open()

    def fail(_path: str) -> None:
        raise OSError(5, os.strerror(5))

    with store.transaction() as transaction:
        with monkeypatch.context() as patch:
            patch.setattr(record_files, "sync_directory", fail)
            with pytest.raises(StoreError):
                transaction.begin_layer(mapped(C))
        # The caller must be able to revert the change.
        assert list(transaction.snapshot.layers) == [A, B, C]
        transaction.remove_layer(C, str(disk.runroot))
    assert list(store.snapshot().layers) == [A, B]
    assert [load["id"] for load in json.loads(disk.path("layers").read_text())] == [A, B]


@pytest.mark.parametrize("swept", [False, True])
def test_leftovers_of_a_killed_writer_are_removed(disk: Disk, swept: bool) -> None:
    for kind in ("layers", "images"):
        disk.path(kind, f".tmp-{kind}.jsonuserns-storage").write_bytes(b"half")
    others = disk.path("layers", ".tmp-layers.json123456")
    others.write_bytes(b"half")
    store = disk.open()
    store.snapshot()
    assert disk.path("layers", ".tmp-layers.jsonuserns-storage").exists()
    assert [leftover.kind for leftover in store.leftovers()] == ["records", "records"]
    if swept:
        assert len(store.sweep()) == 2
    else:
        with store.transaction():
            pass
    assert store.leftovers() == []
    assert store.sweep() == []
    assert not disk.path("layers", ".tmp-layers.jsonuserns-storage").exists()
    assert not disk.path("images", ".tmp-images.jsonuserns-storage").exists()
    assert others.exists()


def test_link_with_the_temporary_name_is_not_followed(disk: Disk, tmp_path: pathlib.Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("safe")
    disk.path("layers", ".tmp-layers.jsonuserns-storage").symlink_to(victim)
    with disk.open().transaction() as transaction:
        transaction.begin_layer(mapped(C))
    assert victim.read_text() == "safe"
    assert not disk.path("layers").is_symlink()


@pytest.fixture
def public_disk() -> t.Iterator[Disk]:
    """A disk whose parent folders all users can enter. pytest makes those of tmp_path private when it starts."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o755)
        disk = Disk(pathlib.Path(folder))
        os.chmod(disk.graphroot, 0o755)
        yield disk


def test_missing_permission_is_reported(public_disk: Disk) -> None:
    disk = public_disk
    os.chmod(disk.path("layers").parent, 0)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setresgid(65534, 65534, 65534)
                os.setresuid(65534, 65534, 65534)
            try:
                Store.open(disk.config()).snapshot()
            except PermissionDenied as error:
                code = 0 if "become: true" in str(error) and "vfs-layers" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


# A model of the store: after any operations, the files have the records of the model

NAMES = [padded_id(item) for item in "abcdef"]
steps = st.lists(
    st.tuples(
        st.sampled_from(
            ["begin", "finish", "give_up", "append", "drop", "remove", "flag", "new", "unknown"]
        ),
        st.sampled_from(NAMES),
        st.sampled_from([ONE, TWO]),
    ),
    max_size=25,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps=steps)
def test_records_equal_the_model_after_any_operations(
    tmp_path_factory: pytest.TempPathFactory, steps: t.Any
) -> None:
    disk = Disk(tmp_path_factory.mktemp("model"))
    disk.write("images", [*IMAGES, {"id": TWO, "layer": A}])
    trash = disk.graphroot / "trash"
    trash.mkdir()
    store = disk.open()
    layers: t.Dict[str, Json] = {layer["id"]: dict(layer) for layer in LAYERS}
    images: t.Dict[str, Json] = {item["id"]: dict(item) for item in disk.read("images")}
    tokens = {kind: disk.token(kind) for kind in ("layers", "images")}
    files = {kind: disk.path(kind).read_bytes() for kind in ("layers", "images")}
    for step, layer_id, image_id in steps:
        if step == "new":
            store = disk.open()
            continue
        if step == "unknown":
            # Another program writes fields that this collection does not know.
            for layer in layers.values():
                layer["later"] = {"deep": [1]}
            disk.write("layers", list(layers.values()))
            disk.path("layers", "layers.lock").write_bytes(os.urandom(64))
            tokens["layers"] = disk.token("layers")
            files["layers"] = disk.path("layers").read_bytes()
            continue
        is_rejected = False
        with store.transaction(containers=True) as transaction:
            try:
                if step == "begin":
                    transaction.begin_layer({"id": layer_id, "parent": A})
                elif step == "finish":
                    transaction.finish_layer(layer_id)
                elif step == "give_up":
                    transaction.mark_incomplete(layer_id)
                elif step == "append":
                    transaction.append_mapped_layer(image_id, layer_id)
                elif step == "drop":
                    transaction.drop_mapped_layer(layer_id)
                elif step == "flag":
                    transaction.update_layer(
                        layer_id, lambda raw: raw.setdefault("flags", {}).update(lease="<2>")
                    )
                else:
                    transaction.remove_layer(layer_id, str(trash))
            except StorageError:
                is_rejected = True
        known = layer_id in layers
        if step == "begin":
            assert is_rejected == known
            if not known:
                layers[layer_id] = {"id": layer_id, "parent": A, "flags": {"incomplete": True}}
        elif step in ("finish", "give_up", "flag"):
            assert is_rejected == (not known)
            if known:
                flags = layers[layer_id].setdefault("flags", {})
                if step == "flag":
                    flags["lease"] = "<2>"
                elif step == "give_up":
                    flags["incomplete"] = True
                else:
                    flags.pop("incomplete", None)
                if not flags:
                    del layers[layer_id]["flags"]
        elif step == "append":
            assert is_rejected == (not known)
            if known:
                listed = images[image_id].setdefault("mapped-layers", [])
                if layer_id not in listed:
                    listed.append(layer_id)
        elif step == "drop":
            assert not is_rejected
            for image in images.values():
                image["mapped-layers"] = [
                    item for item in image.get("mapped-layers", ()) if item != layer_id
                ]
                if not image["mapped-layers"]:
                    del image["mapped-layers"]
        else:
            used = any(layer.get("parent") == layer_id for layer in layers.values()) or any(
                layer_id in (item["layer"], *item.get("mapped-layers", ()))
                for item in images.values()
            )
            assert is_rejected == (used or not known)
            if not is_rejected:
                del layers[layer_id]
        assert disk.read("layers") == list(layers.values())
        assert disk.read("images") == list(images.values())
        for kind in ("layers", "images"):
            data, token = disk.path(kind).read_bytes(), disk.token(kind)
            assert (data != files[kind]) == (token != tokens[kind])
            files[kind], tokens[kind] = data, token
        snapshot = store.snapshot()
        assert {key: item.raw for key, item in snapshot.layers.items()} == layers
        assert {key: item.raw for key, item in snapshot.images.items()} == images
