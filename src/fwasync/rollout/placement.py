"""Which group goes into which batch, so that none gets older than it may. Pure.

Admission alone does not bound staleness: a group that is slow could be overtaken by younger ones again and again,
until the batch that it ends up in is trained with weights far newer than those that it was sampled from. So a batch
takes a group only if every older group that still runs keeps a place in time; otherwise the batch waits. Nothing that
was sampled is thrown away for its age.

A group that was admitted at version s must be in batch s + O at the latest, O being the staleness allowed (batch k is
trained with weights of version k). Groups are placed by earliest deadline. A place always exists: admission lets at
most (d + 1) P groups have a deadline of d or before, P being the groups of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Generic, TypeVar

__all__ = ("BatchPlacement", "Placed", "chunk_sizes")

T = TypeVar("T")


def chunk_sizes(groups: int, chunks: int) -> list[int]:
    """Balanced sizes of the chunks of a batch, the larger ones first: 10 groups in 4 chunks are 3, 3, 2 and 2."""
    size, larger = divmod(groups, chunks)
    return [size + (index < larger) for index in range(chunks)]


@dataclass(frozen=True, slots=True)
class Placed(Generic[T]):
    """A chunk that is full, or what there is of it at the end of the data.

    Attributes:
        batch: Its batch, which is trained with the weights of this version.
        groups: The chunk; empty only if the end of the data makes a batch whole that had been handed out before.
        completes: Whether it is the last of its batch.
    """

    batch: int
    groups: tuple[T, ...]
    completes: bool


class BatchPlacement(Generic[T]):
    """Puts groups into batches.

    Args:
        groups_per_batch: Places of a batch.
        chunks_per_batch: Chunks of a batch.
        max_staleness: Versions that a group may be older than the weights of its batch.
        first_batch: The batch to begin with.
    """

    def __init__(self, groups_per_batch: int, chunks_per_batch: int, max_staleness: int, first_batch: int) -> None:
        self._size = groups_per_batch
        self._chunk_ends = list(accumulate(chunk_sizes(groups_per_batch, chunks_per_batch)))
        self._max_staleness = max_staleness
        self._waiting: list[tuple[int, int, T]] = []
        self._arrivals = 0
        self._batch = first_batch
        self._taken = 0
        self._chunk: list[T] = []

    @property
    def waiting(self) -> int:
        """Groups without a place yet, and such in a chunk that is not full."""
        return len(self._waiting) + len(self._chunk)

    def add(self, version: int, group: T) -> None:
        """A group that was kept, and the version that it was admitted at."""
        self._arrivals += 1
        self._waiting.append((version, self._arrivals, group))

    def place(self, outstanding: Sequence[int]) -> list[Placed[T]]:
        """Place what can be placed.

        Args:
            outstanding: The versions that the rows which have not settled were admitted at.

        Returns:
            The chunks that became full, in order.
        """
        placed: list[Placed[T]] = []
        while self._waiting:
            entry = min(self._waiting, key=lambda waiting: waiting[:2])
            if not self._may_take(entry[0], outstanding):
                break
            self._waiting.remove(entry)
            self._chunk.append(entry[2])
            self._taken += 1
            if self._taken in self._chunk_ends:
                placed.append(self._full_chunk(completes=self._taken == self._size))
        return placed

    def finish(self) -> list[Placed[T]]:
        """The data has ended and nothing is outstanding: make the last batch whole with what there is."""
        placed = self.place(())
        if self._taken:
            placed.append(self._full_chunk(completes=True))
        return placed

    def _may_take(self, version: int, outstanding: Sequence[int]) -> bool:
        """Whether all that is outstanding and has less time keeps a place, if this one is taken now."""
        free = self._size - self._taken - 1
        for oldest in range(self._batch - self._max_staleness, version):
            if sum(other <= oldest for other in outstanding) > free:
                return False
            free += self._size
        return True

    def _full_chunk(self, *, completes: bool) -> Placed[T]:
        placed = Placed(self._batch, tuple(self._chunk), completes)
        self._chunk = []
        if completes:
            self._batch += 1
            self._taken = 0
        return placed
