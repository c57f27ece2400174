# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This plugin util is PRIVATE to the userns.storage collection.
"""Build the driver library as a single Python program, reproducibly byte for byte."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

_LIBRARY = Path(__file__).resolve().parents[1] / "module_utils/_storage"
_FIRST_LINE = b"#!/usr/bin/env python3\n"
_MAIN = """\
import sys

from _storage.service.command import main

sys.exit(main(sys.argv[1:]))
"""
# The earliest time that a zip archive can contain.
_MOMENT = (1980, 1, 1, 0, 0, 0)


def build(library: Path = _LIBRARY) -> bytes:
    """The program userns-storage.

    :raises OSError: the library cannot be read
    """
    files = {"__main__.py": _MAIN.encode()}
    for path in library.rglob("*.py"):
        files[f"{library.name}/{path.relative_to(library).as_posix()}"] = path.read_bytes()
    content = io.BytesIO()
    content.write(_FIRST_LINE)
    with zipfile.ZipFile(content, "a") as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, _MOMENT)
            entry.create_system = 3
            entry.external_attr = 0o100644 << 16
            # Uncompressed, because the output of compressors depends on their version.
            entry.compress_type = zipfile.ZIP_STORED
            archive.writestr(entry, files[name])
    return content.getvalue()
