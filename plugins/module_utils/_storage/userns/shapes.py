# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The forms that data from a less privileged process must have.

A check returns the fault of a JSON value, or an empty string.
"""

from __future__ import annotations

import math
import re
import typing as t

Check = t.Callable[[t.Any], str]

# Characters.
TEXT_LIMIT = 1024 * 1024
# Sums of sizes in a hostile store may exceed 64 bits, but not this number.
_NUMBER_LIMIT = 10**30
_TABLE_LIMIT = 100_000

# Surrogates that represent no byte of a path; os.fsdecode only uses U+DC80 to U+DCFF.
ODD_SURROGATES = re.compile("[\ud800-\udc7f\udd00-\udfff]")
# Ansible interprets objects with such keys as other than data.
_RESERVED = re.compile("_?_ansible")


def text(value: t.Any) -> str:
    """A string of limited length, without surrogates that represent no byte."""
    if not isinstance(value, str):
        return "is not a string"
    if len(value) > TEXT_LIMIT:
        return f"is longer than {TEXT_LIMIT} characters"
    if not value.isascii() and ODD_SURROGATES.search(value):
        return "has a surrogate that stands for no byte"
    return ""


def word(pattern: str) -> Check:
    """A string that fully matches a pattern."""
    compiled = re.compile(pattern)

    def check(value: t.Any) -> str:
        if not isinstance(value, str) or not compiled.fullmatch(value):
            return f"is not of the form {pattern}"
        return ""

    return check


def choice(*values: str) -> Check:
    """One of some strings."""
    allowed = frozenset(values)

    def check(value: t.Any) -> str:
        return "" if isinstance(value, str) and value in allowed else "is not a known word"

    return check


def flag(value: t.Any) -> str:
    """A boolean."""
    return "" if isinstance(value, bool) else "is not a boolean"


def whole(value: t.Any) -> str:
    """A whole number."""
    if not isinstance(value, int) or isinstance(value, bool):
        return "is not a whole number"
    return "" if -_NUMBER_LIMIT < value < _NUMBER_LIMIT else "is too large a number"


def small(value: t.Any) -> str:
    """A non-negative number in the range of the C type int: a PID or an errno."""
    return whole(value) or ("" if 0 <= value < 2**31 else "is no number of that kind")


def real(value: t.Any) -> str:
    """A finite number."""
    if isinstance(value, float):
        return "" if math.isfinite(value) else "is not a finite number"
    return whole(value) and "is not a number"


def nothing(value: t.Any) -> str:
    """None."""
    return "" if value is None else "is not null"


class Maybe:
    """None, or a value of another form.

    :ivar form: the other form
    """

    def __init__(self, form: Check) -> None:
        self.form = form

    def __call__(self, value: t.Any) -> str:
        """The fault of a value, or an empty string."""
        return "" if value is None else self.form(value)


class Either:
    """A value of any of several forms.

    :ivar forms: the forms
    """

    def __init__(self, *forms: Check) -> None:
        self.forms = forms

    def __call__(self, value: t.Any) -> str:
        """The fault of a value for the last of the forms, or an empty string."""
        wrong = ""
        for form in self.forms:
            wrong = form(value)
            if not wrong:
                return ""
        return wrong


class Items:
    """A list; its length is only limited by the limits of a message.

    :ivar entry: the form of its entries
    """

    def __init__(self, entry: Check) -> None:
        self.entry = entry

    def __call__(self, value: t.Any) -> str:
        """The fault of a value, or an empty string."""
        if not isinstance(value, list):
            return "is not a list"
        check = self.entry
        for entry in value:
            wrong = check(entry)
            if wrong:
                return f"has an entry that {wrong}"
        return ""


class Record:
    """An object with exactly these fields.

    :ivar fields: the form of each
    :ivar optional: fields that may be missing
    """

    def __init__(
        self, fields: t.Mapping[str, Check], optional: t.Optional[t.Mapping[str, Check]] = None
    ) -> None:
        self.fields = {**fields, **(optional or {})}
        self.optional = frozenset(optional or ())
        self._required = len(self.fields) - len(self.optional)

    def __call__(self, value: t.Any) -> str:
        """The fault of a value, or an empty string."""
        if not isinstance(value, dict):
            return "is not an object"
        fields, optional, found = self.fields, self.optional, 0
        for key, entry in value.items():
            check = fields.get(key)
            if check is None:
                return f"has the unknown field {key[:60]!a}"
            wrong = check(entry)
            if wrong:
                return f"has the field {key!r} that {wrong}"
            found += key not in optional
        if found != self._required:
            missing = next(key for key in fields if key not in value and key not in optional)
            return f"lacks the field {missing!r}"
        return ""


def table(check: Check) -> Check:
    """An object with any keys, such as names of images, and values of one form."""

    def checked(value: t.Any) -> str:
        if not isinstance(value, dict):
            return "is not an object"
        if len(value) > _TABLE_LIMIT:
            return f"has more than {_TABLE_LIMIT} fields"
        for key, entry in value.items():
            wrong = text(key) or check(entry)
            if wrong:
                return f"has the field {key[:60]!a} that {wrong}"
            if _RESERVED.match(key):
                return f"has the reserved field {key[:60]!a}"
        return ""

    return checked


scalar = Either(nothing, flag, whole, real, text)


def plain(depth: int) -> Check:
    """Plain data of any form.

    :param depth: the maximum nesting of lists and objects
    """
    check: Check = scalar
    for _level in range(depth):
        check = Either(scalar, Items(check), table(check))
    return check
