# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The store as the scenario's play has to leave it: what is in use, and nothing else."""

from __future__ import annotations

import typing as t

IN_USE = "0:200000:65536"


def test_only_the_layer_in_use_stays(host: t.Any, store: t.Any) -> None:
    ((layer, (uidmap, _gidmap)),) = store.mapped_layers().items()
    assert uidmap == [IN_USE]
    assert host.file(f"{store.graphroot}/vfs/dir/{layer}").is_directory


def test_podman_is_well(store: t.Any) -> None:
    assert "localhost/app" in store.podman("images -a")
    store.podman("system df -v")


def test_the_container_starts(store: t.Any) -> None:
    store.podman("start --attach user")
    assert ":".join(store.podman("logs --tail=1 user").split()) == IN_USE


def test_nothing_is_left_in_the_trash(host: t.Any, store: t.Any) -> None:
    for name in ("staging", "trash"):
        assert host.file(f"{store.graphroot}/userns-storage/{name}").listdir() == []
