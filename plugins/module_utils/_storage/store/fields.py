# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The fields in the records of layers, images and containers, and their valid values."""

from __future__ import annotations

import itertools
import re
import typing as t

Raw = t.Dict[str, t.Any]
# Modifies a copy of a record.
Change = t.Callable[[Raw], None]
# Returns the fault of a value, or an empty string.
Check = t.Callable[[t.Any], str]
Fields = t.Mapping[str, Check]

# Runtimes write at most 6 levels. The limit keeps Python's recursion limit from being reached.
DEPTH_LIMIT = 64

TIME = re.compile(
    r"([0-9]{4})-([0-9]{2})-([0-9]{2})T([0-9]{2}):([0-9]{2}):([0-9]{2})(?:\.([0-9]+))?"
    r"(?:Z|([+-])([0-9]{2}):([0-9]{2}))"
)
_ID = re.compile(r"[0-9a-f]{64}")
_LEAST, _MOST = -(2**63), 2**63 - 1


def _check_string(value: t.Any) -> str:
    return "" if isinstance(value, str) else "is not a string"


def _check_id(value: t.Any) -> str:
    if not isinstance(value, str):
        return "is not a string"
    return "" if not value or _ID.fullmatch(value) else "is not 64 lower-case hexadecimal digits"


def _check_uint32s(value: t.Any) -> str:
    if not isinstance(value, list):
        return "is not a list"
    if not value:
        return ""
    if set(map(type, value)) != {int}:
        return "has an entry that is not a whole number"
    return "" if min(value) >= 0 and max(value) < 2**32 else "has an entry that is not an ID"


def _check_list(check: Check) -> Check:
    def verify(value: t.Any) -> str:
        if not isinstance(value, list):
            return "is not a list"
        for item in value:
            wrong = check(item)
            if wrong:
                return f"has an entry that {wrong}"
        return ""

    return verify


def _check_map(check: Check) -> Check:
    def verify(value: t.Any) -> str:
        if not isinstance(value, dict):
            return "is not an object"
        for item in value.values():
            wrong = check(item)
            if wrong:
                return f"has an entry that {wrong}"
        return ""

    return verify


def _check_time(value: t.Any) -> str:
    if not isinstance(value, str):
        return "is not a string"
    return "" if TIME.fullmatch(value) else "is not a time such as 2026-01-31T12:00:00Z"


def _check_int64(value: t.Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int):
        return "is not a whole number"
    return "" if _LEAST <= value <= _MOST else f"is outside {_LEAST} to {_MOST}"


def _check_depth(value: t.Any) -> str:
    return f"is nested more than {DEPTH_LIMIT} deep" if _too_deep(value) else ""


def _too_deep(value: t.Any) -> bool:
    level = [value]
    for _depth in range(DEPTH_LIMIT):
        deeper: t.List[t.Any] = []
        for item in level:
            if isinstance(item, dict):
                deeper.extend(item.values())
            elif isinstance(item, list):
                deeper.extend(item)
        if not deeper:
            return False
        level = deeper
    return True


_NAMES = _check_list(_check_string)
_ID_RANGES = _check_list(_check_map(_check_int64))
_SIZES = _check_map(_check_int64)
_DIGESTS = _check_map(_check_string)
_ANY_MAP = _check_map(lambda _value: "")


def _check_open_map(value: t.Any) -> str:
    return _ANY_MAP(value) or _check_depth(value)


LAYER: Fields = {
    "id": _check_id,
    "names": _NAMES,
    "parent": _check_id,
    "metadata": _check_string,
    "mountlabel": _check_string,
    "created": _check_time,
    "compressed-diff-digest": _check_string,
    "compressed-size": _check_int64,
    "diff-digest": _check_string,
    "toc-digest": _check_string,
    "diff-size": _check_int64,
    "compression": _check_int64,
    "uidset": _check_uint32s,
    "gidset": _check_uint32s,
    "flags": _check_open_map,
    "uidmap": _ID_RANGES,
    "gidmap": _ID_RANGES,
    "big-data-names": _NAMES,
}

IMAGE: Fields = {
    "id": _check_id,
    "digest": _check_string,
    "names": _NAMES,
    "names-history": _NAMES,
    "layer": _check_id,
    "mapped-layers": _check_list(_check_id),
    "metadata": _check_string,
    "big-data-names": _NAMES,
    "big-data-sizes": _SIZES,
    "big-data-digests": _DIGESTS,
    "created": _check_time,
    "flags": _check_open_map,
}

CONTAINER: Fields = {
    "id": _check_id,
    "names": _NAMES,
    "image": _check_id,
    "layer": _check_id,
    "metadata": _check_string,
    "big-data-names": _NAMES,
    "big-data-sizes": _SIZES,
    "big-data-digests": _DIGESTS,
    "created": _check_time,
    "flags": _check_open_map,
    "uidmap": _ID_RANGES,
    "gidmap": _ID_RANGES,
}


def first_fault(raw: Raw, fields: Fields) -> t.Optional[t.Tuple[str, str]]:
    """The first invalid field of a record, and its fault."""
    for key, value in raw.items():
        check = fields.get(key)
        if check is not None:
            wrong = check(value) if value is not None else ""
        elif key.lower() in fields:
            # Go matches names case-insensitively, and would use such a field.
            wrong = f"is spelled differently from {key.lower()!r}"
        else:
            wrong = _check_depth(value)
        if wrong:
            return key, wrong
    return None if raw.get("id") else ("id", "is missing")


def all_good(records: t.Sequence[t.Any], fields: Fields) -> bool:
    """Whether ``first_fault`` finds nothing in all of these records. Fast, and may
    return false for valid records.

    Most records of a file have the same fields, and many have equal values.
    """
    if set(map(type, records)) - {dict}:
        return False
    alike: t.Dict[t.Tuple[str, ...], t.List[Raw]] = {}
    for raw in records:
        alike.setdefault(tuple(raw), []).append(raw)
    for names, group in alike.items():
        if "id" not in names:
            return False
        for name in names:
            check = fields.get(name)
            values = [raw[name] for raw in group]
            if check is None or (name == "id" and not all(values)):
                return False
            if not _column_is_good(values, check):
                return False
    return True


def _column_is_good(values: t.List[t.Any], check: Check) -> bool:
    """Whether the values of a field in many records are valid."""
    kinds = set(map(type, values))
    if kinds == {str} and check in _STRINGS:
        pattern = _STRINGS[check]
        return pattern is None or all(map(pattern.fullmatch, values))
    if kinds == {int} and check is _check_int64:
        return bool(min(values) >= _LEAST and max(values) <= _MOST)
    if kinds == {list} and check is _check_uint32s:
        numbers = list(itertools.chain.from_iterable(values))
        return not check(numbers)
    if kinds == {list} and check is _ID_RANGES:
        values = list(dict(zip(map(repr, values), values)).values())
    return not any(check(value) for value in values if value is not None)


_STRINGS: t.Dict[Check, t.Optional[t.Pattern[str]]] = {
    _check_string: None,
    _check_id: _ID,
    _check_time: TIME,
}
