# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A large store: 200 images, 10,000 layers and 1,000 mapped layers, gathered in time."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import pathlib
import resource
import time
import typing as t

import pytest
from support.lab import Lab
from support.stores import Store

MakeStore = t.Callable[..., Store]
RunModule = t.Callable[..., t.Dict[str, t.Any]]
Json = t.Dict[str, t.Any]

IMAGES, DEEP, MAPPED = 200, 50, 5
DIGEST = "sha256:" + "e" * 64


def layer_id(image: int, number: int, kind: str = "a") -> str:
    return f"{kind}{image:05x}{number:05x}".ljust(64, "0")


def link(name: str) -> str:
    """26 letters and digits that stand for a layer."""
    return base64.b32encode(hashlib.sha256(name.encode()).digest()).decode()[:26]


def populate(store: Store) -> None:
    """Write what a runtime would have written, with a tree of one file for each layer."""
    root = pathlib.Path(store.graphroot)
    home = root / "overlay"
    layers: t.List[Json] = []
    images: t.List[Json] = []

    def add(name: str, parent: str, lowers: t.List[str], mapping: t.Optional[Json]) -> None:
        record: Json = {
            "id": name,
            "created": "2026-01-01T00:00:00Z",
            "compressed-diff-digest": DIGEST,
            "compressed-size": 1000,
            "diff-digest": DIGEST,
            "diff-size": 2048,
            "compression": 2,
            "uidset": [0, 1000],
            "gidset": [0, 1000],
        }
        if parent:
            record["parent"] = parent
        if mapping:
            record["uidmap"] = record["gidmap"] = [mapping]
        layers.append(record)
        folder = home / name
        (folder / "diff").mkdir(parents=True)
        (folder / "work").mkdir()
        (folder / "link").write_text(link(name))
        (folder / "diff" / "file").touch()
        if mapping:
            os.chown(folder / "diff", mapping["host_id"], mapping["host_id"])
            for path in [*(folder / "diff").iterdir()]:
                os.chown(path, mapping["host_id"], mapping["host_id"])
        if lowers:
            (folder / "lower").write_text(":".join(f"l/{link(one)}" for one in lowers))
        (home / "l" / link(name)).symlink_to(f"../{name}/diff")

    for image in range(IMAGES):
        chain: t.List[str] = []
        for number in range(DEEP - MAPPED):
            name = layer_id(image, number)
            add(name, chain[0] if chain else "", chain, None)
            chain.insert(0, name)
        mapped = []
        for number in range(MAPPED):
            name = layer_id(image, number, "b")
            base = 100_000 + 65_536 * number
            add(name, chain[1], chain, {"container_id": 0, "host_id": base, "size": 65_536})
            mapped.append(name)
        images.append(
            {
                "id": layer_id(image, 0, "c"),
                "names": [f"localhost/app{image}:latest"],
                "layer": chain[0],
                "mapped-layers": mapped,
                "created": "2026-01-01T00:00:00Z",
            }
        )
    for kind, records in (("layers", layers), ("images", images)):
        path = root / f"overlay-{kind}" / f"{kind}.json"
        path.write_text(json.dumps(records))
        path.chmod(0o600)
    assert len(layers) == IMAGES * DEEP


# Inside the process that has imported everything, as a module's has.
GATHER = """
import json, resource, sys, time
from ansible_collections.userns.storage.plugins.module_utils._storage import userns
from ansible_collections.userns.storage.plugins.module_utils._storage.operations import inventory
from ansible_collections.userns.storage.plugins.module_utils._storage.operations.opening import StoreRequest

def processor():
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)

place = json.loads(sys.argv[1])
before = processor()
started = time.perf_counter()
request = inventory.InfoRequest(store=StoreRequest(**place), measure="none")
result = userns.run(inventory.info, (request,), None)
print(json.dumps({
    "seconds": time.perf_counter() - started,
    "processor": processor() - before,
    "images": len(result["images"]),
    "layers": sum(len(one["layers"]) for one in result["images"]),
    "mapped": sum(len(one["mapped_layers"]) for one in result["images"]),
    "bad": [m["problem"] for one in result["images"] for m in one["layers"] + one["mapped_layers"]
            if m["status"] != "ok"][:3],
    "orphans": len(result["orphans"]),
}))
"""


@pytest.mark.timing
def test_gathering_keeps_up_with_listing_the_layers(lab: Lab, make_store: MakeStore) -> None:
    store = make_store("overlay-forced")
    store.podman("images")
    populate(store)
    place = json.dumps(
        {
            "graphroot": str(store.graphroot),
            "runroot": str(store.runroot),
            "driver": store.driver,
        }
    )

    def gather() -> Json:
        done = lab.machine.run(
            ["/usr/bin/python3", "-c", GATHER, place], env={"PYTHONPATH": str(lab.tree)}
        )
        found: Json = json.loads(done.stdout)
        return found

    def list_layers() -> t.Tuple[float, float]:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        started = time.perf_counter()
        done = store.storage_cli("layers", "--json")
        seconds = time.perf_counter() - started
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert len(json.loads(done.stdout)) == IMAGES * DEEP
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return seconds, used

    theirs, ours = [], []
    for _round in range(5):
        theirs.append(list_layers())
        ours.append(gather())
    found = ours[0]
    assert (found["images"], found["layers"], found["mapped"]) == (200, 9000, 1000)
    assert found["bad"] == []
    assert found["orphans"] == 0
    seconds, processor = (min(one[key] for one in ours) for key in ("seconds", "processor"))
    their_seconds, their_processor = map(min, zip(*theirs))
    print(f"ours {seconds:.3f} s, of a processor {processor:.3f} s")
    print(f"containers-storage layers --json {their_seconds:.3f} s, {their_processor:.3f} s")
    assert processor < their_processor
    # Go works on all processors at once, we on one: the clock may show no difference.
    assert seconds < 1.25 * their_seconds
