# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A conversion in place that is stopped at the system calls that change the filesystem, and the checks afterwards."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import stat
import typing as t

from .conversions import conversion_args, texts
from .injection import CONVERSION, KILL, ModuleServer, Run
from .lab import Lab
from .machines import Machine
from .store_copies import StoreCopies
from .stores import Store
from .task_stops import MAP, OTHER_IMAGE, spread, tiny_image

Tree = t.Dict[str, t.Tuple[t.Any, ...]]


class Conversions:
    """A store with an image to convert and another image, which is restored after each stop."""

    def __init__(self, lab: Lab, store: Store, machines: t.Sequence[Machine]) -> None:
        self.store, self.machines = store, machines
        self.image, other = tiny_image(lab), tiny_image(lab, OTHER_IMAGE)
        for image in (self.image, other):
            store.load(image)
        # podman initialises the store before it is saved.
        store.podman("rm", store.create(OTHER_IMAGE))
        self.modules = ModuleServer(lab)
        # A user's namespace has 65,536 IDs.
        self.map = "0:1:2000" if store.user else MAP
        self.args = conversion_args(store, [self.image.name], [self.map])
        self.before = {name: self._trees(name) for name in (self.image.name, OTHER_IMAGE)}
        self._copies = StoreCopies(store)
        self._copies.save("before")
        self.seen: t.Dict[str, int] = {}

    def run(self, at: int = 0, fault: str = "") -> Run:
        """Start a conversion and stop it at a point."""
        below = str(self.store.graphroot)
        return self.modules.run(CONVERSION, self.args, below=below, at=at, fault=fault)

    def restore(self, name: str = "before") -> None:
        """Restore the store from its copy."""
        self._copies.restore(name)

    def kill_everywhere(self, most: int = 0) -> int:
        """Kill the conversion at each such call, or at this many of them from the first to the last, and check the
        store."""
        points = self.run().points
        self.restore()
        selected = list(spread(points, most)) if most else list(range(1, points + 1))
        for at in selected:
            assert self.run(at, KILL).at is not None
            self.check_state(may_be_lost=True)
            self.restore()
        # The image is lost only between the first and the last calls.
        assert set(self.seen) == {"old", "lost", "new"}
        return len(selected)

    # Checks

    def check_state(self, may_be_lost: bool) -> None:
        """Check that each podman can use the store, and that each image is complete, in the old or the new form.

        :param may_be_lost: whether the image may be lost; a pull must then restore it
        """
        form = ""
        self._copies.save("left")
        for machine in self.machines:
            self.restore("left")
            self._check_podman(machine)
            assert self._form(OTHER_IMAGE) == "old"
            form = self._form(self.image.name)
            assert form != "lost" or may_be_lost
        self.seen[form] = self.seen.get(form, 0) + 1
        self.store.load(self.image)
        assert self._form(self.image.name) in ("old", "new")
        self._check_podman(machine)
        done = self.run()
        assert not done.result.get("failed"), done.output
        assert self._form(self.image.name) == "new"
        assert self._form(OTHER_IMAGE) == "old"
        self._check_podman(machine)

    def incomplete_layers(self, graphroot: pathlib.Path) -> int:
        """The number of layers of a copy of the store that are marked as incomplete; the other layers must match
        their records."""
        driver = self.store.driver
        records = json.loads((graphroot / f"{driver}-layers/layers.json").read_text())
        trees = {**self.before[self.image.name], **self.before[OTHER_IMAGE]}
        incomplete = 0
        for record in records:
            if "incomplete" in record.get("flags", {}):
                incomplete += 1
                assert record["id"] in self.before[self.image.name]
            elif record["id"] in trees:
                mapped = bool(record.get("uidmap"))
                layers = graphroot / driver / ("subvolumes" if driver == "btrfs" else "")
                folder = layers / record["id"] / ("diff" if driver == "overlay" else "")
                tree = _tree(folder, functools.partial(self._container_id, mapped=mapped))
                assert tree == trees[record["id"]]
        return incomplete

    def form(self) -> str:
        """Whether the image has its old form or the new one, or is lost."""
        return self._form(self.image.name)

    def _check_podman(self, machine: Machine) -> None:
        commands = [["images", "-a"], ["ps", "-a", "--external"], ["system", "df", "-v"]]
        for command in commands:
            self._podman(machine, "podman", *command)
        if machine is not self.store.lab.machine:
            self._podman(machine, "containers-storage", "check")

    def _podman(self, machine: Machine, *command: str) -> None:
        store = self.store
        done = machine.run(list(command), account=store.account, env=store.env(), check=False)
        assert done.rc == 0, f"{machine.name}: {done}"

    def _form(self, name: str) -> str:
        """Whether an image has its old form, the new one, or is lost; nothing else is allowed."""
        found = [image for image in self.store.images() if name in image.get("names", ())]
        if not found:
            return "lost"
        maps = set()
        layer = found[0]["layer"]
        while layer:
            record = self.store.layer(layer)
            assert "incomplete" not in record.get("flags", {})
            maps.add((*texts(record, "uidmap"), *texts(record, "gidmap")))
            layer = record.get("parent", "")
        (mapping,) = maps
        assert mapping in ((), (self.map, self.map))
        trees = self._trees(name, bool(mapping))
        assert trees == self.before[name]
        return "new" if mapping else "old"

    def _container_id(self, host_id: int, mapped: bool) -> int:
        """The ID that a container with the map, or without one, sees."""
        user = self.store.user
        if user is None:
            return host_id - 100000 * mapped
        inner = 0 if host_id == user.uid else host_id - user.subuid_start + 1
        return inner - mapped

    def _trees(self, name: str, mapped: bool = False) -> t.Dict[str, Tree]:
        """The files of each layer of an image, with the owners that containers see."""
        trees = {}
        layer = self.store.image(name)["layer"]
        while layer:
            folder = self.store.layer_folder(layer)
            trees[layer] = _tree(
                folder / "diff" if self.store.driver == "overlay" else folder,
                lambda host_id: self._container_id(host_id, mapped),
            )
            layer = self.store.layer(layer).get("parent", "")
        return trees


def _tree(root: pathlib.Path, container_id: t.Callable[[int], int]) -> Tree:
    found: Tree = {}
    for folder, folders, names in os.walk(root):
        for name in (".", *folders, *names):
            path = os.path.join(folder, name)
            status = os.lstat(path)
            if stat.S_ISCHR(status.st_mode):
                continue
            owner = (container_id(status.st_uid), container_id(status.st_gid))
            if folder == str(root) and name == "." and not status.st_uid:
                # A runtime that mounts a layer changes the owner of its root directory to the host's root.
                owner = (0, 0)
            values = [
                (key, os.getxattr(path, key, follow_symlinks=False))
                for key in sorted(os.listxattr(path, follow_symlinks=False))
            ]
            found[os.path.relpath(path, root)] = (oct(status.st_mode), *owner, values)
    return found
