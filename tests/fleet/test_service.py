# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A host on which systemd runs keeps itself ready, as the roles prepare and prune have told it to."""

from __future__ import annotations

import json
import pathlib
import time
import typing as t

import pytest
from support import hosts, images, managed
from support.booted import Booted
from support.waiting import wait_until

Json = t.Dict[str, t.Any]
NAME = "localhost/app:1"
MAP = "0:100000:65536"


class Site:
    """A managed host with systemd, on which alice has a session."""

    def __init__(self, lab: t.Any) -> None:
        host = managed.Managed(lab, "debian13")
        self.machine = Booted(host.machine)
        lab.on_close(self.machine.close)
        sshd = hosts.Sshd(lab, self.machine)
        lab.on_close(sshd.close)
        self.variables = {**sshd.variables, "ansible_python_interpreter": "/usr/bin/python3"}
        home = f"{host.homes}/alice"
        self.machine.run(["useradd", "-m", "-d", home, "alice"])
        uid = self.machine.run(["id", "-u", "alice"]).stdout.strip()
        self.machine.run(["systemctl", "start", f"user@{uid}.service"])
        self.rootful = Place(self.machine, "vfs", "/var/lib/containers/storage", MAP)
        store = f"{home}/.local/share/containers/storage"
        self.rootless = Place(self.machine, "overlay", store, "keep-id", uid, home)

    @property
    def places(self) -> t.Tuple[Place, Place]:
        """Root's store and alice's."""
        return self.rootful, self.rootless


class Place:
    """One store of the site, with its owner's systemd."""

    def __init__(
        self,
        machine: Booted,
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

    def run(self, *words: str, check: bool = True) -> t.Any:
        """Run a program as the owner."""
        return self.machine.run([*self._prefix, *words], check=check)

    def systemctl(self, *words: str) -> str:
        """What the owner's systemd answers."""
        return str(self.run("systemctl", *self._scope, *words, check=False).stdout.strip())

    def verify(self, *units: str) -> str:
        """What systemd does not like about these units."""
        words = ["systemd-analyze", *self._scope, "verify", "--man=no", *units]
        return str(self.run(*words, check=False).stderr)

    def mapped(self) -> t.List[str]:
        """IDs of the mapped layers of the image with the name."""
        path = pathlib.Path(f"{self.machine.root}{self.graphroot}/{self.driver}-images/images.json")
        images = json.loads(path.read_text())
        (image,) = (item for item in images if NAME in item.get("names", ()))
        return list(image.get("mapped-layers") or ())

    def load(self, image: images.Image, name: str = NAME) -> None:
        """Pull an image under a name."""
        unshare = ["podman", "unshare"] if self._scope else []
        self.run(*unshare, "skopeo", "copy", "-q", image.source, f"containers-storage:{name}")

    def wait_for_a_layer(self) -> str:
        """The mapped layer that the host makes by itself."""
        wait_until(self.mapped, describe=self.said, pause=0.2)
        (layer,) = self.mapped()
        return layer

    def said(self) -> str:
        """What the journal has of the service."""
        # Root asks for everybody; --user-unit would mean root's own.
        field = "USER_UNIT" if self._scope else "UNIT"
        match = [f"{field}={self.service}", "+", f"_SYSTEMD_{field}={self.service}"]
        return str(self.machine.run(["journalctl", "--no-pager", "-o", "cat", *match]).stdout)

    def runs(self) -> int:
        """How often the service was started."""
        return self.said().count(f"Starting {self.service}")

    def wait_until_done(self) -> None:
        """Wait until the service does not run."""
        wait_until(
            lambda: self.systemctl("is-active", self.service) == "inactive",
            describe=self.said,
            pause=0.2,
        )

    def assert_starts_without_a_copy(self, layer: str) -> None:
        """podman creates a container on that layer, and makes no other."""
        self.run("podman", "create", *self.options, NAME, "x")
        assert self.mapped() == [layer]


@pytest.fixture(scope="module")
def site(lab: t.Any) -> Site:
    return Site(lab)


@pytest.fixture(scope="module")
def versions(lab: t.Any) -> t.List[images.Image]:
    return [
        images.build(lab.folder(), [{"a": images.file(f"{number}\n")}], NAME) for number in range(3)
    ]


def test_it_keeps_itself_ready(
    play: t.Any, site: Site, versions: t.List[images.Image], tmp_path: pathlib.Path
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
        **site.variables,
        "ansible_pipelining": True,
        "prepare_install": False,
        "prepare_images": f"{NAME}={versions[0].source}",
        "prepare_service": "present",
        "prune_unused_for": "4w",
        "prune_schedule": "daily",
    }
    inventory = {"all": {"hosts": {"host": variables}}}
    done = play(both, inventory)
    for place in site.places:
        unit = place.service.replace(".service", ".path")
        file = f"{place.graphroot}/{place.driver}-images/images.json"
        assert f"{place.owner}: {unit} watches {file} and creates the layers of" in done.output
    assert play(both, inventory).recap("host")["changed"] == 0
    first = {place.owner: place.mapped() for place in site.places}
    assert [len(layers) for layers in first.values()] == [1, 1]
    for place in site.places:
        for unit in place.units:
            assert place.systemctl("is-active", unit) == "active"
            assert place.systemctl("is-enabled", unit) == "enabled"
        assert place.verify(*place.units, place.service, place.collector) == ""
        # After a boot it waits for containers that are created at each start.
        collect = place.collector.replace(".service", ".timer")
        assert place.systemctl("show", "--property=Persistent", "--value", collect) == "no"
        after = place.systemctl("show", "--property=TimersMonotonic", "--value", collect)
        assert "OnActiveUSec=1h ;" in after
        place.wait_until_done()
        # On a slow machine its time would come within this test; from here on only changes start a run.
        place.systemctl("stop", place.timer)
        place.wait_until_done()
    runs = {place.owner: place.runs() for place in site.places}

    # A new version under the same name.
    for place in site.places:
        place.load(versions[1])
    for place in site.places:
        layer = place.wait_for_a_layer()
        assert [layer] != first[place.owner]
        place.assert_starts_without_a_copy(layer)
        assert f"{place.owner}: created layer {layer[:12]} of {NAME} for " in place.said()
        place.wait_until_done()
    # Its own change of the images starts no run.
    second = {place.owner: place.runs() for place in site.places}
    time.sleep(7)
    assert {place.owner: place.runs() for place in site.places} == second
    assert all(second[owner] > runs[owner] for owner in runs)

    # Retagged, among other changes.
    for place in site.places:
        place.load(versions[2], "localhost/other:1")
        for name in ("localhost/a:1", "localhost/b:1", NAME):
            place.run("podman", "tag", "localhost/other:1", name)
    for place in site.places:
        layer = place.wait_for_a_layer()
        place.assert_starts_without_a_copy(layer)
        place.wait_until_done()
        assert place.runs() > second[place.owner]
        # When the policy's time has come, what is declared stays.
        place.systemctl("start", place.collector)
        assert place.systemctl("is-failed", place.collector) == "inactive"
        assert place.mapped() == [layer]

    for place in site.places:
        place.systemctl("start", place.timer)
    # Taken away again.
    gone = {**variables, "prepare_service": "absent", "prune_schedule": "absent"}
    inventory = {"all": {"hosts": {"host": gone}}}
    assert play(both, inventory, "--check").recap("host")["changed"] > 0
    for place in site.places:
        assert {place.systemctl("is-active", unit) for unit in place.units} == {"active"}
    play(both, inventory)
    for place in site.places:
        assert {place.systemctl("is-active", unit) for unit in place.units} == {"inactive"}
    left = site.machine.run(["find", "/etc/systemd", "-name", "userns-storage*"]).stdout
    assert left == ""
    root = pathlib.Path(site.machine.root)
    assert not (root / "usr/local/libexec/userns-storage").exists()
    assert not (root / "etc/userns-storage").exists()
