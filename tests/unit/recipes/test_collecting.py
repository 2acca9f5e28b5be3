"""Collecting groups: who is taken, refilled, counted, and when bad luck is no longer that."""

from __future__ import annotations

import random
from collections.abc import Callable

import anyio
import anyio.lowlevel
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fwasync.errors import (
    AuthenticationError,
    OperationFailedError,
    OperationTimeoutError,
    ProtocolError,
    RateLimitError,
    ServiceUnavailableError,
    ServiceUnreachableError,
    UsageError,
)
from fwasync.recipes.collecting import Collected, Collector, RowCounts
from fwasync.recipes.groups import PromptGroup, TakenRow
from unit.recipes.groups import group, taken

GOOD, SAME, LOST = "good", "same", "lost"


def collector(outcomes: list[str], *, order: int = 0, refill: bool = True) -> tuple[Collector, list[int], list[int]]:
    """On rows that end so, in an order of its own; with the cursors that were asked for, and what was told."""
    asked: list[int] = []
    told: list[int] = []
    rng = random.Random(order)

    async def sample(row: TakenRow) -> PromptGroup:
        asked.append(row.cursor)
        for _ in range(rng.randrange(8)):
            await anyio.lowlevel.checkpoint()
        outcome = outcomes[row.cursor - 1]
        if outcome == LOST:
            raise ServiceUnreachableError(f"row {row.cursor}")
        return group([0, 1] if outcome == GOOD else [1, 1], version=row.cursor)

    rows = (taken(cursor) for cursor in range(1, len(outcomes) + 1))
    return Collector(rows, 0, sample, refill=refill, tell=told.append), asked, told


def cursors(collected: Collected) -> tuple[list[int], list[int], list[str]]:
    """Which rows were kept, filtered and lost; a group's version stands for its row."""
    return (
        [each.version for each in collected.kept],
        [each.version for each in collected.filtered],
        [str(error) for error in collected.failed],
    )


@given(
    outcomes=st.lists(st.sampled_from([GOOD, GOOD, SAME, LOST]), max_size=30),
    target=st.integers(1, 7),
    order=st.integers(0, 1000),
)
async def test_rows_are_taken_by_their_outcomes_and_not_by_their_arrival(
    outcomes: list[str], target: int, order: int
) -> None:
    source, asked, told = collector(outcomes, order=order)
    done = 0
    total = RowCounts()
    while not source.is_exhausted:
        left = outcomes[done:]
        good = [index for index, outcome in enumerate(left) if outcome == GOOD]
        size = good[target - 1] + 1 if len(good) >= target else len(left)
        collected = await source.collect(target)
        assert collected.consumed == source.consumed == done + size
        here = list(enumerate(left[:size], start=done + 1))
        assert cursors(collected) == (
            [cursor for cursor, outcome in here if outcome == GOOD],
            [cursor for cursor, outcome in here if outcome == SAME],
            [f"row {cursor}" for cursor, outcome in here if outcome == LOST],
        )
        total += RowCounts.of(collected)
        done += size
    assert sorted(asked) == list(range(1, len(outcomes) + 1))
    assert total == RowCounts(outcomes.count(GOOD), outcomes.count(SAME), outcomes.count(LOST))
    assert total.sampled == len(outcomes)
    assert max(told, default=0) <= target
    assert not told or told[-1] == 0


async def test_without_refill_a_step_is_what_was_left_of_so_many() -> None:
    source, _, _ = collector([SAME, SAME, GOOD, LOST, GOOD], refill=False)
    nothing = await source.collect(2)
    assert (cursors(nothing), nothing.consumed) == (([], [1, 2], []), 2)
    step = await source.collect(2, after=nothing)
    assert (cursors(step), step.consumed) == (([3], [1, 2], ["row 4"]), 4)
    last = await source.collect(2)
    assert (cursors(last), last.consumed, source.is_exhausted) == (([5], [], []), 5, True)


async def test_it_keeps_what_it_is_told_to_keep() -> None:
    async def sample(row: TakenRow) -> PromptGroup:
        return group([1, 1], version=row.cursor)

    source = Collector(map(taken, range(1, 4)), 0, sample, keep=lambda group: group.version != 2)
    assert cursors(await source.collect(2)) == ([1, 3], [2], [])

    def broken(group: PromptGroup) -> bool:
        raise KeyError("filter")

    with pytest.raises(KeyError):
        await Collector(map(taken, range(1, 4)), 0, sample, keep=broken).collect(2)


async def test_a_service_that_is_gone_ends_the_run() -> None:
    source, asked, _ = collector([LOST] * 100)
    with pytest.raises(ServiceUnreachableError) as caught:
        await source.collect(2)
    assert caught.value.__notes__[0] == "8 rows one after the other could not be sampled or rewarded"
    assert len(asked) < 12
    source, _, _ = collector([*[LOST] * 7, GOOD] * 5)
    assert [len((await source.collect(1)).failed) for _ in range(5)] == [7] * 5


@pytest.mark.parametrize(
    ("make", "goes_on"),
    [
        (lambda: ServiceUnreachableError("x"), True),
        (lambda: ServiceUnavailableError("x", status=503), True),
        (lambda: RateLimitError("x", status=429), True),
        (lambda: OperationFailedError("x", category="server"), True),
        (lambda: OperationTimeoutError("x"), True),
        (lambda: OperationFailedError("x", category="user"), False),
        (lambda: AuthenticationError("x", status=401), False),
        (lambda: ConnectionResetError("of a reward function"), True),
        (lambda: ProtocolError("x"), False),
        (lambda: UsageError("x"), False),
        (lambda: ZeroDivisionError("x"), False),
    ],
)
async def test_what_is_bad_luck(make: Callable[[], Exception], goes_on: bool) -> None:
    async def sample(row: TakenRow) -> PromptGroup:
        if row.cursor == 1:
            raise make()
        await anyio.lowlevel.checkpoint()
        return group([0, 1])

    source = Collector(map(taken, range(1, 4)), 0, sample)
    if goes_on:
        collected = await source.collect(2)
        assert (len(collected.kept), len(collected.failed)) == (2, 1)
        assert isinstance(collected.failed[0], type(make()))
        return
    with pytest.raises(type(make())):
        await source.collect(2)
