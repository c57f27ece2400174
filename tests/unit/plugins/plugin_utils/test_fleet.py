# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of the report: stores that are shared with users, and images that carry a map."""

from __future__ import annotations

import typing as t

from ansible_collections.userns.storage.plugins.plugin_utils import (
    _fleet,
    _fleet_markdown,
    _fleet_page,
)

MB = 1 << 20


def image(name: str, size: int) -> t.Dict[str, t.Any]:
    own = [{"recorded_size": size, "size_exclusive": size}]
    return {"names": [name], "id": "0" * 64, "layers": own, "mapped_layers": []}


def result(**more: t.Any) -> t.Dict[str, t.Any]:
    store = {"driver": "overlay", "backing_filesystem": "ext4", "graphroot": "/srv/images"}
    return {"store": store, "images": [], "totals": {}, "orphans": [], **more}


def fleet_with_users(users: t.List[t.Dict[str, t.Any]]) -> _fleet.Fleet:
    images = [image("quay.io/team/ci:1", 100 * MB), image("quay.io/other:1", 50 * MB)]
    shared = {"graphroot": "/srv/images", "runroot": "/run/images", "users": users}
    facts = {
        "report_reached": {"ping": "pong"},
        "report_found": {"results": [result(report_store="root")]},
        "report_shared_found": {"results": [result(images=images, report_shared=shared)]},
    }
    return _fleet.fleet(["host"], {"host": facts})


def test_sharing_saves_a_pull_per_user_and_a_copy_per_mapping() -> None:
    fleet = fleet_with_users(
        [
            {"user": "alice", "images": ["*"], "mappings": 1},
            {"user": "bob", "images": ["quay.io/team/*"], "mappings": 2},
        ]
    )
    assert _fleet.totals(fleet)["bytes_saved_by_sharing"] == 2 * 150 * MB + 3 * 100 * MB
    (host,) = fleet.hosts
    assert host.state == _fleet.OK
    assert host.stores[1].user == "root, shared with users"
    assert "2 users in 5 mappings" in host.stores[1].notes[0]
    assert "600 MiB" in host.stores[1].notes[0]
    assert "600 MiB were not copied" in _fleet_markdown.render(fleet, "title", "now")
    assert "not copied, because images are shared" in _fleet_page.render(fleet, "title", "now")


def test_report_without_shared_images_does_not_mention_them() -> None:
    fleet = _fleet.fleet(["host"], {"host": {"report_found": {"results": [result()]}}})
    assert _fleet.totals(fleet)["bytes_saved_by_sharing"] == 0
    assert "not copied" not in _fleet_markdown.render(fleet, "title", "now")
    assert "not copied" not in _fleet_page.render(fleet, "title", "now")


def test_images_with_a_map_are_listed_with_the_size_of_their_copy() -> None:
    copy = {"id": "1" * 64, "uidmap": [], "gidmap": [], "size_exclusive": 90 * MB}
    mapped = {**image("quay.io/team/ci:1", 100 * MB), "uidmap": ["0:1:1000", "1000:0:1"]}
    mapped.update(gidmap=mapped["uidmap"], mapped_layers=[copy], identity_copy=copy["id"])
    plain = {**image("quay.io/other:1", MB), "uidmap": [], "gidmap": [], "identity_copy": None}
    facts = {"report_found": {"results": [result(images=[mapped, plain])]}}
    fleet = _fleet.fleet(["host"], {"host": facts})
    image_with_map, image_without_map = fleet.hosts[0].stores[0].images
    assert (image_with_map.map, image_with_map.identity_copy) == ("0:1:1000, 1000:0:1", 90 * MB)
    assert (image_without_map.map, image_without_map.identity_copy) == ("", 0)
    page, text = (module.render(fleet, "title", "now") for module in (_fleet_page, _fleet_markdown))
    for document in (page, text):
        assert document.count("Images that carry a map") == 1
        assert "90.0 MiB" in document
    assert "no map" in page


def test_host_with_invalid_values_is_reported_as_failed() -> None:
    (host,) = fleet_with_users([{"user": "alice", "images": "x", "mappings": "many"}]).hosts
    assert host.state == _fleet.FAILED
    assert "images of report_shared" in host.message
