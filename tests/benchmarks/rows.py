# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The measurements, one function for each part of the table."""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
import typing as t

from benchmarks.ground import LockWatch, Made, Place, Waiting, processor_seconds
from support import images
from support import large_store as store_data
from support.images import Image
from support.lab import Lab
from support.stores import Store

Say = t.Callable[[str], None]


@dataclasses.dataclass
class Row:
    """One line of the table.

    :param value: what was measured, in ``unit``
    :param allowed: what it may come to at most; None for what only informs
    :param detail: the figures that it is made of
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


# kind of store, its options, words for it, bar against podman's own copy
PODMAN: t.Tuple[t.Tuple[str, t.Dict[str, str], str, float], ...] = (
    ("overlay-ext4", {}, "overlay on ext4", 0.6),
    ("overlay-xfs", {}, "overlay on xfs, reflink", 0.25),
    ("overlay-ext4", {"mountopt": "nodev,metacopy=on"}, "overlay on ext4, metacopy", 0.5),
    ("vfs-ext4", {}, "vfs on ext4", 0.8),
    ("btrfs", {}, "btrfs", 0.8),
)
COPIES_LIMIT = ("overlay-ext4", "overlay-xfs")


def against_podman(lab: Lab, pictures: t.Sequence[Image], rounds: int, say: Say) -> t.Iterator[Row]:
    """Time to a ready mapped layer against podman, diff + apply and cp; disk taken by it."""
    for image in pictures:
        for kind, options, words, allowed in PODMAN:
            where = f"{words}, {image.name.partition('/')[2].partition(':')[0]}"
            say(where)
            place = Place(lab, kind, image, 2048, **options)
            try:
                yield from _pairs(place, where, allowed, kind, options, rounds)
            finally:
                place.close()


def _pairs(
    place: Place, where: str, allowed: float, kind: str, options: t.Dict[str, str], rounds: int
) -> t.List[Row]:
    theirs: t.List[t.Tuple[float, float]] = []
    mine: t.List[Made] = []
    applied: t.List[float] = []
    copies: t.List[t.Tuple[float, float]] = []
    disk: t.List[int] = []

    # Beside a busy neighbour these tell more than the clock does.
    cpu: t.Dict[str, t.List[float]] = {}

    def podman() -> None:
        before = processor_seconds()
        theirs.append(place.podman())
        cpu.setdefault("podman_both", []).append(processor_seconds() - before)

    def ours() -> None:
        before = place.used()
        mine.append(place.ours())
        disk.append(place.used() - before)
        cpu.setdefault("ours", []).append(mine[-1].cpu)

    def diff() -> None:
        before = processor_seconds()
        applied.append(place.diff_and_apply())
        cpu.setdefault("diff_apply", []).append(processor_seconds() - before)

    def copy() -> None:
        before = processor_seconds()
        copies.append(place.copied())
        cpu.setdefault("cp", []).append(processor_seconds() - before)

    contestants = [ours, podman]
    plain = not options
    if plain and kind == "overlay-ext4":
        contestants.append(diff)
    if plain and kind in COPIES_LIMIT:
        contestants.append(copy)
        place.copied()
    place.ours()
    place.forget()
    for number in range(rounds):
        turn = number % len(contestants)
        for contestant in contestants[turn:] + contestants[:turn]:
            contestant()
            place.forget()
    inner = [item.inner for item in mine]
    # What a first container waits for the copy alone: its second start does all the rest too.
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
            # Files smaller than an inode with its name cannot be had for less than an inode.
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
    """An image to be filled behind the runtime's back."""
    return images.build(lab.folder(), images.many_files_layers(1), "localhost/filled:1")


def locks_and_waits(lab: Lab, rounds: int, say: Say) -> t.Iterator[Row]:
    """How long the store is locked, and how long podman waits meanwhile."""
    picture = tiny(lab)
    for count in (10_000, 100_000):
        say(f"locks, {count:,} files")
        place = Place(lab, "overlay-ext4", picture, mib=1024 + count // 50)
        place.fill(count)
        told, seen, meanwhile, idle = [], [], [], []
        try:
            for _number in range(rounds):
                with LockWatch(place.store) as watch:
                    made = place.ours()
                told.append(made.lock)
                seen.append(watch.longest)
                place.forget()
                with Waiting(place) as waiting:
                    place.ours()
                meanwhile.append(waiting.waits)
                place.forget()
                idle.append([place.listing() for _call in range(max(10, len(waiting.waits)))])
            theirs = []
            with Waiting(place) as waiting:
                place.podman()
            theirs = waiting.waits
        finally:
            place.close()
        yield Row(
            "the store's locks are held",
            f"longest, {count:,} files",
            round(max(*told, *seen) * 1000, 1),
            50,
            "ms",
            {
                "told_ms": [round(item * 1000, 1) for item in told],
                "seen_by_another_process_ms": [round(item * 1000, 1) for item in seen],
            },
        )
        yield Row(
            "podman images meanwhile",
            f"longest wait, {count:,} files",
            median(max(busy) / max(calm) for busy, calm in zip(meanwhile, idle)),
            2,
            detail={
                "longest": seconds([max(item) for item in meanwhile]),
                "median": seconds([median(item) for item in meanwhile]),
                "idle_longest": seconds([max(item) for item in idle]),
                "idle_median": seconds([median(item) for item in idle]),
                "longest_beside_podmans_own_copy": round(max(theirs), 3),
            },
        )


def growth(lab: Lab, most: int, rounds: int, say: Say) -> t.List[Row]:
    """Seconds and memory as an image grows."""
    picture = tiny(lab)
    counts = [10_000, most]
    taken: t.List[float] = []
    peaks: t.List[int] = []
    walls: t.List[t.List[float]] = []
    largest = 0
    for count in counts:
        say(f"growth, {count:,} files")
        place = Place(lab, "overlay-ext4", picture, mib=1024 + count // 50)
        try:
            place.fill(count)
            # Whoever counts a process's pages holds it up: no time is taken of this one.
            watched = place.ours(watch=True)
            runs = []
            for _number in range(rounds):
                place.forget()
                runs.append(place.ours())
        finally:
            place.close()
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


def in_place(lab: Lab, picture: Image, rounds: int, say: Say) -> t.List[Row]:
    """A run that finds everything in place."""
    say("a run that finds everything in place")
    place = Place(lab, "overlay-ext4", picture)
    try:
        place.ours()
        runs = [place.ours() for _number in range(max(rounds, 3))]
        if any(run.entry["action"] != "existing" for run in runs):
            raise RuntimeError("a second run did not find the first one's layer")
    finally:
        place.close()
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


def conversions(lab: Lab, pictures: t.Sequence[Image], rounds: int, say: Say) -> t.Iterator[Row]:
    """An image converted in place against a mapped layer of ours."""
    for image in pictures:
        where = f"overlay on ext4, {image.name.partition('/')[2].partition(':')[0]}"
        say(f"conversion in place, {where}")
        place = Place(lab, "overlay-ext4", image)
        copies: t.List[float] = []
        found: t.List[t.Dict[str, t.Any]] = []
        try:
            for _number in range(rounds):
                copies.append(place.ours().inner)
                place.forget()
                found.append(place.converted())
                place.calm()
                place.converted(back=True)
                place.calm()
        finally:
            place.close()
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
    """image_layers_info on 10,000 layers against containers-storage, which only lists them."""
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
        # Go works on all processors at once, we on one.
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
    """The first start of a container on a layer of ours against the second one."""
    image = images.build(lab.folder(), images.many_files_layers(3000), "localhost/many:3000")
    for kind in ("vfs-ext4", "overlay-ext4"):
        say(f"first start on a layer of ours, {kind}")
        place = Place(lab, kind, image)
        first, second = [], []
        try:
            # podman's own warm-up (database, page cache) is not what is measured.
            place.store.run(image.name, "true")
            for _number in range(rounds):
                place.ours()
                first.append(place.start())
                second.append(place.start())
                if len(place.store.mapped_layers(image.name)) != 1:
                    raise RuntimeError("podman has made a layer of its own")
                place.forget()
        finally:
            place.close()
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
    """Say what is being measured."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", file=sys.stderr, flush=True)
