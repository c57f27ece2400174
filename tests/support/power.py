# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A disk that loses what was not synced: a module's recorded calls, replayed and cut off anywhere.

The model is worse than any filesystem of today. A change of a directory is on disk for sure once that
directory was synced (or the whole filesystem) after it; until then it may be there or not, whatever
else is, in any combination. Data is there for sure once its file was synced after the last write.
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
    """One change of a directory: something is there from now on, or no longer.

    :ivar made: number of the call that did it
    :ivar durable: number of the call that made it last, if any
    """

    made: int
    present: bool
    value: t.Any = None
    durable: t.Optional[int] = None


class PowerLoss:
    """A run's calls on one store, to be cut off at any of them.

    :param records: the files of records as they were before, by path
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

    # Reading the calls

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
                self._settle(number, path)
            elif name in ("syncfs", "sync"):
                synced = dict.fromkeys(synced, True)
                self._settle(number, None)
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
            late = [path for path in inside if not synced[path]]
            if late:
                self.problems.append(f"{number}: {call} moves data that may not be there: {late}")
        for path in inside:
            synced[new + path[len(old) :]] = synced.pop(path)
        self._change(old, _Change(number, False))
        if new in self._files.values():
            if not tokens.pop(os.path.dirname(new), False):
                self.problems.append(f"{number}: {call} without a new token before it")
            self._change(new, _Change(number, True, json.loads(call.content)))
        else:
            self._change(new, _Change(number, True))

    def _change(self, path: str, change: _Change) -> None:
        self._names.setdefault(path, []).append(change)

    def _settle(self, number: int, folder: t.Optional[str]) -> None:
        for path, changes in self._names.items():
            if folder is None or os.path.dirname(path) == folder:
                for change in changes:
                    change.durable = number if change.durable is None else change.durable

    # Cutting it off

    def possible(self, path: str, cut: int) -> t.List[_Change]:
        """What may be found at a path when the power goes before the call after number `cut`."""
        changes = [name for name in self._names.get(path, ()) if name.made <= cut]
        last = max(
            (
                place
                for place, one in enumerate(changes)
                if one.durable is not None and one.durable <= cut
            ),
            default=None,
        )
        if last is None:
            # Never synced: it may also be as it was before any of this.
            before = [_Change(0, not changes[0].present)] if changes else []
            return [*before, *changes]
        return changes[last:]

    def surely_there(self, path: str, cut: int) -> bool:
        """Whether something will be found at a path; what the run never touched is there."""
        return all(item.present for item in self.possible(path, cut))

    def check(self) -> t.List[str]:
        """Each way in which a record could point at what is not there; empty is good."""
        found = list(self.problems)
        for cut in range(len(self.calls) + 1):
            ways = [self.possible(path, cut) for path in self._files.values()]
            for chosen in itertools.product(*ways):
                layers, images, containers = (item.value or [] for item in chosen)
                for problem in self._wrong(cut, layers, images, containers):
                    after = self.calls[cut - 1] if cut else "nothing"
                    found.append(f"power lost after {cut} {after}: {problem}")
        return found

    def _wrong(
        self,
        cut: int,
        layers: t.Sequence[Json],
        images: t.Sequence[Json],
        containers: t.Sequence[Json],
    ) -> t.Iterator[str]:
        whole = {item["id"] for item in layers if not (item.get("flags") or {}).get("incomplete")}
        known = {item["id"] for item in layers}
        for layer in layers:
            # Layers that are marked incomplete are deleted by whoever loads them, in whatever order.
            needed = whole if layer["id"] in whole else known
            if layer.get("parent") and layer["parent"] not in needed:
                yield f"layer {layer['id'][:12]} has no parent"
            if layer["id"] in whole:
                for path in self._data_of(layer["id"]):
                    if not self.surely_there(path, cut):
                        yield f"layer {layer['id'][:12]} may lack {path[len(self.graphroot) + 1 :]}"
        for image in images:
            for layer_id in [image["layer"], *image.get("mapped-layers", ())]:
                if layer_id not in whole:
                    state = "incomplete" if layer_id in known else "unknown"
                    yield f"image {image['id'][:12]} names the {state} layer {layer_id[:12]}"
        for container in containers:
            if container["layer"] not in whole:
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
        """The layer whose short name it is: the one that is moved to its place, or away, next to it."""
        number = self._names[link][0].made
        near = [
            (abs(number - change.made), os.path.basename(path))
            for path, changes in self._names.items()
            if os.path.dirname(path) == self.layers and _ID.fullmatch(os.path.basename(path))
            for change in changes
        ]
        return min(near)[1] if near else ""
