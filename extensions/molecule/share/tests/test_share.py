# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The shared images of two users after the play of the scenario."""

from __future__ import annotations

import typing as t

import pytest

USERS = ("alice", "bob")
IMAGE = "localhost/app:1"
STORES = "/var/lib/userns-storage.service"


@pytest.mark.parametrize("user", USERS)
def test_containers_start_without_layers_in_store_of_user(
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


def test_mount_exists_for_each_user_and_mapping(host: t.Any) -> None:
    points = [line.split()[1] for line in host.file("/proc/mounts").content_string.splitlines()]
    assert len([point for point in points if point.startswith(STORES)]) == 2 * len(USERS)


def test_mounts_are_private_to_user(host: t.Any, store_of: t.Callable[[str], t.Any]) -> None:
    folder = f"{STORES}/{store_of('bob').account.uid}"
    assert host.run(f"runuser -u bob -- ls {folder}").rc == 0
    assert host.run(f"runuser -u alice -- ls {folder}").rc != 0


def test_units_are_enabled_and_valid(host: t.Any) -> None:
    names = [
        "userns-storage.service",
        "userns-storage-follow.path",
        "userns-storage-follow.service",
    ]
    for name in names:
        assert host.file(f"/etc/systemd/system/{name}").exists
    assert host.file("/etc/systemd/system/multi-user.target.wants/userns-storage.service").exists
    result = host.run(
        f"env -C /etc/systemd/system systemd-analyze verify --man=no {' '.join(names)}"
    )
    assert "userns-storage" not in result.stderr


def test_service_creates_mounts_again(host: t.Any, store_of: t.Callable[[str], t.Any]) -> None:
    points = [line.split()[1] for line in host.file("/proc/mounts").content_string.splitlines()]
    for point in points:
        if point.startswith(STORES):
            assert host.run(f"umount -l {point}").rc == 0
    unit = host.file("/etc/systemd/system/userns-storage.service").content_string
    (command,) = [
        line.partition("=")[2] for line in unit.splitlines() if line.startswith("ExecStart=")
    ]
    result = host.run(command)
    assert result.rc == 0, result.stderr
    store_of("alice").podman(f"run --rm --userns=keep-id {IMAGE} true")
