"""`RowSource`: rows of any iterable, one of them ready ahead, without those that are settled already."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable
from typing import Generic, TypeVar

import anyio
import anyio.lowlevel

from fwasync.rollout.bell import Bell

__all__ = ("RowSource",)

RowT = TypeVar("RowT")

_BREATH = 256


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
        """
        index = -1
        self.asked_at = anyio.current_time()
        try:
            async for row in _each(self._rows):
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


async def _each(rows: Iterable[RowT] | AsyncIterable[RowT]) -> AsyncGenerator[RowT]:
    """Rows of either kind; a long beginning that is skipped does not hold the loop."""
    if isinstance(rows, AsyncIterable):
        async for row in rows:
            yield row
        return
    for index, row in enumerate(rows):
        if index % _BREATH == _BREATH - 1:
            await anyio.lowlevel.checkpoint()
        yield row
