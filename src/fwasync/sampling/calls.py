"""The calls in progress on an object that can be closed under them.

Invariants
    * Closing ends them all, wherever they are, and each raises `ClosedError`.
    * Who closes waits until the calls have ended, but not for blocks that are the caller's own.
"""

from __future__ import annotations

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
        self._scopes: dict[anyio.CancelScope, anyio.Event] = {}

    @contextmanager
    def call(self, *, is_block: bool = False) -> Generator[None]:
        """Be one of them.

        Args:
            is_block: Code of the caller runs inside: who closes does not wait for it.

        Raises:
            ClosedError: The owner was closed meanwhile.
        """
        ended = anyio.Event()
        with anyio.CancelScope() as scope:
            self._scopes[scope] = ended
            if is_block:
                ended.set()
            try:
                yield
            finally:
                del self._scopes[scope]
                ended.set()
        if scope.cancelled_caught:
            raise ClosedError(f"{self._owner} was closed while this was in progress: keep its block open until the end")

    async def end(self) -> None:
        """End all of them, and wait for those that are no blocks."""
        ending = dict(self._scopes)
        for scope in ending:
            scope.cancel()
        with anyio.CancelScope(shield=True):  # they are cancelled, which takes no time
            for ended in ending.values():
                await ended.wait()
