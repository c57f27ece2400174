# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Measure the claims of the README as ratios of pairs in the same run, on loop filesystems.

Requires root, podman, containers-storage, mkfs.ext4, mkfs.xfs and mkfs.btrfs. All files are below /tmp and are removed
at the end. With --soak it runs soak tests instead of measurements.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import subprocess
import sys
import time
import typing as t

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks import chart, mapped_images, measurements, sharing, soak
from support import hosts, images, mounts
from support.lab import Lab
from support.modules import SYSTEM_PYTHON

PARTS = (
    "copies",
    "locks",
    "growth",
    "in-place",
    "large-store",
    "first-start",
    "sharing",
    "conversion",
    "mapped-images",
)


def main() -> int:
    """Run the measurements or soak tests; returns 0 if all limits are met and no problems are found."""
    options = _options()
    if options.soak is not None:
        parts = [name for name in soak.PARTS if name in (options.only or soak.PARTS)]
        return 1 if soak.soak(parts, options.soak, options.seed) else 0
    load = os.getloadavg()
    found: t.List[measurements.Row] = []
    lab = Lab()
    try:
        about = _about(lab, options, load)
        for row in _measure(lab, options):
            measurements.progress(chart.line(row))
            found.append(row)
            about["load_after"] = [round(item, 2) for item in os.getloadavg()]
            # Completed measurements are kept, even if later measurements fail.
            _write(options.docs, found, about)
    finally:
        lab.close()
    print(chart.table(_sorted(found)))
    print("\n".join(_notes(about)))
    return 1 if any(row.verdict == "missed" for row in found) else 0


def _sorted(found: t.Sequence[measurements.Row]) -> t.List[measurements.Row]:
    order = list(dict.fromkeys(row.group for row in found))
    return sorted(found, key=lambda row: order.index(row.group))


def _notes(about: t.Mapping[str, t.Any]) -> t.List[str]:
    load = f"load {about['load_before'][0]} before, {about['load_after'][0]} after"
    return [
        f"Linux {about['kernel']}, {about['processors']} processors, {about['memory_mb']} MB; "
        f"loop filesystems (direct I/O) on {about['filesystem']}; {about['date']}; {load}",
        "; ".join(f"{name} {version}" for name, version in about["versions"].items()),
        f"Medians of {about['rounds']} pairs; ours from options to result, "
        "podman's first container minus its second container.",
    ]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="pairs for each ratio (5)")
    parser.add_argument(
        "--only",
        choices=[*PARTS, *soak.PARTS],
        action="append",
        help="only this part (repeatable); the last four are soaks",
    )
    parser.add_argument(
        "--soak",
        type=float,
        nargs="?",
        const=600.0,
        metavar="SECONDS",
        help="run soak tests: races and fuzzing take this time each (600); the others end by themselves",
    )
    parser.add_argument("--seed", type=int, default=int(time.time()), help="seed of the soak tests")
    parser.add_argument("--docs", type=pathlib.Path, help="folder for benchmarks.json and .svg")
    return parser.parse_args()


def _measure(lab: Lab, options: argparse.Namespace) -> t.Iterator[measurements.Row]:
    parts = [name for name in PARTS if name in (options.only or PARTS)]
    if "in-place" in parts:
        yield from measurements.in_place(
            lab, hosts.debian_image(lab), options.rounds, measurements.progress
        )
    if "large-store" in parts:
        yield from measurements.large_store(lab, options.rounds, measurements.progress)
    if "first-start" in parts:
        yield from measurements.first_start(lab, options.rounds, measurements.progress)
    if "sharing" in parts:
        yield from sharing.measure(
            lab, hosts.debian_image(lab), options.rounds, measurements.progress
        )
    if {"copies", "conversion", "mapped-images"}.intersection(parts):
        many = images.build(lab.folder(), images.many_files_layers(10_000), "localhost/many:10000")
        both = (hosts.debian_image(lab), many)
        if "mapped-images" in parts:
            yield from mapped_images.measure(lab, both, options.rounds, measurements.progress)
        if "conversion" in parts:
            yield from measurements.conversions(lab, both, options.rounds, measurements.progress)
        if "copies" in parts:
            yield from measurements.against_podman(lab, both, options.rounds, measurements.progress)
    if "locks" in parts:
        yield from measurements.locks_and_waits(lab, options.rounds, measurements.progress)
    if "growth" in parts:
        yield from measurements.growth(lab, 1_000_000, options.rounds, measurements.progress)


def _about(lab: Lab, options: argparse.Namespace, load: t.Sequence[float]) -> t.Dict[str, t.Any]:
    def first_line(*command: str) -> str:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        return done.stdout.strip().splitlines()[0] if done.stdout.strip() else ""

    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "kernel": platform.release(),
        "processors": len(os.sched_getaffinity(0)),
        "memory_mb": memory >> 20,
        "filesystem": mounts.filesystem(str(lab.base)),
        "rounds": options.rounds,
        "load_before": [round(item, 2) for item in load],
        "versions": {
            "podman": ".".join(map(str, lab.machine.version("podman"))),
            "containers-storage": first_line(
                "dpkg-query", "-W", "-f", "${Version}", "containers-storage"
            ),
            "python": first_line(SYSTEM_PYTHON, "--version").split()[-1],
            "mkfs.ext4": first_line("mkfs.ext4", "-V").split()[1],
            "mkfs.xfs": first_line("mkfs.xfs", "-V").split()[-1],
            "mkfs.btrfs": first_line("mkfs.btrfs", "--version").split()[-1],
        },
    }


def _write(
    docs: t.Optional[pathlib.Path],
    found: t.Sequence[measurements.Row],
    about: t.Mapping[str, t.Any],
) -> None:
    if docs is None:
        return
    text = {
        "about": dict(about),
        "rows": [
            {
                "group": row.group,
                "work": row.work,
                "value": round(row.value, 3),
                "unit": row.unit,
                "bar": row.allowed,
                "verdict": row.verdict or None,
                "detail": row.detail,
            }
            for row in _sorted(found)
        ],
    }
    (docs / "benchmarks.json").write_text(json.dumps(text, indent=1) + "\n")
    title = "userns.storage against what runtimes do by themselves: less is better"
    (docs / "benchmarks.svg").write_text(chart.svg(_sorted(found), title, _notes(about)))


if __name__ == "__main__":
    sys.exit(main())
