# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs molecule's scenarios, each in a laboratory of its own with the hosts that it is for, two at a time.

``run.py [SCENARIO...]`` runs ``molecule test`` for these, or all.
``run.py SCENARIO COMMAND [ARGUMENT...]`` runs another command of molecule, such as converge, or login
with ``--host debian12``. The hosts vanish when it ends.
"""

from __future__ import annotations

import concurrent.futures
import os
import pathlib
import subprocess
import sys
import time
import typing as t

# The tests' support, and the collection itself.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[5]))

from support import images, managed
from support.lab import Lab

# Which hosts a scenario is for. The longest first, so that two lanes end together.
SCENARIOS: t.Dict[str, t.Tuple[str, ...]] = {
    "fleet": ("debian12", "debian13", "debiansid", "debianexperimental"),
    "rootless": ("debian13",),
    "share": ("debian13",),
    "default": ("debian12",),
    "gc": ("debiansid",),
}
LANES = 2
# Seconds, to end a scenario that hangs.
_TIME_LIMIT = 3600.0


def main(arguments: t.List[str]) -> int:
    commands = [word for word in arguments if word not in SCENARIOS]
    chosen = [word for word in arguments if word in SCENARIOS]
    if commands and len(chosen) != 1:
        print(__doc__)
        return 2
    if len(chosen) == 1:
        return _molecule(chosen[0], commands or ["test"])
    failed = []
    with concurrent.futures.ThreadPoolExecutor(LANES) as lanes:
        running = {lanes.submit(_apart, name): name for name in chosen or SCENARIOS}
        for item in concurrent.futures.as_completed(running):
            seconds, code, said = item.result()
            print(said, flush=True)
            print(f"== {running[item]}: exit status {code} after {seconds:.1f} s", flush=True)
            failed += [running[item]] if code else []
    return 1 if failed else 0


def _apart(name: str) -> t.Tuple[float, int, str]:
    """Run one scenario in a process of its own; its seconds, exit status and output."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, __file__, name],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=_TIME_LIMIT,
        check=False,
    )
    return time.monotonic() - started, done.returncode, done.stdout


def _molecule(scenario: str, words: t.Sequence[str]) -> int:
    lab = Lab()
    try:
        image = images.build(lab.folder(), images.small_layers())
        hosts = [managed.Managed(lab, name) for name in SCENARIOS[scenario]]
        folder = lab.folder()
        inventory = managed.inventory(folder, hosts, lab_image=image.source)
        tools = pathlib.Path(sys.executable).parent
        environment = {
            **os.environ,
            # Nothing of the caller's own Ansible; what molecule leaves vanishes with the laboratory.
            "HOME": str(folder),
            "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
            "ANSIBLE_COLLECTIONS_PATH": str(lab.tree),
            "ANSIBLE_PIPELINING": "true",
            "MOLECULE_EPHEMERAL_DIRECTORY": str(folder / "molecule"),
            "MOLECULE_LAB_INVENTORY": str(inventory),
            "PYTEST_ADDOPTS": "-p no:cacheprovider",
        }
        results = os.environ.get("MOLECULE_RESULTS")
        if results:
            environment["PYTEST_ADDOPTS"] += f" --junitxml={results}/{scenario}.xml"
        return subprocess.run(
            [tools / "molecule", words[0], "--scenario-name", scenario, *words[1:]],
            cwd=lab.tree / "ansible_collections/userns/storage",
            env=environment,
            check=False,
        ).returncode
    finally:
        lab.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
