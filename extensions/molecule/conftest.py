# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Fixtures for the tests of the scenarios: records and containers of the stores of a host."""

from __future__ import annotations

import json
import typing as t
import uuid

import pytest

IMAGE = "localhost/app:1"
Maps = t.Tuple[t.List[str], t.List[str]]


class Store:
    """The store of a user of a host, by default that of root."""

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
        """Run a podman command and return its standard output."""
        result = self._host.run(f"{self._prefix} podman {command}")
        assert result.rc == 0, result.stderr
        return str(result.stdout)

    @property
    def driver(self) -> str:
        """The driver for which the store contains image records."""
        names = self._host.file(self.graphroot).listdir()
        (driver,) = (name for name in ("overlay", "vfs") if f"{name}-images" in names)
        return driver

    def _records(self, folder: str, name: str) -> t.List[t.Dict[str, t.Any]]:
        path = f"{self.graphroot}/{self.driver}-{folder}/{name}"
        records: t.List[t.Dict[str, t.Any]] = json.loads(self._host.file(path).content_string)
        return records

    def mapped_layers(self) -> t.Dict[str, Maps]:
        """The recorded maps of the mapped layers of the image, by layer ID."""
        (image,) = (
            entry for entry in self._records("images", "images.json") if IMAGE in entry["names"]
        )
        layers = {entry["id"]: entry for entry in self._records("layers", "layers.json")}
        return {
            layer: (
                _format_ranges(layers[layer]["uidmap"]),
                _format_ranges(layers[layer]["gidmap"]),
            )
            for layer in image.get("mapped-layers", ())
        }

    def run_without_copy(self, *options: str) -> t.List[str]:
        """Run a container, assert that the image gets no mapped layer, and return its UID map."""
        before = self.mapped_layers()
        # podman can miss the output of a short-lived container. The log of conmon contains it.
        log = f"/tmp/{uuid.uuid4().hex}.log"
        arguments = " ".join((*options, "--log-driver=k8s-file", f"--log-opt=path={log}"))
        self.podman(f"run --rm {arguments} {IMAGE} cat /proc/self/uid_map")
        assert self.mapped_layers() == before
        lines = self._host.file(log).content_string.splitlines()
        return [":".join(line.split()[3:]) for line in lines]


def _format_ranges(ranges: t.Sequence[t.Dict[str, int]]) -> t.List[str]:
    return [f"{entry['container_id']}:{entry['host_id']}:{entry['size']}" for entry in ranges]


@pytest.fixture
def store(host: t.Any) -> Store:
    """The rootful store of the tested host."""
    return Store(host)


@pytest.fixture
def store_of(host: t.Any) -> t.Callable[[str], Store]:
    """A function that returns the store of a user of the tested host."""
    return lambda user: Store(host, user)
