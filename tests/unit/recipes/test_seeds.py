"""Randomness that depends on what it is for."""

from __future__ import annotations

from collections import Counter

import pytest

from fwasync.recipes.seeds import batches, derive_seed


def test_seeds_depend_on_every_part_and_fit_31_bits() -> None:
    assert derive_seed(0, "sample", 1, 2) == 1611577189
    seeds = {derive_seed(a, b, c) for a in range(20) for b in ("x", "y") for c in range(20)}
    assert len(seeds) == 800
    assert all(0 <= seed < 2**31 for seed in seeds)


@pytest.mark.parametrize(("rows", "size", "total"), [(10, 4, 30), (10, 10, 10), (3, 8, 16), (5, 2, 5)])
def test_every_row_comes_equally_often(rows: int, size: int, total: int) -> None:
    found = list(batches(rows, size, total=total, seed=0))
    counts = Counter(index for batch in found for index in batch)
    assert sum(counts.values()) == total
    assert max(counts.values()) - min(counts[index] for index in range(rows)) <= 1
    assert all(len(batch) == size for batch in found[:-1])
    assert len(found[-1]) == (total % size or size)


def test_passes_differ_and_seeds_differ_and_repeat() -> None:
    first, second = batches(50, 50, total=100, seed=0)
    assert first != second
    assert list(batches(50, 50, total=100, seed=0)) == [first, second]
    assert next(batches(50, 50, total=100, seed=1)) != first
