# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the scenarios' tests ask of a host: its stores' records, its containers."""

from __future__ import annotations

import json
import typing as t
import uuid

import pytest

IMAGE = "localhost/app:1"
Maps = t.Tuple[t.List[str], t.List[str]]


class Store:
    """The store of a user of a host, root's by default."""

    def __init__(self, host: t.Any, user: str = "root") -> None:
        self._host = host
        self.account = host.user(user)
        home = self.account.home
        self.graphroot = (
            "/var/lib/containers/storage"
            if user == "root"
            else f"{home}/.local/share/containers/storage"
        )
        self._prefix = (
            "env -C /"
            if user == "root"
            else f"env -C / HOME={home} XDG_RUNTIME_DIR=/run/user/{self.account.uid} runuser -u {user} --"
        )

    def podman(self, command: str) -> str:
        """What podman says on its standard output."""
        done = self._host.run(f"{self._prefix} podman {command}")
        assert done.rc == 0, done.stderr
        return str(done.stdout)

    @property
    def driver(self) -> str:
        """The driver whose records lie there."""
        names = self._host.file(self.graphroot).listdir()
        (found,) = (name for name in ("overlay", "vfs") if f"{name}-images" in names)
        return found

    def _records(self, folder: str, name: str) -> t.List[t.Dict[str, t.Any]]:
        path = f"{self.graphroot}/{self.driver}-{folder}/{name}"
        records: t.List[t.Dict[str, t.Any]] = json.loads(self._host.file(path).content_string)
        return records

    def mapped_layers(self) -> t.Dict[str, Maps]:
        """The mapped layers of the image, with the maps that their records have."""
        (image,) = (
            entry for entry in self._records("images", "images.json") if IMAGE in entry["names"]
        )
        layers = {entry["id"]: entry for entry in self._records("layers", "layers.json")}
        return {
            entry: (_text(layers[entry]["uidmap"]), _text(layers[entry]["gidmap"]))
            for entry in image.get("mapped-layers", ())
        }

    def starts_without_a_copy(self, *options: str) -> t.List[str]:
        """Start a container, see that no layer is added to the image, and return its UID map."""
        before = self.mapped_layers()
        # Whoever is attached may miss all that a short-lived container says; conmon's log has it.
        log = f"/tmp/{uuid.uuid4().hex}.log"
        words = " ".join((*options, "--log-driver=k8s-file", f"--log-opt=path={log}"))
        self.podman(f"run --rm {words} {IMAGE} cat /proc/self/uid_map")
        assert self.mapped_layers() == before
        lines = self._host.file(log).content_string.splitlines()
        return [":".join(line.split()[3:]) for line in lines]


def _text(ranges: t.Sequence[t.Dict[str, int]]) -> t.List[str]:
    return [f"{entry['container_id']}:{entry['host_id']}:{entry['size']}" for entry in ranges]


@pytest.fixture
def store(host: t.Any) -> Store:
    """The rootful store of the host at hand."""
    return Store(host)


@pytest.fixture
def store_of(host: t.Any) -> t.Callable[[str], Store]:
    """Gives the store of a user of the host at hand."""
    return lambda user: Store(host, user)
