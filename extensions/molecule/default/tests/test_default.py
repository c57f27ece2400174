# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The rootful store as the scenario's play has to leave it."""

from __future__ import annotations

import typing as t

import pytest

WANTED = {
    "0:100000:65536": "0:100000:65536",
    "0:200000:65536": "0:300000:65536",
}


def test_driver_is_the_one_asked_for(host: t.Any, store: t.Any) -> None:
    assert host.file("/etc/containers/storage.conf").contains('^driver = "vfs"')
    assert store.driver == "vfs"


def test_both_maps_have_a_layer(store: t.Any) -> None:
    found = {uidmap[0]: gidmap[0] for uidmap, gidmap in store.mapped_layers().values()}
    assert found == WANTED


def test_files_are_shifted(host: t.Any, store: t.Any) -> None:
    for layer, (uidmap, gidmap) in store.mapped_layers().items():
        first_uid, first_gid = (int(one[0].split(":")[1]) for one in (uidmap, gidmap))
        tree = f"{store.graphroot}/vfs/dir/{layer}"
        assert (host.file(f"{tree}/bin").uid, host.file(f"{tree}/bin").gid) == (
            first_uid,
            first_gid,
        )
        data = host.file(f"{tree}/srv/data")
        assert (data.uid, data.gid) == (first_uid + 1000, first_gid + 500)


@pytest.mark.parametrize("uidmap", WANTED)
def test_container_starts_without_a_copy(store: t.Any, uidmap: str) -> None:
    options = (f"--uidmap={uidmap}", f"--gidmap={WANTED[uidmap]}")
    assert store.starts_without_a_copy(*options) == [uidmap]


def test_nothing_is_left_in_staging(host: t.Any, store: t.Any) -> None:
    for name in ("staging", "trash"):
        assert host.file(f"{store.graphroot}/userns-storage/{name}").listdir() == []
