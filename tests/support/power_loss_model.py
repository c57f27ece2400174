# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A model of a disk that loses unsynced data: the recorded calls of a module, with power losses between them.

The model is worse than any current filesystem. A change of a directory is certainly on disk only after that
directory or the whole filesystem is synced. Until then it may be on disk or not, in any combination with
other changes. Data is certainly on disk only after its file is synced after the last write.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import typing as t

from .injection import Call

Json = t.Dict[str, t.Any]
_ID = re.compile(r"[0-9a-f]{64}")


@dataclasses.dataclass
class _Change:
    """A change of a directory: a name is created or removed.

    :ivar made: the number of the call that makes the change
    :ivar durable: the number of the call that makes the change durable, if any
    """

    made: int
    present: bool
    value: t.Any = None
    durable: t.Optional[int] = None


class PowerLoss:
    """The calls of a run on a store, and the possible states of the store after a power loss between them.

    :param records: the files of records before the run, by path
    """

    def __init__(
        self, graphroot: str, driver: str, records: t.Mapping[str, str], calls: t.Sequence[Call]
    ) -> None:
        self.graphroot, self.driver, self.records = graphroot, driver, records
        inner = {"vfs": "vfs/dir", "overlay": "overlay"}[driver]
        self.layers = f"{graphroot}/{inner}"
        self.calls = calls
        self.problems: t.List[str] = []
        self._names: t.Dict[str, t.List[_Change]] = {}
        self._files = {
            kind: f"{graphroot}/{driver}-{kind}/{kind}.json"
            for kind in ("layers", "images", "containers")
        }
        for path in self._files.values():
            value = json.loads(records.get(path) or "[]")
            self._names[path] = [_Change(0, True, value, 0)]
        self._replay()

    # Replay

    def _replay(self) -> None:
        synced: t.Dict[str, bool] = {}
        tokens: t.Dict[str, bool] = {}
        for number, call in enumerate(self.calls, 1):
            name, path = call.name, call.paths[0] if call.paths else ""
            if name in ("write", "pwrite64", "writev", "sendfile", "copy_file_range", "ftruncate"):
                synced[path] = False
                if path.endswith(".lock"):
                    tokens[os.path.dirname(path)] = True
            elif name in ("fdatasync", "fsync"):
                synced[path] = True
                self._sync(number, path)
            elif name in ("syncfs", "sync"):
                synced = dict.fromkeys(synced, True)
                self._sync(number, None)
            elif name.startswith("rename"):
                self._renamed(number, call, synced, tokens)
            elif name == "symlinkat":
                self._change(path, _Change(number, True))
            elif name in ("unlink", "unlinkat", "rmdir"):
                self._change(path, _Change(number, False))

    def _renamed(
        self, number: int, call: Call, synced: t.Dict[str, bool], tokens: t.Dict[str, bool]
    ) -> None:
        old, new = call.paths
        inside = [path for path in synced if path == old or path.startswith(old + "/")]
        relevant = new.startswith((self.layers + "/", f"{self.graphroot}/{self.driver}-"))
        if relevant:
            unsynced = [path for path in inside if not synced[path]]
            if unsynced:
                self.problems.append(f"{number}: {call} moves data that is not synced: {unsynced}")
        for path in inside:
            synced[new + path[len(old) :]] = synced.pop(path)
        self._change(old, _Change(number, False))
        if new in self._files.values():
            if not tokens.pop(os.path.dirname(new), False):
                self.problems.append(f"{number}: {call} without a new token of the lock before it")
            self._change(new, _Change(number, True, json.loads(call.content)))
        else:
            self._change(new, _Change(number, True))

    def _change(self, path: str, change: _Change) -> None:
        self._names.setdefault(path, []).append(change)

    def _sync(self, number: int, folder: t.Optional[str]) -> None:
        for path, changes in self._names.items():
            if folder is None or os.path.dirname(path) == folder:
                for change in changes:
                    change.durable = number if change.durable is None else change.durable

    # States after a power loss

    def possible_states(self, path: str, cut: int) -> t.List[_Change]:
        """The possible states of a path if power is lost after the call with the number `cut`."""
        changes = [name for name in self._names.get(path, ()) if name.made <= cut]
        last = max(
            (
                index
                for index, change in enumerate(changes)
                if change.durable is not None and change.durable <= cut
            ),
            default=None,
        )
        if last is None:
            # Never synced: the path may also be in its state before the run.
            before = [_Change(0, not changes[0].present)] if changes else []
            return [*before, *changes]
        return changes[last:]

    def certainly_exists(self, path: str, cut: int) -> bool:
        """Whether a path certainly exists; paths that the run does not change exist."""
        return all(item.present for item in self.possible_states(path, cut))

    def check(self) -> t.List[str]:
        """All possible references of records to missing data, and other problems; empty if there are none."""
        found = list(self.problems)
        for cut in range(len(self.calls) + 1):
            states = [self.possible_states(path, cut) for path in self._files.values()]
            for selected in itertools.product(*states):
                layers, images, containers = (item.value or [] for item in selected)
                for problem in self._inconsistencies(cut, layers, images, containers):
                    after = self.calls[cut - 1] if cut else "nothing"
                    found.append(f"power lost after {cut} {after}: {problem}")
        return found

    def _inconsistencies(
        self,
        cut: int,
        layers: t.Sequence[Json],
        images: t.Sequence[Json],
        containers: t.Sequence[Json],
    ) -> t.Iterator[str]:
        complete = {
            item["id"] for item in layers if not (item.get("flags") or {}).get("incomplete")
        }
        known = {item["id"] for item in layers}
        for layer in layers:
            # A runtime that loads the records deletes layers that are marked as incomplete, in any order.
            needed = complete if layer["id"] in complete else known
            if layer.get("parent") and layer["parent"] not in needed:
                yield f"layer {layer['id'][:12]} has no parent"
            if layer["id"] in complete:
                for path in self._data_of(layer["id"]):
                    if not self.certainly_exists(path, cut):
                        yield f"layer {layer['id'][:12]} may lack {path[len(self.graphroot) + 1 :]}"
        for image in images:
            for layer_id in [image["layer"], *image.get("mapped-layers", ())]:
                if layer_id not in complete:
                    state = "incomplete" if layer_id in known else "unknown"
                    yield f"image {image['id'][:12]} refers to the {state} layer {layer_id[:12]}"
        for container in containers:
            if container["layer"] not in complete:
                yield f"container {container['id'][:12]} has lost its layer"

    def _data_of(self, layer_id: str) -> t.Iterator[str]:
        yield f"{self.layers}/{layer_id}"
        yield f"{self.graphroot}/{self.driver}-layers/{layer_id}.tar-split.gz"
        if self.driver == "overlay":
            yield from (
                path
                for path in self._names
                if os.path.dirname(path) == f"{self.layers}/l"
                and self._layer_near(path) == layer_id
            )

    def _layer_near(self, link: str) -> str:
        """The layer of a short name: that whose folder is renamed by the call nearest to the change of the link."""
        number = self._names[link][0].made
        distances = [
            (abs(number - change.made), os.path.basename(path))
            for path, changes in self._names.items()
            if os.path.dirname(path) == self.layers and _ID.fullmatch(os.path.basename(path))
            for change in changes
        ]
        return min(distances)[1] if distances else ""
