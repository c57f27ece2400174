# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The measurements, with a function for each part of the table."""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
import typing as t

from benchmarks.measured_store import (
    ImageListing,
    LockWatch,
    MeasuredStore,
    TemplateRun,
    processor_seconds,
)
from support import images
from support import large_store as store_data
from support.images import Image
from support.lab import Lab
from support.stores import Store

Say = t.Callable[[str], None]


@dataclasses.dataclass
class Row:
    """A row of the table.

    :param value: the measured value in ``unit``
    :param allowed: the limit of the value; None if the value is only informative
    :param detail: the figures from which the value is calculated
    """

    group: str
    work: str
    value: float
    allowed: t.Optional[float]
    unit: str = "x"
    detail: t.Dict[str, t.Any] = dataclasses.field(default_factory=dict)

    @property
    def verdict(self) -> str:
        if self.allowed is None:
            return ""
        return "met" if round(self.value, 3) <= self.allowed else "missed"


def median(values: t.Iterable[float]) -> float:
    return statistics.median(list(values))


def ratio(ours: t.Sequence[float], theirs: t.Sequence[float]) -> float:
    """The median of the ratios of pairs."""
    return median(mine / other for mine, other in zip(ours, theirs))


def seconds(values: t.Sequence[float]) -> t.List[float]:
    return [round(value, 3) for value in values]


# kind of store, its options, its description, limit relative to podman's copy
PODMAN: t.Tuple[t.Tuple[str, t.Dict[str, str], str, float], ...] = (
    ("overlay-ext4", {}, "overlay on ext4", 0.6),
    ("overlay-xfs", {}, "overlay on xfs, reflink", 0.25),
    ("overlay-ext4", {"mountopt": "nodev,metacopy=on"}, "overlay on ext4, metacopy", 0.5),
    ("vfs-ext4", {}, "vfs on ext4", 0.8),
    ("btrfs", {}, "btrfs", 0.8),
)
COPIES_LIMIT = ("overlay-ext4", "overlay-xfs")


def against_podman(
    lab: Lab, test_images: t.Sequence[Image], rounds: int, say: Say
) -> t.Iterator[Row]:
    """Compare the time for a mapped layer with podman, diff + apply and cp, and measure its disk space."""
    for image in test_images:
        for kind, options, description, allowed in PODMAN:
            where = f"{description}, {image.name.partition('/')[2].partition(':')[0]}"
            say(where)
            measured = MeasuredStore(lab, kind, image, 2048, **options)
            try:
                yield from _pairs(measured, where, allowed, kind, options, rounds)
            finally:
                measured.close()


def _pairs(
    measured: MeasuredStore,
    where: str,
    allowed: float,
    kind: str,
    options: t.Dict[str, str],
    rounds: int,
) -> t.List[Row]:
    theirs: t.List[t.Tuple[float, float]] = []
    mine: t.List[TemplateRun] = []
    applied: t.List[float] = []
    copies: t.List[t.Tuple[float, float]] = []
    disk: t.List[int] = []

    # On a busy machine, processor time is more meaningful than elapsed time.
    cpu: t.Dict[str, t.List[float]] = {}

    def podman() -> None:
        before = processor_seconds()
        theirs.append(measured.podman())
        cpu.setdefault("podman_both", []).append(processor_seconds() - before)

    def ours() -> None:
        before = measured.used()
        mine.append(measured.ours())
        disk.append(measured.used() - before)
        cpu.setdefault("ours", []).append(mine[-1].cpu)

    def diff() -> None:
        before = processor_seconds()
        applied.append(measured.diff_and_apply())
        cpu.setdefault("diff_apply", []).append(processor_seconds() - before)

    def copy() -> None:
        before = processor_seconds()
        copies.append(measured.copy_tree())
        cpu.setdefault("cp", []).append(processor_seconds() - before)

    operations = [ours, podman]
    plain = not options
    if plain and kind == "overlay-ext4":
        operations.append(diff)
    if plain and kind in COPIES_LIMIT:
        operations.append(copy)
        measured.copy_tree()
    measured.ours()
    measured.reset()
    for number in range(rounds):
        first = number % len(operations)
        for operation in operations[first:] + operations[:first]:
            operation()
            measured.reset()
    inner = [item.inner for item in mine]
    # The time of the copy alone: the second container includes everything else.
    alone = [max(first - second, 0.001) for first, second in theirs]
    detail = {
        "ours": seconds(inner),
        "ours_with_start_and_imports": seconds([item.wall for item in mine]),
        "processor_seconds": {name: seconds(used) for name, used in cpu.items()},
        "strategy": mine[0].entry["strategy"],
        "files": mine[0].entry["files"],
    }
    rows = [
        Row(
            "against podman's own copy",
            where,
            ratio(inner, alone),
            allowed,
            detail={
                **detail,
                "podman_first": seconds([first for first, _second in theirs]),
                "podman_second": seconds([second for _first, second in theirs]),
                "ratio_to_all_of_podman_first": round(
                    ratio(inner, [first for first, _second in theirs]), 3
                ),
            },
        )
    ]
    if applied:
        rows.append(
            Row(
                "against diff + apply",
                where,
                ratio(inner, applied),
                0.25,
                detail={**detail, "diff_apply": seconds(applied)},
            )
        )
    if copies:
        rows.append(
            Row(
                "against cp -a --reflink=auto",
                where,
                ratio(inner, [short for short, _long in copies]),
                1.3,
                detail={
                    **detail,
                    "cp": seconds([short for short, _long in copies]),
                    "cp_on_disk": seconds([long for _short, long in copies]),
                    "ratio_to_cp_on_disk": round(
                        ratio(inner, [long for _short, long in copies]), 3
                    ),
                },
            )
        )
    size = mine[0].entry["size_apparent"]
    shares = mine[0].entry["strategy"] != "copy"
    small_files = size < 4096 * mine[0].entry["files"]
    rows.append(
        Row(
            "disk per map",
            where,
            round(median(disk) / size * 100, 2),
            # A file requires at least an inode, which may be larger than the file.
            5.0 if shares and not small_files else None,
            "%",
            {
                "bytes": disk,
                "image_bytes": size,
                "size_exclusive": mine[0].entry["size_exclusive"],
                "bytes_per_entry": round(median(disk) / mine[0].entry["files"]),
            },
        )
    )
    return rows


def tiny(lab: Lab) -> Image:
    """An image to which files are added without the runtime."""
    return images.build(lab.folder(), images.many_files_layers(1), "localhost/filled:1")


def locks_and_waits(lab: Lab, rounds: int, say: Say) -> t.Iterator[Row]:
    """Measure how long the store is locked, and how long podman waits at the same time."""
    image = tiny(lab)
    for count in (10_000, 100_000):
        say(f"locks, {count:,} files")
        measured = MeasuredStore(lab, "overlay-ext4", image, mib=1024 + count // 50)
        measured.fill(count)
        reported, observed, busy_waits, idle_waits = [], [], [], []
        try:
            for _number in range(rounds):
                with LockWatch(measured.store) as watch:
                    made = measured.ours()
                reported.append(made.lock)
                observed.append(watch.longest)
                measured.reset()
                with ImageListing(measured) as waiting:
                    measured.ours()
                busy_waits.append(waiting.waits)
                measured.reset()
                idle_waits.append(
                    [measured.listing() for _call in range(max(10, len(waiting.waits)))]
                )
            theirs = []
            with ImageListing(measured) as waiting:
                measured.podman()
            theirs = waiting.waits
        finally:
            measured.close()
        yield Row(
            "the store's locks are held",
            f"longest, {count:,} files",
            round(max(*reported, *observed) * 1000, 1),
            50,
            "ms",
            {
                "told_ms": [round(item * 1000, 1) for item in reported],
                "seen_by_another_process_ms": [round(item * 1000, 1) for item in observed],
            },
        )
        yield Row(
            "podman images meanwhile",
            f"longest wait, {count:,} files",
            median(max(busy) / max(idle) for busy, idle in zip(busy_waits, idle_waits)),
            2,
            detail={
                "longest": seconds([max(item) for item in busy_waits]),
                "median": seconds([median(item) for item in busy_waits]),
                "idle_longest": seconds([max(item) for item in idle_waits]),
                "idle_median": seconds([median(item) for item in idle_waits]),
                "longest_beside_podmans_own_copy": round(max(theirs), 3),
            },
        )


def growth(lab: Lab, most: int, rounds: int, say: Say) -> t.List[Row]:
    """Measure time and memory for a small and a large image."""
    image = tiny(lab)
    counts = [10_000, most]
    taken: t.List[float] = []
    peaks: t.List[int] = []
    walls: t.List[t.List[float]] = []
    largest = 0
    for count in counts:
        say(f"growth, {count:,} files")
        measured = MeasuredStore(lab, "overlay-ext4", image, mib=1024 + count // 50)
        try:
            measured.fill(count)
            # Counting the pages of a process delays it, so the time of this run is not used.
            watched = measured.ours(watch=True)
            runs = []
            for _number in range(rounds):
                measured.reset()
                runs.append(measured.ours())
        finally:
            measured.close()
        walls.append([run.inner for run in runs])
        taken.append(median(run.inner for run in runs))
        peaks.append(watched.memory)
        largest = watched.largest
    factor = taken[1] / taken[0] / (counts[1] / counts[0])
    return [
        Row(
            "growth",
            f"time per file at {most:,} files, of that at {counts[0]:,}",
            factor,
            1.2,
            detail={str(count): seconds(wall) for count, wall in zip(counts, walls)},
        ),
        Row(
            "peak memory of all processes",
            f"{most:,} files",
            round(peaks[1] / 1e6, 1),
            100,
            "MB",
            {str(count): peak for count, peak in zip(counts, peaks)} | {"largest_process": largest},
        ),
    ]


def in_place(lab: Lab, image: Image, rounds: int, say: Say) -> t.List[Row]:
    """Measure a run that finds everything in place."""
    say("a run that finds everything in place")
    measured = MeasuredStore(lab, "overlay-ext4", image)
    try:
        measured.ours()
        runs = [measured.ours() for _number in range(max(rounds, 3))]
        if any(run.entry["action"] != "existing" for run in runs):
            raise RuntimeError("a second run did not find the layer of the first run")
    finally:
        measured.close()
    return [
        Row(
            "a run that finds everything in place",
            "inside the module",
            round(median(run.inner for run in runs), 3),
            0.15,
            "s",
            {
                "inside": seconds([run.inner for run in runs]),
                "process_with_imports": seconds([run.wall for run in runs]),
            },
        )
    ]


def conversions(lab: Lab, test_images: t.Sequence[Image], rounds: int, say: Say) -> t.Iterator[Row]:
    """Compare the conversion of an image in place with the creation of a mapped layer."""
    for image in test_images:
        where = f"overlay on ext4, {image.name.partition('/')[2].partition(':')[0]}"
        say(f"conversion in place, {where}")
        measured = MeasuredStore(lab, "overlay-ext4", image)
        copies: t.List[float] = []
        found: t.List[t.Dict[str, t.Any]] = []
        try:
            for _number in range(rounds):
                copies.append(measured.ours().inner)
                measured.reset()
                found.append(measured.convert_image())
                measured.sync()
                measured.convert_image(back=True)
                measured.sync()
        finally:
            measured.close()
        if any(not item.get("changed") for item in found):
            raise RuntimeError(f"not converted: {found}")
        mine = [item["seconds"] for item in found]
        yield Row(
            "conversion in place against a copy",
            where,
            ratio(mine, copies),
            0.5,
            detail={
                "ours": seconds(mine),
                "copy": seconds(copies),
                "inodes": found[0]["inodes"],
                "lock_seconds": seconds([item["lock_seconds"] for item in found]),
                "expected_lock_seconds": [item["expected_lock_seconds"] for item in found],
            },
        )


# Images in the large store; each has 50 layers.
LARGE = 200


def large_store(lab: Lab, rounds: int, say: Say) -> t.List[Row]:
    """Compare image_layers_info on 10,000 layers with containers-storage, which only lists them."""
    say(f"a store of {LARGE * store_data.DEEP:,} layers")
    store = Store(lab, "overlay-forced")
    ours: t.List[t.Tuple[float, float]] = []
    theirs: t.List[t.Tuple[float, float]] = []
    try:
        store.podman("images")
        store_data.populate(store, LARGE)
        for _number in range(rounds):
            before = processor_seconds()
            wall = store.timed(lambda: store.storage_cli("layers", "--json"))
            theirs.append((wall, processor_seconds() - before))
            found = store_data.gather(lab, store)
            ours.append((found["seconds"], found["processor"]))
    finally:
        store.close()
    group = f"image_layers_info on {LARGE * store_data.DEEP:,} layers"
    walls, processors = (
        ([mine[part] for mine in ours], [their[part] for their in theirs]) for part in (0, 1)
    )
    return [
        # containers-storage, in Go, uses all processors; image_layers_info uses only one.
        Row(group, f"against {LISTING}", ratio(*walls), 1.25, detail=_pair(*walls)),
        Row(
            group,
            f"processor time, against {LISTING}",
            ratio(*processors),
            1,
            detail=_pair(*processors),
        ),
    ]


LISTING = "containers-storage layers --json"


def _pair(ours: t.Sequence[float], theirs: t.Sequence[float]) -> t.Dict[str, t.Any]:
    return {"ours": seconds(ours), "theirs": seconds(theirs)}


def first_start(lab: Lab, rounds: int, say: Say) -> t.Iterator[Row]:
    """Compare the first start of a container on a layer of this collection with the second start."""
    image = images.build(lab.folder(), images.many_files_layers(3000), "localhost/many:3000")
    for kind in ("vfs-ext4", "overlay-ext4"):
        say(f"first start on a layer of ours, {kind}")
        measured = MeasuredStore(lab, kind, image)
        first, second = [], []
        try:
            # podman's warm-up (database, page cache) is not measured.
            measured.store.run(image.name, "true")
            for _number in range(rounds):
                measured.ours()
                first.append(measured.start())
                second.append(measured.start())
                if len(measured.store.mapped_layers(image.name)) != 1:
                    raise RuntimeError("podman has created another layer")
                measured.reset()
        finally:
            measured.close()
        detail = {"first": seconds(first), "second": seconds(second)}
        driver = kind.partition("-")[0]
        yield Row(
            "first start on a layer of ours",
            f"against the second, {driver} on ext4, 3,000 files",
            ratio(first, second),
            1.5,
            detail=detail,
        )


def progress(text: str) -> None:
    """Print the current measurement or a result."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", file=sys.stderr, flush=True)
