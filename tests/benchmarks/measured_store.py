# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Stores for measurements, the measured operations, and observers of memory, locks and waiting times."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import fcntl
import json
import multiprocessing
import os
import pathlib
import resource
import shutil
import struct
import subprocess
import threading
import time
import typing as t

from support.conversions import convert
from support.images import Image
from support.lab import Lab
from support.modules import SYSTEM_PYTHON
from support.stores import Json, Store

MAP = "0:100000:65536"
MAP_ARGS = ("--uidmap", MAP, "--gidmap", MAP)

_LIBC = ctypes.CDLL(None, use_errno=True)


MAKE_LAYER = pathlib.Path(__file__).with_name("make_layer.py")


@dataclasses.dataclass
class TemplateRun:
    """A run of the operation of layer_template.

    :param wall: seconds of the whole process
    :param inner: seconds from the task's options to its result
    :param cpu: processor seconds without imports
    :param lock: seconds for which the store was locked, as reported in the result
    :param memory: bytes, the maximum sum of all its processes, with shared pages counted once
    :param largest: bytes of its largest process
    """

    wall: float
    inner: float
    cpu: float
    lock: float
    entry: Json
    memory: int
    largest: int


def processor_seconds() -> float:
    """The processor seconds of all ended child processes of this process."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class MeasuredStore:
    """A store with an image, and the measured operations on it."""

    def __init__(self, lab: Lab, kind: str, image: Image, mib: int = 2048, **options: str) -> None:
        self.lab, self.image = lab, image
        self.store = Store(lab, kind, options=options, mib=mib, on_disk=True)
        self._write_directly()
        self.store.load(image)
        # podman's initialisation of the store is not measured.
        self.store.podman("rm", self.store.create(image.name))
        self.plain = self.store.graphroot.parent / "plain"

    @property
    def template(self) -> str:
        return str(self.store.image(self.image.name)["layer"])

    def _write_directly(self) -> None:
        """Keep the loop device's file out of the page cache, so that it behaves like a disk."""
        folder = self.store.graphroot.parent
        found = self.store.tool("findmnt", "-n", "-o", "SOURCE", "-T", str(folder))
        self.store.tool("losetup", "--direct-io=on", found.stdout.strip())

    def close(self) -> None:
        self.store.close()

    def sync(self) -> None:
        """Sync the filesystem and complete deletions, so that they do not affect the next measurement."""
        descriptor = os.open(self.store.graphroot, os.O_RDONLY)
        try:
            _LIBC.syncfs(descriptor)
            if self.store.driver == "btrfs":
                for command in ("filesystem", "subvolume", "filesystem"):
                    self.store.tool("btrfs", command, "sync", str(self.store.graphroot))
        finally:
            os.close(descriptor)

    def reset(self) -> None:
        """Remove all containers and all mapped layers."""
        if self.store.containers():
            self.store.podman("rm", "-f", "-a")
        for layer_id in self.store.mapped_layers(self.image.name):
            self.store.storage_cli("delete-layer", layer_id)
        self.sync()

    def used(self) -> int:
        """The used bytes of the filesystem."""
        self.sync()
        space = os.statvfs(self.store.graphroot)
        return (space.f_blocks - space.f_bfree) * space.f_frsize

    # Measured operations; each returns seconds

    def listing(self) -> float:
        """`podman images`."""
        return self.store.timed(lambda: self.store.podman("images"))

    def podman(self) -> t.Tuple[float, float]:
        """Create two containers with the map: podman creates the layer for the first and reuses it for the second."""
        first, second = (
            self.store.timed(lambda: self.store.create(self.image.name, *MAP_ARGS))
            for _number in range(2)
        )
        if len(self.store.mapped_layers(self.image.name)) != 1:
            raise RuntimeError("podman has not created a mapped layer")
        return first, second

    def start(self) -> float:
        """Run a container with the map, from its creation to its end."""
        return self.store.timed(lambda: self.store.run(self.image.name, "true", args=MAP_ARGS))

    def ours(self, watch: bool = False) -> TemplateRun:
        """Run the operation of layer_template in a process of the system's Python that has imported it."""
        options = json.dumps(self.store.module_args())
        env = {"PYTHONPATH": str(self.lab.tree), "PYTHONDONTWRITEBYTECODE": "1"}
        forced = "_CONTAINERS_OVERLAY_DISABLE_IDMAP"
        if forced in self.store.env():
            env[forced] = "yes"
        started = time.perf_counter()
        process = self.lab.machine.popen(
            [SYSTEM_PYTHON, str(MAKE_LAYER), options, self.image.name, MAP],
            env=env,
            stdout=subprocess.PIPE,
        )
        with contextlib.ExitStack() as undo:
            memory = undo.enter_context(Memory(process.pid)) if watch else None
            output, _errors = process.communicate(timeout=3600)
        wall = time.perf_counter() - started
        inner, cpu, largest, result = json.loads(output)
        if result.get("error"):
            raise RuntimeError(result["error"])
        (entry,) = result["layers"]
        peak = memory.peak if memory else 0
        return TemplateRun(wall, inner, cpu, entry["lock_seconds"], entry, peak, largest)

    def convert_image(self, back: bool = False) -> Json:
        """Convert the image in place, in a process that has imported the operation."""
        return convert(self.store, [self.image.name], [] if back else [MAP])

    def diff_and_apply(self) -> float:
        """Copy each layer as an archive into a layer with the map, with the program containers-storage."""
        chain = []
        layer = self.template
        while layer:
            chain.append(layer)
            layer = self.store.layer(layer).get("parent", "")
        made: t.List[str] = []
        archive = self.store.base / "tmp" / "diff.tar"
        started = time.perf_counter()
        for number, template in enumerate(reversed(chain)):
            name = f"{number:x}".rjust(64, "f")
            options = ["--id", name, "--uidmap", MAP, "--gidmap", MAP]
            self.store.storage_cli("create-layer", *options, *made[-1:])
            self.store.storage_cli("diff", "-u", "-f", str(archive), template)
            self.store.storage_cli("applydiff", "-f", str(archive), name)
            made.append(name)
        seconds = time.perf_counter() - started
        archive.unlink()
        for name in reversed(made):
            self.store.storage_cli("delete-layer", name)
        self.sync()
        return seconds

    def copy_tree(self) -> t.Tuple[float, float]:
        """Copy the merged tree with `cp -a --reflink=auto`; returns the seconds without and with a sync."""
        if not self.plain.exists():
            with self.store.mounted(self.template) as tree:
                self.store.tool("cp", "-a", f"{tree}/.", str(self.plain))
            self.sync()
        target = self.plain.with_name("copy")
        started = time.perf_counter()
        self.store.tool("cp", "-a", "--reflink=auto", str(self.plain), str(target))
        seconds = time.perf_counter() - started
        self.sync()
        with_sync = time.perf_counter() - started
        shutil.rmtree(target)
        self.sync()
        return seconds, with_sync

    def fill(self, count: int) -> None:
        """Add `count` small files to the top layer of the image, without the runtime."""
        below = "diff" if self.store.driver == "overlay" else "."
        root = self.store.layer_folder(self.template) / below
        workers = len(os.sched_getaffinity(0))
        jobs = [
            multiprocessing.Process(target=_fill, args=(root, number, workers, count))
            for number in range(workers)
        ]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join()
        self.sync()


def _fill(root: pathlib.Path, number: int, step: int, count: int) -> None:
    for folder in range(number, (count + 149) // 150, step):
        path = root / f"filled/{folder // 1000:03d}/{folder % 1000:03d}"
        path.mkdir(parents=True)
        os.chown(path, 1000, 1000)
        opened = os.open(path, os.O_RDONLY)
        for item in range(folder * 150, min((folder + 1) * 150, count)):
            made = os.open(str(item), os.O_WRONLY | os.O_CREAT, 0o644, dir_fd=opened)
            os.write(made, b"a few bytes, as in a small file of a package\n" * 4)
            os.fchown(made, 1000, 1000)
            os.close(made)
        os.close(opened)


class Memory:
    """Observes the total memory of a process and its descendants."""

    def __init__(self, pid: int) -> None:
        self.peak = 0
        self._pid = pid
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(0.1):
            self.peak = max(
                self.peak, sum(_proportional_size(pid) for pid in _process_tree(self._pid))
            )


def _process_tree(pid: int) -> t.Iterator[int]:
    yield pid
    try:
        text = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return
    for child in text.split():
        yield from _process_tree(int(child))


def _proportional_size(pid: int) -> int:
    try:
        for line in pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


class LockWatch:
    """A separate process that repeatedly tests whether the locks of a store are held."""

    # struct flock of fcntl(2) on 64-bit Linux: type, whence, start, length, PID.
    _FLOCK = struct.Struct("=hh4xqqi4x")

    def __init__(self, store: Store) -> None:
        self.longest = 0.0
        names = ("layers", "images")
        self._paths = [
            str(store.graphroot / f"{store.driver}-{name}" / f"{name}.lock") for name in names
        ]
        self._end = multiprocessing.Event()
        self._results: multiprocessing.Queue[float] = multiprocessing.Queue()

    def __enter__(self) -> LockWatch:
        self._process = multiprocessing.Process(target=self._watch)
        self._process.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._end.set()
        self.longest = self._results.get()
        self._process.join()

    def _watch(self) -> None:
        files = [os.open(path, os.O_RDONLY) for path in self._paths]
        request = self._FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
        longest, since = 0.0, None
        while not self._end.is_set():
            now = time.perf_counter()
            taken = any(
                self._FLOCK.unpack(fcntl.fcntl(file, fcntl.F_GETLK, request))[0] != fcntl.F_UNLCK
                for file in files
            )
            if taken:
                since = since or now
            elif since is not None:
                longest, since = max(longest, now - since), None
            time.sleep(0.0005)
        self._results.put(longest)


class ImageListing:
    """A thread that repeatedly lists the images with podman."""

    def __init__(self, store: MeasuredStore) -> None:
        self.waits: t.List[float] = []
        self._store = store
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._list)

    def __enter__(self) -> ImageListing:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._end.set()
        self._thread.join()

    def _list(self) -> None:
        while not self._end.is_set():
            self.waits.append(self._store.listing())
