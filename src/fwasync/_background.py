"""Tasks that belong to an object: they start after it is entered and have ended when it is left."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, TypeVarTuple

import anyio
from anyio.abc import TaskGroup

__all__ = ("Background",)

Ts = TypeVarTuple("Ts")


class Background:
    """A task group for the inside of `__aenter__` and `__aexit__`.

    It differs from a bare group in one thing: an exception of the owner's body passes through as it is,
    instead of inside an exception group, because the body is our user's and the tasks are not.
    """

    def __init__(self) -> None:
        self._group: TaskGroup | None = None

    async def open(self) -> None:
        """Make ready to start tasks; called in `__aenter__`."""
        group = anyio.create_task_group()
        await group.__aenter__()
        self._group = group

    def start(self, task: Callable[[*Ts], Coroutine[Any, Any, object]], *args: *Ts) -> None:
        """Start a task."""
        assert self._group is not None, "open() comes first"
        self._group.start_soon(task, *args)

    async def aclose(self) -> None:
        """Cancel what still runs and wait for its end; called in `__aexit__`, by the task that opened."""
        group, self._group = self._group, None
        if group is not None:
            group.cancel_scope.cancel()
            await group.__aexit__(None, None, None)
