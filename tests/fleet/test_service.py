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

Json = t.Dict[str, t.Any]
NAME = "localhost/app:1"
MAP = "0:100000:65536"
GRAPHROOT = "/var/lib/containers/storage"
UNITS = ("userns-storage-ready.path", "userns-storage-ready.timer", "userns-storage-collect.timer")


class Site:
    """A managed host with systemd, and what its rootful store holds."""

    def __init__(self, lab: t.Any) -> None:
        host = managed.Managed(lab, "debian13")
        self.machine = Booted(host.machine)
        lab.on_close(self.machine.close)
        sshd = hosts.Sshd(lab, self.machine)
        lab.on_close(sshd.close)
        self.variables = {**sshd.variables, "ansible_python_interpreter": "/usr/bin/python3"}

    def images(self) -> t.List[Json]:
        """Records of the images."""
        path = pathlib.Path(f"{self.machine.root}{GRAPHROOT}/vfs-images/images.json")
        return json.loads(path.read_text()) if path.exists() else []

    def mapped(self) -> t.List[str]:
        """IDs of the mapped layers of the image with the name."""
        (image,) = (one for one in self.images() if NAME in one.get("names", ()))
        return list(image.get("mapped-layers") or ())

    def load(self, image: images.Image, name: str = NAME) -> None:
        """Pull an image under a name."""
        words = ["skopeo", "copy", "-q", image.source, f"containers-storage:{name}"]
        self.machine.run(words)

    def wait_for_a_layer(self) -> str:
        """The mapped layer that the host makes by itself."""
        until = time.monotonic() + 60
        while not self.mapped():
            assert time.monotonic() < until, self.said()
            time.sleep(0.2)
        (layer,) = self.mapped()
        return layer

    def said(self) -> str:
        """What the service has said."""
        words = ["journalctl", "--no-pager", "-o", "cat", "-u", "userns-storage-ready.service"]
        return self.machine.run(words).stdout

    def runs(self) -> int:
        """How often the service was started."""
        return self.said().count("Starting userns-storage-ready.service")

    def active(self, unit: str) -> str:
        """What systemd says of a unit."""
        return self.machine.run(["systemctl", "is-active", unit], check=False).stdout.strip()

    def idle(self) -> None:
        """Wait until the service does not run."""
        until = time.monotonic() + 60
        while self.active("userns-storage-ready.service") != "inactive":
            assert time.monotonic() < until, self.said()
            time.sleep(0.2)

    def assert_starts_without_a_copy(self, layer: str) -> None:
        """podman creates a container on that layer, and no other."""
        self.machine.run(
            [
                "podman",
                "create",
                "--name",
                layer[:12],
                f"--uidmap={MAP}",
                f"--gidmap={MAP}",
                NAME,
                "x",
            ]
        )
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
    variables = {
        **site.variables,
        "prepare_install": False,
        "prepare_driver": "vfs",
        "prepare_images": f"{NAME}={versions[0].source}",
        "prepare_mappings": MAP,
        "prepare_service": "present",
        "prune_unused_for": "4w",
        "prune_schedule": "daily",
    }
    inventory = {"all": {"hosts": {"host": variables}}}
    play("userns.storage.prepare", inventory)
    done = play("userns.storage.prune", inventory)
    for again in ("userns.storage.prepare", "userns.storage.prune"):
        assert play(again, inventory).recap("host")["changed"] == 0
    (first,) = site.mapped()
    for unit in UNITS:
        assert site.active(unit) == "active"
        path = f"/etc/systemd/system/{unit}"
        for name in (path, path.rpartition(".")[0] + ".service"):
            told = site.machine.run(["systemd-analyze", "verify", "--man=no", name], check=False)
            assert (told.rc, told.stderr) == (0, "")
        state = site.machine.run(["systemctl", "is-enabled", unit], check=False).stdout
        assert state == "enabled\n"

    # A new version under the same name.
    site.idle()
    runs = site.runs()
    site.load(versions[1])
    second = site.wait_for_a_layer()
    assert second != first
    site.assert_starts_without_a_copy(second)
    assert f"root: made layer {second[:12]} of {NAME} for {MAP}, by " in site.said()
    # Its own change of the images starts no run.
    site.idle()
    time.sleep(8)
    assert site.runs() == runs + 1

    # Retagged, within a burst of other changes: one more run.
    site.load(versions[2], "localhost/other:1")
    for name in ("localhost/a:1", "localhost/b:1", NAME):
        site.machine.run(["podman", "tag", "localhost/other:1", name])
    third = site.wait_for_a_layer()
    site.assert_starts_without_a_copy(third)
    site.idle()
    assert site.runs() == runs + 2
    # At the policy's turn what is declared stays.
    site.machine.run(["systemctl", "start", "userns-storage-collect.service"])
    assert site.mapped() == [third]

    # Taken away again.
    gone = {**variables, "prepare_service": "absent", "prune_schedule": "absent"}
    inventory = {"all": {"hosts": {"host": gone}}}
    for name in ("userns.storage.prune", "userns.storage.prepare"):
        foreseen = play(name, inventory, "--check").recap("host")["changed"]
        assert play(name, inventory).recap("host")["changed"] == foreseen > 0
        assert play(name, inventory).recap("host")["changed"] == 0
    for unit in UNITS:
        assert site.active(unit) == "inactive"
    left = site.machine.run(["find", "/etc/systemd", "-name", "userns-storage*"]).stdout
    assert left == ""
    root = pathlib.Path(site.machine.root)
    assert not (root / "usr/local/libexec/userns-storage").exists()
    assert not (root / "etc/userns-storage").exists()
    assert done.recap("host")["failed"] == 0
