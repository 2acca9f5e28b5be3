"""Cancel what is used inside of an `async with` at every instant of it. With the virtual clock: it takes no time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, suppress
from typing import Any

import anyio

STEP_S = 0.049
"""Beside the round numbers of the tests' delays, so that instants between and upon them come."""


async def struck(
    enter: Callable[[], AbstractAsyncContextManager[Any]], *, at: float, stay_s: float, native: bool
) -> bool:
    """Enter something, stay there for a while, and cancel all that after a time; whether it was not over yet.

    Args:
        enter: What is entered.
        at: Seconds after which it is cancelled.
        stay_s: Seconds that are spent inside.
        native: Cancel the task; else a scope around it.
    """
    scope = anyio.CancelScope()

    async def use() -> None:
        with scope:
            async with enter():
                await anyio.sleep(stay_s)

    task = asyncio.ensure_future(use())
    await anyio.sleep(at)
    in_time = not task.done()
    task.cancel() if native else scope.cancel()
    with suppress(asyncio.CancelledError):
        await task
    return in_time
