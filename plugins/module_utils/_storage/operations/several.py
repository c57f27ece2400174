# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This module util is PRIVATE to the userns.storage collection.
"""One result of a module out of those of several users' stores."""

from __future__ import annotations

import typing as t

from ..errors import StorageError

Outcome = t.Union[t.Dict[str, t.Any], StorageError]


def joined(outcomes: t.Mapping[str, Outcome]) -> t.Dict[str, t.Any]:
    """The results of an operation on one store each, made one.

    A user whose store could not be worked on at all stands in ``stores`` with an ``error``. The result has an
    ``error`` when anything was refused to anybody, and the ``facts`` of it where there was only one user.

    :param outcomes: by user, in the order asked; the error where there is no result
    """
    result: t.Dict[str, t.Any] = {
        "changed": False,
        "layers": [],
        "partial": False,
        "remaining": 0,
        "stores": [],
        "warnings": [],
        "diff": {"before": {}, "after": {}},
    }
    messages = {}
    facts: t.Dict[str, t.Any] = {}
    for user, outcome in outcomes.items():
        if isinstance(outcome, StorageError):
            messages[user], facts = str(outcome), dict(outcome.facts)
            result["stores"].append({"user": user, "error": str(outcome)})
            continue
        for key in ("changed", "partial"):
            result[key] = result[key] or outcome[key]
        result["remaining"] += outcome["remaining"]
        for key in ("layers", "stores", "warnings"):
            result[key] += outcome.get(key, [])
        for side in ("before", "after"):
            result["diff"][side][user] = outcome["diff"][side]
        if outcome.get("error"):
            messages[user], facts = outcome["error"], dict(outcome.get("facts", {}))
    if messages:
        result["error"] = " ".join(f"For {user}: {text}" for user, text in messages.items())
        if len(outcomes) > 1:
            counted = f"{len(messages)} of {len(outcomes)} users met with a refusal."
            result["error"] = f"{counted} {result['error']}"
            # Whose they are could not be told; but the trace of a fault must not get lost.
            facts = {key: value for key, value in facts.items() if key == "trace"}
        result["facts"] = facts
    return result
