"""Curves as SVG: scales with round ticks, a thin raw line and a smoothed one. Pure.

Values that are not finite, or beyond 1e100, are left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from fwasync.tracking.headlines import number

__all__ = ("curve", "smoothed", "ticks")

Point = tuple[float, float]

_WIDTH, _HEIGHT = 380.0, 230.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 12.0, 10.0, 40.0
_MOST_POINTS = 600
# Products of differences of such values stay finite; whoever diverged beyond needs no curve.
_LARGEST = 1e100
_SMALLEST = 1e-100
_STEPS = (1.0, 2.0, 5.0, 10.0)


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Choose round numbers between two ends: multiples of 1, 2 or 5 times a power of ten.

    Args:
        low: The lower end.
        high: The upper end, greater than `low`.
        most: The most ticks to choose, at least 6.

    Returns:
        At least two ascending values within the ends, evenly spaced.
    """
    least = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(least))
    step = power * next(factor for factor in _STEPS if power * factor >= least * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def smoothed(points: Sequence[Point]) -> list[Point]:
    """The local trend: at each point, a line fitted to its neighbours within about a tenth of all points.

    Weights fall linearly with the distance (a LOWESS without its robust rounds: Cleveland, 1979, "Robust
    Locally Weighted Regression"). Unlike a moving average it does not lag and is not biased at the ends.
    """
    reach = max(len(points) // 10, 2)
    return [(x, _fitted(points[max(i - reach, 0) : i + reach + 1], x)) for i, (x, _) in enumerate(points)]


def _fitted(near: Sequence[Point], x0: float) -> float:
    span = max(abs(x - x0) for x, _ in near) * 1.001 or 1.0
    weighed = [(1 - abs(x - x0) / span, x - x0, y) for x, y in near]
    total = sum(w for w, _, _ in weighed)
    x_mean = sum(w * x for w, x, _ in weighed) / total
    y_mean = sum(w * y for w, _, y in weighed) / total
    spread = sum(w * (x - x_mean) ** 2 for w, x, _ in weighed)
    if not spread:
        return y_mean
    return y_mean - x_mean * sum(w * (x - x_mean) * (y - y_mean) for w, x, y in weighed) / spread


def curve(points: Sequence[Point], *, name: str, x_label: str = "step") -> str:
    """Draw one metric over its steps.

    Colours come from the style sheet of the page: classes `grid`, `axis`, `raw`, `smooth` and `end`.

    Args:
        points: Pairs of step and value in ascending order of step; values may be non-finite.
        name: What is drawn, for people who cannot see it.
        x_label: The name of the horizontal axis.

    Returns:
        An `<svg>` element, as wide as its container; empty if no value can be drawn.
    """
    finite = _thinned([(x, y) for x, y in points if abs(y) < _LARGEST])
    if not finite:
        return ""
    xs, ys = [x for x, _ in finite], [y for _, y in finite]
    across = _Scale(*_widened(xs[0], xs[-1], margin=0.0), _LEFT, _WIDTH - _RIGHT)
    up = _Scale(*_widened(min(ys), max(ys), margin=0.06), _HEIGHT - _BOTTOM, _TOP)
    smooth = smoothed(finite) if len(finite) >= 8 else finite
    summary = f"{name}: from {number(ys[0])} to {number(ys[-1])} over {len(points)} steps"
    parts = [
        f'<svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img" aria-label="{escape(summary)}">',
        *(_level(up.at(y), text) for y, text in up.marks()),
        *(_mark(across.at(x), text) for x, text in across.marks()),
        f'<text class="axis" x="{(_LEFT + _WIDTH - _RIGHT) / 2:g}" y="{_HEIGHT - 5:g}" text-anchor="middle">'
        f"{escape(x_label)}</text>",
        _path("raw", finite, across, up) if smooth is not finite else "",
        _path("smooth", smooth, across, up),
        f'<circle class="end" cx="{across.at(smooth[-1][0]):.1f}" cy="{up.at(smooth[-1][1]):.1f}" r="3.5"/>',
        "</svg>",
    ]
    return "".join(parts)


class _Scale:
    """A linear map from values to places, and its ticks."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self._low, self._high, self._start = low, high, start
        self._slope = (end - start) / (high - low)

    def at(self, value: float) -> float:
        return self._start + (value - self._low) * self._slope

    def marks(self) -> list[tuple[float, str]]:
        values = ticks(self._low, self._high)
        step, largest = values[1] - values[0], max(map(abs, values))
        if largest >= 1e6 or largest < 1e-3:
            return [(value, f"{value:.3g}") for value in values]
        decimals = max(0, -math.floor(math.log10(step) + 1e-9))
        # Adding zero turns the minus zero into a plain one.
        return [(value, f"{round(value, decimals) + 0.0:,.{decimals}f}") for value in values]


def _widened(low: float, high: float, *, margin: float) -> tuple[float, float]:
    """The ends of an axis: some air around the values, or down to zero where that is near."""
    span = high - low
    size = max(abs(low), abs(high))
    if span <= max(1e-9 * size, _SMALLEST):
        air = 0.1 * size if size > _SMALLEST else 1.0
        return low - air, high + air
    near_zero = margin > 0 and 0 <= low < span / 3
    return 0.0 if near_zero else low - margin * span, high + margin * span


def _thinned(points: list[Point]) -> list[Point]:
    """Average neighbours until no more points are left than can be seen."""
    size = math.ceil(len(points) / _MOST_POINTS)
    if size <= 1:
        return points
    groups = (points[start : start + size] for start in range(0, len(points), size))
    return [
        (math.fsum(x / len(group) for x, _ in group), math.fsum(y / len(group) for _, y in group)) for group in groups
    ]


def _level(y: float, text: str) -> str:
    return (
        f'<line class="grid" x1="{_LEFT:g}" x2="{_WIDTH - _RIGHT:g}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="axis" x="{_LEFT - 8:g}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
    )


def _mark(x: float, text: str) -> str:
    return f'<text class="axis" x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 17:g}" text-anchor="middle">{text}</text>'


def _path(kind: str, points: Sequence[Point], across: _Scale, up: _Scale) -> str:
    places = " ".join(f"{across.at(x):.1f},{up.at(y):.1f}" for x, y in points)
    return f'<polyline class="{kind}" points="{places}"/>'
