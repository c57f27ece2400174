# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The whole life of a mapped layer with each generation of the runtimes, on each kind of store."""

from __future__ import annotations

import typing as t

import pytest
from support import hosts, matrix
from support.cases import Case

if t.TYPE_CHECKING:
    from support.hosts import Host
    from support.lab import Lab

KINDS = ("vfs", "overlay", "overlay-forced", "btrfs", "rootless-overlay", "rootless-vfs")
# Its first version with `podman system check`.
CHECKS = (5, 4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("release", matrix.RELEASES)
def test_a_mapped_layer_from_prediction_to_removal(
    release: str,
    kind: str,
    make_case: t.Callable[..., Case],
    lab: Lab,
    host: t.Callable[[str], Host],
) -> None:
    machine = hosts.of_release(lab, release, host)
    case = make_case(kind, machine=machine)
    case.as_user = case.keep_id
    store = case.store
    plain = store.layer_ids()
    shifts = kind == "overlay"

    # Predicted, and nothing written.
    before = store.snapshot_of_disk()
    (foreseen,) = case.layer_template(options={"check": True})["layers"]
    assert before.changes(store.snapshot_of_disk()) == []
    # Made.
    (entry,) = case.layer_template()["layers"]
    assert foreseen["action"] == entry["action"] == ("not_needed" if shifts else "created")
    assert (foreseen["uidmap"], foreseen["gidmap"]) == (entry["uidmap"], entry["gidmap"])
    assert case.mapped() == ([] if shifts else [entry["layer_id"]])
    below = case.template() if shifts else entry["layer_id"]
    # Taken by the runtime, which makes none of its own.
    identity = case.create("--name=kept")
    container = store.container(identity)
    assert store.layer_ids() - plain - {entry["layer_id"]} == {container["layer"]}
    assert store.layer(container["layer"])["parent"] == below
    # Run by it, with the owners of the image.
    assert case.shell("cat /etc/motd; stat -c %u:%g /home/user") == "second\n1000:1000\n"
    # Described.
    (image,) = case.info()["images"]
    told = [(item["id"], item["status"]) for item in image["mapped_layers"]]
    assert told == ([] if shifts else [(below, "ok")])
    assert {item["status"] for item in image["layers"]} == {"ok"}
    # Found in order by podman's own check.
    if machine.version("podman") >= CHECKS:
        checked = store.podman("system", "check", check=False)
        assert checked.rc == 0, checked
    # Left alone while it is used, then collected.
    collect = {"min_age": "0", "max_copies_per_image": 0}
    assert case.call("layer_gc", collect)["changed"] is False
    store.podman("rm", "kept")
    assert case.call("layer_gc", collect)["changed"] is not shifts
    assert store.layer_ids() == plain
    # Made once more, and gone with its image.
    (again,) = case.layer_template()["layers"]
    assert again["action"] == entry["action"]
    case.assert_podman_is_well()
    store.podman("rmi", case.image.name)
    assert store.layer_ids() == set()
    assert store.images() == []
