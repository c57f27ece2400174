# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This module util is PRIVATE to the userns.storage collection.
"""What the user allows and wants to be collected, read from the options as they were typed.

Ages are those of ``ansible.builtin.find`` (``2w``; seconds without a unit). Sizes are those of
Ansible's ``human_to_bytes`` (``10G``, ``1.5 GB``), and ``KiB``, ``MiB``, ``GiB`` as well. A size
may be a percentage of the filesystem (``10%``).
"""

from __future__ import annotations

import datetime
import re
import typing as t
from dataclasses import dataclass

from ..errors import ConfigError
from .moments import AGE, age

_SIZE = re.compile(r"([0-9]*\.?[0-9]+)(?:\s*([A-Za-z]+))?\s*")
_POWERS = {letter: 1 << (10 * power) for power, letter in enumerate("BKMGTPEZY")}
_LONG_UNITS = {
    "B": "byte",
    "K": "kilobyte",
    "M": "megabyte",
    "G": "gigabyte",
    "T": "terabyte",
    "P": "petabyte",
    "E": "exabyte",
    "Z": "zetabyte",
    "Y": "yottabyte",
}
_PERCENT = re.compile(r"([0-9]*\.?[0-9]+)\s*%\s*")


@dataclass(frozen=True)
class Amount:
    """So many bytes, or a share of the filesystem."""

    bytes: int = 0
    percent: t.Optional[float] = None

    def of(self, total: int) -> int:
        """The amount in bytes on a filesystem of ``total`` bytes."""
        if self.percent is None:
            return self.bytes
        return int(total * self.percent / 100)

    def __str__(self) -> str:
        return f"{self.bytes} bytes" if self.percent is None else f"{self.percent:g} %"


@dataclass(frozen=True)
class Policy:
    """The rules, the protections and the limits of one run. Ages in seconds, moments in seconds
    since the epoch.

    Rules, of which any one suffices: ``layers``, ``duplicates``, ``unusable_maps``, ``unused_for``,
    ``created_before``, ``max_copies_per_image``, ``max_used_space``, ``min_free_space``,
    ``high_threshold`` with ``low_threshold``. Protections, of which any one suffices: ``images``
    and ``origin`` (what is not chosen is kept), ``keep_images``, ``keep_mappings``, ``keep_layers``,
    ``min_age``.
    Limits: ``reserved_space``, ``max_freed``.
    """

    images: t.Tuple[str, ...] = ()
    layers: t.FrozenSet[str] = frozenset()
    keep_images: t.Tuple[str, ...] = ()
    keep_mappings: t.Tuple[str, ...] = ()
    keep_layers: t.FrozenSet[str] = frozenset()
    min_age: float = 600.0
    duplicates: bool = False
    unusable_maps: bool = False
    unused_for: t.Optional[float] = None
    created_before: t.Optional[float] = None
    max_copies_per_image: t.Optional[int] = None
    max_used_space: t.Optional[Amount] = None
    reserved_space: t.Optional[Amount] = None
    min_free_space: t.Optional[Amount] = None
    high_threshold: t.Optional[float] = None
    low_threshold: t.Optional[float] = None
    max_freed: t.Optional[Amount] = None
    ours_only: bool = False
    remove_orphans: bool = False
    repair_broken: bool = False

    @property
    def has_rule(self) -> bool:
        """Whether anything at all may be removed because of age, number or space."""
        return bool(
            self.layers
            or self.duplicates
            or self.unusable_maps
            or self.unused_for is not None
            or self.created_before is not None
            or self.max_copies_per_image is not None
            or self.max_used_space is not None
            or self.min_free_space is not None
            or self.high_threshold is not None
        )


def moment(option: str, text: str, now: float) -> float:
    """Seconds since the epoch, of a date (``2026-03-01``, ``2026-03-01T12:00:00Z``; UTC unless it
    says otherwise) or an age before ``now``.
    """
    plain = text.strip()
    if AGE.fullmatch(plain):
        return now - age(option, plain)
    if plain[-1:] in ("Z", "z"):
        plain = plain[:-1] + "+00:00"
    try:
        when = datetime.datetime.fromisoformat(plain)
    except ValueError:
        raise ConfigError(
            f"{option}: {text}",
            "this is neither an age nor a date",
            "Write for example 2w, or 2026-03-01T12:00:00Z.",
        ) from None
    if when.tzinfo is None:
        when = when.replace(tzinfo=datetime.timezone.utc)
    return when.timestamp()


def size(option: str, text: str) -> int:
    """Bytes of a size. Raises ConfigError."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise _bad_size(option, text)
    number, unit = found.group(1), found.group(2)
    if unit is None:
        return int(number) if number.isdigit() else round(float(number))
    letter = unit[0].upper()
    power = _POWERS.get(letter)
    accepted = (letter + "B", letter + "iB") if letter != "B" else ()
    if power is None or (
        len(unit) > 1 and unit.lower() != _LONG_UNITS[letter] and unit not in accepted
    ):
        raise _bad_size(option, text)
    return round(float(number) * power)


def amount(option: str, text: str) -> Amount:
    """A size, or a percentage of the filesystem. Raises ConfigError."""
    found = _PERCENT.fullmatch(text.strip())
    if found is None:
        return Amount(size(option, text))
    return Amount(percent=_percentage(option, float(found.group(1))))


def thresholds(
    high: t.Optional[float], low: t.Optional[float]
) -> t.Tuple[t.Optional[float], t.Optional[float]]:
    """Both percentages checked. Raises ConfigError: out of 0 to 100, or the low one is not below
    the high one.
    """
    if high is None or low is None:
        return None, None
    _percentage("high_threshold", high)
    _percentage("low_threshold", low)
    if low >= high:
        raise ConfigError(
            f"low_threshold: {low:g}",
            f"it is not below high_threshold ({high:g})",
            "Collecting starts at high_threshold and goes on down to low_threshold.",
        )
    return high, low


def copies(option: str, number: t.Optional[int]) -> t.Optional[int]:
    """A number of copies. Raises ConfigError when negative."""
    if number is not None and number < 0:
        raise ConfigError(f"{option}: {number}", "a number of copies cannot be negative")
    return number


def _percentage(option: str, number: float) -> float:
    if not 0 <= number <= 100:
        raise ConfigError(f"{option}: {number:g}", "a percentage lies between 0 and 100")
    return number


def _bad_size(option: str, text: str) -> ConfigError:
    return ConfigError(
        f"{option}: {text}",
        "this is not a size",
        "Write for example 10G, 512MB, 1.5GiB, a number of bytes, or where a share is allowed 10%.",
    )
