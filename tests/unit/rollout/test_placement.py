"""Batches: balanced chunks, and no group older than it may be, whichever order they become ready in."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fwasync.rollout.capacity import StalenessLimiter
from fwasync.rollout.placement import BatchPlacement, chunk_sizes


@pytest.mark.parametrize(
    ("groups", "chunks", "sizes"), [(10, 4, [3, 3, 2, 2]), (4, 4, [1] * 4), (5, 1, [5]), (8, 3, [3, 3, 2])]
)
def test_chunks_are_balanced_the_larger_first(groups: int, chunks: int, sizes: list[int]) -> None:
    assert chunk_sizes(groups, chunks) == sizes


def test_a_chunk_comes_out_when_it_is_full() -> None:
    placement = BatchPlacement[str](4, 2, 0, 0)
    seen = []
    for name in "abcd":
        placement.add(0, name)
        seen.append([(chunk.groups, chunk.completes) for chunk in placement.place([])])
    assert seen == [[], [(("a", "b"), False)], [], [(("c", "d"), True)]]


def test_what_there_is_at_the_end_is_the_last_batch() -> None:
    placement = BatchPlacement[str](10, 4, 0, 3)
    for name in "abcdefg":
        placement.add(3, name)
    chunks = placement.place([]) + placement.finish()
    assert [len(chunk.groups) for chunk in chunks] == [3, 3, 1]
    assert [chunk.completes for chunk in chunks] == [False, False, True]
    assert {chunk.batch for chunk in chunks} == {3}


def test_a_batch_whose_full_chunk_turns_out_to_be_its_last_is_made_whole() -> None:
    placement = BatchPlacement[str](4, 2, 0, 0)
    placement.add(0, "a")
    placement.add(0, "b")
    assert [chunk.completes for chunk in placement.place([])] == [False]
    assert [(chunk.groups, chunk.completes) for chunk in placement.finish()] == [((), True)]
    assert placement.finish() == []


def test_a_young_group_waits_for_an_old_one_that_needs_the_place() -> None:
    placement = BatchPlacement[str](2, 1, 1, 1)
    placement.add(0, "old")
    placement.add(1, "young")
    assert placement.place([0]) == [], "the other group of version 0 must be in this batch too"
    placement.add(0, "slow")
    (chunk,) = placement.place([])
    assert chunk.groups == ("old", "slow")
    assert placement.waiting == 1


def test_a_young_group_goes_ahead_where_the_old_one_keeps_a_place() -> None:
    placement = BatchPlacement[str](2, 1, 1, 0)
    placement.add(0, "a")
    placement.add(0, "b")
    (first,) = placement.place([0])
    assert first.groups == ("a", "b")
    placement.add(1, "young")
    assert placement.place([0]) == []
    placement.add(1, "younger")
    assert placement.waiting == 2, "one has a place, and both would push the old one out of batch 1"
    placement.add(0, "old")
    (second,) = placement.place([])
    assert second.groups == ("young", "old")


@dataclass
class Sim:
    """Admission and placement against each other, with random ends."""

    size: int
    chunks: int
    max_staleness: int
    rows: int

    def run(self, choose: st.DataObject) -> list[tuple[int, int, int]]:
        limiter = StalenessLimiter(self.size, self.max_staleness, 0)
        placement = BatchPlacement[tuple[int, int]](self.size, self.chunks, self.max_staleness, 0)
        flying: dict[int, int] = {}
        whole: list[int] = []
        trained: list[tuple[int, int, int]] = []
        admitted = 0
        while True:
            moves = []
            if limiter.capacity >= 1 and admitted < self.rows:
                moves.append("admit")
            if flying:
                moves += ["keep", "keep", "drop"]
            if whole:
                moves.append("publish")
            if not moves:
                break
            move = choose.draw(st.sampled_from(moves))
            if move == "admit":
                flying[admitted] = limiter.version
                limiter.admitted(1)
                admitted += 1
            elif move == "publish":
                assert whole.pop(0) == limiter.version
                limiter.published()
            else:
                row = choose.draw(st.sampled_from(sorted(flying)))
                version = flying.pop(row)
                if move == "keep":
                    limiter.accepted_row(1)
                    placement.add(version, (row, version))
                else:
                    limiter.dropped_row(1)
            chunks = placement.place(list(flying.values()))
            if admitted == self.rows and not flying:
                chunks += placement.finish()
            for chunk in chunks:
                trained += [(chunk.batch, *group) for group in chunk.groups]
                if chunk.completes:
                    whole.append(chunk.batch)
        assert admitted == self.rows, "stuck"
        assert not flying
        assert placement.waiting == 0
        return trained


@given(st.integers(1, 4), st.integers(0, 3), st.integers(0, 24), st.data())
def test_no_group_is_older_than_it_may_be_and_nothing_is_ever_stuck(
    size: int, max_staleness: int, rows: int, choose: st.DataObject
) -> None:
    chunks = choose.draw(st.integers(1, size))
    trained = Sim(size, chunks, max_staleness, rows).run(choose)
    assert all(0 <= batch - version <= max_staleness for batch, _, version in trained)
    assert len({row for _, row, _ in trained}) == len(trained)
    assert [batch for batch, _, _ in trained] == sorted(batch for batch, _, _ in trained)
