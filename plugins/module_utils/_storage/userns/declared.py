# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The functions that run inside a namespace, each with the declared form of its return value."""

from __future__ import annotations

import typing as t

from .shapes import Check, plain

F = t.TypeVar("F", bound=t.Callable[..., t.Any])

_FORMS: t.Dict[t.Tuple[str, str], Check] = {}
# For functions without a declaration, such as those of tests.
_ANY = plain(8)


def returns(form: Check) -> t.Callable[[F], F]:
    """Declare the form of a function's result. The process that runs it can return nothing else."""

    def declare(function: F) -> F:
        _FORMS[(function.__module__, function.__qualname__)] = form
        return function

    return declare


def form_of(function: t.Callable[..., t.Any]) -> Check:
    """The declared form of a function's result; any plain data without a declaration."""
    return _FORMS.get((function.__module__, function.__qualname__), _ANY)


def is_declared(function: t.Callable[..., t.Any]) -> bool:
    """Whether the function has a declaration."""
    return (function.__module__, function.__qualname__) in _FORMS
