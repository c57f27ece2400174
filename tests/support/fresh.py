# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Hosts without any previous installation, and readers who follow a guide on them over SSH."""

from __future__ import annotations

import json
import pathlib
import re
import typing as t

from . import examples, hosts, stores
from .images import Image
from .lab import Lab
from .machines import Account, Result
from .registry import Registry

HOST = "ws1.example.org"
# The login user of the controller; users other than root use sudo.
_LOGINS = {"bookworm": "root", "trixie": "admin"}
# Directories on the laboratory's disk, because an overlay in memory supports neither overlay stores nor idmapped
# mounts.
_ON_DISK = ("/home", "/srv", "/var/lib/containers", "/var/lib/userns-storage")


class FreshHost(examples.Reader):
    """A bare Debian with an SSH server and three accounts, and the folder of a reader who follows a guide.

    :param image: the image that the registries have under every name
    """

    def __init__(self, lab: Lab, suite: str, image: Image) -> None:
        self.lab = lab
        self.folder = lab.folder()
        self.machine = hosts.Host(lab, suite, hosts.bare(suite))
        lab.on_close(self.machine.close)
        for path in _ON_DISK:
            self.machine.run(["mkdir", "-p", path])
            self.machine.run(["mount", "--bind", str(lab.folder()), path])
        # Settings for the laboratory, which lacks cgroups, and its registries instead of those of the Internet.
        settings = pathlib.Path(self.machine.root, "etc/containers")
        (settings / "containers.conf.d").mkdir(parents=True)
        (settings / "containers.conf.d/lab.conf").write_text(stores.CONTAINERS_CONF)
        registry = Registry(image, examples.REGISTRIES)
        lab.on_close(registry.close)
        (settings / "registries.conf.d").mkdir()
        registry.configure(settings / "registries.conf.d")
        # The first of them gets UID 1000.
        for name in examples.USERS:
            self.machine.run(["useradd", "-m", "-s", "/bin/bash", name])
        self.login = _LOGINS[suite]
        if self.login != "root":
            self.machine.run(["useradd", "-m", "-p", "*", self.login])
            sudoers = pathlib.Path(self.machine.root, "etc/sudoers.d/admin")
            sudoers.write_text(f"{self.login} ALL=(ALL) NOPASSWD: ALL\n")
        self.sshd = hosts.Sshd(lab, self.machine)
        lab.on_close(self.sshd.close)

    def close(self) -> None:
        """Stop the host."""
        self.sshd.close()
        self.machine.close()

    def drivers(self) -> t.Set[str]:
        """The drivers of all stores on the host, of root and of the users."""
        root = pathlib.Path(self.machine.root)
        patterns = (
            "var/lib/containers/storage/*-layers",
            "home/*/.local/share/containers/storage/*-layers",
        )
        return {path.name.rpartition("-")[0] for pattern in patterns for path in root.glob(pattern)}

    def _begin(self) -> None:
        """Create the inventory of the guide First steps, and make the host reachable under its name."""
        (block,) = (
            item
            for item in examples.blocks()
            if "first_steps" in item.document and item.file == "hosts.ini"
        )
        self._save(block)
        options = {
            "HostName": "127.0.0.1",
            "Port": self.sshd.port,
            "User": self.login,
            "IdentityFile": self.sshd.key,
            "UserKnownHostsFile": "/dev/null",
            "StrictHostKeyChecking": "no",
            "LogLevel": "ERROR",
            "ControlMaster": "auto",
            "ControlPath": self.folder / "control",
            "ControlPersist": "60s",
        }
        lines = "".join(f"  {key} {value}\n" for key, value in options.items())
        (self.folder / "ssh_config").write_text(f"Host {HOST}\n{lines}")

    def _end(self) -> None:
        pass

    def _tasks(self, block: examples.Block) -> None:
        """Run tasks in a play for all hosts."""
        play = {"hosts": "all", "become": True, "tasks": block.data}
        (self.folder / "tasks.json").write_text(json.dumps([play]))
        self._succeeds(block, self._ansible("ansible-playbook -i hosts.ini tasks.json"))

    def _playbook(self, block: examples.Block) -> None:
        (self.folder / "play.yml").write_text(block.text)
        self._succeeds(block, self._ansible("ansible-playbook -i hosts.ini play.yml"))

    def _type(self, block: examples.Block, user: str, command: str, fails: bool) -> None:
        done = self._as_user(user, command) if user else self._ansible(command)
        if fails:
            assert done.rc != 0, f"{block}: {command}: succeeds"
            return
        self._succeeds(block, done)
        for line in block.answers(command):
            assert line in done.stdout.splitlines(), f"{block}: {command}: {done.stdout}"

    def _as_user(self, user: str, command: str) -> Result:
        """Run a command as a user who is logged in."""
        number = int(self.machine.run(["id", "-u", user]).stdout)
        folder = f"/run/user/{number}"
        self.machine.run(["install", "-d", "-m", "0700", "-o", user, "-g", user, folder])
        account = Account(user, number, number, f"/home/{user}", folder)
        return self.machine.run(["bash", "-c", command], account=account, check=False)

    def _ansible(self, command: str) -> Result:
        environ = {
            **self._environ(),
            "ANSIBLE_SSH_ARGS": f"-F {self.folder}/ssh_config",
            "ANSIBLE_REMOTE_USER": self.login,
            # A connection less for each task.
            "ANSIBLE_PIPELINING": "true",
        }
        return self.lab.machine.run(
            ["bash", "-c", command], env=environ, cwd=str(self.folder), check=False
        )

    @staticmethod
    def _succeeds(block: examples.Block, done: Result) -> None:
        where = f"{block}: {done.argv[-1]}: rc {done.rc}\n{done.stdout}{done.stderr}"
        assert not FreshHost._failed(done), where
        assert not re.search(r"failed=[1-9]|\| FAILED!", done.stdout), done.stdout
