"""`LiveView`: a run on a terminal, drawn in place.

The only module that imports rich. It draws when it is told something or when time passes, at most eight times
a second, always on the caller's thread: nothing of it runs by itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fwasync.tracking.headlines import duration, full_name, headlines_of, number
from fwasync.tracking.progress import Progress
from fwasync.tracking.run import Record
from fwasync.tracking.views import sparkline

__all__ = ("LiveView",)

_DRAW_EVERY_S = 0.125
_HISTORY = 512
_SHOWN = 12
_COLORS = {"train/loss": "cyan", "rollout/reward": "green", "perf/tokens_per_s": "blue"}


class _History:
    """The course of one metric in bounded memory: when it is full, neighbours are averaged in pairs."""

    def __init__(self) -> None:
        self.points: list[float] = []
        self._span = 1
        self._part: list[float] = []

    def add(self, value: float) -> None:
        self._part.append(value)
        if len(self._part) < self._span:
            return
        self.points.append(sum(self._part) / self._span)
        self._part = []
        if len(self.points) == _HISTORY:
            self.points = [(a + b) / 2 for a, b in zip(self.points[::2], self.points[1::2], strict=True)]
            self._span *= 2


@dataclass(slots=True)
class _Phase(Progress):
    values: dict[str, float] = field(default_factory=dict[str, float])
    histories: dict[str, _History] = field(default_factory=dict[str, _History])

    def add(self, name: str, value: float) -> None:
        self.values[name] = value
        self.histories.setdefault(name, _History()).add(value)


class LiveView:
    """A run on a terminal: a progress bar for each phase, and the headline metrics with their course.

    Closing leaves the last picture above the prompt. What the program prints meanwhile appears above it.
    """

    def __init__(
        self,
        *,
        title: str,
        stream: TextIO | None = None,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._title = title
        self._console = console or Console(file=stream)
        self._clock = clock
        self._live: Live | None = None
        self._drawn = float("-inf")
        self._phases: dict[str, _Phase] = {}
        self._current: _Phase | None = None
        self._message = ""

    def begin(self, phase: str, total_steps: int) -> None:
        """Show the progress bar of a phase."""
        now = self._clock()
        self._current = self._phases[phase] = _Phase(phase, total_steps, began=now, now=now)
        self.tick()

    def show(self, record: Record) -> None:
        """Show the numbers of a step."""
        phase = self._phase_of(record.phase)
        phase.reach(record.step, self._clock())
        for name, value in record.metrics.items():
            phase.add(name, value)
        self.tick()

    def gauge(self, name: str, value: float) -> None:
        """Show a live number."""
        if self._current is not None:
            self._current.add(full_name(name), value)
        self.tick()

    def message(self, text: str) -> None:
        """Show a sentence, until the next one."""
        self._message = text
        self.tick()

    def tick(self) -> None:
        """Draw, if the last picture is old enough."""
        now = self._clock()
        if now - self._drawn < _DRAW_EVERY_S:
            return
        self._drawn = now
        if self._current is not None and not self._current.done:
            self._current.now = now
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, get_renderable=self.picture)
            self._live.start()
        self._live.refresh()

    def close(self) -> None:
        """Draw the end, and give the terminal back."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def picture(self) -> RenderableType:
        """What is to be seen now."""
        return Group(*self._parts())

    def _phase_of(self, name: str) -> _Phase:
        if name not in self._phases:
            now = self._clock()
            self._phases[name] = _Phase(name, None, began=now, now=now)
        self._current = self._phases[name]
        return self._current

    def _parts(self) -> Iterator[RenderableType]:
        yield Text(self._title, style="bold", no_wrap=True, overflow="ellipsis")
        yield self._progress()
        if self._current is not None and self._current.values:
            yield self._metrics(self._current)
        if self._message:
            yield Text(f"› {_one_line(self._message)}", style="dim", no_wrap=True, overflow="ellipsis")

    def _progress(self) -> Table:
        table = Table.grid(padding=(0, 2, 0, 0), expand=True)
        table.add_column(no_wrap=True, overflow="ellipsis")
        table.add_column(ratio=1, no_wrap=True)
        table.add_column(no_wrap=True, justify="right")
        table.add_column(no_wrap=True, justify="right")
        for phase in self._phases.values():
            current = phase is self._current
            mark, style = ("✓", "green") if phase.done else ("●", "bold") if current else ("○", "dim")
            steps = f"{phase.step:,}" + ("" if phase.total is None else f"/{phase.total:,}")
            bar = ProgressBar(total=1.0, completed=phase.fraction, finished_style="green")
            table.add_row(Text(f"{mark} {_one_line(phase.name)}", style=style), bar, steps, self._times(phase))
        return table

    def _times(self, phase: _Phase) -> Text:
        text = Text(duration(phase.now - phase.began))
        if not phase.done and phase.remaining_s is not None and self._console.width >= 60:
            text.append(f" · {duration(phase.remaining_s)} left", style="dim")
        return text

    def _metrics(self, phase: _Phase) -> Table:
        shown = headlines_of(phase.values)[:_SHOWN]
        values = [number(phase.values[headline.key]) for headline in shown]
        used = 6 + max((len(headline.label) for headline in shown), default=0) + max(map(len, values), default=0)
        width = min(self._console.width - used, 60)
        table = Table.grid(padding=(0, 2, 0, 0))
        for headline, value in zip(shown, values, strict=True):
            line = sparkline(phase.histories[headline.key].points, width)
            table.add_row(
                Text(f"  {headline.label}", style="dim", no_wrap=True),
                Text(value, style="bold", justify="right", no_wrap=True),
                Text(line, style=_COLORS.get(headline.key, "magenta"), no_wrap=True, overflow="crop"),
            )
        return table


def _one_line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
