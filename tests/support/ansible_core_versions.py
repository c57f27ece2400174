# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Versions of ansible-core other than that of the tests, in environments of the cache."""

from __future__ import annotations

import importlib.util
import pathlib
import sys
import types

from .lab import COLLECTION

# The Pythons of each version; the first version that an available Python can run is used for the name.
_LINES = {
    "oldest": {"2.16": ("3.10", "3.11", "3.12"), "2.18": ("3.13",)},
    "newest": {
        "2.21": ("3.12", "3.13", "3.14"),
        "2.19": ("3.11",),
    },
}


def workshop() -> types.ModuleType:
    """The module scripts/workshop.py."""
    spec = importlib.util.spec_from_file_location("workshop", COLLECTION / "scripts/workshop.py")
    if spec is None or spec.loader is None:
        raise RuntimeError("scripts/workshop.py cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses and annotations need it.
    sys.modules["workshop"] = module
    spec.loader.exec_module(module)
    return module


def python_with_core(name: str) -> pathlib.Path:
    """The Python of an environment with ansible-core.

    :param name: oldest, newest, or own for the environment of the tests
    """
    if name == "own":
        return pathlib.Path(sys.executable)
    tools = workshop()
    available = tools.pythons()
    for line, versions in _LINES[name].items():
        for version in versions:
            if version in available:
                folder: pathlib.Path = tools.environment(
                    f"core-{name}",
                    f"ansible-core~={line}.0",
                    requirements="core",
                    python=available[version],
                )
                return folder / "bin/python"
    raise RuntimeError(f"none of the Pythons {', '.join(available)} runs the {name} ansible-core")
