"""What a caller of a recipe may have called: after each step, and to judge the model. Both may be async."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from inspect import isawaitable
from typing import TypeVar, cast

from fwasync import AsyncTrainingClient
from fwasync.errors import UsageError
from fwasync.tracking.records import metric

__all__ = ("EvalFn", "Judgement", "StepCallback", "called", "judged")

T = TypeVar("T")

StepCallback = Callable[[int, Mapping[str, float]], Awaitable[None] | None]
"""`(step, metrics)`, called after each step, in order, on the event loop."""

Judgement = Awaitable[Mapping[str, float] | None] | Mapping[str, float] | None
"""Metrics by name; `None` is none."""

EvalFn = Callable[[int, AsyncTrainingClient], Judgement]
"""`(step, client) -> metrics`, called at the end of each pass. Meanwhile nothing is trained: the client's weights are
those of that step. The metrics are logged with the step's own."""


async def called(result: Awaitable[T] | T) -> T:
    """The result of a callback, which may be async."""
    if isawaitable(result):
        return cast("T", await result)
    return result


async def judged(result: Judgement) -> dict[str, float]:
    """The metrics that an evaluation gives.

    Raises:
        UsageError: They are not a mapping of names to numbers.
    """
    metrics = cast("object", await called(result))
    if metrics is None:
        return {}
    if not isinstance(metrics, Mapping):
        raise UsageError(f"an evaluation must give a mapping of names to numbers, got {type(metrics).__name__}")
    return {str(name): metric(str(name), value) for name, value in cast("Mapping[object, object]", metrics).items()}
