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

# What decides which layers go. The first call has decided: thresholds and limits are for the task as a whole.
_RULES = (
    *("duplicates", "unusable_maps", "unused_for", "created_before", "max_copies_per_image"),
    *("max_used_space", "min_free_space", "high_threshold", "low_threshold", "reserved_space"),
    "max_freed",
)


class ActionModule(SlicedAction):
    """Layers go one by one, so a slice may be long where they are large."""

    def told(self) -> Collected:
        """The removals of all calls."""
        return Collected()


class Collected(Told):
    """What is gone, what stays, and what is to go yet."""

    @property
    def _waiting(self) -> t.List[Json]:
        return [one for one in self.result.get("kept", ()) if one["rule"] == "time_limit"]

    @property
    def resuming(self) -> float:
        """Seconds that the last call took to look through the store."""
        return float(self.result.get("seconds_planning", 0))

    def following(self, arguments: Json) -> Json:
        """Just the layers that the first call was to remove, and has not."""
        kept = {name: value for name, value in arguments.items() if name not in _RULES}
        waiting = [one["id"] for one in self._waiting]
        # Without any rule leftovers would stay.
        return {**kept, "layers": waiting or ["none"]}

    def join(self, before: Json) -> None:
        """Add what earlier calls have removed, and why they have kept the rest."""
        result = self.result
        for key in ("removed", "repaired", "notes"):
            result[key] = [*before[key], *result.get(key, ())]
        failures = [*before["failures"], *result.get("failures", ())]
        result["failures"] = list({(one["id"], one.get("path")): one for one in failures}.values())
        why = {one["id"]: one for one in before["kept"] if one["rule"] != "time_limit"}
        gone = {one["id"] for one in (*result["removed"], *failures)}
        result["kept"] = [
            *(one for one in why.values() if one["id"] not in gone),
            *(one for one in result.get("kept", ()) if one["id"] not in {*why, *gone}),
        ]
        for key in ("space_reclaimed", "inodes_reclaimed"):
            result[key] = before[key] + result.get(key, 0)
        result["target_met"] = before["target_met"] and not result["failures"]
        result["would_free"] = before["would_free"]
        result.setdefault("store", before["store"])
        if before.get("failed") and not result.get("failed"):
            result.update(failed=True, msg=before["msg"])

    def line(self, passed: float) -> str:
        """Layers, inodes, bytes, share done and time left."""
        gone, waiting = self.result.get("removed", []), self._waiting
        done, left = (sum(one["size"] for one in some) for some in (gone, waiting))
        share = done / (done + left) if done + left else 0
        text = (
            f"{len(gone)} layers removed, {sum(one['inodes'] for one in gone)} files, "
            f"{human(done)} of {human(done + left)}, {share:.0%} done"
        )
        if 0 < share < 1:
            text += f", about {duration(passed * (1 - share) / share)} left"
        return f"{text}; {self.result.get('remaining', 0)} to go"
