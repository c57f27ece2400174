# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This plugin util is PRIVATE to the userns.storage collection.
"""Variables as people type them into a survey or an inventory: text, lines, or the list itself."""

from __future__ import annotations

import re
import shlex
import typing as t

Mapping = t.Dict[str, t.Any]

_USERNS = re.compile(r"(host|keep-id|nomap|auto)(:|$)")
_NAMED = frozenset({"subuidname", "subgidname", "runtime", "slots"})


def words(value: t.Any) -> t.List[str]:
    """The words of a text or of a list of texts, parted by white space and commas."""
    if value is None:
        return []
    if isinstance(value, str):
        return [word for word in re.split(r"[\s,]+", value) if word]
    if isinstance(value, (list, tuple)):
        return [word for one in value for word in words(one)]
    raise ValueError(f"{value!r} is neither a text nor a list of texts")


def lines(value: t.Any) -> t.List[t.Any]:
    """The lines of a text, or the items of a list with each text among them in lines."""
    if value is None:
        return []
    if isinstance(value, str):
        return [line.strip() for line in re.split(r"[\n;]", value) if line.strip()]
    if isinstance(value, (list, tuple)):
        return [line for one in value for line in (lines(one) if isinstance(one, str) else [one])]
    raise ValueError(f"{value!r} is neither a text nor a list")


def mappings(value: t.Any) -> t.List[Mapping]:
    """Mappings as the option ``mappings`` of layer_template takes them.

    :param value: lines such as ``keep-id``, ``auto:size=4096 slots=3``, ``0:100000:65536``,
        ``0:100000:65536/0:300000:65536`` or ``subuidname=web``; or a list of these and of dicts
    :raises ValueError: a line is none of that
    """
    return [_mapping(one) for one in lines(value)]


def policies(value: t.Any) -> t.Dict[str, t.Dict[str, t.Any]]:
    """What differs from store to store, by the store's owner.

    :param value: lines such as ``alice unused_for=2w keep_images=*/postgres:*,*/redis:*``, or a dict of dicts
    :raises ValueError: a line is none of that
    """
    if isinstance(value, dict):
        if not all(isinstance(one, dict) for one in value.values()):
            raise ValueError(f"{value!r} does not hold a dictionary of options for each store")
        return {str(name): dict(one) for name, one in value.items()}
    found: t.Dict[str, t.Dict[str, t.Any]] = {}
    for one in lines(value):
        owner, *settings = shlex.split(one) if isinstance(one, str) else [""]
        if not owner or "=" in owner or not all("=" in setting for setting in settings):
            raise ValueError(
                f"{one!r} is no policy: write the store's owner and options of layer_gc, "
                "for example: alice unused_for=2w"
            )
        parts = (setting.partition("=") for setting in settings)
        found.setdefault(owner, {}).update((name, text) for name, _equals, text in parts)
    return found


def _mapping(one: t.Any) -> Mapping:
    if isinstance(one, dict):
        return {
            str(name): setting for name, setting in one.items() if setting not in (None, "", [])
        }
    if not isinstance(one, str):
        raise ValueError(f"{one!r} is no mapping")
    found: Mapping = {}
    for place, word in enumerate(shlex.split(one)):
        name, equals, setting = word.partition("=")
        if equals and name in _NAMED:
            found[name] = int(setting) if name == "slots" else setting
        elif place == 0 and _USERNS.match(word):
            found["userns"] = word
        elif place == 0 and ":" in word:
            uid, _slash, gid = word.partition("/")
            for option, text in (("uidmap", uid), ("gidmap", gid)):
                if text:
                    found[option] = text.split(",")
        else:
            raise ValueError(
                f"{word!r} in {one!r} is no mapping: write keep-id, auto, nomap, or a map such as "
                f"0:100000:65536, then what of {', '.join(sorted(_NAMED))} is needed, as NAME=VALUE"
            )
    if not found:
        raise ValueError("an empty text is no mapping")
    return found
