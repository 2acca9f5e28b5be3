"""The calls in progress on an object that can be closed under them.

Invariants
    * Closing ends them all, wherever they are, and each raises `ClosedError`.
    * Who closes waits until the calls have ended, but not for blocks that are the caller's own.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import contextmanager

import anyio

from fwasync.errors import ClosedError

__all__ = ("Calls",)


class Calls:
    """Calls and blocks in progress.

    Args:
        owner: What is closed, for the error's text.
    """

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._calls: dict[anyio.CancelScope, bool] = {}
        self._closing: dict[anyio.CancelScope, anyio.Event] = {}

    @contextmanager
    def call(self, *, timeout: float | None = None, is_block: bool = False) -> Generator[None]:
        """Be one of them.

        Args:
            timeout: Seconds after which the block ends, as that of `anyio.move_on_after` does.
            is_block: Code of the caller runs inside: who closes does not wait for it.

        Raises:
            ClosedError: The owner was closed meanwhile.
        """
        deadline = math.inf if timeout is None else anyio.current_time() + timeout
        ended: anyio.Event | None = None
        with anyio.CancelScope(deadline=deadline) as scope:
            self._calls[scope] = is_block
            try:
                yield
            finally:
                del self._calls[scope]
                ended = self._closing.pop(scope, None)
                if ended is not None:
                    ended.set()
        if ended is not None and scope.cancelled_caught:
            raise ClosedError(f"{self._owner} was closed while this was in progress: keep its block open until the end")

    async def end(self) -> None:
        """End all of them, and wait for those that are no blocks."""
        ending = dict(self._calls)
        for scope in ending:
            self._closing.setdefault(scope, anyio.Event())
            scope.cancel()
        awaited = [self._closing[scope] for scope, is_block in ending.items() if not is_block]
        with anyio.CancelScope(shield=True):  # they are cancelled, which takes no time
            for ended in awaited:
                await ended.wait()
