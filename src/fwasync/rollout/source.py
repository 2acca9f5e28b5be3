"""`RowSource`: rows of any iterable, one of them ready ahead, without those that are settled already."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

import anyio
import anyio.lowlevel

from fwasync.rollout.bell import Bell

__all__ = ("RowSource",)

RowT = TypeVar("RowT")

_BREATH = 256
_LEAVING_S = 30.0


class RowSource(Generic[RowT]):
    """Asks for rows, one ahead of need.

    Args:
        rows: The rows, from the beginning.
        is_settled: Whether a row is to be skipped.
        bell: Rung when a row is ready, and when there are no more.

    Attributes:
        next: The index and the row that is ready, if one is; see `take`.
        is_exhausted: Whether there are no more, beside `next`.
        asked_at: Since when the iterable has been asked for a row; `None` if it is not being asked.
    """

    def __init__(
        self, rows: Iterable[RowT] | AsyncIterable[RowT], is_settled: Callable[[int], bool], bell: Bell
    ) -> None:
        self._rows = rows
        self._is_settled = is_settled
        self._bell = bell
        self._taken = anyio.Event()
        self.next: tuple[int, RowT] | None = None
        self.is_exhausted = False
        self.asked_at: float | None = None

    def take(self) -> tuple[int, RowT]:
        """Take the row that is ready."""
        assert self.next is not None, "no row is ready"
        taken, self.next = self.next, None
        self._taken.set()
        return taken

    async def run(self) -> None:
        """Have the next row ready, until there are no more.

        Raises:
            Exception: What the iterable raises, with a note of where.

        **Cancellation:** an async generator is closed, within 30 s.
        """
        index = -1
        self.asked_at = anyio.current_time()
        try:
            async with _each(self._rows) as rows:
                async for row in rows:
                    index += 1
                    if not self._is_settled(index):
                        await self._offer(index, row)
        except Exception as error:
            error.add_note(f"the source of rows raised this when asked for row {index + 1}")
            raise
        self.asked_at = None
        self.is_exhausted = True
        self._bell.ring()

    async def _offer(self, index: int, row: RowT) -> None:
        self.next, self.asked_at, self._taken = (index, row), None, anyio.Event()
        self._bell.ring()
        await self._taken.wait()
        self.asked_at = anyio.current_time()


@asynccontextmanager
async def _each(rows: Iterable[RowT] | AsyncIterable[RowT]) -> AsyncGenerator[AsyncIterator[RowT]]:
    """Rows of either kind. A generator that is not at its end would be closed later, by a task that nobody owns."""
    iterator = aiter(rows if isinstance(rows, AsyncIterable) else _breathing(rows))
    try:
        yield iterator
    finally:
        if isinstance(iterator, AsyncGenerator):
            with anyio.move_on_after(_LEAVING_S, shield=True):
                await iterator.aclose()


async def _breathing(rows: Iterable[RowT]) -> AsyncGenerator[RowT]:
    """A long beginning that is skipped does not hold the loop."""
    for index, row in enumerate(rows):
        if index % _BREATH == _BREATH - 1:
            await anyio.lowlevel.checkpoint()
        yield row
