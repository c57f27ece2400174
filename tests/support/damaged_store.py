# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Hand-made stores in the format of podman, and damage of any kind to their records."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import hashlib
import json
import os
import pathlib
import sqlite3
import struct
import time
import typing as t

from hypothesis import strategies as st

Json = t.Dict[str, t.Any]
KINDS = ("layers", "images", "containers")
FOLDERS = {"overlay": "overlay", "vfs": "vfs/dir", "btrfs": "btrfs/subvolumes"}
_BLOCK = 512
_CREATED = "2021-01-01T00:00:00Z"


def hex_id(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def short_name(name: str) -> str:
    return base64.b32encode(hashlib.sha256(name.encode()).digest()).decode()[:26]


def lock_token(moment: int) -> bytes:
    """The token in a lock file of a last write at that time (nanoseconds since the epoch)."""
    return struct.pack("<QQI", moment, 1, 1).ljust(64, b"r")


def id_map(start: int) -> t.List[Json]:
    return [{"container_id": 0, "host_id": start, "size": 65536}]


class HandMadeStore:
    """Three images on the same base: the first with two mapped layers, one of which container `db` uses; the second
    with a container; the third is unused. The files are as written by podman.

    :param make_folder: creates a layer's folder; a subvolume on btrfs
    """

    def __init__(
        self,
        base: pathlib.Path,
        driver: str,
        make_folder: t.Callable[[pathlib.Path], None] = lambda path: path.mkdir(),
    ) -> None:
        self.graphroot, self.runroot, self.driver = base / "g", base / "r", driver
        self.make_folder = make_folder
        self.runroot.mkdir()
        self.home = self.graphroot / FOLDERS[driver]
        self.home.mkdir(parents=True)
        if driver == "overlay":
            (self.home / "l").mkdir()
        self.lowers: t.Dict[str, t.List[str]] = {}
        self.now: t.Dict[str, t.List[Json]] = {kind: [] for kind in KINDS}
        # Each version of each file before a change.
        self.versions: t.Dict[str, t.List[bytes]] = {kind: [] for kind in KINDS}
        for kind in KINDS:
            (self.graphroot / f"{driver}-{kind}").mkdir()
        self._fill()
        self.good = {kind: self.path(kind).read_bytes() for kind in KINDS}

    def path(self, kind: str) -> pathlib.Path:
        return self.graphroot / f"{self.driver}-{kind}" / f"{kind}.json"

    def layer_folder(self, name: str) -> pathlib.Path:
        return self.home / hex_id(name)

    def _fill(self) -> None:
        self.layer("base")
        self.layer("top", "base")
        self.image("first", "top")
        self.layer("other", "base")
        self.image("second", "other")
        self.layer("spare", "base")
        self.image("unused", "spare")
        self.mapped("used copy", "top", 100000, "first")
        self.container("db", "used copy", "first", 100000)
        self.mapped("free copy", "top", 200000, "first")
        self.container("web", "other", "second")
        self._database(["db", "web"])

    def save(self, kind: str) -> None:
        """Write a file as runtimes do: the token of the lock, then the file, with old timestamps."""
        path = self.path(kind)
        if path.exists():
            self.versions[kind].append(path.read_bytes())
        path.write_text(json.dumps(self.now[kind], separators=(",", ":")))
        moment = time.time_ns() - 30 * 86400 * 10**9
        os.utime(path, ns=(moment, moment))
        path.with_suffix(".lock").write_bytes(lock_token(moment))

    def layer(self, name: str, parent: str = "", **more: t.Any) -> None:
        record: Json = {"id": hex_id(name), "created": _CREATED}
        if parent:
            record["parent"] = hex_id(parent)
        record["diff-digest"] = f"sha256:{hex_id(f'content of {name}')}"
        record.update(more)
        self._add_layer(name, [parent] if parent else [], record)
        self._tar_split(name)

    def _add_layer(self, name: str, lowers: t.List[str], record: Json) -> None:
        folder = self.layer_folder(name)
        self.make_folder(folder)
        tree = folder
        if self.driver == "overlay":
            tree = folder / "diff"
            tree.mkdir()
            (folder / "link").write_text(short_name(name))
            (self.home / "l" / short_name(name)).symlink_to(f"../{hex_id(name)}/diff")
            if lowers:
                below = self._below(lowers[0])
                (folder / "lower").write_text(":".join(f"l/{short_name(item)}" for item in below))
        if name.startswith("layer of"):
            (tree / "precious").write_text(name)
        self.lowers[name] = lowers
        self.now["layers"].append(record)
        self.save("layers")

    def _below(self, name: str) -> t.List[str]:
        found = [name]
        while self.lowers[found[-1]]:
            found.append(self.lowers[found[-1]][0])
        return found

    def _tar_split(self, name: str) -> None:
        path = self.path("layers").with_name(f"{hex_id(name)}.tar-split.gz")
        path.write_bytes(gzip.compress(b"{}\n"))

    def image(self, name: str, top: str) -> None:
        image_id = hex_id(f"image {name}")
        self.now["images"].append(
            {
                "id": image_id,
                "names": [f"localhost/{name}:1"],
                "layer": hex_id(top),
                "big-data-names": ["manifest"],
                "created": _CREATED,
            }
        )
        self.save("images")
        data = self.path("images").parent / image_id
        data.mkdir()
        (data / "manifest").write_text("{}")

    def mapped(self, name: str, template: str, start: int, image: str) -> None:
        origin = next(item for item in self.now["layers"] if item["id"] == hex_id(template))
        record = {**origin, "id": hex_id(name), "uidmap": id_map(start), "gidmap": id_map(start)}
        self._add_layer(name, [template], record)
        self._tar_split(name)
        for item in self.now["images"]:
            if item["id"] == hex_id(f"image {image}"):
                item.setdefault("mapped-layers", []).append(hex_id(name))
        self.save("images")

    def container(self, name: str, parent: str, image: str, start: int = 0) -> None:
        record: Json = {"id": hex_id(f"layer of {name}"), "parent": hex_id(parent)}
        if start:
            record.update(uidmap=id_map(start), gidmap=id_map(start))
        record["created"] = _CREATED
        self._add_layer(f"layer of {name}", [parent], record)
        container_id = hex_id(f"container {name}")
        self.now["containers"].append(
            {
                "id": container_id,
                "names": [name],
                "image": hex_id(f"image {image}"),
                "layer": hex_id(f"layer of {name}"),
                "created": _CREATED,
            }
        )
        self.save("containers")
        (self.path("containers").parent / container_id / "userdata").mkdir(parents=True)

    def _database(self, names: t.Sequence[str]) -> None:
        connection = sqlite3.connect(self.graphroot / "db.sql")
        connection.execute("CREATE TABLE DBConfig (GraphRoot TEXT, RunRoot TEXT, GraphDriver TEXT)")
        connection.execute(
            "INSERT INTO DBConfig VALUES (?, ?, ?)",
            (str(self.graphroot), str(self.runroot), self.driver),
        )
        connection.execute(
            "CREATE TABLE ContainerConfig (ID TEXT, Name TEXT, PodID TEXT, JSON TEXT)"
        )
        for name in names:
            container_id = hex_id(f"container {name}")
            config = json.dumps({"id": container_id, "name": name})
            connection.execute(
                "INSERT INTO ContainerConfig VALUES (?, ?, '', ?)", (container_id, name, config)
            )
        connection.commit()
        connection.close()

    def restore(self) -> None:
        """Undo all damage."""
        for kind, data in self.good.items():
            moment = time.time_ns() - 30 * 86400 * 10**9
            self.path(kind).write_bytes(data)
            os.utime(self.path(kind), ns=(moment, moment))

    def folders(self) -> t.Set[str]:
        """The names of all layer folders."""
        return {path.name for path in self.home.iterdir() if len(path.name) == 64}


@dataclasses.dataclass(frozen=True)
class Damage:
    """Damage to a file.

    :param kind: of the records in it
    :param how: "truncated", "flipped", "zeroed", "entry", "key", "type", "text", "gone", "older", "swapped" or "moved"
    :param where: a number from 0 to 1 that selects the position
    """

    kind: str
    how: str
    where: float
    value: t.Any = None

    def apply(self, store: HandMadeStore) -> None:
        path = store.path(self.kind)
        data = path.read_bytes() if path.exists() else b""
        new = getattr(self, f"_{self.how}")(store, data)
        if new is None:
            path.unlink(missing_ok=True)
        elif self.how == "flipped":
            # The file was never written.
            before = path.stat() if path.exists() else None
            path.write_bytes(new)
            if before:
                os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        else:
            path.write_bytes(new)

    def _index(self, length: int) -> int:
        return min(int(self.where * length), length - 1)

    def _truncated(self, _store: HandMadeStore, data: bytes) -> bytes:
        return data[: int(self.where * len(data))]

    def _flipped(self, _store: HandMadeStore, data: bytes) -> bytes:
        if not data:
            return data
        at = self._index(len(data))
        return data[:at] + bytes([data[at] ^ self.value]) + data[at + 1 :]

    def _zeroed(self, _store: HandMadeStore, data: bytes) -> bytes:
        """A block that was never written; with a true value, everything after it is lost as well."""
        block = self._index(len(data) // _BLOCK + 1) * _BLOCK
        zeros = bytes(len(data[block : block + _BLOCK]))
        return data[:block] + (b"" if self.value else zeros + data[block + _BLOCK :])

    def _moved(self, store: HandMadeStore, data: bytes) -> bytes:
        """A record that was in the file of volatile records, which has other content now; None if it was removed."""

        def change(found: t.List[Json]) -> None:
            record = found.pop(self._index(len(found)))
            if self.value is not None:
                text = json.dumps([record])[: self.value].encode()
                store.path(self.kind).with_name(f"volatile-{self.kind}.json").write_bytes(text)

        return self._edited(data, change)

    def _entry(self, _store: HandMadeStore, data: bytes) -> bytes:
        return self._edited(data, lambda found: found.pop(self._index(len(found))))

    def _key(self, _store: HandMadeStore, data: bytes) -> bytes:
        def change(found: t.List[Json]) -> None:
            record = found[self._index(len(found))]
            record.pop(sorted(record)[self.value % len(record)])

        return self._edited(data, change)

    def _type(self, _store: HandMadeStore, data: bytes) -> bytes:
        def change(found: t.List[Json]) -> None:
            record = found[self._index(len(found))]
            record[sorted(record)[self.value[0] % len(record)]] = self.value[1]

        return self._edited(data, change)

    def _text(self, _store: HandMadeStore, _data: bytes) -> bytes:
        return bytes(self.value)

    def _gone(self, _store: HandMadeStore, _data: bytes) -> None:
        return None

    def _older(self, store: HandMadeStore, _data: bytes) -> bytes:
        versions = store.versions[self.kind]
        return versions[self._index(len(versions))]

    def _swapped(self, store: HandMadeStore, data: bytes) -> bytes:
        other = store.path(self.value)
        theirs = other.read_bytes() if other.exists() else b""
        other.write_bytes(data)
        return theirs

    @staticmethod
    def _edited(data: bytes, change: t.Callable[[t.List[Json]], t.Any]) -> bytes:
        try:
            found = json.loads(data)
            change(found)
        except (ValueError, TypeError, LookupError, AttributeError, ZeroDivisionError):
            return data
        return json.dumps(found, separators=(",", ":")).encode()


_WHERE = st.floats(0, 1, allow_nan=False)
_ODD: st.SearchStrategy[t.Any] = st.sampled_from(
    [None, True, 0, -1, 1.5, "", "x", "0" * 64, [], {}, [None], [{}]]
)


def _damage(
    how: str, value: t.Optional[st.SearchStrategy[t.Any]] = None
) -> st.SearchStrategy[Damage]:
    return st.builds(
        Damage, st.sampled_from(KINDS), st.just(how), _WHERE, st.none() if value is None else value
    )


damages = st.lists(
    st.one_of(
        _damage("truncated"),
        _damage("flipped", st.integers(1, 255)),
        _damage("zeroed", st.booleans()),
        _damage("moved", st.sampled_from([None, 0, 2, 40, 10_000])),
        _damage("entry"),
        _damage("key", st.integers(0, 30)),
        _damage("type", st.tuples(st.integers(0, 30), _ODD)),
        _damage(
            "text", st.sampled_from([b"", b" \n", b"[]", b"null", b"{}", b"[{}]", b"\0" * 500])
        ),
        _damage("gone"),
        _damage("older"),
        _damage("swapped", st.sampled_from(KINDS)),
    ),
    min_size=1,
    max_size=3,
)
