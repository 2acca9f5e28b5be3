"""Randomness that depends on what it is for, and not on what happened before."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import numpy as np

__all__ = ("batches", "derive_seed")


def derive_seed(*parts: int | str) -> int:
    """A seed below 2**31 that is a function of its parts, the same on every machine."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") >> 1


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
