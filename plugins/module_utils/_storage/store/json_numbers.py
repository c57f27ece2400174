# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Hooks of ``json.JSONDecoder`` for the numbers in untrusted JSON."""

from __future__ import annotations

import sys
import typing as t

_DIGITS_LIMIT = 400


def _integer(literal: str) -> int:
    if len(literal) > _DIGITS_LIMIT:
        raise ValueError(f"a number of {len(literal)} digits")
    return int(literal)


# Old Python versions take quadratic time for long numbers; newer versions refuse them.
PARSE_INT = None if hasattr(sys, "get_int_max_str_digits") else _integer


def refuse_constant(literal: str) -> t.NoReturn:
    """Refuse ``NaN`` and ``Infinity``, which Python accepts.

    :raises ValueError: always
    """
    raise ValueError(f"{literal}, which is not a JSON number")
