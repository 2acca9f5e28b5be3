"""Views of a run on a text stream: a live one for terminals, plain lines for everything else."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TextIO

from fwasync.tracking.headlines import duration, full_name, headlines_of, number
from fwasync.tracking.progress import Progress
from fwasync.tracking.run import Record, View

__all__ = ("PlainView", "make_view", "sparkline")

_BARS = "▁▂▃▄▅▆▇█"
_LINE_EVERY_S = 1.0
_MOST = 6


def make_view(*, title: str, stream: TextIO | None = None) -> View:
    """Make the view that suits a stream.

    Args:
        title: What is being run.
        stream: Where to; `None` is the standard output.

    Returns:
        A `LiveView` if the stream is a terminal that can move its cursor (`TERM` is not `dumb`) and nobody said
        that this is an automatic build (`CI`); a `PlainView` otherwise.
    """
    out = sys.stdout if stream is None else stream
    if out.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("CI"):
        from fwasync.tracking.live import LiveView

        return LiveView(title=title, stream=out)
    return PlainView(title=title, stream=out)


class PlainView:
    """A line of text for a record, at most one a second; the first and the last of each phase always.

    ```
    sft   120/200  train/loss 0.312  tokens/s 10,240  3:20 left
    ```
    """

    def __init__(self, *, title: str, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._title = title
        self._stream = stream
        self._clock = clock
        self._phases: dict[str, Progress] = {}
        self._widths: dict[str, int] = {}
        self._gauges: dict[str, float] = {}
        self._skipped: Record | None = None
        self._phase: str | None = None
        self._due = -math.inf

    def begin(self, phase: str, total_steps: int) -> None:
        """Announce a phase."""
        self._write_skipped()
        now = self._clock()
        self._phases[phase] = Progress(phase, total_steps, began=now, now=now)
        self._phase = None
        self._write(f"{self._title}: {phase}, {total_steps:,} steps")

    def show(self, record: Record) -> None:
        """Write a line, if one is due."""
        now = self._clock()
        first = record.phase != self._phase
        if first:
            self._write_skipped()
        self._phase = record.phase
        progress = self._phases.setdefault(record.phase, Progress(record.phase, None, began=now, now=now))
        progress.reach(record.step, now)
        if first or now >= self._due or record.step == progress.total:
            self._skipped = None
            self._due = now + _LINE_EVERY_S
            self._write(self._line(record))
        else:
            self._skipped = record

    def gauge(self, name: str, value: float) -> None:
        """Keep a live number for the next line."""
        self._gauges[full_name(name)] = value

    def message(self, text: str) -> None:
        """Write a sentence."""
        self._write_skipped()
        self._write(text)

    def close(self) -> None:
        """Write the last record, if its line was not due yet."""
        self._write_skipped()

    def _write_skipped(self) -> None:
        record, self._skipped = self._skipped, None
        if record is not None:
            self._write(self._line(record))

    def _line(self, record: Record) -> str:
        progress = self._phases[record.phase]
        total, remaining_s = progress.total, progress.remaining_s
        step = str(record.step) if total is None else f"{record.step:>{len(str(total))}}/{total}"
        if headlines_of(record.metrics):
            metrics = {**self._gauges, **record.metrics}
            shown = [(headline.label, metrics[headline.key]) for headline in headlines_of(metrics)[:_MOST]]
        else:
            # A phase with none of the well-known metrics, such as an evaluation, shows what it has.
            shown = list(record.metrics.items())[:_MOST]
        cells = [f"{label} {self._aligned(label, value)}" for label, value in shown]
        cells += [f"{duration(remaining_s)} left"] if remaining_s else []
        return "  ".join([f"{record.phase:<4}", step, *cells])

    def _aligned(self, label: str, value: float) -> str:
        text = number(value)
        width = self._widths[label] = max(self._widths.get(label, 0), len(text))
        return text.rjust(width)

    def _write(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()


def sparkline(values: Sequence[float], width: int) -> str:
    """Draw values as a line of bars: `█▆▅▃▂▁`.

    Args:
        values: The history, the oldest first. What is not finite leaves a gap.
        width: The most characters to use. A longer history is averaged in `width` equal parts.

    Returns:
        One character for each value or part; the smallest is `▁`, the greatest `█`. Bars of equal values are
        of middle height.
    """
    count = min(len(values), width)
    if count <= 0:
        return ""
    edges = [part * len(values) // count for part in range(count + 1)]
    means = [_mean(values[start:end]) for start, end in pairwise(edges)]
    finite = [mean for mean in means if mean is not None]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    return "".join(" " if mean is None else _bar(mean, low, high) for mean in means)


def _bar(value: float, low: float, high: float) -> str:
    # Halves first: the distance of two finite numbers may be infinite.
    span = high / 2 - low / 2
    height = (value / 2 - low / 2) / span if span else 0.5
    return _BARS[min(int(height * len(_BARS)), len(_BARS) - 1)]


def _mean(values: Sequence[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(value / len(finite) for value in finite) if finite else None
