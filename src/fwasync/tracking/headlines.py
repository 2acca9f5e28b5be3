"""The metrics that everyone looks at first, and how numbers are written for people. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ("HEADLINES", "Headline", "duration", "full_name", "headlines_of", "number")


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
    Headline("train/dpo_loss", "dpo loss", "DPO loss"),
    Headline("train/orpo_loss", "orpo loss", "ORPO loss"),
    Headline("train/margin", "margin", "Margin of the chosen answer"),
    Headline("train/accuracy", "accuracy", "Accuracy of preferences"),
    Headline("train/log_odds_ratio", "log odds", "Log odds ratio"),
    Headline("rollout/accuracy", "right", "Part of rewards above 0.5"),
    Headline("rollout/pass@1", "pass@1", "pass@1"),
    Headline("eval/loss", "eval loss", "Loss of the evaluation"),
    Headline("perf/tokens_per_s", "tokens/s", "Tokens per second"),
    Headline("train/tokens_per_sec", "tokens/s", "Tokens per second"),
    Headline("rollout/in_flight", "in flight", "Samples in flight"),
    Headline("rollout/groups_ready", "groups ready", "Groups that wait to be trained on"),
    Headline("rollout/staleness", "staleness", "Staleness (policy versions)"),
    Headline("version/sample_staleness_avg", "staleness", "Staleness (policy versions)"),
    Headline("train/mean_kl", "kl", "KL from the reference"),
    Headline("train/ref_kl", "kl", "KL from the reference"),
    Headline("perf/wait_time_ratio", "waiting", "Part of the time spent waiting for samples"),
    Headline("perf/overlap_ratio", "overlap", "Part of the time in which sampling and training overlapped"),
    Headline("perf/sampler_idle_time", "no samples", "Seconds of a step without a rollout"),
    Headline("rollout/queue_time_mean", "queued", "Seconds that groups lay ready"),
    Headline("producer/trajectory_drops_total", "lost", "Rollouts that were lost"),
    Headline("rollout/response_len/mean", "length", "Length of answers (tokens)"),
    Headline("train/grad_norm", "grad norm", "Gradient norm"),
)
"""Names are the cookbook's, and ours where it has none; the first of them that a recipe logs are those to see first."""


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


def duration(seconds: float) -> str:
    """Write a time as a clock would: `0:07`, `12:30`, `1:02:03`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
