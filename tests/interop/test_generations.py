# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Test the life cycle of a mapped layer with each generation of the runtimes, on each kind of store."""

from __future__ import annotations

import typing as t

import pytest
from support import hosts, matrix
from support.store_cases import Case

if t.TYPE_CHECKING:
    from support.hosts import Host
    from support.lab import Lab

KINDS = ("vfs", "overlay", "overlay-forced", "btrfs", "rootless-overlay", "rootless-vfs")
# The first version with `podman system check`.
CHECKS = (5, 4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("release", matrix.RELEASES)
def test_mapped_layer_from_prediction_to_removal(
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
    image_layers = store.layer_ids()
    shifts = kind == "overlay"

    # Check mode predicts the layer and writes nothing.
    before = store.disk_state()
    (predicted,) = case.layer_template(options={"check": True})["layers"]
    assert before.changes(store.disk_state()) == []
    # The module creates the layer.
    (entry,) = case.layer_template()["layers"]
    assert predicted["action"] == entry["action"] == ("not_needed" if shifts else "created")
    assert (predicted["uidmap"], predicted["gidmap"]) == (entry["uidmap"], entry["gidmap"])
    assert case.mapped() == ([] if shifts else [entry["layer_id"]])
    below = case.template() if shifts else entry["layer_id"]
    # The runtime uses it, and creates no copy.
    identity = case.create("--name=kept")
    container = store.container(identity)
    assert store.layer_ids() - image_layers - {entry["layer_id"]} == {container["layer"]}
    assert store.layer(container["layer"])["parent"] == below
    # The container sees the owners of the image.
    assert case.shell("cat /etc/motd; stat -c %u:%g /home/user") == "second\n1000:1000\n"
    # image_layers_info returns it.
    (image,) = case.info()["images"]
    mapped_layers = [(item["id"], item["status"]) for item in image["mapped_layers"]]
    assert mapped_layers == ([] if shifts else [(below, "ok")])
    assert {item["status"] for item in image["layers"]} == {"ok"}
    # podman's own check finds no damage.
    if machine.version("podman") >= CHECKS:
        checked = store.podman("system", "check", check=False)
        assert checked.rc == 0, checked
    # layer_gc keeps it while it is used, and removes it afterwards.
    collect = {"min_age": "0", "max_copies_per_image": 0}
    assert case.call("layer_gc", collect)["changed"] is False
    store.podman("rm", "kept")
    assert case.call("layer_gc", collect)["changed"] is not shifts
    assert store.layer_ids() == image_layers
    # A layer that is created again is removed with its image.
    (recreated,) = case.layer_template()["layers"]
    assert recreated["action"] == entry["action"]
    case.assert_podman_works()
    store.podman("rmi", case.image.name)
    assert store.layer_ids() == set()
    assert store.images() == []
