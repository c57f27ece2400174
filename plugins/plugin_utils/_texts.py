# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This plugin util is PRIVATE to the userns.storage collection.
"""Convert variables from surveys and inventories: text, lines or a list."""

from __future__ import annotations

import re
import shlex
import typing as t

from ansible_collections.userns.storage.plugins.module_utils._storage.operations.mapping_options import (
    OPTIONS,
)

Mapping = t.Dict[str, t.Any]

_USERNS = re.compile(r"(host|keep-id|nomap|auto)(:|$)")
# The options that can follow the user namespace or the maps.
_NAMED = frozenset(OPTIONS) - {"userns", "uidmap", "gidmap"}


def is_blank(value: t.Any) -> bool:
    """Whether a survey's answer is empty; ansible-core 2.19 and later read it as null."""
    return value is None or (isinstance(value, str) and not value.strip())


def is_none(value: t.Any) -> bool:
    """Whether a text is the word that disables an option in a survey."""
    return isinstance(value, str) and value.strip().lower() == "none"


def number_as_text(value: t.Any) -> t.Any:
    """The text of a number, because ansible-core 2.19 and later read the answer 0 as a number; other values
    unchanged."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return str(value) if number else value


def words(value: t.Any) -> t.List[str]:
    """The words of a text or of a list of texts, separated by white space and commas; empty for the text "none"."""
    value = number_as_text(value)
    if value is None or is_none(value):
        return []
    if isinstance(value, str):
        return _words(value)
    if isinstance(value, (list, tuple)):
        return [
            word
            for item in value
            for word in (_words(item) if isinstance(item, str) else words(item))
        ]
    raise ValueError(f"{value!r} is neither a text nor a list of texts")


def _words(text: str) -> t.List[str]:
    return [word for word in re.split(r"[\s,]+", text) if word]


def lines(value: t.Any) -> t.List[t.Any]:
    """The lines of a text, or the items of a list with texts split into lines; empty for the text "none"."""
    if value is None or is_none(value):
        return []
    if isinstance(value, str):
        return [line.strip() for line in re.split(r"[\n;]", value) if line.strip()]
    if isinstance(value, (list, tuple)):
        return [
            line for item in value for line in (lines(item) if isinstance(item, str) else [item])
        ]
    raise ValueError(f"{value!r} is neither a text nor a list")


def mappings(value: t.Any) -> t.List[Mapping]:
    """Mappings for the option ``mappings`` of layer_template.

    :param value: lines such as ``keep-id``, ``auto:size=4096 slots=3``, ``0:100000:65536``,
        ``0:100000:65536/0:300000:65536`` or ``subuidname=web``; or a list of these and of dicts
    :raises ValueError: a line has another form
    """
    return [_mapping(line) for line in lines(value)]


def policies(value: t.Any) -> t.Dict[str, t.Dict[str, t.Any]]:
    """The options of a policy for each store, by owner.

    :param value: lines such as ``alice unused_for=2w keep_images=*/postgres:*,*/redis:*``, or a dict of dicts
    :raises ValueError: a line has another form
    """
    if isinstance(value, dict):
        if not all(isinstance(item, dict) for item in value.values()):
            raise ValueError(f"{value!r} does not contain a dictionary of options for each store")
        return {str(name): dict(entry) for name, entry in value.items()}
    found: t.Dict[str, t.Dict[str, t.Any]] = {}
    for line in lines(value):
        owner, *settings = shlex.split(line) if isinstance(line, str) else [""]
        if not owner or "=" in owner or not all("=" in setting for setting in settings):
            raise ValueError(
                f"{line!r} is not a policy: write the store's owner and options of layer_gc, "
                "for example: alice unused_for=2w"
            )
        parts = (setting.partition("=") for setting in settings)
        found.setdefault(owner, {}).update((name, text) for name, _equals, text in parts)
    return found


def _mapping(value: t.Any) -> Mapping:
    if isinstance(value, dict):
        return {
            str(name): setting for name, setting in value.items() if setting not in (None, "", [])
        }
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a mapping")
    found: Mapping = {}
    for location, word in enumerate(shlex.split(value)):
        name, equals, setting = word.partition("=")
        if equals and name in _NAMED:
            found[name] = int(setting) if OPTIONS[name].type == "int" else setting
        elif location == 0 and _USERNS.match(word):
            found["userns"] = word
        elif location == 0 and ":" in word:
            uid, _slash, gid = word.partition("/")
            for option, text in (("uidmap", uid), ("gidmap", gid)):
                if text:
                    found[option] = text.split(",")
        else:
            raise ValueError(
                f"{word!r} in {value!r} is not a mapping: write keep-id, auto, nomap, or a map such as "
                f"0:100000:65536, then any of {', '.join(sorted(_NAMED))} as NAME=VALUE"
            )
    if not found:
        raise ValueError("an empty text is not a mapping")
    return found
