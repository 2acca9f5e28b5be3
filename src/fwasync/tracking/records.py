"""`Record`: what was logged at one step, and its line in `metrics.jsonl`. Pure."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any, cast

from fwasync.errors import UsageError

__all__ = ("Record", "is_after", "line_of", "metric", "record_of")

_OWN_KEYS = ("time_s", "phase", "step")


@dataclass(frozen=True, slots=True)
class Record:
    """What was logged at one step.

    Attributes:
        phase: The part of the run, such as `"sft"` or `"rl"`.
        step: The step within the phase.
        time_s: Seconds since the run began.
        metrics: Values by name; they may be NaN or infinite.
    """

    phase: str
    step: int
    time_s: float
    metrics: Mapping[str, float]


def metric(name: str, value: Any) -> float:
    """A value as a number.

    Raises:
        UsageError: It is none, or the name is one of `time_s`, `phase` and `step`.
    """
    if name in _OWN_KEYS:
        raise UsageError(f"a metric cannot be named {name!r}: every line has that key already; try 'train/{name}'")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise UsageError(f"metric {name!r} is {value!r}, which is no number") from error
    return int(value) if isinstance(value, Integral) else number


def line_of(record: Record) -> bytes:
    """The line of a record, with its newline; values that are not finite are `null`."""
    metrics = {name: value if math.isfinite(value) else None for name, value in record.metrics.items()}
    head = {"time_s": round(record.time_s, 6), "phase": record.phase, "step": record.step}
    return json.dumps({**head, **metrics}, allow_nan=False).encode() + b"\n"


def record_of(line: bytes) -> Record:
    """The record of a line; `null` is read as NaN.

    Raises:
        ValueError: It is not the line of a record.
    """
    parsed: object = json.loads(line)
    if not isinstance(parsed, dict):
        raise ValueError("it is not a JSON object")
    values = cast("dict[str, Any]", parsed)
    phase, step, time_s = values.get("phase"), values.get("step"), values.get("time_s")
    if not (isinstance(phase, str) and isinstance(step, int) and isinstance(time_s, int | float)):
        raise ValueError("phase, step or time_s are missing")
    metrics = {
        name: math.nan if value is None else metric(name, value)
        for name, value in values.items()
        if name not in _OWN_KEYS
    }
    return Record(phase, step, float(time_s), metrics)


def is_after(line: bytes, phase: str, step: int) -> bool:
    """Whether it is the line of a record of that phase and a later step."""
    try:
        record = record_of(line)
    except ValueError:
        return False
    return record.phase == phase and record.step > step
