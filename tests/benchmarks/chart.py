# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Format the results of the benchmarks as a table and as a chart for the README."""

from __future__ import annotations

import html
import typing as t

from benchmarks.measurements import Row

_WIDTH, _LINE, _LEFT, _RIGHT = 860, 24, 430, 130
_COLOURS = {"met": "#2a7f62", "missed": "#b3541e", "": "#7a8794"}


def number(row: Row, value: t.Optional[float]) -> str:
    if value is None:
        return ""
    digits = f"{value:.2f}" if row.unit in ("x", "s") else f"{value:.1f}"
    return f"{digits} {row.unit}"


def line(row: Row) -> str:
    """A row as a line of text."""
    limit = f" of {number(row, row.allowed)}" if row.allowed is not None else ""
    return f"{row.group}: {row.work}: {number(row, row.value)}{limit} {row.verdict}".rstrip()


def table(rows: t.Sequence[Row]) -> str:
    """A table of work, value, limit and verdict, with columns as wide as required."""
    cells = [("work", "measured", "limit", "verdict")]
    for row in rows:
        limit = f"<= {number(row, row.allowed)}" if row.allowed is not None else ""
        cells.append((f"{row.group}: {row.work}", number(row, row.value), limit, row.verdict))
    widths = [max(len(cell[column]) for cell in cells) for column in range(4)]
    lines = []
    for line in cells:
        first = line[0].ljust(widths[0])
        lines.append(f"{first}  {line[1]:>{widths[1]}}  {line[2]:>{widths[2]}}  {line[3]}".rstrip())
    lines.insert(1, "-" * (sum(widths) + 6))
    return "\n".join(lines)


def svg(rows: t.Sequence[Row], title: str, notes: t.Sequence[str]) -> str:
    """A chart of all rows with a limit; the length of a bar is the value relative to the limit."""
    shown = [row for row in rows if row.allowed]
    height = 76 + _LINE * len(shown) + 16 * len(notes) + 20
    width = _WIDTH - _LEFT - _RIGHT
    # The limit is at two thirds of the width; longer bars are truncated at the edge.
    allowed = width / 1.5
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'font-family="sans-serif" font-size="12">',
        f"<title>{html.escape(title)}</title>",
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="16" y="28" font-size="16" fill="#1d2733">{html.escape(title)}</text>',
        f'<text x="{_LEFT + allowed:.0f}" y="52" text-anchor="middle" fill="#1d2733">allowed</text>',
    ]
    top = 62
    for index, row in enumerate(shown):
        y = top + _LINE * index
        length = max(2.0, min(row.value / (row.allowed or 1) * allowed, width))
        label = html.escape(f"{row.group}: {row.work}")
        parts += [
            f'<text x="{_LEFT - 8}" y="{y + 15}" text-anchor="end" fill="#1d2733" '
            f'font-size="11">{label}</text>',
            f'<rect x="{_LEFT}" y="{y + 3}" width="{length:.1f}" height="{_LINE - 8}" '
            f'fill="{_COLOURS[row.verdict]}"/>',
            f'<text x="{_WIDTH - _RIGHT + 8}" y="{y + 15}" fill="#1d2733">'
            f"{number(row, row.value)} of {number(row, row.allowed)}</text>",
        ]
    bottom = top + _LINE * len(shown)
    parts.append(
        f'<line x1="{_LEFT + allowed:.1f}" y1="{top - 4}" x2="{_LEFT + allowed:.1f}" '
        f'y2="{bottom}" stroke="#1d2733" stroke-dasharray="3 3"/>'
    )
    for index, note in enumerate(notes):
        parts.append(
            f'<text x="16" y="{bottom + 22 + 16 * index}" fill="#4a5663" font-size="11">'
            f"{html.escape(note)}</text>"
        )
    parts.append("</svg>")
    return "\n".join(parts) + "\n"
