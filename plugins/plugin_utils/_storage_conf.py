# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This plugin util is PRIVATE to the userns.storage collection.
"""Keys set in a storage.conf, and every other byte of it left as it is."""

from __future__ import annotations

import json
import re
import typing as t

from ..module_utils._storage.errors import ConfigError
from ..module_utils._storage.store import toml

Settings = t.Dict[str, t.Any]

_HEADER = re.compile(r"[ \t]*\[[ \t]*([A-Za-z0-9_.\- \t]+?)[ \t]*\][ \t]*(?:#.*)?")
_PAIR = re.compile(
    r"""([ \t]*([A-Za-z0-9_-]+)[ \t]*=[ \t]*)
        ("(?:[^"\\]|\\.)*"|'[^']*'|\[[^\]\n]*\]|[^\s\#\[\]"']+)
        ([ \t]*(?:\#.*)?)""",
    re.VERBOSE,
)
_PLACES = {"driver": "storage"}
# These may stand for all drivers in [storage.options], and then count where the driver's own table is silent.
_SHARED = "storage.options"


def settings(value: t.Any) -> Settings:
    """Settings from a dict, or from lines such as ``overlay.mountopt=nodev,metacopy=on``.

    :raises ValueError: a line has no ``=``
    """
    if isinstance(value, dict):
        return {str(name): setting for name, setting in value.items()}
    found: Settings = {}
    for line in value:
        name, equals, setting = str(line).partition("=")
        if not equals or not name.strip():
            raise ValueError(f"{line!r} is not KEY=VALUE, such as overlay.mountopt=nodev")
        found[name.strip()] = setting.strip()
    return found


def edit(text: str, wanted: Settings, path: str = "storage.conf") -> str:
    """Set keys in a storage.conf.

    :param wanted: ``driver``, or ``DRIVER.KEY`` for a key of ``[storage.options.DRIVER]``, or ``KEY`` for one of
        ``[storage.options]``. A text that begins with ``+`` is added to the comma list that is there.
    :raises ConfigError: the text is not TOML, or is written in a way that cannot be edited
    """
    for name, value in wanted.items():
        text = _set(text, name, value, path)
    return text


def _set(text: str, name: str, value: t.Any, path: str) -> str:
    table, key = _place(name)
    before = toml.loads(text.encode(), path)
    found = _table(before, table).get(key)
    if isinstance(value, str) and value.startswith("+"):
        base = found if found is not None else _table(before, _SHARED).get(key)
        value = _joined(base if isinstance(base, str) else "", value[1:])
    if found == value and isinstance(found, type(value)):
        return text
    changed = _written(text, table, key, json.dumps(value, ensure_ascii=False))
    after = toml.loads(changed.encode(), path)
    expected = _table(before, table)
    if _without(after, table, key) != _without(before, table, key) or (
        _table(after, table) != {**expected, key: value}
    ):
        raise ConfigError(
            f"{path}, key {key} of [{table}]",
            "is written in a way that is not edited here",
            "Set it by hand, or write it on a line of its own below the table's name.",
        )
    return changed


def _place(name: str) -> t.Tuple[str, str]:
    if name in _PLACES:
        return _PLACES[name], name
    driver, dot, key = name.rpartition(".")
    return (f"{_SHARED}.{driver}" if dot else _SHARED), key


def _table(document: t.Mapping[str, t.Any], name: str) -> t.Dict[str, t.Any]:
    found: t.Any = document
    for part in name.split("."):
        found = found.get(part, {}) if isinstance(found, dict) else {}
    return dict(found) if isinstance(found, dict) else {}


def _without(document: t.Any, table: str, key: str) -> t.Any:
    """The document less one key, and less tables that hold nothing."""

    def copy(found: t.Any, name: str) -> t.Any:
        if not isinstance(found, dict):
            return found
        result = {}
        for part, value in found.items():
            inner = copy(value, f"{name}.{part}".lstrip("."))
            if (name, part) != (table, key) and inner != {}:
                result[part] = inner
        return result

    return copy(document, "")


def _joined(base: str, more: str) -> str:
    """A comma list with items added; an item ``name=value`` replaces one of that name."""
    items = [item for item in base.split(",") if item]
    for item in (one for one in more.split(",") if one):
        name, equals, _value = item.partition("=")
        items = [one for one in items if not (equals and one.partition("=")[0] == name)]
        if item not in items:
            items.append(item)
    # What is the same in another order is left as it is.
    return base if sorted(items) == sorted(base.split(",")) else ",".join(items)


def _written(text: str, table: str, key: str, value: str) -> str:
    lines = re.findall(r"[^\n]*\n|[^\n]+", text)
    ending = "\r\n" if lines and lines[0].endswith("\r\n") else "\n"
    current, header, sample = "", -1, -1
    for number, line in enumerate(lines):
        bare = line.rstrip("\r\n")
        match = _HEADER.fullmatch(bare)
        if match:
            current = re.sub(r"[ \t]", "", match.group(1))
            header = number if current == table else header
            continue
        if current != table:
            continue
        pair = _PAIR.fullmatch(bare)
        if pair and pair.group(2) == key:
            lines[number] = f"{pair.group(1)}{value}{pair.group(4)}{line[len(bare) :]}"
            return "".join(lines)
        if re.match(rf"[ \t]*#[ \t]*{re.escape(key)}[ \t]*=", bare):
            sample = number
    if lines and not lines[-1].endswith("\n"):
        lines[-1] += ending
    fresh = f"{key} = {value}{ending}"
    if header < 0:
        lines += [ending] * bool(lines) + [f"[{table}]{ending}", fresh]
    else:
        lines.insert((sample if sample >= 0 else header) + 1, fresh)
    return "".join(lines)
