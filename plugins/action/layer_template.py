# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Calls the module of this name in slices of time, and shows in between how far it is."""

from __future__ import annotations

import typing as t

from ansible_collections.userns.storage.plugins.plugin_utils._amounts import duration, human
from ansible_collections.userns.storage.plugins.plugin_utils._slices import (
    Json,
    SlicedAction,
    Told,
)


class ActionModule(SlicedAction):
    """Nothing is shown of a removal, which takes no time."""

    def told(self) -> Layers:
        """The layers of all calls."""
        return Layers()

    def whole(self, arguments: t.Mapping[str, t.Any]) -> bool:
        """Whether one call does it."""
        return super().whole(arguments) or arguments.get("state") == "absent"


class Layers(Told):
    """What has become of each image and map."""

    def __init__(self) -> None:
        super().__init__()
        # The first pair of share done and seconds passed of the layer at hand, and its key.
        self._layer: t.Tuple[t.Any, ...] = ()
        self._first = (0.0, 0.0)

    @property
    def _begun(self) -> t.Optional[Json]:
        layers = self.result.get("layers", ())
        return next((one for one in layers if one.get("progress")), None)

    @property
    def resuming(self) -> float:
        """Seconds that the last call took to look through what others have made."""
        begun = self._begun
        return float(begun["progress"]["seconds_resuming"]) if begun else 0

    def join(self, before: Json) -> None:
        """Layers that an earlier call has made are there for the later ones."""
        result = self.result
        # A call that could not even begin has told nothing of what others have done.
        for key in ("layers", "stores", "store"):
            if key in before:
                result.setdefault(key, before[key])
        made = {_key(one): one for one in before.get("layers", ()) if one["action"] == "created"}
        result["layers"] = [
            made.get(_key(one), one) if one["action"] == "existing" else one
            for one in result.get("layers", ())
        ]

    def line(self, passed: float) -> str:
        """Files, bytes, share done and time left of the layer that is being made."""
        layers = self.result.get("layers", [])
        left = f"{self.result.get('remaining', 0)} of {len(layers)} layers to do"
        begun = self._begun
        if begun is None:
            return left
        progress = begun["progress"]
        name = (begun["image_names"] or [begun["image_id"][:12]])[0]
        expected = progress["bytes_expected"]
        share = progress["bytes"] / expected if expected else 0
        return (
            f"{name} for {','.join(begun['uidmap'])}: {progress['files']} files, "
            f"{human(progress['bytes'])} of {human(expected)}, {share:.0%} done"
            f"{self._left(begun, share, passed)}; {left}"
        )

    def _left(self, begun: Json, share: float, passed: float) -> str:
        """The time that the layer at hand may still take, where there is something to reckon it from."""
        key = _key(begun)
        if key != self._layer:
            self._layer, self._first = key, (share, passed)
            since, of = passed, share
        else:
            since, of = passed - self._first[1], share - self._first[0]
        if of <= 0 or since <= 0:
            return ""
        return f", about {duration(since * (1 - share) / of)} left"


def _key(layer: Json) -> t.Tuple[t.Any, ...]:
    names = ("user", "image_id", "uidmap", "gidmap")
    return tuple(tuple(one) if isinstance(one, list) else one for one in map(layer.get, names))
