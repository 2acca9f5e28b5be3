"""Cutting a batch and merging its results are pure; together they must change nothing."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fwasync.training.batch import plan_chunks
from fwasync.training.merge import merge_metrics


@given(st.lists(st.integers(0, 100), min_size=1, max_size=60), st.integers(1, 10), st.integers(1, 150))
def test_chunks_tile_the_batch_within_the_limits(sizes: list[int], max_datums: int, max_bytes: int) -> None:
    chunks = plan_chunks(sizes, max_datums=max_datums, max_bytes=max_bytes)
    assert [index for chunk in chunks for index in range(len(sizes))[chunk]] == list(range(len(sizes)))
    for chunk in chunks:
        held = sizes[chunk]
        assert 1 <= len(held) <= max_datums
        assert len(held) == 1 or sum(held) <= max_bytes


@given(st.lists(st.integers(0, 100), min_size=2, max_size=60), st.integers(1, 10), st.integers(1, 150))
def test_no_chunk_could_take_the_next_datum(sizes: list[int], max_datums: int, max_bytes: int) -> None:
    chunks = plan_chunks(sizes, max_datums=max_datums, max_bytes=max_bytes)
    for chunk in chunks[:-1]:
        wider = sizes[chunk.start : chunk.stop + 1]
        assert len(wider) > max_datums or sum(wider) > max_bytes


def test_each_reduction() -> None:
    parts = [
        {"a:sum": 1, "b:mean": 1, "c:min": 3, "d:max": 3, "e:slack": 1, "f:unique": 7, "g": 1, "h:odd": 1, "i:sum": 1},
        {"a:sum": 2, "b:mean": 4, "c:min": 2, "d:max": 5, "e:slack": 4, "f:unique": 8, "g": 2, "h:odd": 1},
    ]
    assert merge_metrics(parts, weights=[2, 1]) == {
        "a:sum": 3,
        "b:mean": 2,
        "c:min": 2,
        "d:max": 5,
        "e:slack": 2,
        "f:unique": 7,
        "f:unique_1": 8,
    }


def test_one_chunk_keeps_everything() -> None:
    assert merge_metrics([{"loss": 1.0, "x:odd": 2.0}], weights=[0]) == {"loss": 1.0, "x:odd": 2.0}
