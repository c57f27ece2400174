# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Artificial fleets: the data that the role report would collect from this many hosts, in the format of the modules."""

from __future__ import annotations

import random
import typing as t

Json = t.Dict[str, t.Any]

MIB = 1 << 20
_IMAGES = (
    ("docker.io/library/postgres:17", 438 * MIB),
    ("docker.io/library/redis:8", 137 * MIB),
    ("registry.example.org/ci/builder:2026-10", 1730 * MIB),
    ("registry.example.org/desktop/toolbox:latest", 962 * MIB),
    ("quay.io/prometheus/node-exporter:v1.9.1", 26 * MIB),
    ("ghcr.io/example/web/frontend-with-a-rather-long-name:sha-3f9c2d1", 211 * MIB),
)
_USERS = ("root", "alice", "runner")


def hostvars(count: int, seed: int = 1) -> t.Dict[str, Json]:
    """Variables of `count` hosts; of every 25, one is unreachable, one fails and one has incomplete data."""
    random_source = random.Random(seed)
    found: t.Dict[str, Json] = {}
    for number in range(count):
        name = f"node{number:03d}.example.org"
        if number % 25 == 1 and count > 2:
            found[name] = {
                "report_reached": {
                    "unreachable": True,
                    "msg": f"Failed to connect to the host via ssh: connect to host {name} port 22: No route to host",
                }
            }
        elif number % 25 == 7:
            found[name] = {
                "report_reached": {"failed": True},
                "report_error": "The module interpreter '/usr/bin/python3' was not found.",
            }
        else:
            users = _USERS[: random_source.randint(1, 3)]
            found[name] = _host(users, random_source, broken=number % 25 == 13)
    return found


def _host(users: t.Sequence[str], random_source: random.Random, broken: bool) -> Json:
    stores = {user: _store(user, random_source) for user in users}
    found = [entry for entry, _gc in stores.values()]
    if broken:
        found[-1] = {
            "report_store": users[-1],
            "failed": False,
            "msg": "/home/alice/.local/share/containers/storage/overlay-layers/layers.json: record 3: "
            "field uidmap is no list. Restore the file from a backup.",
        }
    missing = [
        {
            "user": user,
            "image_names": ["registry.example.org/desktop/toolbox:latest"],
            "image_id": "a" * 64,
            "uidmap": ["0:1:1000", "1000:0:1", "1001:1001:64536"],
            "gidmap": ["0:1:1000", "1000:0:1", "1001:1001:64536"],
            "action": random_source.choice(["created", "existing", "not_needed"]),
            "reason": "No layer with this map is there, and the overlay driver cannot shift IDs for rootless users.",
            "size_apparent": 962 * MIB,
        }
        for user in users
    ]
    return {
        "report_reached": {"ping": "pong"},
        "report_found": {"results": found},
        "prune_collected": {
            "results": [gc for user, (_e, gc) in stores.items() if not broken or user != users[-1]]
        },
        "prepare_made": {"layers": missing},
    }


def _store(user: str, random_source: random.Random) -> t.Tuple[Json, Json]:
    images: t.List[Json] = []
    removed = []
    for name, size in random_source.sample(_IMAGES, random_source.randint(2, len(_IMAGES))):
        mapped = []
        for number in range(random_source.choice([0, 1, 1, 2, 4])):
            layer = _layer(size // 9, size, f"0:{100000 + 65536 * number}:65536", random_source)
            mapped.append(layer)
            if number:
                removed.append(
                    {
                        "id": layer["id"],
                        "image_names": [name],
                        "image_ids": ["b" * 64],
                        "uidmap": layer["uidmap"],
                        "gidmap": layer["gidmap"],
                        "size": layer["size_exclusive"],
                        "reason": "not seen in use for 4 weeks, last on 2026-09-01T12:00:00Z",
                    }
                )
            else:
                layer["containers"] = [{"name": "db", "id": "c", "known_to_podman": True}]
        image: Json = {"id": "b" * 64, "names": [name], "mapped_layers": mapped}
        if user != "root" and "toolbox" in name:
            # Pulled with the map of keep-id containers; others have a copy.
            image["uidmap"] = image["gidmap"] = ["0:1:1000", "1000:0:1", "1001:1001:64536"]
            if mapped:
                mapped[0]["uidmap"] = mapped[0]["gidmap"] = []
                image["identity_copy"] = mapped[0]["id"]
        image["layers"] = [_layer(size, size, "", random_source)]
        images.append(image)
    layers = [item for image in images for item in (*image["layers"], *image["mapped_layers"])]
    mapped = [item for image in images for item in image["mapped_layers"]]
    entry = {
        "report_store": user,
        "images": images,
        "orphans": [],
        "totals": {**_sums(layers), "mapped": {"layers": len(mapped), **_sums(mapped)}},
        "store": {
            "graphroot": "/var/lib/containers/storage"
            if user == "root"
            else f"/home/{user}/.local/share/containers/storage",
            "driver": "overlay",
            "backing_filesystem": random_source.choice(["ext4", "xfs"]),
        },
    }
    gc = {
        "prune_store": user,
        "removed": removed,
        "kept": [],
        "notes": [],
        "would_free": [],
        "space_reclaimed": sum(item["size"] for item in removed),
    }
    return entry, gc


def _layer(recorded: int, size: int, ids: str, random_source: random.Random) -> Json:
    return {
        "id": f"{random_source.getrandbits(256):064x}",
        "uidmap": [ids] if ids else [],
        "gidmap": [ids] if ids else [],
        "recorded_size": recorded,
        "size_apparent": size,
        "size_exclusive": int(size * random_source.uniform(0.9, 1.1)),
        "inodes": size // 30000,
        "status": "ok",
        "problem": None,
        "containers": [],
        "last_used": None,
        "origin": "runtime",
    }


def _sums(layers: t.Sequence[Json]) -> Json:
    return {
        "recorded": sum(layer["recorded_size"] for layer in layers),
        "apparent": sum(layer["size_apparent"] for layer in layers),
        "exclusive": sum(layer["size_exclusive"] for layer in layers),
        "inodes": sum(layer["inodes"] for layer in layers),
    }
