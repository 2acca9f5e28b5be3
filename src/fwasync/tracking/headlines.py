"""The metrics that everyone looks at first, and how numbers are written for people. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ("HEADLINES", "Headline", "full_name", "headlines_of", "number")


@dataclass(frozen=True, slots=True)
class Headline:
    """A metric of interest.

    Attributes:
        key: Its name in the records.
        label: Its name on the terminal.
        title: Its name in a report.
    """

    key: str
    label: str
    title: str


HEADLINES = (
    Headline("rollout/reward", "reward", "Reward"),
    Headline("train/loss", "train/loss", "Loss"),
    Headline("train/ce_loss", "ce loss", "Cross-entropy loss"),
    Headline("perf/tokens_per_s", "tokens/s", "Tokens per second"),
    Headline("train/tokens_per_sec", "tokens/s", "Tokens per second"),
    Headline("rollout/in_flight", "in flight", "Samples in flight"),
    Headline("rollout/staleness", "staleness", "Staleness (policy versions)"),
    Headline("train/grad_norm", "grad norm", "Gradient norm"),
)


def headlines_of(metrics: Iterable[str]) -> list[Headline]:
    """The headlines among the names of metrics, in their fixed order."""
    names = set(metrics)
    return [headline for headline in HEADLINES if headline.key in names]


def full_name(name: str) -> str:
    """The key of the headline that a gauge means: `rollout/in_flight` for `in_flight`; else the name itself."""
    return next((headline.key for headline in HEADLINES if headline.key.endswith(f"/{name}")), name)


def number(value: float) -> str:
    """Write a number with as many digits as one reads: `0.312`, `10,240`, `1.50e-05`.

    Whole numbers are written whole.
    """
    if not math.isfinite(value):
        return str(float(value))
    size = abs(value)
    if size >= 1e9 or 0 < size < 1e-3:
        return f"{value:.2e}"
    if size >= 1000 or float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:.{1 if size >= 100 else 2 if size >= 10 else 3}f}"
