# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The readers of untrusted data as functions of bytes, which return a result or raise an error of this collection."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import struct
import typing as t

from ansible.errors import AnsibleFilterError
from ansible_collections.userns.storage.plugins.filter import mappings, unit_mapping
from ansible_collections.userns.storage.plugins.filter import storage_conf as storage_conf_filter
from ansible_collections.userns.storage.plugins.module_utils._storage.capabilities import (
    capabilities,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.errors import StorageError
from ansible_collections.userns.storage.plugins.module_utils._storage.idmap.grammar import (
    UsernsContext,
    parse_map_flags,
    parse_request,
    parse_userns,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.idmap.mapping import (
    Mapping,
    Shift,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.idmap.ranges import IDMap
from ansible_collections.userns.storage.plugins.module_utils._storage.operations import (
    gc_policy,
    inventory_results,
    results,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.store import (
    ledger,
    libpod_db,
    records,
    toml,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.store.config import (
    Account,
    StoreOverrides,
    discover,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.store.snapshot import Snapshot
from ansible_collections.userns.storage.plugins.module_utils._storage.tree import owners
from ansible_collections.userns.storage.plugins.module_utils._storage.userns import channel

_ALICE = Account("alice", 1000, 1000, "/nowhere")
_CONTEXTS = tuple(
    UsernsContext(
        rootless=rootless,
        uid=1000 if rootless else 0,
        gid=1000 if rootless else 0,
        available=Mapping(IDMap.parse(["0:0:65537"]), IDMap.parse(["0:0:65537"])),
    )
    for rootless in (True, False)
)


def store_records(data: bytes, _folder: pathlib.Path) -> None:
    """The three files of records, separated by a line, and all queries on them."""
    parts = [*data.split(b"\n#\n"), b"", b"", b""]
    layers = records.parse(parts[0], records.Layer, "layers.json")
    images = records.parse(parts[1], records.Image, "images.json")
    containers = records.parse(parts[2], records.Container, "containers.json")
    snapshot = Snapshot(
        {item.id: item for item in layers},
        {item.id: item for item in images},
        {item.id: item for item in containers},
    )
    for layer in layers:
        with contextlib.suppress(StorageError):
            snapshot.chain(layer.id)
        snapshot.children(layer.id)
        snapshot.containers_on(layer.id)
        snapshot.images_of_layer(layer.id)
        json.dumps([layer.created, layer.diff_size, layer.uidset, layer.names], default=str)
        str(layer.mapping)
    for image in images:
        for name in (image.id[:4], *image.names[:3], *image.digests[:3]):
            with contextlib.suppress(StorageError):
                snapshot.resolve_image(name)
    for container in containers:
        str((container.name, container.podman_name, container.created))
    reread = records.parse(records.serialise(layers), records.Layer, "layers.json")
    if [item.raw for item in reread] != [item.raw for item in layers]:
        raise AssertionError("writing and reading changes records")


def storage_conf(data: bytes, folder: pathlib.Path) -> None:
    """A storage.conf."""
    with contextlib.suppress(StorageError):
        toml.loads(data, "storage.conf")
    path = folder / "storage.conf"
    path.write_bytes(data)
    for storage in ((1, 43), (1, 62), (1, 64)):
        can = capabilities("podman", (5, 0), storage)
        with contextlib.suppress(StorageError):
            discover(StoreOverrides(storage_conf=str(path)), {}, _ALICE, True, can)


def grammar(data: bytes, _folder: pathlib.Path) -> None:
    """--userns, --uidmap and the plain maps."""
    text = data.decode("utf-8", "surrogateescape")
    for context in _CONTEXTS:
        for options in ({"userns": text}, {"uidmap": text.split(",")}):
            with contextlib.suppress(StorageError):
                found = parse_request(**options).resolve(context)
                found.uid.normal().validate()
    with contextlib.suppress(StorageError):
        parse_userns(text)
    with contextlib.suppress(StorageError):
        parse_map_flags(text.split(","))
    IDMap.parse(text.split(",")).validate()


def attributes(data: bytes, _folder: pathlib.Path) -> None:
    """POSIX ACLs and file capabilities of untrusted files."""
    shift = Shift(
        Mapping(IDMap.parse(["0:0:65536"]), IDMap.parse(["0:0:65536"])),
        Mapping(IDMap.parse(["0:100000:65536"]), IDMap.parse(["0:100000:65536"])),
    )
    for name in owners.WITH_IDS:
        if len(owners.translate(name, data, shift)) != len(data):
            raise AssertionError(f"{name} changes its size")


def databases(data: bytes, folder: pathlib.Path) -> None:
    """podman's database and the ledger, as written by a user."""
    (folder / "libpod").mkdir(exist_ok=True)
    for name in ("libpod/bolt_state.db", "db.sql", "ledger.json"):
        (folder / name).write_bytes(data)
        if name == "ledger.json":
            ledger.Ledger(str(folder / name)).load()
        else:
            with contextlib.suppress(StorageError):
                libpod_db.recorded(str(folder), str(folder), False)
        (folder / name).unlink()
    # Random data does not match the checksum of bolt's first page.
    (folder / "libpod/bolt_state.db").write_bytes(_first_page() + data)
    libpod_db.recorded(str(folder), str(folder), False)
    (folder / "libpod/bolt_state.db").unlink()


_PAGE = 1024


def _first_page() -> bytes:
    """The first page of a bolt file whose next page is the root."""
    meta = struct.pack("<IIIIQQQQQ", 0xED0CDAED, 2, _PAGE, 0, 1, 0, 0, 2, 1)
    page = struct.pack("<QHHI", 0, 4, 0, 0) + meta + struct.pack("<Q", libpod_db._fnv(meta))
    return page.ljust(_PAGE, b"\0")


def _leaf(kind: int, key: bytes, value: bytes) -> bytes:
    """A page of bolt with a single entry."""
    entry = struct.pack("<IIII", kind, 16, len(key), len(value))
    return struct.pack("<QHHI", 1, 2, 1, 0) + entry + key + value


def answers(data: bytes, _folder: pathlib.Path) -> None:
    """Messages from a process in a user's namespace, of each kind."""
    for form in (
        inventory_results.INFO,
        results.TEMPLATE,
        inventory_results.GC,
        inventory_results.IMAGES_REMOVED,
    ):
        with contextlib.suppress(channel.BadMessage):
            channel.decode(data, form)
    for kind in b"EPUFX":
        with contextlib.suppress(channel.BadMessage):
            message = channel.decode_message(bytes((kind,)), data)
            if kind == b"E"[0]:
                str(channel.rebuilt_error(message))


def policies(data: bytes, _folder: pathlib.Path) -> None:
    """Ages, times and sizes."""
    text = data.decode("utf-8", "surrogateescape")
    for read in (
        lambda: gc_policy.moment("option", text, 1e9),
        lambda: gc_policy.size("option", text),
        lambda: gc_policy.amount("option", text).of(10**12),
    ):
        with contextlib.suppress(StorageError):
            read()


def units(data: bytes, _folder: pathlib.Path) -> None:
    """Units of systemd and manifests of Kubernetes, alone and with a pod."""
    text = data.decode("utf-8", "surrogateescape")
    for given in (text, {"a.container": text, "b.pod": "[Pod]\nUserNS=auto\n", "c.yaml": text}):
        with contextlib.suppress(AnsibleFilterError):
            unit_mapping.unit_mapping(given)


def survey_answers(data: bytes, _folder: pathlib.Path) -> None:
    """Answers of surveys, and settings for a storage.conf."""
    text = data.decode("utf-8", "surrogateescape")
    for read_text in (
        mappings.mappings,
        lambda item: storage_conf_filter.storage_conf(item, item),
    ):
        with contextlib.suppress(AnsibleFilterError):
            read_text(text)


READERS: t.Mapping[str, t.Callable[[bytes, pathlib.Path], None]] = {
    item.__name__: item
    for item in (
        *(store_records, storage_conf, grammar, attributes, databases, answers, policies),
        *(units, survey_answers),
    )
}

_ID, _OTHER = "a" * 64, "b" * 64
# Valid inputs of the readers, as seeds.
SEEDS: t.Mapping[str, t.Sequence[bytes]] = {
    "store_records": [
        b"\n#\n".join(
            json.dumps(item).encode()
            for item in (
                [
                    {
                        "id": _ID,
                        "created": "2026-01-02T03:04:05.1Z",
                        "diff-size": 1,
                        "uidset": [0, 1],
                        "flags": {"incomplete": True},
                        "uidmap": [{"container_id": 0, "host_id": 1, "size": 2}],
                    },
                    {"id": _OTHER, "parent": _ID, "names": ["x"]},
                ],
                [{"id": _ID, "layer": _OTHER, "names": ["localhost/a:1"], "mapped-layers": [_ID]}],
                [{"id": _ID, "image": _ID, "layer": _OTHER, "metadata": '{"name":"x"}'}],
            )
        )
    ],
    "storage_conf": [
        b'[storage]\ndriver = "overlay"\ngraphroot = "/x/$UID"\nrunroot = \'/r\'\n'
        b'[storage.options]\nadditionalimagestores = ["/a", "/b"]\n'
        b'[storage.options.overlay]\nmountopt = "nodev,metacopy=on"\n',
    ],
    "grammar": [b"keep-id:uid=1,gid=2,size=3", b"+u0:@1000:1", b"0:100000:65536,70000:1:1"],
    "attributes": [b"\x02\0\0\0" + b"\x02\0\x07\0\xe8\x03\0\0", b"\1\0\0\3" + b"\0" * 20],
    "databases": [
        b"SQLite format 3\0" + b"\0" * 100,
        _leaf(1, b"runtime-config", b"\0" * 16 + _leaf(0, b"graph-root", b"/g")),
        struct.pack("<QHHIIIQ", 1, 1, 1, 0, 0, 0, 1),
    ],
    "units": [
        b"[Unit]\nA=b\n[Container]\nImage=a.example/b:1\nUserNS=keep-id:uid=1\nUIDMap=0:1:2 \\\n3:4:5\n"
        b"PodmanArgs=--uidmap 0:1:2 '--gidmap=0:1:2'\nPod=b.pod\n",
        b"[Pod]\nRemapUsers=manual\nRemapUid=0:1:2\nRemapGid=0:1:2\n[Kube]\nYaml=c.yaml\n",
        b"kind: Pod\nspec:\n  hostUsers: false\n  containers:\n  - image: a.example/b:1\n",
    ],
    "survey_answers": [
        b"keep-id\nauto:size=4096 slots=3\n0:1:2/0:3:4\n",
        b'[storage]\ndriver = "overlay"\noverlay.mountopt=nodev\n',
    ],
    "answers": [
        b'{"kind":"LayerInUse","subject":"a","cause":"b","hint":"c","facts":{"users":[{"id":"x","name":"y"}]}}',
        b'{"moved":true,"step":"reading /a/\\udcff"}',
        b'{"changed":false,"images":[],"actions":[],"removed_layers":[],"store":{}}',
    ],
    "policies": [b"10m", b"1.5GiB", b"20%", b"2026-01-02T03:04:05Z"],
}


def read(name: str, data: bytes, folder: pathlib.Path) -> None:
    """Run a reader; an error of this collection is valid if its message can be formatted.

    :raises Exception: any other exception is a bug
    """
    try:
        READERS[name](data, folder)
    except StorageError as error:
        json.dumps({"msg": str(error), **error.facts}, default=os.fsdecode)
        str(error).encode("utf-8", "surrogateescape")
