# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Hosts of four Debian releases after the plays of the scenario."""

from __future__ import annotations

import typing as t

VERSIONS = {"debian12": "4.3", "debian13": "5.4", "debiansid": "5.", "debianexperimental": "6."}


def test_podman_version_matches_release(host: t.Any, store: t.Any) -> None:
    name = host.backend.get_pytest_id().partition("://")[2]
    assert store.podman("--version").split()[-1].startswith(VERSIONS[name])


def test_rootful_store_needs_no_mapped_layers(store: t.Any) -> None:
    assert store.driver == "overlay"
    assert store.mapped_layers() == {}
    options = ("--uidmap=0:100000:65536", "--gidmap=0:100000:65536")
    assert store.run_without_copy(*options) == ["0:100000:65536"]


def test_keep_id_container_starts_without_copy(store_of: t.Callable[[str], t.Any]) -> None:
    store = store_of("alice")
    assert store.driver == "overlay"
    ((uidmap, _gidmap),) = store.mapped_layers().values()
    assert store.run_without_copy("--userns=keep-id") == uidmap
