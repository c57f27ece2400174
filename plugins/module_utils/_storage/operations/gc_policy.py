# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The table of the options of layer_gc: which layers to remove, to protect, and when to stop.

A field of :class:`Policy` with :func:`as_option` defines an option for the argument spec of the module, the settings
of the service and the action plugin. The predicate of a rule is in gc_plan.py.

Ages are those of ``ansible.builtin.find`` (``2w``; seconds without a unit). Sizes are those of
Ansible's ``human_to_bytes`` (``10G``, ``1.5 GB``), and ``KiB``, ``MiB``, ``GiB`` as well. A size
may be a percentage of the filesystem (``10%``).
"""

from __future__ import annotations

import datetime
import re
import typing as t
from dataclasses import dataclass, field, fields

from ..errors import ConfigError, size_text
from .options import Option, as_option, options_of
from .time_formats import AGE, age

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
    """A number of bytes, or a share of the filesystem."""

    bytes: int = 0
    percent: t.Optional[float] = None

    def of(self, total: int) -> int:
        """The amount in bytes on a filesystem of ``total`` bytes."""
        if self.percent is None:
            return self.bytes
        return int(total * self.percent / 100)

    def __str__(self) -> str:
        return size_text(self.bytes) if self.percent is None else f"{self.percent:g} %"


def moment(option: str, text: str, now: float) -> float:
    """The seconds since the epoch of a date (``2026-03-01``, ``2026-03-01T12:00:00Z``; UTC unless it
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
            "it is neither an age nor a date",
            "Use for example 2w, or 2026-03-01T12:00:00Z.",
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
            "Removal starts at high_threshold and stops at low_threshold.",
        )
    return high, low


def copies(option: str, number: t.Optional[int]) -> t.Optional[int]:
    """A number of copies. Raises ConfigError when negative."""
    if number is not None and number < 0:
        raise ConfigError(f"{option}: {number}", "the number of copies cannot be negative")
    return number


def _percentage(option: str, number: float) -> float:
    if not 0 <= number <= 100:
        raise ConfigError(f"{option}: {number:g}", "a percentage must be between 0 and 100")
    return number


def _bad_size(option: str, text: str) -> ConfigError:
    return ConfigError(
        f"{option}: {text}",
        "it is not a size",
        "Write for example 10G, 512MB, 1.5GiB, a number of bytes, or a percentage such as 10% where it is allowed.",
    )


# Rules select layers for removal, each on its own. A part belongs to the rule of the same pair. Protections keep
# layers, limits stop all rules, and repairs concern everything that is no intact mapped layer. The rule of the kind
# IMAGE selects images; its predicate is in superseded_images.py.
RULE, PART, PROTECTION, LIMIT, REPAIR = "rule", "part", "protection", "limit", "repair"
IMAGE = "image"

# From the name of an option, its value as a task gives it, and the time (seconds since the epoch) to the value that
# the plan uses. Raises ConfigError.
Reader = t.Callable[[str, t.Any, float], t.Any]


def _as_given(_name: str, value: t.Any, _now: float) -> t.Any:
    return value


def _texts(_name: str, value: t.Any, _now: float) -> t.Tuple[str, ...]:
    return tuple(value)


def _ids(_name: str, value: t.Any, _now: float) -> t.FrozenSet[str]:
    return frozenset(value)


def _age(name: str, value: t.Any, _now: float) -> float:
    return age(name, value)


def _moment(name: str, value: t.Any, now: float) -> float:
    return moment(name, value, now)


def _amount(name: str, value: t.Any, _now: float) -> Amount:
    return amount(name, value)


def _copies(name: str, value: t.Any, _now: float) -> t.Optional[int]:
    return copies(name, value)


def _is(expected: str) -> Reader:
    return lambda _name, value, _now: value == expected


def _shared(_name: str, value: t.Any, _now: float) -> str:
    return "shared is true" if value else ""


@dataclass(frozen=True)
class GcOption(Option):
    """An option of layer_gc.

    :param kind: RULE, PART, PROTECTION, LIMIT, REPAIR or IMAGE
    :param read: converts the value for the plan
    :param trials: for a rule, the values for which a run without rules predicts the freed space
    :param pair: for a rule, the name of its part; neither is given without the other
    :param of_one_run: whether it applies to a single run, so that policies of the service do not have it
    :param in_survey: whether the AWX survey asks for it
    """

    kind: str = RULE
    read: Reader = _as_given
    trials: t.Tuple[t.Any, ...] = ()
    pair: str = ""
    of_one_run: bool = False
    in_survey: bool = False


_TRIED_AGES = ("1d", "1w", "4w", "26w")
_TRIED_SHARES = ("10%", "20%")


@dataclass(frozen=True)
class Policy:
    """The rules, the protections and the limits of one run. Ages in seconds, times in seconds since the epoch.

    A layer is removed if any rule selects it and no protection holds. ``images`` and ``origin`` protect the layers
    that they do not select. ``shared`` describes the readers of the store, and does not protect layers that
    ``layers`` names. ``keep_layers`` contains IDs of declared layers, from callers within the collection.
    """

    images: t.Tuple[str, ...] = field(
        default=(), metadata=as_option(GcOption("list", (), kind=PROTECTION, read=_texts))
    )
    layers: t.FrozenSet[str] = field(
        default=frozenset(), metadata=as_option(GcOption("list", (), read=_ids, of_one_run=True))
    )
    keep_images: t.Tuple[str, ...] = field(
        default=(),
        metadata=as_option(GcOption("list", (), kind=PROTECTION, read=_texts, in_survey=True)),
    )
    keep_mappings: t.Tuple[str, ...] = field(
        default=(), metadata=as_option(GcOption("list", (), kind=PROTECTION, read=_texts))
    )
    keep_layers: t.FrozenSet[str] = frozenset()
    shared: str = field(
        default="", metadata=as_option(GcOption("bool", kind=PROTECTION, read=_shared))
    )
    min_age: float = field(
        default=600.0,
        metadata=as_option(GcOption("str", "10m", kind=PROTECTION, read=_age, in_survey=True)),
    )
    duplicates: bool = field(
        default=False, metadata=as_option(GcOption("bool", False, trials=(True,)))
    )
    unusable_maps: bool = field(
        default=False, metadata=as_option(GcOption("bool", False, trials=(True,)))
    )
    unused_for: t.Optional[float] = field(
        default=None, metadata=as_option(GcOption(read=_age, trials=_TRIED_AGES, in_survey=True))
    )
    created_before: t.Optional[float] = field(
        default=None, metadata=as_option(GcOption(read=_moment, trials=_TRIED_AGES))
    )
    max_copies_per_image: t.Optional[int] = field(
        default=None,
        metadata=as_option(GcOption("int", read=_copies, trials=(0, 1, 2), in_survey=True)),
    )
    max_used_space: t.Optional[Amount] = field(
        default=None,
        metadata=as_option(GcOption(read=_amount, trials=_TRIED_SHARES, in_survey=True)),
    )
    reserved_space: t.Optional[Amount] = field(
        default=None, metadata=as_option(GcOption(kind=LIMIT, read=_amount))
    )
    min_free_space: t.Optional[Amount] = field(
        default=None, metadata=as_option(GcOption(read=_amount, trials=_TRIED_SHARES))
    )
    high_threshold: t.Optional[float] = field(
        default=None,
        metadata=as_option(GcOption("float", trials=(85,), pair="low_threshold", in_survey=True)),
    )
    low_threshold: t.Optional[float] = field(
        default=None, metadata=as_option(GcOption("float", kind=PART, trials=(80,), in_survey=True))
    )
    superseded_images: t.Optional[float] = field(
        default=None, metadata=as_option(GcOption(kind=IMAGE, read=_age, in_survey=True))
    )
    max_freed: t.Optional[Amount] = field(
        default=None, metadata=as_option(GcOption(kind=LIMIT, read=_amount))
    )
    ours_only: bool = field(
        default=False,
        metadata=as_option(
            GcOption("str", "any", ("any", "ours"), "origin", kind=PROTECTION, read=_is("ours"))
        ),
    )
    remove_orphans: bool = field(
        default=False,
        metadata=as_option(
            GcOption(
                "str",
                "report",
                ("report", "remove"),
                "orphans",
                kind=REPAIR,
                read=_is("remove"),
                in_survey=True,
            )
        ),
    )
    repair_broken: bool = field(
        default=False,
        metadata=as_option(
            GcOption(
                "str",
                "report",
                ("report", "repair"),
                "broken",
                kind=REPAIR,
                read=_is("repair"),
                in_survey=True,
            )
        ),
    )

    @property
    def has_rule(self) -> bool:
        """Whether any rule is set."""
        defaults = {item.name: item.default for item in fields(self)}
        return any(
            getattr(self, option.field) != defaults[option.field]
            for option in options_of(type(self), GcOption).values()
            if option.kind in (RULE, IMAGE)
        )


OPTIONS = options_of(Policy, GcOption)


def named(*kinds: str) -> t.Tuple[str, ...]:
    """The names of the options of these kinds, in the order of the table."""
    return tuple(name for name, option in OPTIONS.items() if option.kind in kinds)


def pairs() -> t.List[t.Tuple[str, str]]:
    """The options that must be given together, as in Ansible's ``required_together``."""
    return [(name, option.pair) for name, option in OPTIONS.items() if option.pair]


def read(options: t.Mapping[str, t.Any], now: float) -> Policy:
    """A policy from options as a task or a configuration gives them.

    :param now: seconds since the epoch
    :raises ConfigError: an option is invalid
    """
    values = {
        option.field: option.read(name, options[name], now)
        for name, option in OPTIONS.items()
        if option.is_given(options.get(name))
    }
    high, low = thresholds(values.get("high_threshold"), values.get("low_threshold"))
    return Policy(**{**values, "high_threshold": high, "low_threshold": low})
