# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run podman commands in a loop while layer_gc repeatedly removes all unused mapped layers."""

from __future__ import annotations

import threading
import typing as t

from .lab import Lab
from .modules import run_module
from .stores import Store


class Rounds:
    """A loop that creates, starts and removes containers with user namespaces.

    :ivar failures: messages of failures
    :ivar count: the number of completed rounds
    :ivar collections: the number of successful runs of layer_gc
    :ivar removed: the number of layers that they removed
    """

    def __init__(self, lab: Lab, store: Store, image: str, maps: t.Sequence[str]) -> None:
        self.lab, self.store, self.image, self.maps = lab, store, image, maps
        self.failures: t.List[str] = []
        self.count = 0
        self.collections = 0
        self.removed = 0
        self._end = threading.Event()

    def run(self, count: int) -> None:
        """Run `count` further rounds, each for a container with the next map."""
        for _round in range(count):
            self._round(self.count, self.maps[self.count % len(self.maps)])
            self.count += 1

    def _round(self, number: int, text: str) -> None:
        name = f"round{number}"
        options = ["--name", name, "--uidmap", text, "--gidmap", text]
        for step in (
            ["create", *options, self.image, "cat", "/etc/release"],
            ["start", "--attach", name],
            ["images", "-a"],
            ["start", "--attach", name],
        ):
            done = self.store.podman(*step, check=False)
            if done.rc != 0:
                self.failures.append(f"round {number}: podman {' '.join(step)}: {done.stderr}")
            if step[0] == "create":
                self._check_parent(number, name)
        done = self.store.podman("rm", "-f", name, check=False)
        if done.rc != 0:
            self.failures.append(f"round {number}: podman rm: {done.stderr}")

    def _check_parent(self, number: int, name: str) -> None:
        """Check that the parent layer of a container has a record and a folder."""
        container = next((c for c in self.store.containers() if name in c.get("names", ())), None)
        if container is None:
            self.failures.append(f"round {number}: no container {name}")
            return
        parent = self.store.layer(container["layer"])["parent"]
        if parent not in self.store.layer_ids() or not self.store.layer_folder(parent).is_dir():
            self.failures.append(f"round {number}: the layer {parent} of {name} was lost")

    def collect_until_stopped(self) -> None:
        """Run layer_gc until `stop` is called; only layers in use are protected."""
        args = {**self.store.module_args(), "min_age": "0", "max_copies_per_image": 0}
        while not self._end.is_set():
            result = run_module(self.lab, "layer_gc", args, fails=None)
            if result.get("failed"):
                self.failures.append(f"layer_gc: {result['msg']}")
            else:
                self.collections += 1
                self.removed += len(result["removed"])

    def stop(self) -> None:
        """End `collect_until_stopped` after the current run."""
        self._end.set()
