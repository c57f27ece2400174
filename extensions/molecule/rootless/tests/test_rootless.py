# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The stores of two users as the scenario's play has to leave them."""

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
def test_keep_id_starts_without_a_copy(store_of: t.Callable[[str], t.Any], user: str) -> None:
    store = store_of(user)
    ((uidmap, _gidmap),) = store.mapped_layers().values()
    assert store.starts_without_a_copy("--userns=keep-id") == uidmap
    assert uidmap[1] == f"{store.account.uid}:0:1"


@pytest.mark.parametrize("user", USERS)
def test_all_belongs_to_the_user(
    host: t.Any, store_of: t.Callable[[str], t.Any], user: str
) -> None:
    store = store_of(user)
    assert host.file(store.graphroot).user == user
    assert host.file(f"{store.graphroot}/userns-storage").user == user
    (layer,) = store.mapped_layers()
    # Root of the namespace of a keep-id container is the first of the user's subordinate IDs.
    first = next(
        int(line.split(":")[1])
        for line in host.file("/etc/subuid").content_string.splitlines()
        if line.startswith(f"{user}:")
    )
    assert host.file(f"{store.graphroot}/overlay/{layer}/diff/bin").uid == first


def test_the_rootful_store_was_left_alone(host: t.Any) -> None:
    assert not host.file("/var/lib/containers/storage/userns-storage").exists


@pytest.mark.parametrize("user", USERS)
def test_systemd_takes_the_units_of_each_user(
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
    done = host.run(
        f"env -C /etc/systemd/user XDG_RUNTIME_DIR=/run SYSTEMD_LOG_LEVEL=warning "
        f"systemd-analyze verify --user --man=no {' '.join(names)}"
    )
    assert (done.rc, done.stderr) == (0, "")
    assert host.file(f"/var/lib/systemd/linger/{user}").exists
    # Nothing of it lies in the home.
    assert not host.file(f"{account.home}/.config/systemd").exists


@pytest.mark.parametrize("user", USERS)
def test_the_user_may_run_the_service(
    host: t.Any, store_of: t.Callable[[str], t.Any], user: str
) -> None:
    store = store_of(user)
    before = store.mapped_layers()
    program = "/usr/local/libexec/userns-storage/userns-storage.pyz"
    done = host.run(
        f"env -C / HOME={store.account.home} XDG_RUNTIME_DIR=/run/user/{store.account.uid} "
        f"runuser -u {user} -- /usr/bin/python3 {program} ready /etc/userns-storage/ready/{user}.json"
    )
    assert (done.rc, done.stdout, done.stderr) == (0, "", "")
    assert store.mapped_layers() == before
