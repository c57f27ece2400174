# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This plugin util is PRIVATE to the userns.storage collection.
"""Find variables with the prefix of a role that do not exist, usually because they are misspelled."""

from __future__ import annotations

import difflib
import functools
import re
import typing as t
from pathlib import Path

import yaml


def unknown(names: t.Iterable[str], role: Path, ignored: t.Container[str] = ()) -> t.List[str]:
    """The unknown names with the role's prefix, each with a similar option if there is one.

    :param role: the role's folder, whose files contain the names that it uses
    :param ignored: names with another purpose
    """
    prefix = f"{role.name}_"
    options, used = _known(role)
    found = []
    for name in sorted(set(names)):
        if not name.startswith(prefix) or name in used or name in ignored:
            continue
        close = difflib.get_close_matches(name, options, 1)
        found.append(f"{name} (did you mean {close[0]}?)" if close else name)
    return found


@functools.cache
def _known(role: Path) -> t.Tuple[t.Tuple[str, ...], t.FrozenSet[str]]:
    """The options of a role, and all names with its prefix in its files and its playbook."""
    specs = yaml.safe_load((role / "meta/argument_specs.yml").read_text(encoding="utf-8"))
    options = tuple(specs["argument_specs"]["main"]["options"])
    used = {*options, f"{role.name}_hosts"}
    for path in role.rglob("*"):
        if path.suffix in (".yml", ".j2"):
            text = path.read_text(encoding="utf-8")
            used.update(re.findall(rf"(?<!\w){role.name}_\w+", text))
    return options, frozenset(used)
