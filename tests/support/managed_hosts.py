# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Managed hosts: Debian roots with an sshd, whose default stores and homes are in folders of the laboratory."""

from __future__ import annotations

import json
import pathlib
import typing as t

from . import hosts, stores
from .lab import Lab

# The releases by names of hosts in inventories. They have podman 4.3, 5.4, 5.8 and 6.1.
RELEASES = {
    "debian12": "bookworm",
    "debian13": "trixie",
    "debiansid": "sid",
    "debianexperimental": "experimental",
}


class ManagedHost:
    """A host that Ansible reaches by ssh until the laboratory closes.

    Its default stores are /var/lib/containers/storage and those of its users, whose homes must be
    created below `homes`. `variables` contains the variables that a play requires.
    """

    def __init__(self, lab: Lab, name: str) -> None:
        self.name = name
        self.machine = hosts.Host(lab, RELEASES[name])
        lab.on_close(self.machine.close)
        self.homes = lab.folder()
        # The root of the host is an overlay in memory, which cannot contain an overlay store.
        self._bind(lab.folder(), "/var/lib/containers")
        self._write("/etc/containers/containers.conf", stores.CONTAINERS_CONF)
        self.sshd = hosts.Sshd(lab, self.machine)
        lab.on_close(self.sshd.close)

    def _bind(self, source: pathlib.Path, target: str) -> None:
        self.machine.run(["mkdir", "-p", target])
        self.machine.run(["mount", "--bind", str(source), target])

    def _write(self, path: str, text: str) -> None:
        self.machine.run(["mkdir", "-p", str(pathlib.PurePath(path).parent)])
        self.machine.run(["tee", path], stdin=text)

    @property
    def variables(self) -> t.Dict[str, t.Any]:
        """Its variables in an inventory."""
        return {
            **self.sshd.variables,
            "ansible_python_interpreter": "/usr/bin/python3",
            "lab_homes": str(self.homes),
        }


def inventory(
    folder: pathlib.Path, managed: t.Iterable[ManagedHost], **variables: t.Any
) -> pathlib.Path:
    """Write an inventory of managed hosts, with variables for all of them."""
    entries = {host.name: host.variables for host in managed}
    path = folder / "hosts.json"
    path.write_text(json.dumps({"all": {"hosts": entries, "vars": variables}}, indent=1))
    return path
