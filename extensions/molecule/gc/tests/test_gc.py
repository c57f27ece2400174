# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The rootful store after garbage collection: only the mapped layer in use remains."""

from __future__ import annotations

import typing as t

UIDMAP_IN_USE = "0:200000:65536"


def test_only_layer_in_use_remains(host: t.Any, store: t.Any) -> None:
    ((layer, (uidmap, _gidmap)),) = store.mapped_layers().items()
    assert uidmap == [UIDMAP_IN_USE]
    assert host.file(f"{store.graphroot}/vfs/dir/{layer}").is_directory


def test_podman_reports_images_and_disk_usage(store: t.Any) -> None:
    assert "localhost/app" in store.podman("images -a")
    store.podman("system df -v")


def test_container_starts(store: t.Any) -> None:
    store.podman("start --attach user")
    assert ":".join(store.podman("logs --tail=1 user").split()) == UIDMAP_IN_USE


def test_staging_and_trash_are_empty(host: t.Any, store: t.Any) -> None:
    for name in ("staging", "trash"):
        assert host.file(f"{store.graphroot}/userns-storage/{name}").listdir() == []
