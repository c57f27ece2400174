# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run the module layer_template in time slices, and display its progress between them."""

from __future__ import annotations

import math
import re
import typing as t

from ansible_collections.userns.storage.plugins.plugin_utils._amounts import duration, human
from ansible_collections.userns.storage.plugins.plugin_utils._slices import (
    Json,
    SlicedAction,
    SliceResults,
)


class ActionModule(SlicedAction):
    """Removals take no time and show no progress."""

    def results(self) -> Layers:
        """The layers of all calls."""
        return Layers()

    def whole(self, arguments: t.Mapping[str, t.Any]) -> bool:
        """Whether a single call is enough."""
        return super().whole(arguments) or arguments.get("state") == "absent"


class Layers(SliceResults):
    """The results for each image and map.

    The first call works in the stores of all users. Each later call works in the store of one user, in turns, so that
    no user waits for a store that never becomes ready.
    """

    def __init__(self) -> None:
        super().__init__()
        self._stopped: t.Set[str] = set()
        # Bytes done and seconds passed at the first progress line.
        self._first: t.Optional[t.Tuple[float, float]] = None

    @property
    def _begun(self) -> t.Optional[Json]:
        return next((layer for layer in self._pending if layer.get("progress")), None)

    @property
    def _pending(self) -> t.List[Json]:
        """The layers that remain to be created in the current stores."""
        layers = self.result.get("layers", ())
        return [
            layer
            for layer in layers
            if layer["action"] == "pending" and self.user in ("", layer["user"])
        ]

    @property
    def _waiting(self) -> t.List[str]:
        """The users whose layers are incomplete, in the order of the task."""
        users = [
            item["user"] for item in self.result.get("layers", ()) if item["action"] == "pending"
        ]
        return [user for user in dict.fromkeys(users) if user not in self._stopped]

    def following(self, arguments: Json) -> Json:
        """The same for the next user, if there are several."""
        if len(self.result.get("stores", ())) < 2 or not arguments.get("users"):
            return arguments
        users = self._waiting
        at = users.index(self.user) + 1 if self.user in users else 0
        self.user = users[at % len(users)]
        return {**arguments, "users": [self.user]}

    @property
    def resuming(self) -> float:
        """The time that the last call took to examine existing work, in seconds."""
        begun = self._begun
        return float(begun["progress"]["seconds_resuming"]) if begun else 0

    @property
    def left(self) -> t.Tuple[float, float]:
        """The remaining layers, less the finished part of the current layer."""
        progress = self._begun["progress"] if self._begun else None
        at_hand = -progress["bytes"] - progress["files"] if progress else math.inf
        return (self.remaining or 0, at_hand)

    @property
    def remaining(self) -> t.Any:
        """The number of layers to create in the current stores."""
        return len(self._pending) if self.user else super().remaining

    @property
    def goes_on(self) -> bool:
        """Whether another call is needed."""
        return bool(self._waiting) if self.user else super().goes_on

    def give_up(self, why: str) -> None:
        """Make no more calls for the current store."""
        if not self.user:
            super().give_up(why)
            return
        self._stopped.add(self.user)
        self.result["failed"] = True
        self.result["msg"] = _messages(self.result.get("msg", ""), f"For {self.user}: {why}")

    def join(self, before: Json) -> None:
        """Layers that an earlier call created are existing layers for later calls."""
        if self.user:
            self._join_users(before)
        result = self.result
        # A call that failed early returned nothing about existing layers.
        for key in ("layers", "stores", "store"):
            if key in before:
                result.setdefault(key, before[key])
        if before.get("pulled"):
            # The first call pulled them.
            result["pulled"] = before["pulled"]
        made = {
            _key(item): item for item in before.get("layers", ()) if item["action"] == "created"
        }
        result["layers"] = [
            made.get(_key(item), item) if item["action"] == "existing" else item
            for item in result.get("layers", ())
        ]

    def _join_users(self, before: Json) -> None:
        """Add the results of the other users to the result of the current user."""
        result = self.result
        if "partial" not in result or any("error" in item for item in result.get("stores", ())):
            self._stopped.add(self.user)
        for key in ("layers", "stores"):
            mine = [item for item in result.get(key, ()) if item["user"] == self.user]
            if not mine:
                mine = [item for item in before[key] if item["user"] == self.user]
            joined: t.List[Json] = []
            for item in before[key]:
                # At the position of this user's first entry.
                joined += [item] if item["user"] != self.user else mine
                mine = mine if item["user"] != self.user else []
            result[key] = joined
        result["remaining"] = sum(item["action"] == "pending" for item in result["layers"])
        result["partial"] = result["remaining"] > 0
        if "diff" in result and "diff" in before:
            result["diff"]["after"] = {**before["diff"]["after"], **result["diff"]["after"]}
        if before.get("failed"):
            result["msg"] = _messages(before["msg"], result["msg"] if result.get("failed") else "")
            result["failed"] = True

    def line(self, passed: float) -> str:
        """Files and bytes of the current layer; the finished share and the remaining time of all layers."""
        counted = [
            layer
            for layer in self.result.get("layers", ())
            if layer["action"] in ("created", "pending")
        ]
        made = sum(layer["action"] == "created" for layer in counted)
        done, whole = (sum(amounts) for amounts in zip(*map(_amounts, counted), (0, 0)))
        share = done / whole if whole else 0
        text = (
            f"{made} of {len(counted)} layers created, {human(done)} of {human(whole)}, "
            f"{share:.0%} done{self._left(done, whole, passed)}"
        )
        begun = self._begun
        if begun is None:
            return text
        progress = begun["progress"]
        name = (begun["image_names"] or [begun["image_id"][:12]])[0]
        whose = "" if begun["user"] == "root" else f" of {begun['user']}"
        return (
            f"{text}; now {name} for {','.join(begun['uidmap'])}{whose}: {progress['files']} files, "
            f"{human(progress['bytes'])} of {human(progress['bytes_expected'])}"
        )

    def _left(self, done: float, whole: float, passed: float) -> str:
        """The estimated remaining time of all layers, if it can be estimated."""
        if self._first is None:
            self._first = (done, passed)
            of, since = done, passed
        else:
            of, since = done - self._first[0], passed - self._first[1]
        if of <= 0 or since <= 0 or done >= whole:
            return ""
        return f", about {duration(since * (whole - done) / of)} left"


def _amounts(layer: Json) -> t.Tuple[int, int]:
    """The existing and the expected bytes of a layer."""
    expected = layer.get("size_expected") or 0
    if layer["action"] == "created":
        return expected, expected
    progress = layer.get("progress") or {}
    done = progress.get("bytes", 0)
    return done, max(expected, done, progress.get("bytes_expected", 0))


def _messages(*messages: str) -> str:
    """The messages of the users as one text, without duplicates."""
    found: t.List[str] = []
    for message in messages:
        text = re.sub(r"^[0-9]+ of [0-9]+ users failed\. ", "", message)
        if text and not any(text in earlier for earlier in found):
            found.append(text)
    return " ".join(found)


def _key(layer: Json) -> t.Tuple[t.Any, ...]:
    names = ("user", "image_id", "uidmap", "gidmap")
    return tuple(tuple(item) if isinstance(item, list) else item for item in map(layer.get, names))
