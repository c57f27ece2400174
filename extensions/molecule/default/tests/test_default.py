# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The rootful store and its units after the plays of the scenario."""

from __future__ import annotations

import json
import typing as t

import pytest

# The GID map of each UID map.
GIDMAPS = {
    "0:100000:65536": "0:100000:65536",
    "0:200000:65536": "0:300000:65536",
}


def test_driver_matches_configuration(host: t.Any, store: t.Any) -> None:
    assert host.file("/etc/containers/storage.conf").contains('^driver = "vfs"')
    assert store.driver == "vfs"


def test_mappings_have_mapped_layers(store: t.Any) -> None:
    gidmaps = {uidmap[0]: gidmap[0] for uidmap, gidmap in store.mapped_layers().values()}
    assert gidmaps == GIDMAPS


def test_files_have_mapped_owners(host: t.Any, store: t.Any) -> None:
    for layer, (uidmap, gidmap) in store.mapped_layers().items():
        first_uid, first_gid = (int(entries[0].split(":")[1]) for entries in (uidmap, gidmap))
        tree = f"{store.graphroot}/vfs/dir/{layer}"
        assert (host.file(f"{tree}/bin").uid, host.file(f"{tree}/bin").gid) == (
            first_uid,
            first_gid,
        )
        data = host.file(f"{tree}/srv/data")
        assert (data.uid, data.gid) == (first_uid + 1000, first_gid + 500)


@pytest.mark.parametrize("uidmap", GIDMAPS)
def test_container_starts_without_copy(store: t.Any, uidmap: str) -> None:
    options = (f"--uidmap={uidmap}", f"--gidmap={GIDMAPS[uidmap]}")
    assert store.run_without_copy(*options) == [uidmap]


def test_staging_and_trash_are_empty(host: t.Any, store: t.Any) -> None:
    for name in ("staging", "trash"):
        assert host.file(f"{store.graphroot}/userns-storage/{name}").listdir() == []


@pytest.mark.parametrize(
    ("unit", "target"),
    [("ready.path", "paths"), ("ready.timer", "timers"), ("collect.timer", "timers")],
)
def test_units_are_enabled(host: t.Any, unit: str, target: str) -> None:
    path = f"/etc/systemd/system/userns-storage-{unit}"
    link = host.file(f"/etc/systemd/system/{target}.target.wants/userns-storage-{unit}")
    assert link.linked_to == path
    for name in (path, f"/etc/systemd/system/userns-storage-{unit.partition('.')[0]}.service"):
        file = host.file(name)
        assert (file.user, oct(file.mode)) == ("root", "0o644")


def test_units_contain_store_and_calendar(host: t.Any, store: t.Any) -> None:
    folder = "/etc/systemd/system/userns-storage-"
    path = host.file(f"{folder}ready.path").content_string
    assert f"PathChanged={store.graphroot}/vfs-images/images.json\n" in path
    assert "OnCalendar=Sun 03:00\n" in host.file(f"{folder}collect.timer").content_string


def test_service_finds_no_work(host: t.Any, store: t.Any) -> None:
    before = store.mapped_layers()
    for job in ("ready", "collect"):
        unit = host.file(f"/etc/systemd/system/userns-storage-{job}.service").content_string
        (command,) = (
            line.partition("=")[2] for line in unit.splitlines() if line.startswith("ExecStart=")
        )
        result = host.run(f"env -C / {command}")
        assert (result.rc, result.stdout, result.stderr) == (0, "", "")
    assert store.mapped_layers() == before


def test_configuration_contains_policy_of_store(host: t.Any) -> None:
    text = host.file("/etc/userns-storage/collect/root.json").content_string
    (entry,) = json.loads(text)["stores"]
    assert entry == {
        "user": "root",
        "allow_untested_runtime": False,
        "policy": {
            "images": [],
            "keep_images": ["localhost/base:*"],
            "keep_mappings": [],
            "duplicates": False,
            "unusable_maps": False,
            "min_age": "10m",
            "unused_for": "4w",
            "max_copies_per_image": "3",
            "origin": "any",
            "orphans": "report",
            "broken": "report",
        },
    }
