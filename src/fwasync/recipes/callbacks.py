"""What a caller of a recipe may have called: after each step, and to judge the model. Both may be async."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from inspect import isawaitable
from typing import TypeVar, cast

from fwasync import AsyncTrainingClient

__all__ = ("EvalFn", "StepCallback", "called")

T = TypeVar("T")

StepCallback = Callable[[int, Mapping[str, float]], Awaitable[None] | None]
"""`(step, metrics)`, called after each step, in order, on the event loop."""

EvalFn = Callable[[int, AsyncTrainingClient], Awaitable[Mapping[str, float]] | Mapping[str, float]]
"""`(step, client) -> metrics`, called at the end of each pass. Meanwhile nothing is trained: the client's weights are
those of that step. The metrics are logged with the step's own."""


async def called(result: Awaitable[T] | T) -> T:
    """The result of a callback, which may be async."""
    if isawaitable(result):
        return cast("T", await result)
    return result
