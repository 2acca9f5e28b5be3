"""The calls in progress on an object that can be closed under them.

Invariants
    * Closing ends them all, wherever they are, and each raises `ClosedError`.
    * Who closes waits until the calls have ended, but not for blocks that are the caller's own.
"""

from __future__ import annotations

import math
from types import TracebackType

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

    def call(self, *, timeout: float | None = None, is_block: bool = False) -> Call:
        """Be one of them, for the block of a `with`.

        Args:
            timeout: Seconds after which the block ends, as that of `anyio.move_on_after` does.
            is_block: Code of the caller runs inside: who closes does not wait for it.

        Raises:
            ClosedError: The owner was closed meanwhile.
        """
        deadline = math.inf if timeout is None else anyio.current_time() + timeout
        return Call(self, anyio.CancelScope(deadline=deadline), is_block=is_block)

    def begin(self, scope: anyio.CancelScope, *, is_block: bool) -> None:
        """A call runs in this scope."""
        self._calls[scope] = is_block

    def finish(self, scope: anyio.CancelScope) -> bool:
        """A call runs no more; whether it was ended from here."""
        del self._calls[scope]
        ended = self._closing.pop(scope, None)
        if ended is not None:
            ended.set()
        return ended is not None

    def closed(self) -> ClosedError:
        """What a call that was ended from here raises."""
        return ClosedError(f"{self._owner} was closed while this was in progress: keep its block open until the end")

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


class Call:
    """The block of one call; made by `Calls.call`."""

    __slots__ = ("_calls", "_is_block", "_scope")

    def __init__(self, calls: Calls, scope: anyio.CancelScope, *, is_block: bool) -> None:
        self._calls = calls
        self._scope = scope
        self._is_block = is_block

    def __enter__(self) -> None:
        self._scope.__enter__()
        self._calls.begin(self._scope, is_block=self._is_block)

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> bool | None:
        is_ended = self._calls.finish(self._scope)
        is_caught = self._scope.__exit__(exc_type, exc, tb)
        if is_ended and self._scope.cancelled_caught:
            raise self._calls.closed()
        return is_caught
