# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This plugin util is PRIVATE to the userns.storage collection.
"""Read registered variables, whose values hosts and owners of stores control, with the expected types."""

from __future__ import annotations

import collections.abc
import typing as t

from ._escapes import terminal

Facts = t.Mapping[str, t.Any]

# The limit of each text, because hosts must not make the output arbitrarily long.
_MOST_ENTRIES = 1000
_LONGEST_TEXT = 500
_HIGHEST = 2**63 - 1


class Malformed(Exception):
    """Variables of a host do not have the form of results of the modules. The message names the location."""


def results_of(registered: t.Any, name: str) -> t.List[Facts]:
    """The results of a task with a loop; a task that failed before its loop has a single result, or none."""
    task = dict_of(registered, name)
    if not task:
        return []
    if task.get("results") is None:
        found = [] if task.get("skipped") else [task]
    else:
        found = dicts_of(task, "results", name)
    return [item for item in found if not item.get("skipped")]


def dict_of(value: t.Any, name: str) -> Facts:
    if value is None or value == "":
        return {}
    if not isinstance(value, collections.abc.Mapping):
        raise Malformed(f"{name} is of type {type(value).__name__}, not a dictionary")
    return value


def list_of(entry: Facts, key: str, name: str) -> t.Sequence[t.Any]:
    value = entry.get(key)
    if value is None or value == "":
        return ()
    if not isinstance(value, (list, tuple)):
        raise Malformed(f"{key} of {name} is of type {type(value).__name__}, not a list")
    return value[:_MOST_ENTRIES]


def dicts_of(entry: Facts, key: str, name: str) -> t.List[Facts]:
    return [dict_of(value, f"an entry of {key} of {name}") for value in list_of(entry, key, name)]


def number_of(value: t.Any) -> int:
    """Bytes or a count; 0 if it is no number or outside the range of filesystems."""
    if isinstance(value, bool) or not isinstance(value, int):
        return 0
    return int(value) if 0 <= value <= _HIGHEST else 0


def text_of(value: t.Any) -> str:
    """A visible line of limited length. For structures only the type, because their text may be endless."""
    if value is None or value is False:
        return ""
    if not isinstance(value, (str, int, float)):
        return f"({type(value).__name__})"
    if isinstance(value, int) and abs(value) > _HIGHEST:
        return "(number)"
    text = terminal(" ".join(str(value)[: 10 * _LONGEST_TEXT].split()))
    return text if len(text) <= _LONGEST_TEXT else f"{text[: _LONGEST_TEXT - 1]}…"
