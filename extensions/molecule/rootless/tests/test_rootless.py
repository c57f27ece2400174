# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The rootless stores of two users after the plays of the scenario."""

from __future__ import annotations

import typing as t

import pytest

USERS = ("alice", "bob")


def test_subordinate_ids_do_not_overlap(host: t.Any) -> None:
    for name in ("subuid", "subgid"):
        lines = host.file(f"/etc/{name}").content_string.splitlines()
        ranges = sorted((int(line.split(":")[1]), int(line.split(":")[2])) for line in lines)
        assert {line.split(":")[0] for line in lines} >= set(USERS)
        assert all(first[0] + first[1] <= second[0] for first, second in zip(ranges, ranges[1:]))


@pytest.mark.parametrize("user", USERS)
def test_keep_id_container_starts_without_copy(
    store_of: t.Callable[[str], t.Any], user: str
) -> None:
    store = store_of(user)
    ((uidmap, _gidmap),) = store.mapped_layers().values()
    assert store.run_without_copy("--userns=keep-id") == uidmap
    assert uidmap[1] == f"{store.account.uid}:0:1"


@pytest.mark.parametrize("user", USERS)
def test_store_belongs_to_user(host: t.Any, store_of: t.Callable[[str], t.Any], user: str) -> None:
    store = store_of(user)
    assert host.file(store.graphroot).user == user
    assert host.file(f"{store.graphroot}/userns-storage").user == user
    (layer,) = store.mapped_layers()
    # In a keep-id container, UID 0 is the first subordinate ID of the user.
    first = next(
        int(line.split(":")[1])
        for line in host.file("/etc/subuid").content_string.splitlines()
        if line.startswith(f"{user}:")
    )
    assert host.file(f"{store.graphroot}/overlay/{layer}/diff/bin").uid == first


def test_rootful_store_is_unchanged(host: t.Any) -> None:
    assert not host.file("/var/lib/containers/storage/userns-storage").exists


@pytest.mark.parametrize("user", USERS)
def test_units_of_user_are_valid(
    host: t.Any, store_of: t.Callable[[str], t.Any], user: str
) -> None:
    account = store_of(user).account
    names = [
        f"userns-storage-{unit}-{account.uid}.{kind}"
        for unit, kinds in (
            ("ready", ("path", "timer", "service")),
            ("collect", ("timer", "service")),
        )
        for kind in kinds
    ]
    for name in names:
        text = host.file(f"/etc/systemd/user/{name}").content_string
        assert f"ConditionUser={account.uid}\n" in text
    result = host.run(
        f"env -C /etc/systemd/user XDG_RUNTIME_DIR=/run SYSTEMD_LOG_LEVEL=warning "
        f"systemd-analyze verify --user --man=no {' '.join(names)}"
    )
    assert (result.rc, result.stderr) == (0, "")
    assert host.file(f"/var/lib/systemd/linger/{user}").exists
    # The role writes no units to the home directory.
    assert not host.file(f"{account.home}/.config/systemd").exists


@pytest.mark.parametrize("user", USERS)
def test_user_can_run_service(host: t.Any, store_of: t.Callable[[str], t.Any], user: str) -> None:
    store = store_of(user)
    before = store.mapped_layers()
    program = "/usr/local/libexec/userns-storage/userns-storage.pyz"
    result = host.run(
        f"env -C / HOME={store.account.home} XDG_RUNTIME_DIR=/run/user/{store.account.uid} "
        f"runuser -u {user} -- /usr/bin/python3 {program} ready /etc/userns-storage/ready/{user}.json"
    )
    assert (result.rc, result.stdout, result.stderr) == (0, "", "")
    assert store.mapped_layers() == before
