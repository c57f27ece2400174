# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This plugin util is PRIVATE to the userns.storage collection.
"""Several calls of layer_template, each stopped by its time limit, told as one."""

from __future__ import annotations

import typing as t

Json = t.Dict[str, t.Any]

# Seconds between two lines.
SHORTEST = 10
# A call first looks through what others have made. So that it gets on, it may take this part of the time so far.
_PART = 3

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


class Slices:
    """The results so far.

    :param started: on the clock whose readings the methods are given, in seconds
    """

    def __init__(self, started: float) -> None:
        self._started = started
        self._result: Json = {}
        # The first pair of share done and seconds passed of the layer at hand, and its key.
        self._layer: t.Tuple[t.Any, ...] = ()
        self._first = (0.0, 0.0)

    def next_limit(self, now: float) -> int:
        """The time limit for the next call, in seconds."""
        return max(SHORTEST, int(now - self._started) // _PART)

    def add(self, result: Json) -> Json:
        """Join the result of one more call, and return that of all."""
        before, self._result = self._result, dict(result)
        if not before:
            return self._result
        # A call that could not even begin has told nothing of what others have done.
        for key in ("layers", "stores", "store"):
            if key in before and key not in result:
                self._result[key] = before[key]
        made = {_key(one): one for one in before.get("layers", ()) if one["action"] == "created"}
        self._result["layers"] = [
            made.get(_key(one), one) if one["action"] == "existing" else one
            for one in self._result.get("layers", ())
        ]
        self._result["changed"] = bool(before.get("changed")) or bool(result.get("changed"))
        warnings = [*before.get("warnings", ()), *result.get("warnings", ())]
        if warnings:
            self._result["warnings"] = list(dict.fromkeys(warnings))
        if "diff" in before:
            after = result.get("diff", before["diff"])
            self._result["diff"] = {**(after or {}), "before": before["diff"]["before"]}
        return self._result

    def line(self, now: float) -> str:
        """What to show of it while there is more to do."""
        layers = self._result.get("layers", [])
        remaining = self._result.get("remaining", 0)
        begun = next((one for one in layers if one.get("progress")), None)
        left = f"{remaining} of {len(layers)} layers to do"
        if begun is None:
            return left
        progress = begun["progress"]
        name = (begun["image_names"] or [begun["image_id"][:12]])[0]
        share = progress["bytes"] / progress["bytes_expected"] if progress["bytes_expected"] else 0
        return (
            f"{name} for {','.join(begun['uidmap'])}: {progress['files']} files, "
            f"{_size(progress['bytes'])} of {_size(progress['bytes_expected'])}, {share:.0%} done"
            f"{self._left(begun, share, now)}; {left}"
        )

    def _left(self, begun: Json, share: float, now: float) -> str:
        """The time that the layer at hand may still take, where there is something to reckon it from."""
        key = _key(begun)
        if key != self._layer:
            self._layer, self._first = key, (share, now)
            since, of = now - self._started, share
        else:
            since, of = now - self._first[1], share - self._first[0]
        if of <= 0 or since <= 0:
            return ""
        return f", about {_time(since * (1 - share) / of)} left"


def _key(layer: Json) -> t.Tuple[t.Any, ...]:
    names = ("user", "image_id", "uidmap", "gidmap")
    return tuple(tuple(one) if isinstance(one, list) else one for one in map(layer.get, names))


def _size(size: float) -> str:
    for unit in _UNITS:
        if size < 1000 or unit == _UNITS[-1]:
            break
        size /= 1000
    return f"{size:.0f} {unit}" if size >= 10 or unit == "B" else f"{size:.1f} {unit}"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
