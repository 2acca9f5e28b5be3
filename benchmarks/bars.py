"""Bars of several clients, cell by cell, as SVG; they begin at zero, and shorter is better."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

import charts

WIDTH, VALUES, LETTER = 780, 70, 6.4
BAR, GAP, HEADING, TITLE = 16, 4, 26, 30
OURS = "fwasync"


def bars(title: str, cells: Mapping[str, Mapping[str, float]]) -> str:
    """What each client needs in each cell; fwasync's are in colour."""
    longest = max(value for clients in cells.values() for value in clients.values()) or 1.0
    names = max(len(name) for clients in cells.values() for name in clients) * LETTER + 16
    parts, y = [charts.text(0, 16, title, "start", "title")], float(TITLE)
    for cell, clients in cells.items():
        parts.append(charts.text(0, y + 14, cell, "start", "title"))
        y += HEADING
        for name, value in clients.items():
            width = value / longest * (WIDTH - names - VALUES)
            kind = "dot0" if OURS in name else "dot4"
            parts.append(charts.text(names - 8, y + 12, name, "end"))
            parts.append(
                f'<rect class="{kind}" x="{names:.0f}" y="{y:.1f}" width="{width:.1f}" height="{BAR}" rx="2"/>'
            )
            parts.append(charts.text(names + width + 6, y + 12, charts.label(value), "start"))
            y += BAR + GAP
        y += 6
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y:.0f}" role="img" '
        f'aria-label="{escape(title)}">'
    )
    return "\n".join([head, f"<style>\n{charts.style()}\n</style>", *parts, "</svg>"]) + "\n"
