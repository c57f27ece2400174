# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run the module layer_gc in time slices, and display its progress between them."""

from __future__ import annotations

import typing as t

from ansible_collections.userns.storage.plugins.module_utils._storage.operations import gc_policy
from ansible_collections.userns.storage.plugins.module_utils._storage.operations.result_merging import (
    merged,
)
from ansible_collections.userns.storage.plugins.plugin_utils._amounts import duration, human
from ansible_collections.userns.storage.plugins.plugin_utils._slices import (
    Json,
    SlicedAction,
    SliceResults,
)


def _decided() -> t.FrozenSet[str]:
    """The options with which the first call selects layers: thresholds and limits apply to the task as
    a whole. The layers themselves are those that remain.
    """
    return frozenset(gc_policy.named(gc_policy.RULE, gc_policy.PART, gc_policy.LIMIT)) - {"layers"}


# Options that cannot be those of several stores; the module refuses them.
_OF_ONE_STORE = ("user", "graphroot", "runroot")
_OF_ANSIBLE = frozenset(
    {"ansible_facts", "exception", "failed", "invocation", "msg", "rc", "unreachable"}
)


class ActionModule(SlicedAction):
    """Layers are removed one by one, so that a slice with large layers may be long."""

    def results(self) -> Collected:
        """The removals of all calls."""
        return Collected()

    def repeated(
        self, arguments: t.Mapping[str, t.Any], task_vars: t.Optional[t.Dict[str, t.Any]]
    ) -> Json:
        """Call the module until nothing remains, in the store of each user."""
        users = arguments.get("users")
        if users is None or any(arguments.get(name) for name in _OF_ONE_STORE):
            return super().repeated(arguments, task_vars)
        names = users.split(",") if isinstance(users, str) else users
        rest = {name: value for name, value in arguments.items() if name != "users"}
        outcomes = {
            user: _outcome(super(ActionModule, self).repeated({**rest, "user": user}, task_vars))
            for user in dict.fromkeys(str(name).strip() for name in names)
        }
        result = merged(outcomes)
        if not result["warnings"]:
            del result["warnings"]
        message = result.pop("error", None)
        result.pop("facts", None)
        return {**result, "failed": True, "msg": message} if message else result


def _outcome(result: Json) -> Json:
    """The result for one user's store, without fields that Ansible adds."""
    own = {
        key: value
        for key, value in result.items()
        if key not in _OF_ANSIBLE and not key.startswith("_ansible")
    }
    if result.get("failed") or result.get("unreachable"):
        own["error"] = result.get("msg") or "The module failed without a message."
    return own


class Collected(SliceResults):
    """The removed, the kept and the remaining layers."""

    @property
    def _waiting(self) -> t.List[Json]:
        return [item for item in self.result.get("kept", ()) if item["rule"] == "time_limit"]

    @property
    def resuming(self) -> float:
        """The time that the last call took to examine the store, in seconds."""
        return float(self.result.get("seconds_planning", 0))

    def following(self, arguments: Json) -> Json:
        """Only the layers that the first call selected and did not remove."""
        decided = _decided()
        kept = {name: value for name, value in arguments.items() if name not in decided}
        waiting = [item["id"] for item in self._waiting]
        # Without a rule, leftovers would not be removed.
        return {**kept, "layers": waiting or ["none"]}

    def join(self, before: Json) -> None:
        """Add the removals of earlier calls, and their reasons for keeping the rest."""
        result = self.result
        for key in ("removed", "repaired", "removed_images", "notes"):
            result[key] = [*before[key], *result.get(key, ())]
        failures = [*before["failures"], *result.get("failures", ())]
        result["failures"] = list(
            {(failure["id"], failure.get("path")): failure for failure in failures}.values()
        )
        why = {item["id"]: item for item in before["kept"] if item["rule"] != "time_limit"}
        gone = {item["id"] for item in (*result["removed"], *failures)}
        result["kept"] = [
            *(item for item in why.values() if item["id"] not in gone),
            *(item for item in result.get("kept", ()) if item["id"] not in {*why, *gone}),
        ]
        for end in ("", "_min", "_max"):
            key = f"space_reclaimed{end}"
            result[key] = before.get(key, 0) + result.get(key, 0)
        result["inodes_reclaimed"] = before["inodes_reclaimed"] + result.get("inodes_reclaimed", 0)
        result["target_met"] = before["target_met"] and not result["failures"]
        result["would_free"] = before["would_free"]
        result.setdefault("store", before["store"])
        if before.get("failed") and not result.get("failed"):
            result.update(failed=True, msg=before["msg"])

    def line(self, passed: float) -> str:
        """Layers, inodes, bytes, share done and time left."""
        gone, waiting = self.result.get("removed", []), self._waiting
        done, left = (sum(item["size"] for item in some) for some in (gone, waiting))
        share = done / (done + left) if done + left else 0
        text = (
            f"{len(gone)} layers removed, {sum(item['inodes'] for item in gone)} files, "
            f"{human(done)} of {human(done + left)}, {share:.0%} done"
        )
        if 0 < share < 1:
            text += f", about {duration(passed * (1 - share) / share)} left"
        return f"{text}; {self.result.get('remaining', 0)} remaining"
