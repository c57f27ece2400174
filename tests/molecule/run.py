# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run molecule scenarios, two at a time, each in a separate laboratory with its hosts.

``run.py [SCENARIO...]`` runs ``molecule test`` for these scenarios, or for all.
``run.py SCENARIO COMMAND [ARGUMENT...]`` runs another command of molecule, such as converge, or login
with ``--host debian12``. The hosts are removed when it ends.
"""

from __future__ import annotations

import concurrent.futures
import os
import pathlib
import subprocess
import sys
import time
import typing as t

# The packages of the tests, and the collection itself.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[5]))

from support import images, managed_hosts
from support.lab import Lab

# The hosts of each scenario. The longest scenario is first, so that the workers end at about the same time.
SCENARIOS: t.Dict[str, t.Tuple[str, ...]] = {
    "fleet": ("debian12", "debian13", "debiansid", "debianexperimental"),
    "rootless": ("debian13",),
    "share": ("debian13",),
    "default": ("debian12",),
    "gc": ("debiansid",),
}
WORKERS = 2
# Seconds, to end a scenario that hangs.
_TIME_LIMIT = 3600.0


def main(arguments: t.List[str]) -> int:
    command = [argument for argument in arguments if argument not in SCENARIOS]
    selected = [argument for argument in arguments if argument in SCENARIOS]
    if command and len(selected) != 1:
        print(__doc__)
        return 2
    if len(selected) == 1:
        return _molecule(selected[0], command or ["test"])
    failed = []
    with concurrent.futures.ThreadPoolExecutor(WORKERS) as workers:
        running = {workers.submit(_run_in_process, name): name for name in selected or SCENARIOS}
        for item in concurrent.futures.as_completed(running):
            seconds, code, output = item.result()
            print(output, flush=True)
            print(f"== {running[item]}: exit status {code} after {seconds:.1f} s", flush=True)
            failed += [running[item]] if code else []
    return 1 if failed else 0


def _run_in_process(name: str) -> t.Tuple[float, int, str]:
    """Run a scenario in a separate process; returns its seconds, exit status and output."""
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


def _molecule(scenario: str, command: t.Sequence[str]) -> int:
    lab = Lab()
    try:
        image = images.build(lab.folder(), images.small_layers())
        hosts = [managed_hosts.ManagedHost(lab, name) for name in SCENARIOS[scenario]]
        folder = lab.folder()
        inventory = managed_hosts.inventory(folder, hosts, lab_image=image.source)
        tools = pathlib.Path(sys.executable).parent
        environment = {
            **os.environ,
            # Ansible settings of the caller are not used; files of molecule are removed with the laboratory.
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
            [tools / "molecule", command[0], "--scenario-name", scenario, *command[1:]],
            cwd=lab.tree / "ansible_collections/userns/storage",
            env=environment,
            check=False,
        ).returncode
    finally:
        lab.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
