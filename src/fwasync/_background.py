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

    It differs from a bare group in one thing: whatever the owner's body ends with passes through as it is, because the
    body is our user's and the tasks are not. An exception is not put into an exception group, and ending the tasks
    does not cancel the task that ends them.
    """

    def __init__(self) -> None:
        self._group: TaskGroup | None = None
        self._scopes: set[anyio.CancelScope] = set()

    async def open(self) -> None:
        """Make ready to start tasks; called in `__aenter__`."""
        group = anyio.create_task_group()
        await group.__aenter__()
        self._group = group

    def start(self, task: Callable[[*Ts], Coroutine[Any, Any, object]], *args: *Ts) -> None:
        """Start a task."""
        assert self._group is not None, "open() comes first"
        scope = anyio.CancelScope()
        self._scopes.add(scope)
        self._group.start_soon(self._run, scope, task, *args)

    async def _run(
        self, scope: anyio.CancelScope, task: Callable[[*Ts], Coroutine[Any, Any, object]], *args: *Ts
    ) -> None:
        with scope:
            await task(*args)
        self._scopes.discard(scope)

    async def aclose(self) -> None:
        """Cancel what still runs and wait for its end; called in `__aexit__`, by the task that opened."""
        group, self._group = self._group, None
        if group is not None:
            for scope in self._scopes:
                scope.cancel()
            await group.__aexit__(None, None, None)
