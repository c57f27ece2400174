# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This plugin util is PRIVATE to the userns.storage collection.
"""Format a fleet as a single HTML page, including style, script and charts. It loads no other resources."""

from __future__ import annotations

import base64
import hashlib
import typing as t

from ._amounts import human
from ._escapes import html as esc
from ._fleet import FAILED, OK, PARTLY, SILENT, UNREACHABLE, Fleet, Host, Store, Sums

# Up to this number, each host has its own bar; otherwise only the fullest hosts, and a chart of all hosts.
_BARS = 20
_IMAGES = 40

_STATES = {
    OK: "read",
    PARTLY: "partly read",
    FAILED: "failed",
    UNREACHABLE: "unreachable",
    SILENT: "not asked",
}

_STYLE = """
:root{color-scheme:light dark;--bg:#f6f7f9;--card:#fff;--ink:#1a1f26;--soft:#56616d;--line:#dbe1e8;
--own:#9aabbc;--kept:#2f6fd0;--freed:#d97a16;--mark:#1a1f26;--bad:#b3261e;--good:#1f7a46;--code:#eef1f5}
@media (prefers-color-scheme:dark){:root{--bg:#12161b;--card:#1b2027;--ink:#e7ebef;--soft:#9fabb8;--line:#333c46;
--own:#64778b;--kept:#5f9df2;--freed:#f0a04b;--mark:#fff;--bad:#ff8a80;--good:#6fce98;--code:#262d36}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);
font:15px/1.45 system-ui,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1180px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:26px;line-height:1.2;margin:0 0 4px}
h2{font-size:18px;margin:0 0 10px}
h3{font-size:14px;margin:16px 0 6px;color:var(--soft);font-weight:600}
p{margin:0 0 10px}.soft{color:var(--soft)}.bad{color:var(--bad)}.good{color:var(--good)}
section{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:18px 20px;margin-top:18px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(165px,1fr));gap:12px;margin-top:18px}
.tile{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 16px}
.tile b{display:block;font-size:25px;line-height:1.25;font-weight:650}
.tile span{color:var(--soft);font-size:13px}
.legend{display:flex;flex-wrap:wrap;gap:6px 18px;font-size:13px;color:var(--soft);margin-bottom:12px}
.legend i{display:inline-block;width:12px;height:12px;border-radius:3px;margin-right:6px;vertical-align:-1px}
.legend i.mark{width:3px;height:14px;border-radius:0;background:var(--mark)}
.own{background:var(--own);fill:var(--own)}.kept{background:var(--kept);fill:var(--kept)}
.freed{background:var(--freed);fill:var(--freed)}
svg{display:block;width:100%}svg .mark{stroke:var(--mark);stroke-width:3;vector-effect:non-scaling-stroke}
svg .rail{fill:var(--line);opacity:.55}
.bar{display:grid;grid-template-columns:minmax(90px,220px) 1fr 92px;gap:12px;align-items:center;padding:3px 0}
.bar svg,.cell svg{height:14px;border-radius:3px}
.num{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.name{overflow-wrap:anywhere}
.sky svg{height:130px;border-bottom:1px solid var(--line)}
.scale{display:flex;justify-content:space-between;font-size:13px;color:var(--soft)}
table{border-collapse:collapse;width:100%;font-size:14px}
th,td{text-align:left;padding:6px 14px 6px 0;border-bottom:1px solid var(--line);vertical-align:top}
th{color:var(--soft);font-weight:600;white-space:nowrap}th.num,td.num{text-align:right}
td:last-child,th:last-child{padding-right:0}tr:last-child td{border-bottom:0}
code{font:13px/1.4 ui-monospace,"DejaVu Sans Mono",monospace;background:var(--code);border-radius:4px;padding:1px 5px;
overflow-wrap:anywhere}
input{font:inherit;color:inherit;background:var(--bg);border:1px solid var(--line);border-radius:7px;padding:6px 10px;
width:100%;max-width:320px}
.row{display:grid;grid-template-columns:minmax(120px,2fr) 104px 54px 100px 76px minmax(130px,2fr) 108px 58px;gap:12px;
align-items:center}
.head{color:var(--soft);font-size:13px;font-weight:600;padding:10px 0 6px 18px;border-bottom:1px solid var(--line)}
.of{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap}
td[data-of=map] code{overflow-wrap:normal}
.host{border-bottom:1px solid var(--line)}.host:last-child{border-bottom:0}
summary{cursor:pointer;padding:7px 0;list-style:none;position:relative;padding-left:18px}
summary::-webkit-details-marker{display:none}
summary::before{content:"";position:absolute;left:2px;top:14px;border:5px solid transparent;
border-left-color:var(--soft);border-right:0}
details[open]>summary::before{transform:rotate(90deg)}
.plain{padding:7px 0 7px 18px}
.cell{display:grid;grid-template-columns:1fr 80px;gap:8px;align-items:center}
.pill{justify-self:start;font-size:12px;font-weight:600;border:1px solid currentColor;border-radius:99px;
padding:0 9px;white-space:nowrap}
.message{grid-column:1/-1;margin:0;font-size:13px;overflow-wrap:anywhere}
.store{margin:2px 0 14px 18px;padding:12px 16px;border:1px solid var(--line);border-radius:8px;background:var(--bg)}
:focus-visible{outline:2px solid var(--kept);outline-offset:2px;border-radius:4px}
.store p{font-size:13px;overflow-wrap:anywhere}.store>.soft{overflow-wrap:anywhere}
footer{margin-top:22px;font-size:13px;color:var(--soft)}
.plain .message{grid-column:3/-1}
@media (max-width:820px){.plain .message{grid-column:1/-1}.head{display:none}main{padding:20px 12px 40px}
section{padding:14px}.row{grid-template-columns:1fr 1fr;gap:3px 12px}.row>.name{grid-column:1/-1;font-weight:600}
.row>.pill{grid-column:1/-1;margin:2px 0}
.row .of{position:static;width:auto;height:auto;clip-path:none;color:var(--soft);font-size:13px}
.row>.num{text-align:left}.row>.cell{grid-column:1/-1;grid-template-columns:1fr auto}
.bar{grid-template-columns:minmax(120px,220px) 1fr 80px;gap:8px}.store{margin-left:0;padding:10px}}
@media (max-width:640px){.tiles{grid-template-columns:1fr 1fr}.tile:last-child{grid-column:1/-1}
.bar{grid-template-columns:1fr auto;gap:2px 12px}.bar svg{grid-row:2;grid-column:1/-1}table,tbody{display:block}
thead{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap}
tr{display:grid;grid-template-columns:1fr 1fr;gap:2px 12px;padding:8px 0;border-bottom:1px solid var(--line)}
tr:last-child{border-bottom:0}td,td.num{display:block;min-width:0;padding:0;border:0;text-align:left}
td[data-of=image],td[data-of=rule],td[data-of=why],td[data-of=map]{grid-column:1/-1}
td::before{content:attr(data-of) ": ";color:var(--soft);font-size:13px}td[data-of=image]::before{content:none}
td code{overflow-wrap:anywhere}}
@media print{body{background:#fff}section,.tile{break-inside:avoid}input{display:none}}
"""

# Without it, the page only lacks the search.
_SCRIPT = """
const field=document.getElementById("search");
if(field){field.hidden=false;const rows=[...document.querySelectorAll(".host")];
field.addEventListener("input",()=>{const word=field.value.trim().toLowerCase();
let shown=0;
for(const row of rows){row.hidden=word!==""&&!row.textContent.toLowerCase().includes(word);shown+=row.hidden?0:1}
document.getElementById("found").textContent=word===""?"":shown+" of "+rows.length+" hosts"})}
"""


def render(fleet: Fleet, title: str, moment: str) -> str:
    """The page.

    :param moment: the time of the report, as text
    """
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{esc(title)}</title><style>{_STYLE}</style></head><body><main>",
        f'<h1>{esc(title)}</h1><p class="soft">{esc(moment)}. On disk: space that the removal of the layers frees. '
        "Recorded: sizes that podman shows.</p>",
        *_tiles(fleet),
        *_chart(fleet),
        *_images(fleet),
        *_hosts(fleet),
        "<footer>Made by userns.storage.report.</footer>",
        f"</main><script>{_SCRIPT}</script></body></html>\n",
    ]
    return "\n".join(parts)


def _count(number: int, text: str, more: str = "") -> str:
    return f"{number:,} {text if number == 1 else more or text + 's'}"


def _tiles(fleet: Fleet) -> t.Iterator[str]:
    sums = fleet.sums
    unread = len(fleet.hosts) - fleet.counted(OK)
    factor = (
        f"{sums.mapped_on_disk / sums.mapped_recorded:.1f} times" if sums.mapped_recorded else ""
    )
    tiles = [
        (human(sums.on_disk), f"on disk, {human(sums.recorded)} recorded", ""),
        (
            human(sums.mapped_on_disk),
            f"in {_count(sums.mapped_layers, 'mapped layer')}"
            + (f", {factor} the recorded size" if factor else ""),
            "",
        ),
        (human(sums.freed), f"would be freed with {_count(sums.freed_layers, 'layer')}", ""),
        (
            f"{sums.missing:,}",
            "mapped layers missing for the next start",
            "bad" if sums.missing else "good",
        ),
        (
            f"{len(fleet.hosts) - unread:,} of {len(fleet.hosts):,}",
            "hosts read completely",
            "bad" if unread else "good",
        ),
    ]
    if sums.saved:
        shared = (human(sums.saved), "not copied, because images are shared with users", "good")
        tiles.insert(3, shared)
    yield '<div class="tiles">'
    for value, label, kind in tiles:
        yield f'<div class="tile"><b class="{kind}">{esc(value)}</b><span>{esc(label)}</span></div>'
    yield "</div>"


_LEGEND = (
    '<div class="legend"><span><i class="own"></i>images\' own layers</span>'
    '<span><i class="kept"></i>mapped layers that are kept</span>'
    '<span><i class="freed"></i>mapped layers that would be freed</span>'
    '<span><i class="mark"></i>recorded</span></div>'
)


def _chart(fleet: Fleet) -> t.Iterator[str]:
    full = sorted(
        (item for item in fleet.hosts if item.stores), key=lambda item: -item.sums.on_disk
    )
    if not full:
        return
    top = max(max(item.sums.on_disk, item.sums.recorded) for item in full) or 1
    yield f'<section id="chart"><h2>Bytes on disk by host</h2>{_LEGEND}'
    if len(full) > _BARS:
        yield from _skyline(full, top)
        yield f"<h3>The {_BARS} hosts with the highest disk usage</h3>"
    for host in full[:_BARS]:
        yield (
            f'<div class="bar"><span class="name">{esc(host.name)}</span>{_bar(host.sums, top)}'
            f'<span class="num">{human(host.sums.on_disk)}</span></div>'
        )
    yield "</section>"


def _segments(sums: Sums) -> t.Iterator[t.Tuple[str, int]]:
    yield "own", sums.own
    yield "kept", sums.mapped_kept
    yield "freed", min(sums.freed, sums.mapped_on_disk)


def _bar(sums: Sums, top: int) -> str:
    """A horizontal bar; the mark is the recorded size."""
    at = 0.0
    parts = ['<rect class="rail" width="1000" height="10"/>']
    for kind, size in _segments(sums):
        width = 1000 * size / top
        if width:
            parts.append(f'<rect class="{kind}" x="{at:.1f}" width="{width:.1f}" height="10"/>')
        at += width
    mark = min(1000 * sums.recorded / top, 998)
    parts.append(f'<path class="mark" d="M{mark:.1f} 0v10"/>')
    label = f"{human(sums.on_disk)} on disk, {human(sums.recorded)} recorded"
    return (
        f'<svg viewBox="0 0 1000 10" preserveAspectRatio="none" role="img" aria-label="{label}">'
        f"<title>{label}</title>{''.join(parts)}</svg>"
    )


def _skyline(hosts: t.Sequence[Host], top: int) -> t.Iterator[str]:
    width = 1000 / len(hosts)
    parts = []
    for index, host in enumerate(hosts):
        height = 0.0
        columns = []
        for kind, size in _segments(host.sums):
            part = 100 * size / top
            height += part
            if part:
                columns.append(
                    f'<rect class="{kind}" x="{index * width:.2f}" y="{100 - height:.2f}" '
                    f'width="{width * 0.9:.2f}" height="{part:.2f}"/>'
                )
        parts.append(
            f"<g><title>{esc(host.name)}: {human(host.sums.on_disk)}</title>{''.join(columns)}</g>"
        )
    label = f"All {len(hosts)} hosts, by descending disk usage"
    yield (
        f'<div class="sky"><div class="scale"><span>{human(top)}</span></div>'
        f'<svg viewBox="0 0 1000 100" preserveAspectRatio="none" role="img" aria-label="{label}">{"".join(parts)}</svg>'
        f'<div class="scale"><span>{label}</span>'
        f"<span>{esc(hosts[-1].name)}: {human(hosts[-1].sums.on_disk)}</span></div></div>"
    )


def _table(
    head: t.Sequence[str], rows: t.Iterable[t.Sequence[str]], numbers: t.Collection[int] = ()
) -> str:
    """A table of HTML cells. On a narrow screen each row is a block, and each cell has a heading.

    With the ARIA roles, it is also a table for screen readers there.
    """
    kinds = [" class=num" if index in numbers else "" for index in range(len(head))]
    heads = "".join(
        f'<th scope="col" role="columnheader"{kind}>{name}</th>' for kind, name in zip(kinds, head)
    )
    body = "".join(
        '<tr role="row">'
        + "".join(
            f'<td role="cell" data-of="{name}"{kind}><span>{cell}</span></td>'
            for name, kind, cell in zip(head, kinds, row)
        )
        + "</tr>"
        for row in rows
    )
    return (
        f'<table role="table"><thead role="rowgroup"><tr role="row">{heads}</tr></thead>'
        f'<tbody role="rowgroup">{body}</tbody></table>'
    )


def _images(fleet: Fleet) -> t.Iterator[str]:
    shown = [image for image in fleet.images if image.copies or image.freed]
    if not shown:
        return
    yield '<section id="images"><h2>Images by disk usage of their mapped layers</h2>'
    yield _table(
        ("image", "hosts", "mapped layers", "recorded", "on disk", "would be freed"),
        [
            (
                f"<code>{esc(item.name)}</code>",
                f"{len(item.hosts):,}",
                f"{item.copies:,}",
                human(item.recorded),
                human(item.on_disk),
                human(item.freed),
            )
            for item in shown[:_IMAGES]
        ],
        range(1, 6),
    )
    if len(shown) > _IMAGES:
        yield f'<p class="soft">And {len(shown) - _IMAGES} more images.</p>'
    yield "</section>"


def _hosts(fleet: Fleet) -> t.Iterator[str]:
    top = max([max(item.sums.on_disk, item.sums.recorded) for item in fleet.hosts] or [0]) or 1
    yield '<section id="hosts"><h2>Hosts</h2>'
    yield '<input id="search" type="search" placeholder="Host, user, image, map …" aria-label="Search hosts" hidden>'
    yield '<p id="found" class="soft" role="status"></p>'
    yield (
        '<div class="row head" aria-hidden="true"><span>host</span><span>state</span><span class="num">images</span>'
        '<span class="num">mapped layers</span><span class="num">recorded</span><span>on disk</span>'
        '<span class="num">would be freed</span><span class="num">missing</span></div>'
    )
    for host in fleet.hosts:
        yield from _host(host, top)
    yield "</section>"


def _host(host: Host, top: int) -> t.Iterator[str]:
    sums = host.sums
    bad = "good" if host.state == OK else "bad"
    name = f'<span class="name">{esc(host.name)}</span><span class="pill {bad}">{_STATES[host.state]}</span>'
    message = f'<p class="message bad">{esc(host.message)}</p>' if host.message else ""
    if not host.stores:
        yield f'<div class="host plain"><div class="row">{name}{message}</div></div>'
        return
    missing = " bad" if sums.missing else ""
    yield (
        f'<details class="host"><summary><div class="row">{name}'
        f"{_figure('images', f'{sums.images:,}')}"
        f"{_figure('mapped layers', f'{sums.mapped_layers:,}')}"
        f"{_figure('recorded', human(sums.recorded))}"
        f'<span class="cell">{_bar(sums, top)}<span class="num">{human(sums.on_disk)}</span></span>'
        f"{_figure('would be freed', human(sums.freed))}"
        f"{_figure('missing', f'{sums.missing:,}', missing)}{message}</div></summary>"
    )
    for store in host.stores:
        yield from _store(store)
    yield "</details>"


def _figure(name: str, value: str, kind: str = "") -> str:
    """A number in a host's row. Its name is for screen readers, and for narrow screens, which have no headings."""
    return f'<span class="num{kind}"><span class="of">{name}: </span>{value}</span>'


def _store(store: Store) -> t.Iterator[str]:
    whose = "The rootful store" if store.user == "root" else f"The store of {store.user}"
    yield f'<div class="store"><b>{esc(whose)}</b> <span class="soft">{esc(store.location)}</span>'
    if store.problem:
        yield f'<p class="bad">{esc(store.problem)}</p>'
    for note in store.notes:
        yield f'<p class="soft">{esc(note)}</p>'
    broken = [image for image in store.images if image.problem]
    for image in broken:
        yield f'<p class="bad"><code>{esc(image.name)}</code> {esc(image.problem)}</p>'
    mapped = [image for image in store.images if image.map]
    if mapped:
        yield "<h3>Images that carry a map and need no mapped layer for it</h3>"
        yield _table(
            ("image", "map", "on disk", "unmapped copy"),
            [
                (
                    f"<code>{esc(image.name)}</code>",
                    f"<code>{esc(image.map)}</code>",
                    human(image.on_disk),
                    human(image.identity_copy) if image.identity_copy else "none",
                )
                for image in mapped
            ],
            (2, 3),
        )
    copies = [(image, copy) for image in store.images for copy in image.copies]
    if copies:
        yield "<h3>Mapped layers</h3>"
        yield _table(
            ("image", "map", "recorded", "on disk", "containers", "state"),
            [
                (
                    f"<code>{esc(image.name)}</code>",
                    f"<code>{esc(copy_.map)}</code>" if copy_.map else "no map",
                    human(copy_.recorded),
                    human(copy_.on_disk),
                    esc(", ".join(copy_.containers) or "none"),
                    esc(copy_.status)
                    if copy_.status == "ok"
                    else f'<span class="bad">{esc(copy_.status)}</span>',
                )
                for image, copy_ in copies
            ],
            (2, 3),
        )
    if store.removals:
        yield "<h3>Would be freed</h3>"
        yield _table(
            ("image", "map", "on disk", "why"),
            [
                (
                    f"<code>{esc(removal.image)}</code>",
                    f"<code>{esc(removal.map)}</code>",
                    human(removal.size),
                    esc(removal.reason),
                )
                for removal in store.removals
            ],
            (2,),
        )
    if store.prospects:
        yield "<h3>No rule is set. Each rule alone would free</h3>"
        yield _table(
            ("rule", "layers", "on disk"),
            [
                (f"<code>{esc(rule)}</code>", f"{layers:,}", human(size))
                for rule, layers, size in store.prospects
            ],
            (1, 2),
        )
    if store.missing:
        yield "<h3>Mapped layers missing for the next start</h3>"
        yield _table(
            ("image", "map", "why"),
            [
                (
                    f"<code>{esc(item.image)}</code>",
                    f"<code>{esc(item.map)}</code>" if item.map else "",
                    f'<span class="bad">{esc(item.reason)}</span>'
                    if item.refused
                    else esc(item.reason),
                )
                for item in store.missing
            ],
        )
    yield "</div>"
