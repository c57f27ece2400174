# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Test that image references are completed, refused and resolved as by podman."""

from __future__ import annotations

import json
import random
import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.errors import (
    ConfigError,
    ImageAmbiguous,
    ImageUnknown,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.store import references
from ansible_collections.userns.storage.plugins.module_utils._storage.store.records import (
    Image as Record,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.store.records import parse
from ansible_collections.userns.storage.plugins.module_utils._storage.store.snapshot import Snapshot
from support import images
from support.hosts import Host
from support.lab import Lab
from support.stores import Store

LONG = "a" * 128
NAMES = (
    *("redis", "redis:8", "library/redis", "org/redis", "a/b/c/d:1", "docker.io/redis", "docker.io/redis:8"),
    *("docker.io/library/redis", "index.docker.io/redis", "index.docker.io/org/redis:1", "docker.io/a/b/c"),
    *("localhost/x", "localhost/x:1", "localhost:5000/x", "localhost:5000/x:1", "localhost", "localhost:5000"),
    *("quay.io/org/x", "quay.io:443/org/x:t", "a.b", "a.b:1", "host.example/x", "x.y/z:1", "127.0.0.1:5000/x"),
    *("Redis", "org/Redis", "localhost/Redis", "quay.io/Org/x", "QUAY.io/x", "Localhost/x", "docker.io/Redis"),
    *("x:", ":x", "x:a:b", "x/", "/x", "x//y", "", " ", "x y", "x:1 ", "x\t", "-x", "x-", "x--y", "x__y", "x___y"),
    *("x.y", "x..y", "x._y", "_x", "x_", "x-.y", "x.-y", "x:-1", "x:.1", "x:_1", "x:1-", "x:A", "x:ä", "ä", "x:1+2"),
    *(f"x:{LONG}", f"x:{LONG}a", f"localhost/{'a' * 245}", f"localhost/{'a' * 246}", f"localhost/{'a' * 247}"),
    *("a" * 63, "a" * 64, "A" * 64, f"localhost/{'a' * 64}", f"{'a' * 64}:1", f"x/{'b' * 64}", "sha256", "deadbeef"),
    *("quay.io", "quay.io:1", "quay-.io/x", "-quay.io/x", "quay..io/x", "q_y.io/x", "quay.io:/x", "quay.io:a/x"),
    *(".io/x", "a:5/x:1", "a:5/b/c", "docker.io/x:latest", "docker.io:443/x", "x@y", "[::1]:5000/x", "x&y", "x%20y"),
)  # fmt: skip


def names() -> t.List[str]:
    """The fixed names, and random names from parts with a meaning."""
    generator = random.Random(5)
    pieces = (
        "a",
        "b1",
        "redis",
        "library",
        "docker.io",
        "localhost",
        "quay.io",
        ":",
        "/",
        ".",
        "-",
        "_",
        "__",
        "8",
        "A",
        ":5",
    )
    random_names = [
        "".join(generator.choices(pieces, k=generator.randint(1, 6))) for _number in range(150)
    ]
    return list(dict.fromkeys([*NAMES, *random_names]))


@pytest.fixture(params=["own", "experimental"])
def store(
    request: pytest.FixtureRequest,
    lab: Lab,
    host: t.Callable[[str], Host],
    make_store: t.Callable[..., Store],
    small_image: images.Image,
) -> Store:
    """A store with one image, of the oldest and of the newest podman."""
    machine = None if request.param == "own" else host(request.param)
    return make_store("vfs", small_image, machine=machine)


def test_names_are_recorded_as_podman_records_them(store: Store, small_image: images.Image) -> None:
    image = store.image(small_image.name)["id"]
    accepted: t.Dict[str, str] = {}
    refused = []
    for name in names():
        try:
            accepted[name] = references.recorded(name, "localhost")
        except ConfigError:
            refused.append(name)
    assert len(accepted) > 60
    store.podman("tag", image, *accepted)
    assert set(store.image(image)["names"]) == {small_image.name, *accepted.values()}
    for name in refused:
        done = store.podman("tag", image, name, check=False)
        # podman parses a host with an underscore as the first part of a repository.
        assert done.rc != 0 or "_y.io/" in name, name


QUERIES = (
    *("redis", "redis:8", "docker.io/redis:8", "docker.io/library/redis:8", "library/redis:8"),
    *("index.docker.io/redis:8", "docker.io/other"),
    *("docker.io/redis", "localhost/redis:8", "x", "localhost/x", "org/x", "quay.io/org/x", "quay.io/x", "Redis:8"),
    *("docker.io/org/y:1", "org/y:1", "y:1", "localhost:5000/z", "localhost:5000/z:latest", "z", "5000/z", ""),
    *("app", "localhost/app", "docker.io/app", "docker.io/library/app", "app:latest", "redis:9", "redis:", "ghcr.io/x"),
)  # fmt: skip


def test_names_resolve_to_same_images_as_in_podman(store: Store, lab: Lab) -> None:
    recorded = (
        ("docker.io/library/redis:8", "docker.io/org/y:1"),
        ("localhost/x:latest", "localhost:5000/z:latest"),
        ("quay.io/org/x:latest", "localhost/app:latest"),
        ("docker.io/library/app:latest",),
    )
    for number, tags in enumerate(recorded):
        layers: t.List[t.Any] = [{"a": images.file(f"{number}")}]
        made = store.load(images.build(lab.folder(), layers, f"localhost/made:{number}"))
        store.podman("tag", made, *tags)
    records = parse(json.dumps(store.images()).encode(), Record, "images.json")
    snapshot = Snapshot(images={record.id: record for record in records})
    found = 0
    for query in QUERIES:
        done = store.podman("image", "inspect", "--format", "{{.Id}}", query, check=False)
        try:
            ours = snapshot.resolve_image(query).id
        except (ImageUnknown, ImageAmbiguous):
            ours = ""
        assert ours == done.stdout.strip(), query
        found += bool(ours)
    assert found > 15
