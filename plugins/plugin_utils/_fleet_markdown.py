# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This plugin util is PRIVATE to the userns.storage collection.
"""Format a fleet as Markdown, for the output of a job and for forges."""

from __future__ import annotations

import typing as t

from ._amounts import human
from ._escapes import markdown, markdown_code
from ._fleet import OK, Fleet, Host, Store

_LONGEST = 25


def render(fleet: Fleet, title: str, moment: str) -> str:
    """Render the page; long lists are cut, and the rest is counted."""
    sums = fleet.sums
    lines = [
        f"# {markdown(title)}",
        "",
        f"{markdown(moment)}, {len(fleet.hosts)} hosts, {len(fleet.hosts) - fleet.counted(OK)} not read completely.",
        "",
        f"* {human(sums.on_disk)} on disk, recorded as {human(sums.recorded)}",
        f"* {sums.mapped_layers} mapped layers use {human(sums.mapped_on_disk)} of this",
        f"* {sums.freed_layers} of them would be removed, which frees {human(sums.freed)}",
        f"* {sums.missing} are missing and would delay the next container start",
        *(
            [f"* {human(sums.saved)} were not copied, because images are shared with users"]
            if sums.saved
            else []
        ),
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
                "would be freed",
                "missing",
            ),
            [_host_row(host) for host in fleet.hosts],
        ),
        "",
        "## Images by disk usage of their mapped layers",
        "",
        *_table(
            ("image", "hosts", "mapped layers", "recorded", "on disk", "would be freed"),
            [
                (
                    markdown_code(image.name, cell=True),
                    str(len(image.hosts)),
                    str(image.copies),
                    human(image.recorded),
                    human(image.on_disk),
                    human(image.freed),
                )
                for image in fleet.images[:_LONGEST]
            ],
        ),
        *_rest(len(fleet.images), "images"),
        "",
        *_mapped_images(fleet),
        "## Would be freed",
        "",
        *_list(_removals(fleet), "Nothing."),
        "",
        "## Mapped layers missing for the next start",
        "",
        *_list(_missing(fleet), "Nothing, as far as it was examined."),
    ]
    return "\n".join(lines) + "\n"


def _host_row(host: Host) -> t.Tuple[str, ...]:
    sums = host.sums
    state = (
        host.state if host.state == OK else f"**{host.state}** {markdown(host.message, cell=True)}"
    )
    if not host.stores:
        return (markdown(host.name, cell=True), state, *["-"] * 6)
    return (
        markdown(host.name, cell=True),
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
    found = [
        (removal.size, host, store, removal)
        for host, store in _each(fleet)
        for removal in store.removals
    ]
    found.sort(key=lambda item: -item[0])
    return [
        f"{human(size)} {_where(host, store, item.image, item.map)}: {markdown(item.reason)}"
        for size, host, store, item in found
    ]


def _mapped_images(fleet: Fleet) -> t.List[str]:
    """A section on images that carry a map, if there are any."""
    found = [
        f"{_where(host, store, image.name, image.map)}: {human(image.on_disk)}"
        + (
            f", and {human(image.identity_copy)} in a copy for containers without a map"
            if image.identity_copy
            else ""
        )
        for host, store in _each(fleet)
        for image in store.images
        if image.map
    ]
    title = "## Images that carry a map and need no mapped layer for it"
    return [title, "", *_list(found, ""), ""] if found else []


def _missing(fleet: Fleet) -> t.List[str]:
    return [
        f"{_where(host, store, item.image, item.map)}: {markdown(item.reason)}"
        for host, store in _each(fleet)
        for item in store.missing
    ]


def _where(host: Host, store: Store, image: str, ids: str) -> str:
    return (
        f"{markdown(host.name)} {markdown(store.user)} {markdown_code(image)} {markdown_code(ids)}"
    )


def _list(entries: t.Sequence[str], nothing: str) -> t.List[str]:
    if not entries:
        return [nothing]
    return [f"* {entry}" for entry in entries[:_LONGEST]] + _rest(len(entries), "more")


def _rest(count: int, what: str) -> t.List[str]:
    if count <= _LONGEST:
        return []
    text = f"{count - _LONGEST} more" if what == "more" else f"{count - _LONGEST} more {what}"
    return ["", f"And {text}."]


def _table(head: t.Sequence[str], rows: t.Sequence[t.Sequence[str]]) -> t.List[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]
