"""A task beside a block of code."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVarTuple

from fwasync._background import Background

__all__ = ("meanwhile",)

Ts = TypeVarTuple("Ts")


@asynccontextmanager
async def meanwhile(task: Callable[[*Ts], Coroutine[Any, Any, object]], *args: *Ts) -> AsyncGenerator[None]:
    """Run a task for the time of the block, at the end of which it is cancelled and has ended.

    What the block raises passes as it is, without a group around it.
    """
    background = Background()
    await background.open()
    try:
        background.start(task, *args)
        yield
    finally:
        await background.aclose()
