"""The order of the rows, and how far a run has come in it. Pure.

Invariants
    * Each pass takes every row once, in an order that depends on seed and pass alone.
    * The cursor counts rows of the file: rows that cannot be trained on are passed by and counted like the others. At
      the end of a pass it is a whole multiple of the number of rows.
    * What comes after a cursor does not depend on how it was reached.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fwasync.data.seeds import derive_seed

__all__ = ("Batch", "Batches", "carve_out")


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of one step.

    Attributes:
        rows: Their indices; at least one.
        epoch: The pass, from 0.
        consumed: The cursor after it.
        ends_epoch: It is the last of its pass.
    """

    rows: tuple[int, ...]
    epoch: int
    consumed: int
    ends_epoch: bool


class Batches:
    """The batches of a run. The last one of each pass may be smaller; no row is left over.

    Args:
        usable: For each row of the file whether it can be trained on; at least one can.
        batch_size: Rows of a batch.
        epochs: Passes.
        seed: Of the order.
        shuffle: Else every pass has the order of the file.
    """

    def __init__(
        self, usable: Sequence[bool], batch_size: int, *, epochs: int, seed: int, shuffle: bool = True
    ) -> None:
        self._usable = np.array(usable, bool)
        self._size = batch_size
        self._epochs = epochs
        self._seed = seed
        self._shuffle = shuffle

    @property
    def rows(self) -> int:
        """Rows of the file."""
        return len(self._usable)

    def steps(self, consumed: int = 0) -> int:
        """How many batches come after a cursor."""
        epoch, offset = divmod(consumed, self.rows)
        if epoch >= self._epochs:
            return 0
        left = int(self._usable[self._order(epoch)[offset:]].sum())
        whole = math.ceil(int(self._usable.sum()) / self._size)
        return math.ceil(left / self._size) + whole * (self._epochs - epoch - 1)

    def after(self, consumed: int = 0) -> Iterator[Batch]:
        """The batches that come after a cursor."""
        begins, offset = divmod(consumed, self.rows)
        for epoch in range(begins, self._epochs):
            order = self._order(epoch)
            places = np.flatnonzero(self._usable[order])
            places = places[places >= offset]
            offset = 0
            for start in range(0, len(places), self._size):
                chosen = places[start : start + self._size]
                last = start + self._size >= len(places)
                end = self.rows if last else int(chosen[-1]) + 1
                yield Batch(tuple(order[chosen].tolist()), epoch, epoch * self.rows + end, last)

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        if not self._shuffle:
            return np.arange(self.rows)
        return np.random.default_rng(derive_seed(self._seed, "epoch", epoch)).permutation(self.rows)


def carve_out(rows: int, *, ratio: float, most: int, seed: int) -> tuple[int, ...]:
    """Which of the rows to keep for evaluation: that part of them, rounded down, but not more than `most`."""
    count = min(int(rows * ratio), most, rows - 1)
    if count < 1:
        return ()
    chosen = np.random.default_rng(derive_seed(seed, "carve")).permutation(rows)[:count]
    return tuple(sorted(chosen.tolist()))
