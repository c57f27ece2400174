# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This plugin util is PRIVATE to the userns.storage collection.
"""Escape untrusted text for each format that this collection writes, with one function for each.

A store's owner decides paths, names and labels, an image's maker its own. In no output may they be more than text.
What is written on managed hosts uses module_utils/_storage/printable.py and store/toml.py.
"""

from __future__ import annotations

import html as _html
import re
import typing as t

from ansible import template
from ansible.errors import AnsibleFilterError

from ..module_utils._storage.printable import printable

# Longer than any path, image reference or message that is shown.
_LIMIT = 5000
# Bytes that systemd takes for the end of a line, see read_line(3) of its sources.
_LINE_ENDS = "\n\r\0"
# Forges make links, mentions, references, labels and formulas of these even behind a backslash.
_ACTIVE = re.compile(r"@|://|www\.|[#!~%&$]\w|\bGH-\d|:[a-z][a-z0-9_+-]*:", re.IGNORECASE)
# What is markup wherever it stands, at the beginning, and behind a number at the beginning.
_MARKUP = re.compile(r"[\\`*_{}\[\]<>#|~!&$]|^[-+=]|^\d+[.)]")


def terminal(text: t.Any) -> str:
    """One line for a terminal or a log."""
    return printable(text, _LIMIT)


def html(text: t.Any) -> str:
    """Text for HTML and SVG: between tags, and inside attributes with quotation marks."""
    return _html.escape(printable(text, _LIMIT), quote=True)


def markdown(text: t.Any, cell: bool = False) -> str:
    """Text for one line of Markdown (CommonMark and GitHub's), in which no character is markup.

    Text in which a forge would find a link or a mention becomes a code span.

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
    """Text as the whole value, or a part in the middle of it, of a setting without words, such as ``PathChanged=``.

    :raises ValueError: no unit can hold it: a line end, text that is not UTF-8, a backslash or white space at an end
    """
    value = _systemd(text)
    if value != value.strip() or value.endswith("\\"):
        raise ValueError(
            f"{terminal(text)!r} cannot be used in a systemd unit: it begins or ends with white space or a backslash"
        )
    return value.replace("%", "%%")


def systemd_command(words: t.Sequence[t.Any]) -> str:
    """A program and its arguments as the value of ``ExecStart=``.

    :raises ValueError: no unit can hold it, or the program is named by something else than a plain path
    """
    program, *arguments = map(_systemd, words)
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
    """What a filter raises, `from None`: of a cause ansible-core shows the message once more, as it is."""
    return AnsibleFilterError(terminal(f"userns.storage.{name}: {error}"))


def template_result(value: t.Any) -> t.Any:
    """A filter's result, which is not to be taken for a template again whatever it holds.

    ansible-core up to 2.18 evaluates ``{{ }}`` in values that pass through a variable, a loop or set_stats once more.
    """
    if hasattr(template, "trust_as_template"):
        # From 2.19 on a template is only what a playbook or inventory says.
        return value
    from ansible.utils.unsafe_proxy import wrap_var

    return wrap_var(value)
