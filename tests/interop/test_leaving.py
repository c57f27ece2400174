# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What leaves a mapped container by commit, export, save and push, with the capabilities of its files."""

from __future__ import annotations

import pathlib
import re
import subprocess
import tarfile
import typing as t

import pytest
from support import hosts, images, matrix
from support.cases import Case
from support.images import CAP_NET_RAW, capability
from support.registry import Receiver

if t.TYPE_CHECKING:
    from support.hosts import Host
    from support.lab import Lab

KINDS = ("vfs", "overlay-forced", "btrfs", "rootless-overlay")
# A program with a capability.
PROGRAM = "usr/bin/ping"
# One that gets its capability in the container.
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
    """The small image with setcap, and the libraries that it needs."""
    found = subprocess.run(["ldd", SETCAP], capture_output=True, text=True, check=True).stdout
    layer = {"usr/bin/setcap": images.file(pathlib.Path(SETCAP).read_bytes(), 0o755)}
    for path in re.findall(r"(/\S+) \(", found):
        layer[path[1:]] = images.file(pathlib.Path(path).read_bytes(), 0o755)
    return images.build(
        lab.folder(), images.complete([*images.small_layers(), layer]), "localhost/setcap:1"
    )


def granted(archive: tarfile.TarFile) -> t.Dict[str, bytes]:
    """The capabilities that an archive gives to its files, as they stand in it."""
    return {
        item.name.lstrip("./"): item.pax_headers[HEADER].encode("utf-8", "surrogateescape")
        for item in archive
        if HEADER in item.pax_headers
    }


def left(case: Case, receiver: Receiver, name: str, options: t.Sequence[str]) -> t.Dict[str, t.Any]:
    """What leaves a container that has touched the program, by each way."""
    store, scratch = case.store, case.store.base / "tmp"
    script = f"touch -d 2020-01-01 /{PROGRAM}; cp /{PROGRAM} /{NEW}; setcap cap_net_raw+ep /{NEW}"
    command = ["sh", "-c", script]
    identity = store.create(case.image.name, *options, "--user=0", command=command)
    store.podman("start", "-a", identity)
    made = f"localhost/{name}:1"
    store.podman("commit", "-q", identity, made)
    store.podman("export", "-o", str(scratch / f"{name}.tar"), identity)
    store.podman("save", "-q", "--format=oci-archive", "-o", str(scratch / f"{name}.oci"), made)
    target = f"{receiver.address}/{store.base.name}/{name}:1"
    store.podman("push", "-q", "--tls-verify=false", made, target)
    store.podman("push", "-q", "--tls-verify=false", case.image.name, f"{target}.base")
    store.podman("rm", identity)
    path = f"{store.base.name}/{name}:1"
    *below, top = receiver.layers(path)
    with (
        tarfile.open(scratch / f"{name}.oci") as saved,
        tarfile.open(scratch / f"{name}.tar", errors="surrogateescape") as exported,
    ):
        digests = sorted(item.name for item in saved if item.name.startswith("blobs/"))
        return {
            "export": granted(exported),
            "commit": granted(top),
            "the image's layers": [granted(item) for item in below],
            "the image itself": receiver.tags[f"{path}.base"],
            "saved layers": len(digests),
        }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("release", matrix.RELEASES)
def test_capabilities_leave_as_from_a_copy_of_podmans_own(
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
    theirs = left(case, receiver, "podman", case.podman_args)
    (copied,) = case.mapped()
    store.podman("rmi", "localhost/podman:1")
    store.storage_cli("delete-layer", copied)
    plain = left(case, receiver, "plain", [])
    (entry,) = case.layer_template()["layers"]
    ours = left(case, receiver, "ours", case.podman_args)
    assert case.mapped() == [entry["layer_id"]]
    assert ours == theirs
    # The image and its layers, and the capabilities that came with it, are as without a user namespace.
    old = capability(CAP_NET_RAW)
    for way in ("export", "commit"):
        assert ours[way].pop(PROGRAM) == plain[way].pop(PROGRAM) == old
        assert plain[way].pop(NEW) == old
        # Upstream carries the ID outside of the root that has granted it (container-libs 1126).
        first = int(case.map[0].split(":")[1])
        assert ours[way].pop(NEW) in (old, capability(CAP_NET_RAW, rootid=first))
    assert ours == plain
