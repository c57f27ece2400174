# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Four hosts of four generations as the scenario's play has to leave them."""

from __future__ import annotations

import typing as t

VERSIONS = {"debian12": "4.3", "debian13": "5.4", "debiansid": "5.", "debianexperimental": "6."}


def test_podman_is_as_old_as_the_host(host: t.Any, store: t.Any) -> None:
    name = host.backend.get_pytest_id().partition("://")[2]
    assert store.podman("--version").split()[-1].startswith(VERSIONS[name])


def test_the_kernel_shifts_for_the_rootful_store(store: t.Any) -> None:
    assert store.driver == "overlay"
    assert store.mapped_layers() == {}
    options = ("--uidmap=0:100000:65536", "--gidmap=0:100000:65536")
    assert store.starts_without_a_copy(*options) == ["0:100000:65536"]


def test_keep_id_starts_without_a_copy(store_of: t.Callable[[str], t.Any]) -> None:
    store = store_of("alice")
    assert store.driver == "overlay"
    ((uidmap, _gidmap),) = store.mapped_layers().values()
    assert store.starts_without_a_copy("--userns=keep-id") == uidmap
