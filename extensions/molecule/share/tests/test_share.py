# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Two users whose images come from one store of root's, as the scenario's play has to leave them."""

from __future__ import annotations

import typing as t

import pytest

USERS = ("alice", "bob")
IMAGE = "localhost/app:1"
STORES = "/var/lib/userns-storage.service"


@pytest.mark.parametrize("user", USERS)
def test_containers_start_with_nothing_in_the_users_store(
    host: t.Any, store_of: t.Callable[[str], t.Any], user: str
) -> None:
    store = store_of(user)
    assert store.podman("images --format '{{.Repository}}:{{.Tag}} {{.ReadOnly}}'").split() == [
        IMAGE,
        "true",
    ]
    for options in ("", "--userns=keep-id"):
        store.podman(f"run --rm {options} {IMAGE} true")
    records = host.file(f"{store.graphroot}/overlay-layers/layers.json")
    assert not records.exists or records.content_string.strip() in ("[]", "")


def test_one_mount_for_each_user_and_mapping(host: t.Any) -> None:
    points = [line.split()[1] for line in host.file("/proc/mounts").content_string.splitlines()]
    assert len([point for point in points if point.startswith(STORES)]) == 2 * len(USERS)


def test_another_user_cannot_read_it(host: t.Any, store_of: t.Callable[[str], t.Any]) -> None:
    folder = f"{STORES}/{store_of('bob').account.uid}"
    assert host.run(f"runuser -u bob -- ls {folder}").rc == 0
    assert host.run(f"runuser -u alice -- ls {folder}").rc != 0


def test_the_units_are_enabled_and_valid(host: t.Any) -> None:
    names = [
        "userns-storage.service",
        "userns-storage-follow.path",
        "userns-storage-follow.service",
    ]
    for name in names:
        assert host.file(f"/etc/systemd/system/{name}").exists
    assert host.file("/etc/systemd/system/multi-user.target.wants/userns-storage.service").exists
    done = host.run(f"env -C /etc/systemd/system systemd-analyze verify --man=no {' '.join(names)}")
    assert "userns-storage" not in done.stderr


def test_the_service_makes_the_mounts_again(
    host: t.Any, store_of: t.Callable[[str], t.Any]
) -> None:
    points = [line.split()[1] for line in host.file("/proc/mounts").content_string.splitlines()]
    for point in points:
        if point.startswith(STORES):
            assert host.run(f"umount -l {point}").rc == 0
    unit = host.file("/etc/systemd/system/userns-storage.service").content_string
    (start,) = [
        line.partition("=")[2] for line in unit.splitlines() if line.startswith("ExecStart=")
    ]
    done = host.run(start)
    assert done.rc == 0, done.stderr
    store_of("alice").podman(f"run --rm --userns=keep-id {IMAGE} true")
