# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This plugin util is PRIVATE to the userns.storage collection.
"""A fleet as Markdown, for a job's output and for forges."""

from __future__ import annotations

import re
import typing as t

from ._amounts import human
from ._fleet import OK, Fleet, Host, Store

_LONGEST = 25


def render(fleet: Fleet, title: str, moment: str) -> str:
    """The page, with the longest lists cut and the rest counted."""
    sums = fleet.sums
    lines = [
        f"# {_cell(title)}",
        "",
        f"{_cell(moment)}, {len(fleet.hosts)} hosts, {len(fleet.hosts) - fleet.counted(OK)} not wholly read.",
        "",
        f"* {human(sums.on_disk)} on disk, where the records claim {human(sums.recorded)}",
        f"* {sums.mapped_layers} mapped layers hold {human(sums.mapped_on_disk)} of it",
        f"* {sums.freed_layers} of them would be collected, {human(sums.freed)}",
        f"* {sums.missing} are missing for the next start",
        "",
        "## Hosts",
        "",
        *_table(
            (
                "host",
                "state",
                "images",
                "mapped layers",
                "recorded",
                "on disk",
                "would free",
                "missing",
            ),
            [_host_row(host) for host in fleet.hosts],
        ),
        "",
        "## Images by what their mapped layers hold",
        "",
        *_table(
            ("image", "hosts", "copies", "recorded", "on disk", "would free"),
            [
                (
                    _code(one.name),
                    str(len(one.hosts)),
                    str(one.copies),
                    human(one.recorded),
                    human(one.on_disk),
                    human(one.freed),
                )
                for one in fleet.images[:_LONGEST]
            ],
        ),
        *_rest(len(fleet.images), "images"),
        "",
        "## What would be collected",
        "",
        *_list(_removals(fleet), "Nothing."),
        "",
        "## What is missing for the next start",
        "",
        *_list(_missing(fleet), "Nothing, as far as it was asked for."),
    ]
    return "\n".join(lines) + "\n"


def _host_row(host: Host) -> t.Tuple[str, ...]:
    sums = host.sums
    state = host.state if host.state == OK else f"**{host.state}** {_cell(host.message)}"
    if not host.stores:
        return (_cell(host.name), state, *["-"] * 6)
    return (
        _cell(host.name),
        state,
        str(sums.images),
        str(sums.mapped_layers),
        human(sums.recorded),
        human(sums.on_disk),
        human(sums.freed),
        str(sums.missing),
    )


def _each(fleet: Fleet) -> t.Iterator[t.Tuple[Host, Store]]:
    return ((host, store) for host in fleet.hosts for store in host.stores)


def _removals(fleet: Fleet) -> t.List[str]:
    found = [(one.size, host, store, one) for host, store in _each(fleet) for one in store.removals]
    found.sort(key=lambda one: -one[0])
    return [
        f"{human(size)} {_cell(host.name)} {_cell(store.user)} {_code(one.image)} {_code(one.map)}: {_cell(one.reason)}"
        for size, host, store, one in found
    ]


def _missing(fleet: Fleet) -> t.List[str]:
    return [
        f"{_cell(host.name)} {_cell(store.user)} {_code(one.image)} {_code(one.map)}: {_cell(one.reason)}"
        for host, store in _each(fleet)
        for one in store.missing
    ]


def _list(entries: t.Sequence[str], nothing: str) -> t.List[str]:
    if not entries:
        return [nothing]
    return [f"* {entry}" for entry in entries[:_LONGEST]] + _rest(len(entries), "more")


def _rest(count: int, what: str) -> t.List[str]:
    if count <= _LONGEST:
        return []
    words = f"{count - _LONGEST} more" if what == "more" else f"{count - _LONGEST} more {what}"
    return ["", f"And {words}."]


def _table(head: t.Sequence[str], rows: t.Sequence[t.Sequence[str]]) -> t.List[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def _cell(text: str) -> str:
    """Text in which no character is Markdown's."""
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    text = " ".join(text.split()).replace("|", "\\|").replace("`", "'")
    return f"`{text}`" if text else ""
