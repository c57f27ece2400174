# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Parse and format points in time and ages: RFC 3339 in UTC, ``2w``."""

from __future__ import annotations

import datetime
import re
import typing as t

from ..errors import ConfigError

AGE = re.compile(r"(-?\d+)([smhdw])?", re.IGNORECASE)
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}

# In UTC, without a zone.
_EPOCH = datetime.datetime(1970, 1, 1)
_FIRST, _LAST = (
    float((moment - _EPOCH) // datetime.timedelta(seconds=1))
    for moment in (datetime.datetime.min, datetime.datetime.max)
)

_FRACTION = re.compile(r"(\.\d{1,9})(?=Z|[+-]|$)")


def format_time(moment: float) -> str:
    """Format a time (seconds since the epoch) in whole seconds, limited to the years 1 to 9999."""
    seconds = int(max(_FIRST, min(moment, _LAST)))
    # fromtimestamp does not support years before 1970 on all platforms.
    return f"{(_EPOCH + datetime.timedelta(seconds=seconds)).isoformat()}Z"


def format_age(seconds: float) -> str:
    """Format an age in the largest unit of which it has at least two, rounded down."""
    whole = max(int(seconds), 0)
    for unit, name in ((604800, "weeks"), (86400, "days"), (3600, "hours"), (60, "minutes")):
        if whole >= 2 * unit:
            return f"{whole // unit} {name}"
    return f"{whole} seconds"


def from_rfc3339(text: str) -> t.Optional[float]:
    """Seconds since the epoch; None for anything but a date and time with a zone."""
    plain = _FRACTION.sub("", text.strip(), count=1)
    if plain[-1:] in ("Z", "z"):
        plain = plain[:-1] + "+00:00"
    try:
        when = datetime.datetime.fromisoformat(plain)
        return None if when.tzinfo is None else when.timestamp()
    except (ValueError, OverflowError):
        return None


def is_moment(text: str) -> bool:
    """Whether a date and time without a zone exists."""
    try:
        datetime.datetime.fromisoformat(text)
    except ValueError:
        return False
    return True


def age(option: str, text: str) -> float:
    """Parse an age to seconds. Raises ConfigError: it is no age, or negative, which would mean
    "younger than".
    """
    found = AGE.fullmatch(text.strip())
    if found is None:
        raise ConfigError(
            f"{option}: {text}",
            "it is not an age",
            "Write a whole number and one of s, m, h, d, w, for example 2w.",
        )
    number = int(found.group(1))
    if number < 0:
        raise ConfigError(
            f"{option}: {text}", "the age cannot be negative", f"Write {text.strip()[1:]}."
        )
    return float(number * _SECONDS[(found.group(2) or "s").lower()])
