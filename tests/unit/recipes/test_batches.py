"""The order of the rows: exact passes, and a cursor from which it goes on as if it had not been left."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fwasync.recipes.batches import Batches, carve_out

USABLE = st.lists(st.booleans(), min_size=1, max_size=12).filter(any)


@given(usable=USABLE, size=st.integers(1, 6), epochs=st.integers(1, 3), seed=st.integers(0, 5))
def test_each_pass_takes_each_usable_row_once(usable: list[bool], size: int, epochs: int, seed: int) -> None:
    order = Batches(usable, size, epochs=epochs, seed=seed)
    found = list(order.after())
    assert len(found) == order.steps()
    for epoch in range(epochs):
        own = [batch for batch in found if batch.epoch == epoch]
        counts = Counter(row for batch in own for row in batch.rows)
        assert counts == Counter(row for row, good in enumerate(usable) if good)
        assert all(len(batch.rows) == size for batch in own[:-1])
        assert [batch.ends_epoch for batch in own] == [False] * (len(own) - 1) + [True]
        assert own[-1].consumed == (epoch + 1) * len(usable)


@given(usable=USABLE, size=st.integers(1, 6), epochs=st.integers(1, 3))
def test_it_goes_on_from_every_cursor(usable: list[bool], size: int, epochs: int) -> None:
    order = Batches(usable, size, epochs=epochs, seed=3)
    found = list(order.after())
    for done, batch in enumerate(found, 1):
        assert list(order.after(batch.consumed)) == found[done:]
        assert order.steps(batch.consumed) == len(found) - done
    assert not list(order.after(len(usable) * epochs))


def test_passes_and_seeds_differ_and_repeat() -> None:
    first, second = (batch.rows for batch in Batches([True] * 50, 50, epochs=2, seed=0).after())
    assert first != second
    assert [batch.rows for batch in Batches([True] * 50, 50, epochs=2, seed=0).after()] == [first, second]
    assert next(Batches([True] * 50, 50, epochs=1, seed=1).after()).rows != first


@pytest.mark.parametrize(
    ("rows", "ratio", "most", "count"), [(100, 0.1, 100, 10), (100, 0.5, 20, 20), (9, 0.1, 5, 0), (1, 0.9, 5, 0)]
)
def test_how_much_is_carved_out(rows: int, ratio: float, most: int, count: int) -> None:
    chosen = carve_out(rows, ratio=ratio, most=most, seed=0)
    assert len(set(chosen)) == len(chosen) == count
    assert all(0 <= row < rows for row in chosen)
    assert chosen == carve_out(rows, ratio=ratio, most=most, seed=0)
