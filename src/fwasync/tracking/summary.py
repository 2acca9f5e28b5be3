"""What came of a run, whatever its recipe, made of the names of its metrics. Pure."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from fwasync.tracking.headlines import Headline, duration, headlines_of, number
from fwasync.tracking.report import Table, render_report
from fwasync.tracking.run import Record
from fwasync.tracking.settings import config_json

__all__ = ("Course", "courses", "ends", "run_report")

_EDGE = 5
_MOST = 3
_MEANS = ("perf/", "rollout/in_flight", "train/tokens_per_sec", "train/grad_norm")
"""They tell how it went, not what came of it."""


@dataclass(frozen=True, slots=True)
class Course:
    """How a metric went in a phase: where it began, where it ended, and over how many steps."""

    phase: str
    headline: Headline
    first: float
    last: float
    steps: int

    def __str__(self) -> str:
        return f"{number(self.first)} → {number(self.last)}"


def courses(records: Sequence[Record]) -> list[Course]:
    """How the metrics went that everyone looks at first: up to three of each phase; speed is not one of them."""
    return [
        course for phase in dict.fromkeys(record.phase for record in records) for course in _courses(phase, records)
    ]


def ends(values: Sequence[float]) -> tuple[float, float]:
    """Where values began and ended: the means of up to five at each end, of no more than a quarter of all.

    Args:
        values: At least one. What is not finite counts only if nothing else is there.
    """
    finite = [value for value in values if math.isfinite(value)] or list(values)
    edge = min(_EDGE, max(len(finite) // 4, 1))
    return sum(finite[:edge]) / edge, sum(finite[-edge:]) / edge


def run_report(
    *, title: str, config: Mapping[str, Any], records: Sequence[Record], tables: Sequence[Table] = ()
) -> str:
    """The report of any run as an HTML page: what came of it, its curves, and its settings, secrets masked.

    Args:
        title: The heading of the page.
        config: What determined the run.
        records: What was logged.
        tables: The recipe's own, shown before the settings.

    Raises:
        UsageError: `config` contains itself, or a table is ragged.
    """
    cards = [("steps", f"{len(records):,}"), ("time", duration(records[-1].time_s if records else 0.0))]
    phases = {record.phase for record in records}
    for course in courses(records):
        where = f" ({course.phase})" if len(phases) > 1 else ""
        cards.append((f"{course.headline.title}{where}", str(course)))
    settings = Table("Settings", ("name", "value"), list(_flat(json.loads(config_json(config)))))
    return render_report(title=title, summary=cards, records=records, tables=(*tables, settings))


def _courses(phase: str, records: Sequence[Record]) -> Iterator[Course]:
    own = [record for record in records if record.phase == phase]
    names = {name for record in own for name in record.metrics if not name.startswith(_MEANS)}
    for headline in headlines_of(names)[:_MOST]:
        values = [record.metrics[headline.key] for record in own if headline.key in record.metrics]
        yield Course(phase, headline, *ends(values), steps=len(values))


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Settings that are set, by their dotted names."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(cast("dict[str, Any]", value), f"{prefix}{name}.")
        elif value is not None:
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value)
