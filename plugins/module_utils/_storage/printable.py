# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Make untrusted text safe for messages and terminals: one line, printable characters, limited length.

The owner of a store controls paths, names and labels. They must not move the cursor, start a line or change the
direction of the surrounding text.
"""

from __future__ import annotations

import os
import re
import shlex
import typing as t

_LIMIT = 1000
_MOST_LINES = 200
_CUT = "[...]"
_SHORT_ESCAPES = {"\t": "\\t", "\n": "\\n", "\r": "\\r"}
# Control characters in a diff, except tabs and line ends.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f]")
# Characters that terminals interpret and JSON does not escape: DEL and C1 controls, marks of direction, line
# separators, and bytes that are not UTF-8.
_ACTIVE = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def printable(text: t.Any, limit: int = _LIMIT) -> str:
    """Text on one line, with an escape sequence such as ``\\x1b`` for each character that is not visible.

    :param limit: the maximum length in characters; the middle of a longer text is left out
    """
    shown = _cut(str(text), limit)
    if shown.isprintable():
        return shown
    visible = (character if character.isprintable() else _escape(character) for character in shown)
    return _cut("".join(visible), limit)


def _cut(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    half = (limit - len(_CUT)) // 2
    return f"{text[:half]}{_CUT}{text[-half:]}"


def printable_lines(text: str, limit: int = _MOST_LINES) -> str:
    """Text of several lines, such as the output of a program: each line as by :func:`printable`, and indented.

    The lines are indented, because unindented lines are Ansible's own.

    :param limit: the maximum number of lines; lines in the middle of a longer text are left out
    """
    lines = text.split("\n")
    if len(lines) > limit:
        half = limit // 2
        lines = [*lines[:half], _CUT, *lines[-half:]]
    return "\n".join(f"  {printable(line)}" for line in lines)


def printable_diff(text: str) -> str:
    """A file's text for a diff, with its lines but without control characters."""
    return _CONTROLS.sub(lambda match: _escape(match[0]), text)


def without_controls(value: t.Any) -> t.Any:
    """A module's result with escape sequences for characters that terminals interpret and JSON does not escape."""
    if isinstance(value, str):
        return _ACTIVE.sub(lambda match: _escape(match[0]), value)
    if isinstance(value, dict):
        return {without_controls(key): without_controls(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_controls(item) for item in value]
    return value


def command(*arguments: str) -> str:
    """A quoted command line for a shell, on one line, with visible characters."""
    return " ".join(
        shlex.quote(argument) if argument.isprintable() else _ansi_quoted(argument)
        for argument in arguments
    )


def user_command(user: str, line: str) -> str:
    """A command line for root to run a command line as a user, from any folder and with any shell of the user."""
    return command("runuser", "-l", user, "-s", "/bin/sh", "-c", line)


def _ansi_quoted(word: str) -> str:
    return f"$'{''.join(map(_in_ansi_quotes, os.fsencode(word).decode('latin-1')))}'"


def _in_ansi_quotes(byte: str) -> str:
    if byte in "\\'":
        return f"\\{byte}"
    return byte if " " <= byte <= "~" else f"\\x{ord(byte):02x}"


def _escape(character: str) -> str:
    if "\udc80" <= character <= "\udcff":
        # A byte that is not UTF-8, as represented by Python.
        return f"\\x{ord(character) - 0xDC00:02x}"
    if character in _SHORT_ESCAPES:
        return _SHORT_ESCAPES[character]
    # Without the codec unicode_escape, whose file a user's process may not be able to read.
    number = ord(character)
    if number < 0x100:
        return f"\\x{number:02x}"
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
