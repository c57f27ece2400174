# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Write a large store of the overlay driver in the format of runtimes, and run image_layers_info on it."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import pathlib
import typing as t

from .lab import Lab
from .stores import Store

Json = t.Dict[str, t.Any]

# Layers of an image including its mapped layers, and the number of its mapped layers.
DEEP, MAPPED = 50, 5
DIGEST = "sha256:" + "e" * 64


def layer_id(image: int, number: int, kind: str = "a") -> str:
    return f"{kind}{image:05x}{number:05x}".ljust(64, "0")


def link(name: str) -> str:
    """The short name of a layer: 26 letters and digits."""
    return base64.b32encode(hashlib.sha256(name.encode()).digest()).decode()[:26]


def populate(store: Store, count: int) -> None:
    """Write `count` images as a runtime would, with a tree of a single file for each layer.

    The store must be new and use the overlay driver.
    """
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
            (folder / "lower").write_text(":".join(f"l/{link(lower)}" for lower in lowers))
        (home / "l" / link(name)).symlink_to(f"../{name}/diff")

    for image in range(count):
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
    assert len(layers) == count * DEEP


# Runs in a process that has imported everything, like the process of a module.
_GATHER = """
import json, resource, sys, time
from ansible_collections.userns.storage.plugins.module_utils._storage.userns import running as userns
from ansible_collections.userns.storage.plugins.module_utils._storage.operations import image_layers_info
from ansible_collections.userns.storage.plugins.module_utils._storage.operations.store_opening import StoreRequest

def processor():
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)

called = 0

def note(_frame, event, _argument):
    global called
    called += event in ("call", "c_call")

store = json.loads(sys.argv[1])
before = processor()
started = time.perf_counter()
request = image_layers_info.InfoRequest(store=StoreRequest(**store), measure="none")
if sys.argv[2:]:
    # In this process, because calls of a child would not be counted.
    sys.setprofile(note)
    result = image_layers_info.info(request)
    sys.setprofile(None)
else:
    result = userns.run(image_layers_info.info, (request,), None)
print(json.dumps({
    "seconds": time.perf_counter() - started,
    "processor": processor() - before,
    "calls": called,
    "images": len(result["images"]),
    "layers": sum(len(image["layers"]) for image in result["images"]),
    "mapped": sum(len(image["mapped_layers"]) for image in result["images"]),
    "bad": [m["problem"] for image in result["images"] for m in image["layers"] + image["mapped_layers"]
            if m["status"] != "ok"][:3],
    "orphans": len(result["orphans"]),
}))
"""


def gather(
    lab: Lab, store: Store, *, before: t.Sequence[str] = (), count_calls: bool = False
) -> Json:
    """Run image_layers_info on a store in a process of the system's Python.

    :param before: arguments before the command, such as strace with its options
    :param count_calls: count the called functions; the seconds are then not meaningful
    :returns: ``seconds``, ``processor`` (seconds), ``calls``; the numbers of ``images``, ``layers``, ``mapped``
        layers and ``orphans``; and ``bad``, the problems of up to three layers
    """
    options = json.dumps(
        {
            "graphroot": str(store.graphroot),
            "runroot": str(store.runroot),
            "driver": store.driver,
        }
    )
    command = [
        *before,
        "/usr/bin/python3",
        "-c",
        _GATHER,
        options,
        *(["count"] if count_calls else []),
    ]
    done = store.machine.run(command, env={"PYTHONPATH": str(lab.tree)})
    found: Json = json.loads(done.stdout)
    return found
