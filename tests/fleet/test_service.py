# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The service that the roles prepare and prune install on a host with systemd creates and removes layers."""

from __future__ import annotations

import json
import pathlib
import time
import typing as t

import pytest
from support import hosts, images, managed_hosts
from support.systemd_host import SystemdHost
from support.waiting import wait_until

Json = t.Dict[str, t.Any]
NAME = "localhost/app:1"
MAP = "0:100000:65536"


class ServiceHost:
    """A managed host with systemd, on which alice has a session."""

    def __init__(self, lab: t.Any) -> None:
        host = managed_hosts.ManagedHost(lab, "debian13")
        self.machine = SystemdHost(host.machine)
        lab.on_close(self.machine.close)
        sshd = hosts.Sshd(lab, self.machine)
        lab.on_close(sshd.close)
        self.variables = {**sshd.variables, "ansible_python_interpreter": "/usr/bin/python3"}
        home = f"{host.homes}/alice"
        self.machine.run(["useradd", "-m", "-d", home, "alice"])
        uid = self.machine.run(["id", "-u", "alice"]).stdout.strip()
        self.machine.run(["systemctl", "start", f"user@{uid}.service"])
        self.rootful = HostStore(self.machine, "vfs", "/var/lib/containers/storage", MAP)
        graphroot = f"{home}/.local/share/containers/storage"
        self.rootless = HostStore(self.machine, "overlay", graphroot, "keep-id", uid, home)

    @property
    def stores(self) -> t.Tuple[HostStore, HostStore]:
        """Root's store and alice's."""
        return self.rootful, self.rootless


class HostStore:
    """A store of the host, with the systemd manager of its owner."""

    def __init__(
        self,
        machine: SystemdHost,
        driver: str,
        graphroot: str,
        mapping: str,
        uid: str = "",
        home: str = "",
    ) -> None:
        self.machine, self.driver, self.graphroot = machine, driver, graphroot
        self.owner = "alice" if uid else "root"
        self.options = (
            [f"--userns={mapping}"] if uid else [f"--uidmap={mapping}", f"--gidmap={mapping}"]
        )
        environ = ["env", "-C", "/", f"HOME={home}", f"XDG_RUNTIME_DIR=/run/user/{uid}"]
        self._prefix = ["runuser", "-u", "alice", "--", *environ] if uid else []
        self._scope = ["--user"] if uid else []
        tail = f"-{uid}" if uid else ""
        self.service = f"userns-storage-ready{tail}.service"
        self.collector = f"userns-storage-collect{tail}.service"
        self.timer = f"userns-storage-ready{tail}.timer"
        self.units = [
            f"userns-storage-{name}{tail}.{kind}"
            for name, kind in (("ready", "path"), ("ready", "timer"), ("collect", "timer"))
        ]

    def run(self, *arguments: str, check: bool = True) -> t.Any:
        """Run a program as the owner."""
        return self.machine.run([*self._prefix, *arguments], check=check)

    def systemctl(self, *arguments: str) -> str:
        """The output of systemctl for the owner's manager."""
        return str(self.run("systemctl", *self._scope, *arguments, check=False).stdout.strip())

    def verify(self, *units: str) -> str:
        """The warnings of systemd-analyze about units."""
        command = ["systemd-analyze", *self._scope, "verify", "--man=no", *units]
        return str(self.run(*command, check=False).stderr)

    def mapped(self) -> t.List[str]:
        """The IDs of the mapped layers of the image with the name."""
        path = pathlib.Path(f"{self.machine.root}{self.graphroot}/{self.driver}-images/images.json")
        images = json.loads(path.read_text())
        (image,) = (item for item in images if NAME in item.get("names", ()))
        return list(image.get("mapped-layers") or ())

    def load(self, image: images.Image, name: str = NAME) -> None:
        """Pull an image under a name."""
        unshare = ["podman", "unshare"] if self._scope else []
        self.run(*unshare, "skopeo", "copy", "-q", image.source, f"containers-storage:{name}")

    def wait_for_layer(self) -> str:
        """Wait until the host has created a mapped layer; returns its ID."""
        wait_until(self.mapped, describe=self.journal, pause=0.2)
        (layer,) = self.mapped()
        return layer

    def journal(self) -> str:
        """The journal entries of the service."""
        # Root reads the journal of all users; --user-unit would select root's own units.
        field = "USER_UNIT" if self._scope else "UNIT"
        match = [f"{field}={self.service}", "+", f"_SYSTEMD_{field}={self.service}"]
        return str(self.machine.run(["journalctl", "--no-pager", "-o", "cat", *match]).stdout)

    def runs(self) -> int:
        """The number of times the service was started."""
        return self.journal().count(f"Starting {self.service}")

    def wait_until_done(self) -> None:
        """Wait until the service is not running."""
        wait_until(
            lambda: self.systemctl("is-active", self.service) == "inactive",
            describe=self.journal,
            pause=0.2,
        )

    def assert_no_copy_at_start(self, layer: str) -> None:
        """Assert that podman creates a container with that layer and no other layer."""
        self.run("podman", "create", *self.options, NAME, "x")
        assert self.mapped() == [layer]


@pytest.fixture(scope="module")
def systemd_host(lab: t.Any) -> ServiceHost:
    return ServiceHost(lab)


@pytest.fixture(scope="module")
def versions(lab: t.Any) -> t.List[images.Image]:
    return [
        images.build(lab.folder(), [{"a": images.file(f"{number}\n")}], NAME) for number in range(3)
    ]


def test_service_creates_layers_of_new_images(
    play: t.Any, systemd_host: ServiceHost, versions: t.List[images.Image], tmp_path: pathlib.Path
) -> None:
    both = tmp_path / "both.yml"
    jobs: t.List[t.Tuple[str, Json]] = [
        ("prepare", {"prepare_driver": "vfs", "prepare_mappings": MAP}),
        ("prepare", {"prepare_driver": "overlay", "prepare_users": "alice"}),
        ("prune", {"prune_users": "alice", "prune_rootful": True}),
    ]
    both.write_text(
        json.dumps(
            [
                {"ansible.builtin.import_playbook": f"userns.storage.{job}", "vars": variables}
                for job, variables in jobs
            ]
        )
    )
    variables = {
        **systemd_host.variables,
        "ansible_pipelining": True,
        "prepare_install": False,
        "prepare_images": f"{NAME}={versions[0].source}",
        "prepare_service": "present",
        "prune_unused_for": "4w",
        "prune_schedule": "daily",
    }
    inventory = {"all": {"hosts": {"host": variables}}}
    done = play(both, inventory)
    for store in systemd_host.stores:
        unit = store.service.replace(".service", ".path")
        file = f"{store.graphroot}/{store.driver}-images/images.json"
        assert f"{store.owner}: {unit} watches {file} and creates the layers of" in done.output
    assert play(both, inventory).recap("host")["changed"] == 0
    first = {store.owner: store.mapped() for store in systemd_host.stores}
    assert [len(layers) for layers in first.values()] == [1, 1]
    for store in systemd_host.stores:
        for unit in store.units:
            assert store.systemctl("is-active", unit) == "active"
            assert store.systemctl("is-enabled", unit) == "enabled"
        assert store.verify(*store.units, store.service, store.collector) == ""
        # After a boot, the timer waits for containers that are created at each start.
        collect = store.collector.replace(".service", ".timer")
        assert store.systemctl("show", "--property=Persistent", "--value", collect) == "no"
        after = store.systemctl("show", "--property=TimersMonotonic", "--value", collect)
        assert "OnActiveUSec=1h ;" in after
        store.wait_until_done()
        # On a slow machine the timer would elapse during this test; from here on only changes start a run.
        store.systemctl("stop", store.timer)
        store.wait_until_done()
    runs = {store.owner: store.runs() for store in systemd_host.stores}

    # A new version gets the same name.
    for store in systemd_host.stores:
        store.load(versions[1])
    for store in systemd_host.stores:
        layer = store.wait_for_layer()
        assert [layer] != first[store.owner]
        store.assert_no_copy_at_start(layer)
        assert f"{store.owner}: created layer {layer[:12]} of {NAME} for " in store.journal()
        store.wait_until_done()
    # The service's own change of the images starts no run.
    second = {store.owner: store.runs() for store in systemd_host.stores}
    time.sleep(7)
    assert {store.owner: store.runs() for store in systemd_host.stores} == second
    assert all(second[owner] > runs[owner] for owner in runs)

    # The name is moved to another image, among other changes.
    for store in systemd_host.stores:
        store.load(versions[2], "localhost/other:1")
        for name in ("localhost/a:1", "localhost/b:1", NAME):
            store.run("podman", "tag", "localhost/other:1", name)
    for store in systemd_host.stores:
        layer = store.wait_for_layer()
        store.assert_no_copy_at_start(layer)
        store.wait_until_done()
        assert store.runs() > second[store.owner]
        # Garbage collection keeps the declared layers.
        store.systemctl("start", store.collector)
        assert store.systemctl("is-failed", store.collector) == "inactive"
        assert store.mapped() == [layer]

    for store in systemd_host.stores:
        store.systemctl("start", store.timer)
    # Uninstall the service.
    absent = {**variables, "prepare_service": "absent", "prune_schedule": "absent"}
    inventory = {"all": {"hosts": {"host": absent}}}
    assert play(both, inventory, "--check").recap("host")["changed"] > 0
    for store in systemd_host.stores:
        assert {store.systemctl("is-active", unit) for unit in store.units} == {"active"}
    play(both, inventory)
    for store in systemd_host.stores:
        assert {store.systemctl("is-active", unit) for unit in store.units} == {"inactive"}
    left = systemd_host.machine.run(["find", "/etc/systemd", "-name", "userns-storage*"]).stdout
    assert left == ""
    root = pathlib.Path(systemd_host.machine.root)
    assert not (root / "usr/local/libexec/userns-storage").exists()
    assert not (root / "etc/userns-storage").exists()
