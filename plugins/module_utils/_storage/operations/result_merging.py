# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Merge the results for the stores of several users into a single result of a module."""

from __future__ import annotations

import typing as t

from ..errors import StorageError

# Keys of a result that are not merged.
_APART = ("changed", "diff", "error", "facts", "warnings")

Outcome = t.Union[t.Dict[str, t.Any], StorageError]


def joined(outcomes: t.Mapping[str, Outcome]) -> t.Dict[str, t.Any]:
    """Join the results of an operation on one store each.

    A user whose store could not be used has an entry in ``stores`` with an ``error``. The result has an
    ``error`` if anything was refused for any user, and its ``facts`` if there was only one user.

    :param outcomes: by user, in the requested order; the error if there is no result
    """
    result = _empty(layers=[], partial=False, remaining=0)
    for user, outcome in _each_result(result, outcomes):
        for key in ("changed", "partial"):
            result[key] = result[key] or outcome[key]
        result["remaining"] += outcome["remaining"]
        if "pulled" in outcome:
            pulled = result.setdefault("pulled", [])
            pulled += (name for name in outcome["pulled"] if name not in pulled)
        for key in ("layers", "stores", "warnings"):
            result[key] += outcome.get(key, [])
        for side in ("before", "after"):
            result["diff"][side][user] = outcome["diff"][side]
    return result


def merged(outcomes: t.Mapping[str, Outcome]) -> t.Dict[str, t.Any]:
    """Merge the results of an operation on one store each.

    ``stores`` has the result of each store with its ``user``, or the ``error``. In addition, lists of all stores are
    concatenated, with the ``user`` in each entry, and numbers are added up. ``target_met`` is true if it is true in
    all stores, any other switch if it is true in any store.

    :param outcomes: by user, in the order of the option; the error if there is no result
    """
    result = _empty()
    for user, outcome in _each_result(result, outcomes):
        result["changed"] = result["changed"] or bool(outcome.get("changed"))
        result["warnings"] += outcome.get("warnings", ())
        diff = outcome.get("diff") or {}
        if isinstance(diff, list):
            # Diffs of files contain their paths.
            before = result["diff"]
            result["diff"] = [*(before if isinstance(before, list) else ()), *diff]
        else:
            for side, shown in diff.items():
                result["diff"][side][user] = shown
        own = {key: value for key, value in outcome.items() if key not in _APART}
        result["stores"].append({"user": user, **own})
        for key, value in own.items():
            _add(result, key, value, user)
        if outcome.get("error"):
            result["stores"][-1]["error"] = outcome["error"]
    return result


def _add(result: t.Dict[str, t.Any], key: str, value: t.Any, user: str) -> None:
    if isinstance(value, bool):
        before = result.get(key, value)
        result[key] = (before and value) if key == "target_met" else (before or value)
    elif isinstance(value, (int, float)):
        result[key] = result.get(key, 0) + value
    elif isinstance(value, (list, tuple)):
        entries = ({**item, "user": user} if isinstance(item, dict) else item for item in value)
        result.setdefault(key, []).extend(entries)


def _empty(**more: t.Any) -> t.Dict[str, t.Any]:
    """An empty result, to which those of the stores are added."""
    diff: t.Dict[str, t.Any] = {"before": {}, "after": {}}
    return {"changed": False, "stores": [], "warnings": [], "diff": diff, **more}


def _each_result(
    result: t.Dict[str, t.Any], outcomes: t.Mapping[str, Outcome]
) -> t.Iterator[t.Tuple[str, t.Dict[str, t.Any]]]:
    """The results of the stores, by user. Failures are added to ``result`` as stores, and finally as its error."""
    messages: t.Dict[str, str] = {}
    facts: t.Dict[str, t.Any] = {}
    for user, outcome in outcomes.items():
        if isinstance(outcome, StorageError):
            messages[user], facts = str(outcome), dict(outcome.facts)
            result["stores"].append({"user": user, "error": str(outcome)})
            continue
        yield user, outcome
        if outcome.get("error"):
            messages[user], facts = outcome["error"], dict(outcome.get("facts", {}))
    _add_failures(result, messages, facts, len(outcomes))


def _add_failures(
    result: t.Dict[str, t.Any], messages: t.Mapping[str, str], facts: t.Dict[str, t.Any], count: int
) -> None:
    """Add the messages of the users whose stores failed."""
    if messages:
        result["error"] = " ".join(f"For {user}: {text}" for user, text in messages.items())
        if count > 1:
            counted = f"{len(messages)} of {count} users failed."
            result["error"] = f"{counted} {result['error']}"
            # The user cannot be named here, but the traceback of a bug must not be lost.
            facts = {key: value for key, value in facts.items() if key == "trace"}
        result["facts"] = facts
