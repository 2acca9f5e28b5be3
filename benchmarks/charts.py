"""Curves of several clients over one size, as SVG: small panels side by side, logarithmic where sizes are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from fwasync.tracking.curves import ticks

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 380, 250
LEFT, RIGHT, TOP, BOTTOM = 60, 14, 30, 44
KEY_HEIGHT = 26
HUES = ("#2563eb", "#d97706", "#059669", "#9333ea", "#64748b")
DARK_HUES = ("#6ea8ff", "#fbbf24", "#34d399", "#c084fc", "#94a3b8")


@dataclass(frozen=True)
class Panel:
    """Curves of some clients; an axis that is not logarithmic begins at zero."""

    title: str
    x_label: str
    curves: Mapping[str, Points]
    is_log_x: bool = True
    is_log_y: bool = True


class Axis:
    """From values to places."""

    def __init__(self, values: Sequence[float], start: float, end: float, *, is_log: bool) -> None:
        self._is_log, self._start, self._end = is_log, start, end
        high = max(values)
        if is_log:
            self._low, self._high = math.log10(min(values)), math.log10(high)
            air = max((self._high - self._low) * 0.06, 0.15)
            self._low, self._high = self._low - air, self._high + air
        else:
            self._low, self._high = 0.0, (high or 1.0) * 1.08

    def at(self, value: float) -> float:
        value = math.log10(value) if self._is_log else value
        return self._start + (value - self._low) / (self._high - self._low) * (self._end - self._start)

    def marks(self) -> list[float]:
        if not self._is_log:
            return ticks(self._low, self._high)
        powers = range(math.floor(self._low), math.ceil(self._high) + 1)
        digits = (
            (1,)
            if self._high - self._low > 3
            else (1, 2, 5)
            if self._high - self._low > 0.9
            else (1, 1.5, 2, 3, 4, 6, 8)
        )
        return [
            value
            for power in powers
            for digit in digits
            if self._low <= math.log10(value := digit * 10.0**power) <= self._high
        ]


def label(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 or value == 0 else f"{value:.3g}"


def text(x: float, y: float, what: str, anchor: str = "middle", kind: str = "axis") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(what)}</text>'


def drawn(panel: Panel, names: Sequence[str]) -> str:
    """A panel, with its upper left corner at the origin."""
    curves = {  # what a logarithm has no place for is left out
        name: [(x, y) for x, y in curve if y > 0 or not panel.is_log_y] for name, curve in panel.curves.items()
    }
    points = [point for curve in curves.values() for point in curve]
    across = Axis([x for x, _ in points], LEFT, WIDTH - RIGHT, is_log=panel.is_log_x)
    up = Axis([y for _, y in points], HEIGHT - BOTTOM, TOP, is_log=panel.is_log_y)
    sizes = sorted({x for x, _ in points})
    parts = [text(LEFT, 16, panel.title, "start", "title"), text((LEFT + WIDTH) / 2, HEIGHT - 6, panel.x_label)]
    for value in up.marks():
        y = up.at(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(text(LEFT - 8, y + 4, label(value), "end"))
    parts += [
        text(across.at(value), HEIGHT - BOTTOM + 17, label(value))
        for value in (sizes if panel.is_log_x else across.marks())
    ]
    for name, curve in curves.items():
        hue = names.index(name) % len(HUES)
        places = [(across.at(x), up.at(y)) for x, y in sorted(curve)]
        parts.append(f'<polyline class="hue{hue}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>')
        if len(places) <= 12:
            parts += [f'<circle class="dot{hue}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in places]
    return "".join(parts)


def style() -> str:
    def colours(ink: str, soft: str, rule: str, hues: Sequence[str]) -> str:
        lines = [f"text {{ fill: {soft} }} .title {{ fill: {ink} }} .grid {{ stroke: {rule} }}"]
        lines += [f".hue{at} {{ stroke: {hue} }} .dot{at} {{ fill: {hue} }}" for at, hue in enumerate(hues)]
        return "\n".join(lines)

    return "\n".join(
        [
            "text { font: 12px system-ui, sans-serif } .title { font-weight: 600 } .grid { stroke-width: 1 }",
            "polyline { fill: none; stroke-width: 2.2; stroke-linejoin: round }",
            colours("#16191f", "#5b6472", "#d5dae1", HUES),
            f"@media (prefers-color-scheme: dark) {{\n{colours('#9aa4b2', '#8a94a2', '#4a515c', DARK_HUES)}\n}}",
        ]
    )


def sheet(panels: Sequence[Panel], columns: int = 2) -> str:
    """All panels, and a key to the curves above them."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.curves))
    rows = math.ceil(len(panels) / columns)
    width, height = columns * (WIDTH + 20), rows * (HEIGHT + 14) + KEY_HEIGHT
    summary = "; ".join(panel.title for panel in panels)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(summary)}">',
        f"<style>\n{style()}\n</style>",
    ]
    x = float(LEFT)
    for number, name in enumerate(names):
        parts.append(f'<circle class="dot{number % len(HUES)}" cx="{x:.1f}" cy="10" r="4"/>')
        parts.append(text(x + 9, 14, name, "start"))
        x += 32 + 6.6 * len(name)
    for number, panel in enumerate(panels):
        left, top = number % columns * (WIDTH + 20), number // columns * (HEIGHT + 14) + KEY_HEIGHT
        parts.append(f'<g transform="translate({left} {top})">{drawn(panel, names)}</g>')
    return "\n".join([*parts, "</svg>"]) + "\n"
