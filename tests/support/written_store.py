# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Write a user's vfs store with content that no runtime writes, and run the operations of all modules on it.

The functions also run in the user's namespace.
"""

from __future__ import annotations

import base64
import json
import os
import pathlib
import shutil
import sqlite3
import typing as t

from ansible_collections.userns.storage.plugins.module_utils._storage.errors import StorageError
from ansible_collections.userns.storage.plugins.module_utils._storage.operations import (
    image_layers,
    image_layers_info,
    layer_gc,
    layer_template,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.operations.mapping_options import (
    MappingOptions,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.operations.store_opening import (
    StoreRequest,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.userns.channel import (
    decode,
    encode,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.userns.declared import form_of

Json = t.Dict[str, t.Any]

IMAGE, TOP, BASE, MAPPED, OWN, CONTAINER = (letter * 64 for letter in "abcdef")
_CONFIG = "=" + base64.b64encode(f"sha256:{IMAGE}".encode()).decode()
_RUNTIME = "podman 5.4.2"

# All paths that are opened by name and that a user can change, relative to the graph root; that of storage.conf is
# relative to the home. New paths must be added here, because test_obstacles.py replaces each path with obstacles.
OPENED_PATHS: t.Mapping[str, str] = {
    "storage.conf": "~/.config/containers/storage.conf",
    "podman's database (SQLite)": "db.sql",
    "its journal": "db.sql-wal",
    "podman's database (bolt)": "libpod/bolt_state.db",
    "records of layers": "vfs-layers/layers.json",
    "records of layers, volatile": "vfs-layers/volatile-layers.json",
    "lock of layers": "vfs-layers/layers.lock",
    "records of images": "vfs-images/images.json",
    "lock of images": "vfs-images/images.lock",
    "records of containers": "vfs-containers/containers.json",
    "lock of containers": "vfs-containers/containers.lock",
    "an image's configuration": f"vfs-images/{IMAGE}/{_CONFIG}",
    "an image's passwd": f"vfs/dir/{TOP}/etc/passwd",
    "an image's group": f"vfs/dir/{TOP}/etc/group",
    "a layer's tar-split": f"vfs-layers/{TOP}.tar-split.gz",
    "a layer's folder": f"vfs/dir/{TOP}",
    "a mapped layer's folder": f"vfs/dir/{MAPPED}",
    "folder of layers": "vfs/dir",
    "our folder": "userns-storage",
    "our lock": "userns-storage/lock",
    "our ledger": "userns-storage/ledger.json",
    "our half-written ledger": "userns-storage/ledger.json.tmp",
    "our staging folder": "userns-storage/staging",
    "a note of work": "userns-storage/staging/work/work.json",
    "a note of suspended work": "userns-storage/staging/work/suspended",
    "our trash": "userns-storage/trash",
    "a note of a removal": "userns-storage/trash/orphan-1/removal.json",
}


def records() -> t.Dict[str, t.List[Json]]:
    """The records of an image with a base layer and a mapped layer, and of a container on the mapped layer."""
    maps = {
        kind: [{"container_id": 0, "host_id": 1, "size": 65536}] for kind in ("uidmap", "gidmap")
    }
    made = {"created": "2026-01-02T03:04:05.123456789Z", "diff-size": 10}
    return {
        "layers": [
            {"id": BASE, **made},
            {"id": TOP, "parent": BASE, "uidset": [0], "gidset": [0], **made},
            {"id": MAPPED, "parent": BASE, **made, **maps},
            {"id": OWN, "parent": MAPPED, **made, **maps},
        ],
        "images": [
            {
                "id": IMAGE,
                "names": ["localhost/a:1"],
                "layer": TOP,
                "mapped-layers": [MAPPED],
                "created": made["created"],
                "metadata": "{}",
                "big-data-names": [f"sha256:{IMAGE}"],
                "big-data-sizes": {f"sha256:{IMAGE}": 2},
            }
        ],
        "containers": [
            {
                "id": CONTAINER,
                "names": ["db"],
                "image": IMAGE,
                "layer": OWN,
                "metadata": '{"name":"db"}',
                "created": made["created"],
                **maps,
            }
        ],
    }


def write(
    home: str,
    changed: t.Optional[t.Mapping[str, t.Any]] = None,
    files: t.Optional[t.Mapping[str, bytes]] = None,
) -> StoreRequest:
    """Write a store into a folder.

    :param home: a folder that is emptied first; the store is in its subfolder ``storage``
    :param changed: records that replace those of :func:`records`, by kind
    :param files: further files, by path below the graph root
    """
    root = os.path.join(home, "storage")
    shutil.rmtree(home, ignore_errors=True)
    for folder in (
        *(f"vfs/dir/{item}/etc" for item in (BASE, TOP, MAPPED, OWN)),
        f"vfs-images/{IMAGE}",
        *("vfs-layers", "vfs-containers", "libpod", "userns-storage/staging/work"),
        "userns-storage/trash/orphan-1",
        "../.config/containers",
    ):
        os.makedirs(os.path.join(root, folder), exist_ok=True)
    found: t.Dict[str, bytes] = {"storage.lock": b"", "userns-storage/lock": b""}
    for kind, entries in {**records(), **(changed or {})}.items():
        text = entries if isinstance(entries, bytes) else json.dumps(entries).encode("ascii")
        found[f"vfs-{kind}/{kind}.json"] = text
        found[f"vfs-{kind}/{kind}.lock"] = b""
    found[f"vfs-images/{IMAGE}/{_CONFIG}"] = b'{"config":{"User":"app"}}'
    found[f"vfs/dir/{TOP}/etc/passwd"] = b"root:x:0:0::/:/bin/sh\napp:x:1000:1000::/:/bin/sh\n"
    found[f"vfs/dir/{TOP}/etc/group"] = b"app:x:1000:\n"
    found["../.config/containers/storage.conf"] = (
        f'[storage]\ndriver = "vfs"\ngraphroot = "{root}"\nrunroot = "{home}/run"\n'.encode()
    )
    for path, data in {**found, **(files or {})}.items():
        pathlib.Path(root, path).write_bytes(data)
    return StoreRequest(
        storage_conf=os.path.join(home, ".config/containers/storage.conf"), lock_timeout=0.2
    )


def write_database(path: str, statements: t.Iterable[str]) -> None:
    """Write an SQLite database."""
    with sqlite3.connect(path) as connection:
        for statement in statements:
            connection.execute(statement)
    connection.close()


def run_all_operations(store: StoreRequest, check: bool = False) -> t.List[str]:
    """Run the operations of all modules; returns "done" or the class name of the error for each operation.

    :raises Exception: an error that is not a StorageError, or a result that the receiver does not accept
    """
    namespaces = (
        MappingOptions("auto", runtime=_RUNTIME),
        MappingOptions("keep-id", runtime=_RUNTIME),
    )
    operations: t.Sequence[t.Tuple[t.Callable[..., t.Any], t.Any]] = (
        (image_layers_info.info, image_layers_info.InfoRequest(store, measure="exclusive")),
        (
            layer_template.declare,
            layer_template.TemplateRequest(
                store, ("localhost/a:1",), namespaces, check=True, force=True
            ),
        ),
        (
            layer_gc.collect,
            layer_gc.GcRequest(
                store,
                {
                    "min_age": "0",
                    "max_copies_per_image": 0,
                    "unused_for": "1w",
                    "created_before": "2025-01-01",
                    "orphans": "remove",
                    "broken": "repair",
                },
                check=check,
            ),
        ),
        (image_layers.look, image_layers._Step(store, ("localhost/a:1",))),
        (image_layers.report, image_layers._Step(store, ("localhost/a:1",), "apparent", not check)),
        (image_layers.remove, image_layers._Step(store, ("localhost/a:1",), write=False)),
    )
    found = []
    for operation, request in operations:
        try:
            decode(encode(operation(request)), form_of(operation))
            found.append("done")
        except StorageError as error:
            encode(str(error))
            found.append(type(error).__name__)
    return found
