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
        assert all(one[0] + one[1] <= other[0] for one, other in zip(ranges, ranges[1:]))


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
