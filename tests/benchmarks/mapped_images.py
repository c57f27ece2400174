# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Compare images that are pulled with the map of their containers with podman's pull and copy."""

from __future__ import annotations

import contextlib
import pathlib
import typing as t

from benchmarks.measurements import Row, Say, ratio, seconds
from benchmarks.sharing import disk_usage
from support import users
from support.images import Image
from support.lab import Lab
from support.modules import run_module
from support.registry import Registry
from support.stores import Store

KEEP_ID = ("--userns=keep-id",)
_HOST = "registry.example.org"
_GROUP = "images pulled with a map"


class _Pulls:
    """Pulls of an image from a registry into the store of a user."""

    def __init__(self, lab: Lab, image: Image) -> None:
        self.lab = lab
        self.name = f"{_HOST}/{image.name.partition('/')[2]}"
        self.registry = Registry(image, (_HOST,))
        self.registry.configure(pathlib.Path("/etc/containers"))
        self.user = users.add_user(lab, None)
        self.store = Store(lab, "rootless-overlay", user=self.user)
        self.store.podman("images")

    def theirs(self) -> None:
        """Pull with podman, and run a container with keep-id."""
        self.store.podman("pull", "-q", self.name)
        self._start()

    def ours(self) -> None:
        """Pull with the map of keep-id containers, and run a container with keep-id."""
        args = {"image": self.name, "userns": "keep-id", "user": self.user.name, "measure": "none"}
        run_module(self.lab, "image_layers", args)
        self._start()

    def _start(self) -> None:
        self.store.run(self.name, "true", args=KEEP_ID)

    def pull_only(self) -> int:
        """Pull with podman; returns the bytes of all layers."""
        self.store.podman("pull", "-q", self.name)
        return self.used()

    def used(self) -> int:
        """The bytes of all layers."""
        return disk_usage(self.store.graphroot / "overlay")

    def remove_images(self) -> None:
        """Remove all images."""
        self.store.podman("rmi", "--all", "--force")

    def close(self) -> None:
        self.store.podman("rm", "--all", "--force", "--time=0")
        self.store.close()
        users.remove_user(self.lab, self.user, None)
        self.registry.close()


def measure(lab: Lab, test_images: t.Sequence[Image], rounds: int, say: Say) -> t.Iterator[Row]:
    """Measure the time of a pull and the first container, and the disk space of image and container."""
    for image in test_images:
        where = image.name.partition("/")[2].partition(":")[0]
        say(f"pull with a map, {where}")
        mine: t.List[float] = []
        theirs: t.List[float] = []
        mapped = copied = 0
        with contextlib.closing(_Pulls(lab, image)) as pulls:
            pull_only = pulls.pull_only()
            pulls.remove_images()
            for _number in range(rounds):
                theirs.append(pulls.store.timed(pulls.theirs))
                copied = pulls.used()
                pulls.remove_images()
                mine.append(pulls.store.timed(pulls.ours))
                mapped = pulls.used()
                pulls.remove_images()
        yield Row(
            _GROUP,
            f"pull and first keep-id start, {where}",
            ratio(mine, theirs),
            0.6,
            detail={"ours": seconds(mine), "podman": seconds(theirs)},
        )
        yield Row(
            _GROUP,
            f"disk with a container, of the image alone, {where}",
            mapped / pull_only,
            1.02,
            detail={"image": pull_only, "ours": mapped, "podman": copied},
        )
