# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This plugin util is PRIVATE to the userns.storage collection.
"""Escape untrusted text for each format that this collection writes, with one function for each.

The owner of a store controls paths, names and labels, and so does the maker of an image. They must be plain text in
any output. Code on managed hosts uses module_utils/_storage/printable.py and store/toml.py.
"""

from __future__ import annotations

import html as _html
import re
import typing as t

from ansible import template
from ansible.errors import AnsibleFilterError

from ..module_utils._storage.printable import printable

# Longer than any displayed path, image reference or message.
_LIMIT = 5000
# Characters that systemd treats as the end of a line, see read_line_full() in its source.
_LINE_ENDS = "\n\r\0"
# Forges create links, mentions, references, labels and formulas from these even after a backslash.
_ACTIVE = re.compile(r"@|://|www\.|[#!~%&$]\w|\bGH-\d|:[a-z][a-z0-9_+-]*:", re.IGNORECASE)
# Markup anywhere, at the beginning, and after a number at the beginning.
_MARKUP = re.compile(r"[\\`*_{}\[\]<>#|~!&$]|^[-+=]|^\d+[.)]")


def terminal(text: t.Any) -> str:
    """One line for a terminal or a log."""
    return printable(text, _LIMIT)


def html(text: t.Any) -> str:
    """Text for HTML and SVG: between tags, and inside attributes with quotation marks."""
    return _html.escape(printable(text, _LIMIT), quote=True)


def markdown(text: t.Any, cell: bool = False) -> str:
    """Text for a line of Markdown (CommonMark and GitHub's), without any markup.

    Text in which a forge would detect a link or a mention becomes a code span.

    :param cell: the line is the cell of a table
    """
    shown = " ".join(printable(text, _LIMIT).split())
    if _ACTIVE.search(shown):
        return markdown_code(shown, cell)
    return _MARKUP.sub(lambda match: f"{match[0][:-1]}\\{match[0][-1]}", shown)


def markdown_code(text: t.Any, cell: bool = False) -> str:
    """A code span of Markdown; empty for an empty text.

    :param cell: as :func:`markdown`. There a vertical bar ends the cell even inside a code span.
    """
    shown = " ".join(printable(text, _LIMIT).split())
    if not shown:
        return ""
    longest = max(map(len, re.findall("`+", shown)), default=0)
    fence = "`" * (longest + 1)
    space = " " if shown[0] == "`" or shown[-1] == "`" else ""
    span = f"{fence}{space}{shown}{space}{fence}"
    return span.replace("|", "\\|") if cell else span


def systemd_value(text: t.Any) -> str:
    """Text for the value, or a part of the value, of a setting that is not split into words, such as ``PathChanged=``.

    :raises ValueError: units cannot contain it: a line end, text that is not UTF-8, a backslash or white space at an
        end
    """
    value = _systemd(text)
    if value != value.strip() or value.endswith("\\"):
        raise ValueError(
            f"{terminal(text)!r} cannot be used in a systemd unit: it begins or ends with white space or a backslash"
        )
    return value.replace("%", "%%")


def systemd_command(argv: t.Sequence[t.Any]) -> str:
    """A program and its arguments as the value of ``ExecStart=``.

    :raises ValueError: units cannot contain it, or the program is no plain path
    """
    program, *arguments = map(_systemd, argv)
    if not re.fullmatch(r"/[^\s\"'\\$;]+", program):
        raise ValueError(
            f"{terminal(program)!r} is not a valid absolute path of a program for systemd: "
            "no white space, quotation marks, backslashes or dollar signs"
        )
    return " ".join([program.replace("%", "%%"), *map(_systemd_word, arguments)])


def _systemd_word(word: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9_./:@=+,-]+", word):
        return word
    escaped = re.sub(r'(["\\])', r"\\\1", word)
    escaped = "".join(
        character
        if character.isprintable()
        else "".join(f"\\x{byte:02x}" for byte in character.encode())
        for character in escaped
    )
    return f'"{escaped.replace("%", "%%").replace("$", "$$")}"'


def _systemd(text: t.Any) -> str:
    value = str(text)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{terminal(value)!r} cannot be used in a systemd unit: it is not UTF-8"
        ) from None
    if any(end in value for end in _LINE_ENDS) or not value:
        what = "it is empty" if not value else "it contains a line break"
        raise ValueError(f"{terminal(value)!r} cannot be used in a systemd unit: {what}")
    return value


def filter_error(name: str, error: Exception) -> AnsibleFilterError:
    """The error of a filter, to be raised `from None`, because ansible-core also displays the message of a cause
    unescaped."""
    return AnsibleFilterError(terminal(f"userns.storage.{name}: {error}"))


def template_result(value: t.Any) -> t.Any:
    """A filter's result that is never evaluated as a template.

    ansible-core up to 2.18 evaluates ``{{ }}`` again in values that pass through a variable, a loop or set_stats.
    """
    if hasattr(template, "trust_as_template"):
        # From 2.19 on, only text of playbooks and inventories is evaluated.
        return value
    from ansible.utils.unsafe_proxy import wrap_var

    return wrap_var(value)
