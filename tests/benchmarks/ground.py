# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the measurements share: stores to measure on, contestants, and watchers beside them."""

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
class Made:
    """One run of what layer_template does.

    :param wall: seconds of the whole process
    :param inner: seconds from the task's options to its result
    :param cpu: seconds of processor that all of it took, imports left out
    :param lock: seconds that the store was locked, as it says
    :param memory: bytes, the largest sum of all its processes, shared pages counted once
    :param largest: bytes, the largest of its processes
    """

    wall: float
    inner: float
    cpu: float
    lock: float
    entry: Json
    memory: int
    largest: int


def processor_seconds() -> float:
    """What all processes that this one has started and waited for have taken so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class Place:
    """A store with one image, and what is done to it again and again."""

    def __init__(self, lab: Lab, kind: str, image: Image, mib: int = 2048, **options: str) -> None:
        self.lab, self.image = lab, image
        self.store = Store(lab, kind, options=options, mib=mib, on_disk=True)
        self._write_directly()
        self.store.load(image)
        # podman's own first steps in a store are not what is measured.
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

    def calm(self) -> None:
        """Leave nothing for the next one to write, and nothing that was deleted to be freed."""
        descriptor = os.open(self.store.graphroot, os.O_RDONLY)
        try:
            _LIBC.syncfs(descriptor)
            if self.store.driver == "btrfs":
                for what in ("filesystem", "subvolume", "filesystem"):
                    self.store.tool("btrfs", what, "sync", str(self.store.graphroot))
        finally:
            os.close(descriptor)

    def forget(self) -> None:
        """Remove all containers and all layers that the image came without."""
        if self.store.containers():
            self.store.podman("rm", "-f", "-a")
        for layer_id in self.store.mapped_layers(self.image.name):
            self.store.storage_cli("delete-layer", layer_id)
        self.calm()

    def used(self) -> int:
        """Bytes of the filesystem in use."""
        self.calm()
        space = os.statvfs(self.store.graphroot)
        return (space.f_blocks - space.f_bfree) * space.f_frsize

    # What is timed; each returns seconds

    def listing(self) -> float:
        """`podman images`."""
        return self.store.timed(lambda: self.store.podman("images"))

    def podman(self) -> t.Tuple[float, float]:
        """podman's first container with the map, and its second one, whose layer is there."""
        first, second = (
            self.store.timed(lambda: self.store.create(self.image.name, *MAP_ARGS))
            for _number in range(2)
        )
        if len(self.store.mapped_layers(self.image.name)) != 1:
            raise RuntimeError("podman has made no mapped layer")
        return first, second

    def start(self) -> float:
        """A container with the map from its creation to its end."""
        return self.store.timed(lambda: self.store.run(self.image.name, "true", args=MAP_ARGS))

    def ours(self, watch: bool = False) -> Made:
        """What layer_template does, in a process of the system's Python that has imported it."""
        where = json.dumps(self.store.module_args())
        env = {"PYTHONPATH": str(self.lab.tree), "PYTHONDONTWRITEBYTECODE": "1"}
        forced = "_CONTAINERS_OVERLAY_DISABLE_IDMAP"
        if forced in self.store.env():
            env[forced] = "yes"
        started = time.perf_counter()
        process = self.lab.machine.popen(
            [SYSTEM_PYTHON, str(MAKE_LAYER), where, self.image.name, MAP],
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
        return Made(wall, inner, cpu, entry["lock_seconds"], entry, peak, largest)

    def converted(self, back: bool = False) -> Json:
        """What a conversion of the image in place does, in a process that has imported it."""
        return convert(self.store, [self.image.name], [] if back else [MAP])

    def diff_and_apply(self) -> float:
        """Each layer as an archive into a layer with the map, by containers-storage itself."""
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
            words = ["--id", name, "--uidmap", MAP, "--gidmap", MAP]
            self.store.storage_cli("create-layer", *words, *made[-1:])
            self.store.storage_cli("diff", "-u", "-f", str(archive), template)
            self.store.storage_cli("applydiff", "-f", str(archive), name)
            made.append(name)
        seconds = time.perf_counter() - started
        archive.unlink()
        for name in reversed(made):
            self.store.storage_cli("delete-layer", name)
        self.calm()
        return seconds

    def copied(self) -> t.Tuple[float, float]:
        """`cp -a --reflink=auto` of the merged tree as a plain folder; then all of it on the disk."""
        if not self.plain.exists():
            with self.store.mounted(self.template) as tree:
                self.store.tool("cp", "-a", f"{tree}/.", str(self.plain))
            self.calm()
        target = self.plain.with_name("copy")
        started = time.perf_counter()
        self.store.tool("cp", "-a", "--reflink=auto", str(self.plain), str(target))
        seconds = time.perf_counter() - started
        self.calm()
        whole = time.perf_counter() - started
        shutil.rmtree(target)
        self.calm()
        return seconds, whole

    def fill(self, count: int) -> None:
        """Put so many small files into the image's top layer, behind the runtime's back."""
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
        self.calm()


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
    """Watches how much memory a process and all that it starts hold together."""

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
            self.peak = max(self.peak, sum(_proportional(pid) for pid in _family(self._pid)))


def _family(pid: int) -> t.Iterator[int]:
    yield pid
    try:
        text = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return
    for child in text.split():
        yield from _family(int(child))


def _proportional(pid: int) -> int:
    try:
        for line in pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


class LockWatch:
    """A process of its own that asks, over and over, whether a store's locks could be had."""

    # struct flock of fcntl(2) on 64-bit Linux: type, whence, start, length, PID.
    _FLOCK = struct.Struct("=hh4xqqi4x")

    def __init__(self, store: Store) -> None:
        self.longest = 0.0
        names = ("layers", "images")
        self._paths = [
            str(store.graphroot / f"{store.driver}-{name}" / f"{name}.lock") for name in names
        ]
        self._end = multiprocessing.Event()
        self._answers: multiprocessing.Queue[float] = multiprocessing.Queue()

    def __enter__(self) -> LockWatch:
        self._process = multiprocessing.Process(target=self._watch)
        self._process.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._end.set()
        self.longest = self._answers.get()
        self._process.join()

    def _watch(self) -> None:
        files = [os.open(path, os.O_RDONLY) for path in self._paths]
        asked = self._FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
        longest, since = 0.0, None
        while not self._end.is_set():
            now = time.perf_counter()
            taken = any(
                self._FLOCK.unpack(fcntl.fcntl(file, fcntl.F_GETLK, asked))[0] != fcntl.F_UNLCK
                for file in files
            )
            if taken:
                since = since or now
            elif since is not None:
                longest, since = max(longest, now - since), None
            time.sleep(0.0005)
        self._answers.put(longest)


class Waiting:
    """A thread that lists the images with podman, again and again."""

    def __init__(self, place: Place) -> None:
        self.waits: t.List[float] = []
        self._place = place
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._list)

    def __enter__(self) -> Waiting:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._end.set()
        self._thread.join()

    def _list(self) -> None:
        while not self._end.is_set():
            self.waits.append(self._place.listing())
