# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Checks text with proselint and with the project's own rules, without a network: prose.py FILE...

Code blocks and literals are not checked; of Python files, only comments and docstrings are. The exit status is 1 if a
rule matches.
"""

from __future__ import annotations

import functools
import re
import sys
import token
import tokenize
from pathlib import Path

from proselint.checks import __register__ as builtin
from proselint.registry.checks import Check, types

# Checks of proselint that suit technical documentation.
BUILTIN = ("archaism", "lexical_illusions", "malapropisms", "nonwords", "oxymorons")

# Words and constructions that the documentation does not use, with their replacements.
PREFERRED = {
    r"rubbish": "leftovers",
    r"as ever": "(remove)",
    r"podmans": "versions of podman",
    r"buildahs": "buildah versions",
    r"anew": "again",
    r"in (?:its|their) place": "instead",
    r"for ever": "without end",
    r"what (?:goes|stays|comes|came|was) \w+": "name the object",
    r"made ready": "prepared",
    r"takes? (?:it |them |\w+ \w+ )?away": "remove",
    r"taken away": "removed",
    r"asked for": "requested",
    r"not to be had": "not available",
    r"is held against": "is matched against",
    r"so many": "the number",
    r"nobody (?:beforehand|uses)": "unused, or unknown ahead of time",
    r"put in (?:its )?place of": "instead of",
    r"goes? on with": "resume",
    r"gone on with": "resumed",
    r"sees? to it": "ensure",
    r"half a layer": "partial layer",
    r"met with a refusal": "failed",
    r"refused by name": "refused with an error that names it",
    r"on from here": "next steps",
    r"is (?:said|told)": "is reported",
    r"are (?:said|told)": "are reported",
    r"said to": "reported",
    r"by itself alone": "alone",
    r"way out": "hint",
    r"no matter of": "not affected by",
    r"what is (?:there|refused|missing|found|left)": "name the object",
    r"who(?:ever)? comes next": "the next run",
}

# The code calls directories folders.
ONLY_IN_GUIDES = {r"folders?": "directory"}

# Headings of plugin documentation in YAML repeat words.
NOT_IN_CODE = ("lexical_illusions",)


@functools.cache
def rules(code: bool) -> tuple[Check, ...]:
    """The rules for Python files, or for guides."""
    names = set(BUILTIN) - set(NOT_IN_CODE if code else ())
    preferred = PREFERRED if code else {**PREFERRED, **ONLY_IN_GUIDES}
    return (
        *(check for check in builtin if check.path.split(".")[0] in names),
        Check(
            check_type=types.PreferredForms(items=preferred),
            path="userns.storage",
            message="Use '{}' instead of '{}'.",
        ),
    )


def comments_and_docstrings(path: Path) -> str:
    """The comments, docstrings and plugin documentation of a Python file, with blanks instead of everything else."""
    with tokenize.open(path) as file:
        lines = file.read().splitlines(keepends=True)
    found = [re.sub(r"[^\n]", " ", line) for line in lines]
    depth, begins = 0, True
    for kind, text, start, end, _line in tokenize.generate_tokens(iter([*lines, ""]).__next__):
        depth += (text in "([{") - (text in ")]}") if kind == token.OP else 0
        # A string at the beginning of a statement is a docstring; plugin documentation is a raw string.
        documents = kind == token.STRING and depth == 0 and (begins or text.startswith('r"""'))
        if kind == token.COMMENT or documents:
            for row in range(start[0] - 1, end[0]):
                first = start[1] if row == start[0] - 1 else 0
                last = end[1] if row == end[0] - 1 else len(lines[row])
                found[row] = found[row][:first] + lines[row][first:last] + found[row][last:]
        begins = kind in (token.INDENT, token.DEDENT, token.NEWLINE, token.NL, token.COMMENT)
    return "".join(found)


def prose(path: Path) -> str:
    """The text of a file, with placeholders instead of code, so that line numbers stay the same."""

    def blank(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", match[0])

    def mask(match: re.Match[str]) -> str:
        return "_" * len(match[0]) + "\n" * match[0].count("\n")

    if path.suffix == ".py":
        text = comments_and_docstrings(path)
    else:
        text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        text = re.sub(r"(?ms)^```.*?^```$", blank, text)
        text = re.sub(r"(?s)<!--.*?-->", blank, text)
    elif path.suffix == ".rst":
        text = re.sub(r"(?m)^\.\. code-block::.*\n(?:(?: +.*)?\n)*", blank, text)
        text = re.sub(r"(?m)^\.\. .*$", blank, text)
    text = re.sub(r"``[^`]+``|`[^`\n]+`", mask, text)
    return f"{text}\n"


def main(files: list[str]) -> int:
    """Print a line for each match; returns the exit status."""
    found = 0
    for name in files:
        text = prose(Path(name))
        for check in rules(name.endswith(".py")):
            for result in check.check_with_flags(text):
                line = text.count("\n", 0, result.span[0] + 1) + 1
                print(f"{name}:{line}: {result.check_path}: {result.message}")
                found += 1
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
