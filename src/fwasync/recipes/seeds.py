"""Randomness that depends on what it is for, and not on what happened before."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from fwasync.data.seeds import derive_seed

__all__ = ("batches", "derive_seed")


def batches(rows: int, batch_size: int, *, total: int, seed: int) -> Iterator[list[int]]:
    """Row indices of each batch: all rows in a new order, again and again, until `total` of them were given.

    No row is dropped at the end of a pass: batches go on across it. Only the last batch can be smaller.
    """
    order = np.concatenate(
        [
            np.random.default_rng(derive_seed(seed, "epoch", epoch)).permutation(rows)
            for epoch in range(math.ceil(total / rows))
        ]
    )[:total]
    for start in range(0, total, batch_size):
        yield order[start : start + batch_size].tolist()
