# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Test that commit, export, save and push of a mapped container keep the capabilities of files."""

from __future__ import annotations

import pathlib
import re
import subprocess
import tarfile
import typing as t

import pytest
from support import hosts, images, matrix
from support.images import CAP_NET_RAW, capability
from support.registry import Receiver
from support.store_cases import Case

if t.TYPE_CHECKING:
    from support.hosts import Host
    from support.lab import Lab

KINDS = ("vfs", "overlay-forced", "btrfs", "rootless-overlay")
# A program of the image with a capability.
PROGRAM = "usr/bin/ping"
# A program that gets its capability in the container.
NEW = "usr/bin/new"
SETCAP = "/usr/sbin/setcap"
HEADER = "SCHILY.xattr.security.capability"


@pytest.fixture(scope="module")
def receiver() -> t.Iterator[Receiver]:
    registry = Receiver()
    yield registry
    registry.close()


@pytest.fixture(scope="module")
def image(lab: Lab) -> images.Image:
    """The small image, setcap, and the libraries that setcap needs."""
    found = subprocess.run(["ldd", SETCAP], capture_output=True, text=True, check=True).stdout
    layer = {"usr/bin/setcap": images.file(pathlib.Path(SETCAP).read_bytes(), 0o755)}
    for path in re.findall(r"(/\S+) \(", found):
        layer[path[1:]] = images.file(pathlib.Path(path).read_bytes(), 0o755)
    return images.build(
        lab.folder(), images.complete([*images.small_layers(), layer]), "localhost/setcap:1"
    )


def capabilities_in(archive: tarfile.TarFile) -> t.Dict[str, bytes]:
    """The capabilities of the files in an archive, in the form of the archive."""
    return {
        item.name.lstrip("./"): item.pax_headers[HEADER].encode("utf-8", "surrogateescape")
        for item in archive
        if HEADER in item.pax_headers
    }


def run_and_export(
    case: Case, receiver: Receiver, name: str, options: t.Sequence[str]
) -> t.Dict[str, t.Any]:
    """The capabilities and layers in the results of each command, for a container that changed the program."""
    store, scratch = case.store, case.store.base / "tmp"
    script = f"touch -d 2020-01-01 /{PROGRAM}; cp /{PROGRAM} /{NEW}; setcap cap_net_raw+ep /{NEW}"
    command = ["sh", "-c", script]
    identity = store.create(case.image.name, *options, "--user=0", command=command)
    store.podman("start", "-a", identity)
    committed = f"localhost/{name}:1"
    store.podman("commit", "-q", identity, committed)
    store.podman("export", "-o", str(scratch / f"{name}.tar"), identity)
    store.podman(
        "save", "-q", "--format=oci-archive", "-o", str(scratch / f"{name}.oci"), committed
    )
    target = f"{receiver.address}/{store.base.name}/{name}:1"
    store.podman("push", "-q", "--tls-verify=false", committed, target)
    store.podman("push", "-q", "--tls-verify=false", case.image.name, f"{target}.base")
    store.podman("rm", identity)
    path = f"{store.base.name}/{name}:1"
    *lower, top = receiver.layers(path)
    with (
        tarfile.open(scratch / f"{name}.oci") as saved,
        tarfile.open(scratch / f"{name}.tar", errors="surrogateescape") as exported,
    ):
        digests = sorted(item.name for item in saved if item.name.startswith("blobs/"))
        return {
            "export": capabilities_in(exported),
            "commit": capabilities_in(top),
            "the image's layers": [capabilities_in(item) for item in lower],
            "the image itself": receiver.tags[f"{path}.base"],
            "saved layers": len(digests),
        }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("release", matrix.RELEASES)
def test_capabilities_are_the_same_as_with_copy_by_podman(
    release: str,
    kind: str,
    make_case: t.Callable[..., Case],
    lab: Lab,
    host: t.Callable[[str], Host],
    image: images.Image,
    receiver: Receiver,
) -> None:
    case = make_case(kind, image, machine=hosts.of_release(lab, release, host))
    store = case.store
    with_podman_layer = run_and_export(case, receiver, "podman", case.podman_args)
    (copied,) = case.mapped()
    store.podman("rmi", "localhost/podman:1")
    store.storage_cli("delete-layer", copied)
    without_userns = run_and_export(case, receiver, "plain", [])
    (entry,) = case.layer_template()["layers"]
    with_our_layer = run_and_export(case, receiver, "ours", case.podman_args)
    assert case.mapped() == [entry["layer_id"]]
    assert with_our_layer == with_podman_layer
    # The image, its layers and its capabilities are the same as without a user namespace.
    original = capability(CAP_NET_RAW)
    for command in ("export", "commit"):
        assert (
            with_our_layer[command].pop(PROGRAM) == without_userns[command].pop(PROGRAM) == original
        )
        assert without_userns[command].pop(NEW) == original
        # Upstream keeps the host ID of the root user that set the capability (container-libs 1126).
        first = int(case.map[0].split(":")[1])
        assert with_our_layer[command].pop(NEW) in (original, capability(CAP_NET_RAW, rootid=first))
    assert with_our_layer == without_userns
