# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of escape sequences in messages."""

from __future__ import annotations

import subprocess
import sys

from ansible_collections.userns.storage.plugins.module_utils._storage import printable


def test_escape_sequences_match_python() -> None:
    for number in (*range(0x2100), *range(0xD7F0, 0xDC80), *range(0xDD00, 0x110000, 37)):
        character = chr(number)
        if not character.isprintable():
            expected = character.encode("unicode_escape").decode()
            assert printable.printable(character) == expected, hex(number)
    assert printable.printable("\udc80\udcff") == "\\x80\\xff"


def test_escaping_imports_no_modules() -> None:
    """A process in a user's namespace may not be able to read the files of the interpreter."""
    code = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('printable', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "before = set(sys.modules)\n"
        "text = '\\x1b\\t\\u200b\\U000e0001\\udcff'\n"
        "module.printable(text), module.without_controls(text), module.command(text)\n"
        "print(sorted(set(sys.modules) - before))\n"
    )
    command = [sys.executable, "-c", code, printable.__file__]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    assert result.stdout == "[]\n"
