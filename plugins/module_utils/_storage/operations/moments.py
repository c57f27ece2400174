# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This module util is PRIVATE to the userns.storage collection.
"""Moments and ages as people and records write them: RFC 3339 in UTC, ``2w``."""

from __future__ import annotations

import datetime
import re
import typing as t

from ..errors import ConfigError

AGE = re.compile(r"(-?\d+)([smhdw])?", re.IGNORECASE)
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}

_FRACTION = re.compile(r"(\.\d{1,9})(?=Z|[+-]|$)")


def say(moment: float) -> str:
    """A moment (seconds since the epoch) in words, whole seconds."""
    when = datetime.datetime.fromtimestamp(int(moment), datetime.timezone.utc)
    return when.strftime("%Y-%m-%dT%H:%M:%SZ")


def say_age(seconds: float) -> str:
    """An age in words: the largest unit of which there are at least two, cut to a whole number."""
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
    except ValueError:
        return None
    return None if when.tzinfo is None else when.timestamp()


def age(option: str, text: str) -> float:
    """Seconds of an age. Raises ConfigError: not an age, or a negative one, which would mean
    "younger than".
    """
    found = AGE.fullmatch(text.strip())
    if found is None:
        raise ConfigError(
            f"{option}: {text}",
            "this is not an age",
            "Write a whole number and one of s, m, h, d, w, for example 2w.",
        )
    number = int(found.group(1))
    if number < 0:
        raise ConfigError(
            f"{option}: {text}", "an age cannot be negative here", f"Write {text.strip()[1:]}."
        )
    return float(number * _SECONDS[(found.group(2) or "s").lower()])
