# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Set keys in the text of a storage.conf and leave all other bytes unchanged."""

from __future__ import annotations

import re
import typing as t

from ..errors import ConfigError
from . import toml

Settings = t.Dict[str, t.Any]

_HEADER = re.compile(r"[ \t]*\[[ \t]*([A-Za-z0-9_.\- \t]+?)[ \t]*\][ \t]*(?:#.*)?")
_PAIR = re.compile(
    r"""([ \t]*([A-Za-z0-9_-]+)[ \t]*=[ \t]*)
        ("(?:[^"\\]|\\.)*"|'[^']*'|\[(?:"(?:[^"\\\n]|\\.)*"|'[^'\n]*'|[^\]\n"'])*\]|[^\s\#\[\]"']+)
        ([ \t]*(?:\#.*)?)""",
    re.VERBOSE,
)
# A list that ends on a later line, and the rest of that line.
_LONG_LIST = re.compile(
    r"""([ \t]*([A-Za-z0-9_-]+)[ \t]*=[ \t]*)\[[^\n]*\n.*\]([ \t]*(?:\#[^\n]*)?)""",
    re.VERBOSE | re.DOTALL,
)
_TEXT_OR_COMMENT = re.compile(r""""(?:[^"\\\n]|\\.)*"|'[^'\n]*'|#[^\n]*""")
_BARE = re.compile(r"[A-Za-z0-9_-]+")
_TABLES = {"driver": "storage"}
# Keys whose values are lists of texts.
_LISTS = ("additionalimagestores", "additionallayerstores")
# These may be set for all drivers in [storage.options]. The driver's own table takes precedence.
_SHARED = "storage.options"


def settings(value: t.Any) -> Settings:
    """Settings from a dict, or from lines such as ``overlay.mountopt=nodev,metacopy=on``.

    :raises ValueError: a line does not contain ``=``
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


def edit(
    text: str,
    requested: Settings,
    path: str = "storage.conf",
    inherited: t.Optional[toml.Table] = None,
) -> str:
    """Set keys in a storage.conf.

    :param requested: ``driver``, or ``DRIVER.KEY`` for a key of ``[storage.options.DRIVER]``, or ``KEY`` for one of
        ``[storage.options]``. A text that begins with ``+`` is added to the existing comma list. For
        ``additionalimagestores`` and ``additionallayerstores`` each text is a list of paths with commas; paths that
        begin with ``+`` are added, and those that begin with ``-`` removed.
    :param inherited: the text that a runtime reads before this file; its list is extended if the file has none
    :raises ConfigError: the text is not TOML, or is written in a way that cannot be edited
    """
    for name, value in requested.items():
        text = _set(text, name, value, path, inherited or {})
    return text


def says(document: toml.Table, requested: Settings) -> bool:
    """Whether a document already has all these settings."""
    for name, value in requested.items():
        table, key = _location(name)
        found = _table(document, table).get(key)
        if key in _LISTS and isinstance(value, str):
            value = _listed(found, value, "storage.conf", key)
            found = [] if found is None else found
        elif isinstance(value, str) and value.startswith("+"):
            value = joined(found, value[1:]) if isinstance(found, str) else None
        if found is None or found != value or not isinstance(found, type(value)):
            return False
    return True


def merged(base: toml.Table, other: toml.Table) -> toml.Table:
    """Merge two files key by key, as a runtime does; the later file takes precedence."""
    result = dict(base)
    for key, value in other.items():
        before = result.get(key)
        if isinstance(before, dict) and isinstance(value, dict):
            value = merged(before, value)
        result[key] = value
    return result


def set_keys(text: str, path: str = "storage.conf") -> Settings:
    """All keys of ``[storage]`` and its options that a text sets, named as for :func:`edit`; others of ``[storage]`` as
    ``storage:KEY``.

    :raises ConfigError: the text is not TOML
    """
    found: Settings = {}
    storage = toml.loads(text.encode(), path).get("storage", {})
    if not isinstance(storage, dict):
        return found
    options = storage.get("options", {})
    for key, value in storage.items():
        if key != "options":
            found[key if key in _TABLES else f"storage:{key}"] = value
    for key, value in (options if isinstance(options, dict) else {}).items():
        if isinstance(value, dict):
            found.update((f"{key}.{name}", setting) for name, setting in value.items())
        else:
            found[key] = value
    return found


def _set(text: str, name: str, value: t.Any, path: str, inherited: toml.Table) -> str:
    table, key = _location(name)
    before = toml.loads(text.encode(), path)
    found = _table(before, table).get(key)
    if key in _LISTS and isinstance(value, str):
        base = _table(inherited, table).get(key) if found is None else found
        listed = _listed(base, value, path, key)
        if listed == (base or []):
            # Nothing to add or remove.
            return text
        value = listed
    elif isinstance(value, str) and value.startswith("+"):
        sources = (before, inherited)
        found_there = (
            _table(source, table_name).get(key)
            for source in sources
            for table_name in (table, _SHARED)
        )
        base = next((item for item in found_there if item is not None), None)
        value = joined(base if isinstance(base, str) else "", value[1:])
    if found == value and isinstance(found, type(value)):
        return text
    changed = _written(text, table, key, toml.value(value))
    try:
        after = toml.loads(changed.encode(), path)
    except ConfigError:
        # The key has a notation that was not found.
        after = {}
    expected = _table(before, table)
    if _without(after, table, key) != _without(before, table, key) or (
        _table(after, table) != {**expected, key: value}
    ):
        raise ConfigError(
            f"{path}, key {key} of [{table}]",
            "has a form that cannot be edited",
            "Set it by hand, or write it on a line of its own below the table's name.",
        )
    return changed


def _listed(base: t.Any, text: str, path: str, key: str) -> t.List[str]:
    """A list of paths, changed by a setting.

    :raises ConfigError: the existing list has a form that cannot be edited
    """
    sign = text[:1] if text[:1] in ("+", "-") else ""
    paths = [item.strip() for item in text[len(sign) :].split(",") if item.strip()]
    if not sign:
        return paths
    there = [] if base is None else base
    if not isinstance(there, list) or not all(isinstance(item, str) for item in there):
        raise ConfigError(
            f"{path}, key {key}",
            "has a form that cannot be edited",
            "Set the key by hand as a list of paths.",
        )
    if sign == "-":
        return [item for item in there if item.rstrip("/") not in {p.rstrip("/") for p in paths}]
    return [*there, *(item for item in paths if item not in there)]


def _location(name: str) -> t.Tuple[str, str]:
    if name in _TABLES:
        return _TABLES[name], name
    driver, dot, key = name.rpartition(".")
    if not all(map(_BARE.fullmatch, [key, driver] if dot else [key])):
        raise ConfigError(
            f"setting {name!r}",
            "is not a key of storage.conf",
            "Write DRIVER.KEY, such as overlay.mountopt.",
        )
    return (f"{_SHARED}.{driver}" if dot else _SHARED), key


def _table(document: t.Mapping[str, t.Any], name: str) -> t.Dict[str, t.Any]:
    found: t.Any = document
    for part in name.split("."):
        found = found.get(part, {}) if isinstance(found, dict) else {}
    return dict(found) if isinstance(found, dict) else {}


def _without(document: t.Any, table: str, key: str) -> t.Any:
    """The document without one key and without empty tables."""

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


def joined(base: str, more: str) -> str:
    """A comma list with items added; an item ``name=value`` replaces an item of that name."""
    items = [item for item in base.split(",") if item]
    for item in (part for part in more.split(",") if part):
        name, equals, _value = item.partition("=")
        items = [option for option in items if not (equals and option.partition("=")[0] == name)]
        if item not in items:
            items.append(item)
    # The same items in another order are left unchanged.
    return base if sorted(items) == sorted(base.split(",")) else ",".join(items)


def _statements(text: str) -> t.List[str]:
    """The lines of a text; a list that spans several lines is a single item."""
    result: t.List[str] = []
    depth = 0
    for line in re.findall(r"[^\n]*\n|[^\n]+", text):
        if depth:
            result[-1] += line
        else:
            result.append(line)
        bare = _TEXT_OR_COMMENT.sub("", line)
        depth = max(0, depth + bare.count("[") - bare.count("]"))
    return result


def _written(text: str, table: str, key: str, value: str) -> str:
    lines = _statements(text)
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
        pair = _PAIR.fullmatch(bare) or _LONG_LIST.fullmatch(bare)
        if pair and pair.group(2) == key:
            rest = pair.groups()[-1]
            lines[number] = f"{pair.group(1)}{value}{rest}{line[len(bare) :]}"
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
