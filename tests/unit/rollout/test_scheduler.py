"""The scheduler on a virtual clock: what is admitted when, what is handed over, and where every row ends up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import nullcontext
from typing import Any

import anyio
import pytest

from fwasync import errors
from fwasync.rollout.context import RolloutContext
from fwasync.rollout.scheduler import AsyncRolloutScheduler
from fwasync.rollout.trajectory import Rollout, rewards_differ
from fwasync.testing import virtual_time
from unit.rollout.runs import Counted, Sampler, made, rows_of, settings, train


async def second(row: Any, ctx: RolloutContext) -> Rollout:
    """A rollout that takes a second."""
    await anyio.sleep(1)
    return made(ctx)


@virtual_time
async def test_every_row_is_trained_on_once_and_the_account_says_so() -> None:
    rollout = Counted(second)
    async with AsyncRolloutScheduler("abcde", rollout, settings(), sampler=object()) as scheduler:
        batches = await train(scheduler)
        account = scheduler.statistics().account
    assert [rows_of(batch) for batch in batches] == [[0, 1], [2, 3], [4]]
    assert [sorted(group.row for group in batch) for batch in batches] == [["a", "b"], ["c", "d"], ["e"]]
    assert all(len(group.rollouts) == 4 for batch in batches for group in batch)
    assert all(sum(group.advantages) == pytest.approx(0) for batch in batches for group in batch)
    assert (account.submitted, account.kept, account.in_flight, account.waiting) == (5, 5, 0, 0)
    assert scheduler.version == 3
    assert len(set(rollout.seeds)) == len(rollout.seeds) == 20
    assert rollout.running == 0


@virtual_time
async def test_strictly_on_policy_samples_nothing_ahead() -> None:
    rollout = Counted(second)
    async with AsyncRolloutScheduler(range(8), rollout, settings(), sampler=object()) as scheduler:
        async for batch in scheduler:
            await batch.collect()
            await anyio.sleep(60)
            assert len(rollout.rows) == 2 * (batch.version + 1), "the trainer is not overtaken"
            await scheduler.publish(batch)
    assert [version for _, _, _, version in rollout.started] == [v for v in range(4) for _ in range(8)]


@virtual_time
async def test_one_version_ahead_samples_while_training() -> None:
    rollout = Counted(second)
    limits = settings(max_staleness=1)
    async with AsyncRolloutScheduler(range(40), rollout, limits, sampler=object()) as scheduler:
        started = anyio.current_time()
        batches = await train(scheduler, seconds=1.0)
        elapsed = anyio.current_time() - started
        statistics = scheduler.statistics()
    assert elapsed == pytest.approx(21), "one second of sampling, then twenty of training that hide the rest"
    assert statistics.overlap_s == pytest.approx(18)
    assert statistics.trainer_idle_s == pytest.approx(1)
    offsets = [version - group.version for version, batch in enumerate(batches) for group in batch]
    assert max(offsets) == 1


@virtual_time
async def test_a_straggler_is_waited_for_rather_than_trained_on_too_late() -> None:
    async def rollout(row: int, ctx: RolloutContext) -> Rollout:
        await anyio.sleep(100 if row == 0 else 1)
        return made(ctx)

    limits = settings(max_staleness=2)
    async with AsyncRolloutScheduler(range(20), rollout, limits, sampler=object()) as scheduler:
        batches = await train(scheduler)
    where = {group.row_index: version for version, batch in enumerate(batches) for group in batch}
    assert where[0] == 2, "the last batch that it may be in"
    assert sorted(where) == list(range(20)), "and nothing was thrown away"


@virtual_time
async def test_a_batch_is_handed_over_when_its_first_chunk_is_full() -> None:
    async def rollout(row: int, ctx: RolloutContext) -> Rollout:
        await anyio.sleep(row)
        return made(ctx)

    limits = settings(groups_per_batch=5, chunks_per_batch=2)
    seen = []
    async with AsyncRolloutScheduler(range(5), rollout, limits, sampler=object()) as scheduler:
        async for batch in scheduler:
            async for chunk in batch:
                seen.append((anyio.current_time(), [group.row_index for group in chunk]))
            metrics = await scheduler.publish(batch)
    assert seen == [(2, [0, 1, 2]), (4, [3, 4])]
    assert metrics["async/realized_training_chunks"] == 2
    assert metrics["perf/train_chunk_wait_time"] == pytest.approx(2)


@virtual_time
async def test_concurrency_is_bounded_by_whole_rows() -> None:
    rollout = Counted(second)
    limits = settings(max_staleness=3, max_concurrency=11)
    async with AsyncRolloutScheduler(range(20), rollout, limits, sampler=object()) as scheduler:
        await train(scheduler)
    assert rollout.most == 8


@virtual_time
async def test_a_window_that_adapts_is_followed() -> None:
    class Window:
        window_size = 4

    window, rollout = Window(), Counted(second)
    limits = settings(max_staleness=9, max_concurrency=16)
    async with AsyncRolloutScheduler(range(40), rollout, limits, sampler=object(), concurrency=window) as scheduler:
        await train(scheduler, batches=2)
        assert rollout.most == 4
        window.window_size = 12
        await train(scheduler, batches=2)
        assert rollout.most == 12
        window.window_size = 1
        rollout.most = 0
        await train(scheduler)
        assert rollout.most == 4, "there is always room for one row"
    assert len(rollout.rows) == 40


@virtual_time
async def test_what_the_filter_drops_is_replaced_and_counted() -> None:
    async def rollout(row: int, ctx: RolloutContext) -> Rollout:
        await anyio.sleep(1)
        return made(ctx, 1.0 if row % 2 else None)

    async with AsyncRolloutScheduler(range(8), rollout, settings(), sampler=object(), keep=rewards_differ) as scheduler:
        batches = await train(scheduler)
        account = scheduler.statistics().account
        assert scheduler.state().position == 8
    assert [rows_of(batch) for batch in batches] == [[0, 2], [4, 6]]
    assert (account.submitted, account.kept, account.filtered, account.refilled) == (8, 4, 4, 3)


@virtual_time
async def test_advantages_that_are_no_numbers_drop_the_group() -> None:
    def advantages(rewards: Any) -> list[float]:
        return [float("nan")] * len(rewards) if max(rewards) > 3 else list(rewards)

    async def rollout(row: int, ctx: RolloutContext) -> Rollout:
        return made(ctx, 9.0 if row == 1 else None)

    async with AsyncRolloutScheduler(
        range(3), rollout, settings(), sampler=object(), advantages=advantages
    ) as scheduler:
        batches = await train(scheduler)
        account = scheduler.statistics().account
    assert [rows_of(batch) for batch in batches] == [[0, 2]]
    assert account.filtered == 1
    assert batches[0][0].advantages == (0.0, 1.0, 2.0, 3.0)


@virtual_time
async def test_lost_rollouts_leave_a_smaller_group() -> None:
    async def rollout(row: int, ctx: RolloutContext) -> Rollout | None:
        if ctx.rollout_index == 1:
            raise ConnectionResetError("the tool hung up")
        return None if ctx.rollout_index == 2 else made(ctx)

    async with AsyncRolloutScheduler(range(2), rollout, settings(), sampler=object()) as scheduler:
        (batch,) = await train(scheduler)
        statistics = scheduler.statistics()
    assert [len(group.rollouts) for group in batch] == [2, 2]
    assert statistics.drops == {"ConnectionResetError": 2, "None": 2}
    metrics = statistics.metrics()
    assert metrics["producer/recoverable_errors_total"] == 2
    assert metrics["producer/trajectory_drops_total"] == 4


@virtual_time
async def test_what_is_lost_in_a_task_group_is_counted_by_its_own_name() -> None:
    async def tool() -> None:
        raise ConnectionResetError("the sandbox is gone")

    async def rollout(row: int, ctx: RolloutContext) -> Rollout:
        await anyio.sleep(1)
        if ctx.rollout_index == 0:
            async with anyio.create_task_group() as tools:
                tools.start_soon(tool)
        return made(ctx)

    async with AsyncRolloutScheduler(range(2), rollout, settings(), sampler=object()) as scheduler:
        await train(scheduler)
        assert scheduler.statistics().drops == {"ConnectionResetError": 2}


@virtual_time
async def test_a_group_that_is_given_up_ends_its_siblings_and_is_tried_anew() -> None:
    ended: list[tuple[int, int]] = []

    async def rollout(row: int, ctx: RolloutContext) -> Rollout:
        if ctx.attempt == 0 and ctx.rollout_index < 3:
            await anyio.sleep(1)
            raise errors.RecoverableRolloutError("the sandbox went away")
        try:
            await anyio.sleep(50 if ctx.attempt == 0 else 1)
        finally:
            ended.append((ctx.attempt, ctx.rollout_index))
        return made(ctx)

    limits = settings(groups_per_batch=1, max_group_retries=1)
    counted = Counted(rollout)
    async with AsyncRolloutScheduler(range(1), counted, limits, sampler=object()) as scheduler:
        (batch,) = await train(scheduler)
        statistics = scheduler.statistics()
        assert anyio.current_time() == pytest.approx(2), "the sibling was not waited for"
    assert len(batch[0].rollouts) == 4
    assert ended[0] == (0, 3)
    assert statistics.drops == {"RecoverableRolloutError": 3, "sibling": 1}
    assert (statistics.account.retried, statistics.account.failed) == (1, 0)
    assert len(set(counted.seeds)) == 8, "a retry has seeds of its own"


@virtual_time
async def test_a_row_without_a_retry_left_fails_and_is_replaced() -> None:
    async def rollout(row: int, ctx: RolloutContext) -> Rollout | None:
        await anyio.sleep(1)
        return None if row == 0 else made(ctx)

    limits = settings(max_group_retries=2)
    counted = Counted(rollout)
    async with AsyncRolloutScheduler(range(3), counted, limits, sampler=object()) as scheduler:
        batches = await train(scheduler)
        account = scheduler.statistics().account
    assert [rows_of(batch) for batch in batches] == [[1, 2]]
    assert counted.rows.count(0) == 3
    assert (account.failed, account.retried, account.refilled) == (1, 2, 1)


@virtual_time
async def test_a_rollout_that_is_stuck_is_ended_at_its_deadline() -> None:
    async def rollout(row: int, ctx: RolloutContext) -> Rollout:
        assert ctx.time_left == pytest.approx(30)
        if ctx.rollout_index == 0:
            ctx.note("waiting for a tool that never answers")
            await anyio.sleep_forever()
        return made(ctx)

    limits = settings(rollout_timeout=30.0)
    async with AsyncRolloutScheduler(range(2), rollout, limits, sampler=object()) as scheduler:
        (batch,) = await train(scheduler)
        assert anyio.current_time() == pytest.approx(30)
        drops = scheduler.statistics().drops
    assert [len(group.rollouts) for group in batch] == [3, 3]
    assert drops == {"RolloutTimeoutError": 2}


@virtual_time
async def test_five_per_cent_of_failures_cost_no_row() -> None:
    async def rollout(row: int, ctx: RolloutContext) -> Rollout:
        await anyio.sleep(1 + (ctx.seed % 100) / 100)
        if ctx.seed % 20 == 0:
            raise TimeoutError("the tool was slow")
        return made(ctx)

    limits = settings(groups_per_batch=8, group_size=8, max_staleness=1, min_group_size=6, max_group_retries=2)
    async with AsyncRolloutScheduler(range(100), rollout, limits, sampler=object()) as scheduler:
        batches = await train(scheduler, seconds=0.5)
        statistics = scheduler.statistics()
    assert sorted(row for batch in batches for row in rows_of(batch)) == list(range(100))
    assert 20 < statistics.drops["TimeoutError"] < 70


@virtual_time
async def test_a_bug_ends_the_run_with_its_own_error() -> None:
    async def rollout(row: int, ctx: RolloutContext) -> Rollout:
        if row == 1 and ctx.rollout_index == 2:
            raise KeyError("reward")
        await anyio.sleep(10)
        return made(ctx)

    counted = Counted(rollout)
    async with AsyncRolloutScheduler(range(4), counted, settings(), sampler=object()) as scheduler:
        with pytest.raises(KeyError, match="reward") as caught:
            await train(scheduler)
        assert caught.value.__notes__ == ["raised by rollout 2 of row 1"]
        await anyio.sleep(0.1)
        assert counted.running == 0, "its siblings were ended"
        with pytest.raises(KeyError):
            await anext(scheduler)


@pytest.mark.parametrize(
    ("rollout_result", "error"),
    [
        ("text", TypeError),
        (asyncio.CancelledError(), errors.UsageError),
        (ValueError("no"), ValueError),
        (SystemExit(2), errors.UsageError),
        (StopAsyncIteration(), errors.UsageError),
    ],
)
def test_what_a_rollout_must_not_do(rollout_result: Any, error: type[Exception]) -> None:
    @virtual_time
    async def run() -> None:
        async def rollout(row: int, ctx: RolloutContext) -> Any:
            await anyio.sleep(1)
            if isinstance(rollout_result, BaseException):
                raise rollout_result
            return rollout_result

        async with AsyncRolloutScheduler(range(4), rollout, settings(), sampler=object()) as scheduler:
            with pytest.raises(error):
                await train(scheduler)

    run()


@virtual_time
async def test_a_rollout_that_cancels_its_own_task_is_told_of() -> None:
    async def rollout(row: int, ctx: RolloutContext) -> Rollout:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await anyio.sleep(1)
        return made(ctx)

    async with AsyncRolloutScheduler(range(4), rollout, settings(), sampler=object()) as scheduler:
        with pytest.raises(errors.UsageError, match="nobody had asked for"):
            await train(scheduler)


@virtual_time
async def test_when_a_run_has_failed_nothing_is_in_flight_and_every_loss_is_counted() -> None:
    async def rollout(row: int, ctx: RolloutContext) -> Rollout:
        await anyio.sleep(ctx.rollout_index)
        raise ConnectionError("down")

    limits = settings(group_size=8)
    async with AsyncRolloutScheduler(range(4), rollout, limits, sampler=object()) as scheduler:
        with pytest.raises(errors.CircuitBreakerTrippedError, match="5 rollouts in a row"):
            await train(scheduler)
        await anyio.sleep(0.1)
        statistics = scheduler.statistics()
    assert statistics.drops == {"ConnectionError": 5}
    assert (statistics.in_flight, statistics.oldest_s) == (0, 0)
    assert statistics.account.submitted == statistics.account.in_flight == 2, "which are not settled"


@virtual_time
async def test_an_async_filter_is_refused_rather_than_taken_for_yes() -> None:
    async def keep(group: object) -> bool:
        return False

    wrong: Any = keep
    async with AsyncRolloutScheduler(range(4), second, settings(), sampler=object(), keep=wrong) as scheduler:
        with pytest.raises(errors.UsageError, match="plain"):
            await train(scheduler)


@virtual_time
async def test_the_breaker_ends_the_run() -> None:
    async def rollout(row: int, ctx: RolloutContext) -> Rollout:
        await anyio.sleep(1)
        if row >= 4:
            raise ConnectionRefusedError("nobody is there")
        return made(ctx)

    async with AsyncRolloutScheduler(range(40), rollout, settings(), sampler=object()) as scheduler:
        with pytest.raises(errors.CircuitBreakerTrippedError, match="ConnectionRefusedError") as caught:
            await train(scheduler)
        assert isinstance(caught.value.__cause__, ConnectionRefusedError)
        assert scheduler.version == 2
        assert scheduler.state().position == 4


@virtual_time
async def test_a_row_whose_every_rollout_fails_has_failed_and_the_run_goes_on() -> None:
    async def rollout(row: int, ctx: RolloutContext) -> Rollout:
        await anyio.sleep(1)
        if row == 1:
            raise ConnectionResetError("this prompt kills the sandbox")
        return made(ctx)

    limits = settings(group_size=8, min_group_size=1)
    async with AsyncRolloutScheduler(range(5), rollout, limits, sampler=object()) as scheduler:
        batches = await train(scheduler)
        account = scheduler.statistics().account
    assert [rows_of(batch) for batch in batches] == [[0, 2], [3, 4]]
    assert (account.kept, account.failed, account.refilled) == (4, 1, 1)


@virtual_time
async def test_rollouts_that_are_stuck_do_not_trip_the_breaker_while_others_succeed() -> None:
    async def rollout(row: int, ctx: RolloutContext) -> Rollout:
        await anyio.sleep(1000 if ctx.rollout_index == 3 or row >= 8 else 1)
        return made(ctx)

    limits = settings(groups_per_batch=8, rollout_timeout=10.0)
    async with AsyncRolloutScheduler(range(40), rollout, limits, sampler=object()) as scheduler:
        batches = await train(scheduler, batches=1)
        assert [len(group.rollouts) for group in batches[0]] == [3] * 8, "eight have ended at once, at their deadline"
        with pytest.raises(errors.CircuitBreakerTrippedError, match="5 rollouts in a row"):
            await train(scheduler)


@virtual_time
async def test_the_breaker_counts_what_ends_many_rollouts_once() -> None:
    async def rollout(row: int, ctx: RolloutContext) -> Rollout:
        await anyio.sleep(1)
        if ctx.attempt == 0:
            raise errors.RecoverableRolloutError("the machine is lost", repeated=ctx.rollout_index > 0)
        return made(ctx)

    limits = settings(group_size=8, max_group_retries=1)
    async with AsyncRolloutScheduler(range(2), rollout, limits, sampler=object()) as scheduler:
        batches = await train(scheduler)
        drops = scheduler.statistics().drops
    assert [rows_of(batch) for batch in batches] == [[0, 1]]
    assert drops == {"RecoverableRolloutError": 14, "sibling": 2}


@virtual_time
async def test_an_error_of_later_rows_lets_the_batch_in_hand_be_published() -> None:
    async def rollout(row: int, ctx: RolloutContext) -> Rollout:
        await anyio.sleep(1 if row < 2 else 2)
        if row == 2:
            raise ValueError("a bad row")
        return made(ctx)

    async with AsyncRolloutScheduler(range(4), rollout, settings(max_staleness=1), sampler=object()) as scheduler:
        batch = await anext(scheduler)
        await anyio.sleep(10)
        assert len(await batch.collect()) == 2
        await scheduler.publish(batch)
        with pytest.raises(ValueError, match="a bad row"):
            await anext(scheduler)
        assert scheduler.state().kept == 2


@virtual_time
async def test_a_batch_that_cannot_become_whole_says_why() -> None:
    async def rollout(row: int, ctx: RolloutContext) -> Rollout:
        await anyio.sleep(row)
        if row == 1:
            raise ValueError("a bad row")
        return made(ctx)

    async with AsyncRolloutScheduler(range(2), rollout, settings(chunks_per_batch=2), sampler=object()) as scheduler:
        batch = await anext(scheduler)
        with pytest.raises(ValueError, match="a bad row"):
            await batch.collect()
        with pytest.raises(errors.UsageError, match="chunks that were not taken"):
            await scheduler.publish(batch)


@virtual_time
async def test_a_source_may_be_async_slow_and_end_early() -> None:
    async def rows() -> AsyncGenerator[str]:
        for name in "abc":
            await anyio.sleep(5)
            yield name

    async with AsyncRolloutScheduler(rows(), second, settings(max_staleness=3), sampler=object()) as scheduler:
        batches = await train(scheduler)
        assert anyio.current_time() == pytest.approx(16)
        assert scheduler.statistics().source_exhausted
    assert [[group.row for group in batch] for batch in batches] == [["a", "b"], ["c"]]


@virtual_time
async def test_a_source_without_rows_is_a_run_without_batches() -> None:
    async with AsyncRolloutScheduler([], second, settings(), sampler=object()) as scheduler:
        assert await train(scheduler) == []
        with pytest.raises(StopAsyncIteration):
            await anext(scheduler)


@virtual_time
async def test_a_source_that_is_not_at_its_end_is_closed_before_the_run_is_left() -> None:
    is_closed = False

    async def rows() -> AsyncGenerator[int]:
        nonlocal is_closed
        try:
            for number in range(100):
                yield number
        finally:
            await anyio.sleep(1)
            is_closed = True

    source = rows()
    async with AsyncRolloutScheduler(source, second, settings(), sampler=object()) as scheduler:
        await train(scheduler, batches=1)
        assert not is_closed
    assert is_closed


@virtual_time
async def test_a_source_that_breaks_ends_the_run() -> None:
    async def rows() -> AsyncGenerator[int]:
        yield 0
        raise OSError("the file is gone")

    async with AsyncRolloutScheduler(rows(), second, settings(), sampler=object()) as scheduler:
        with pytest.raises(OSError, match="the file is gone") as caught:
            await train(scheduler)
    assert "row 1" in caught.value.__notes__[0]


@virtual_time
async def test_a_run_goes_on_exactly_where_another_stopped() -> None:
    async def rollout(row: int, ctx: RolloutContext) -> Rollout:
        await anyio.sleep(7 if row in (1, 4) else 1)
        return made(ctx, 1.0 if row % 5 == 3 else None)

    limits = settings(max_staleness=2)
    first, second_ = Counted(rollout), Counted(rollout)
    async with AsyncRolloutScheduler(range(15), first, limits, sampler=object(), keep=rewards_differ) as scheduler:
        before = await train(scheduler, seconds=1, batches=2)
        state = scheduler.state()
    assert state.version == 2
    async with AsyncRolloutScheduler(
        range(15), second_, limits, sampler=object(), keep=rewards_differ, state=state
    ) as scheduler:
        after = await train(scheduler, seconds=1)
        end = scheduler.state()
        account = scheduler.statistics().account
    trained = [row for batch in before + after for row in rows_of(batch)]
    assert sorted(trained) == [row for row in range(15) if row % 5 != 3]
    assert not set(second_.rows) & {row for batch in before for row in rows_of(batch)}
    assert (end.position, end.ahead, end.kept, end.filtered, end.version) == (15, (), 12, 3, 6)
    assert account.submitted == 15
    seeds = dict(zip(first.started, first.seeds, strict=True))
    again = dict(zip(second_.started, second_.seeds, strict=True))
    same = {key[:3] for key in seeds} & {key[:3] for key in again}
    assert same, "some rows were in flight when the first run stopped"
    assert {(key[:3], seed) for key, seed in seeds.items() if key[:3] in same} == {
        (key[:3], seed) for key, seed in again.items() if key[:3] in same
    }


@virtual_time
async def test_rollouts_in_flight_get_the_new_sampler_and_the_old_one_stays_open_for_who_uses_it() -> None:
    old, new = Sampler("old"), Sampler("new")
    seen: list[tuple[int, str, int, bool]] = []

    async def rollout(row: int, ctx: RolloutContext) -> Rollout:
        held = ctx.sampler
        await anyio.sleep(1 if row < 2 else 5)
        seen.append((row, ctx.policy.sampler.name, ctx.policy.version, held.is_open))
        return made(ctx)

    async with AsyncRolloutScheduler(range(4), rollout, settings(max_staleness=1), sampler=old) as scheduler:
        batch = await anext(scheduler)
        await batch.collect()
        await scheduler.publish(batch, sampler=new)
        await anyio.sleep(1)
        assert old.is_open, "rows 2 and 3 use it"
        batch = await anext(scheduler)
        await anyio.sleep(1)
        assert (old.is_open, new.is_open) == (False, True)
    assert set(seen) == {(0, "old", 0, True), (1, "old", 0, True), (2, "new", 1, True), (3, "new", 1, True)}
    assert (old.closings, new.closings, new.is_open) == (1, 1, False)


@virtual_time
async def test_a_sampler_that_cannot_be_entered_commits_nothing() -> None:
    async with AsyncRolloutScheduler(range(2), second, settings(), sampler=Sampler()) as scheduler:
        batch = await anext(scheduler)
        await batch.collect()
        with pytest.raises(ConnectionError, match="no sampler here"):
            await scheduler.publish(batch, sampler=Sampler(failing=True))
        late = Sampler("late")
        with anyio.move_on_after(0.05) as scope:
            await scheduler.publish(batch, sampler=late)
        assert scope.cancelled_caught
        assert (scheduler.version, scheduler.state().position) == (0, 0)
        await scheduler.publish(batch)
        assert (scheduler.version, scheduler.state().position) == (1, 2)
    assert not late.is_open


@virtual_time
async def test_a_sampler_may_stay_its_owners() -> None:
    async with Sampler() as sampler:
        async with AsyncRolloutScheduler(range(2), second, settings(), sampler=nullcontext(sampler)) as scheduler:
            await train(scheduler)
        assert sampler.is_open


@virtual_time
async def test_a_scheduler_whose_sampler_cannot_be_entered_does_not_open() -> None:
    scheduler = AsyncRolloutScheduler(range(2), second, settings(), sampler=Sampler(failing=True))
    with pytest.raises(ConnectionError, match="no sampler here"):
        async with scheduler:
            pytest.fail("not reached")


@virtual_time
async def test_a_scheduler_is_entered_once() -> None:
    async with AsyncRolloutScheduler(range(2), second, settings(), sampler=object()) as scheduler:
        with pytest.raises(errors.UsageError, match="entered once"):
            await scheduler.__aenter__()
        assert len(await train(scheduler)) == 1
    with pytest.raises(errors.UsageError, match="entered once"):
        await scheduler.__aenter__()


@virtual_time
async def test_batches_are_published_in_order_whole_and_once() -> None:
    scheduler = AsyncRolloutScheduler(range(4), second, settings(chunks_per_batch=2), sampler=object())
    with pytest.raises(errors.ClosedError):
        await anext(scheduler)
    async with scheduler:
        batch = await anext(scheduler)
        with pytest.raises(errors.UsageError, match="batch 0 is not published"):
            await anext(scheduler)
        await anext(batch)
        with pytest.raises(errors.UsageError, match="chunks that were not taken"):
            await scheduler.publish(batch)
        await batch.collect()
        await scheduler.publish(batch)
        with pytest.raises(errors.UsageError, match="not the one in hand"):
            await scheduler.publish(batch)
    with pytest.raises(errors.ClosedError):
        await scheduler.publish(batch)


@virtual_time
async def test_leaving_ends_every_rollout_and_passes_the_callers_error_on() -> None:
    rollout = Counted(second)
    with pytest.raises(ZeroDivisionError):
        async with AsyncRolloutScheduler(range(9), rollout, settings(max_staleness=3), sampler=object()) as scheduler:
            await anyio.sleep(0.5)
            assert rollout.running == 32
            assert "32 rollouts in flight" in repr(scheduler)
            raise ZeroDivisionError
    assert rollout.running == 0
    assert len(asyncio.all_tasks()) == 1


@virtual_time
async def test_metrics_of_a_step() -> None:
    async with AsyncRolloutScheduler(range(4), second, settings(max_concurrency=4), sampler=object()) as scheduler:
        batch = await anext(scheduler)
        await batch.collect()
        await anyio.sleep(3)
        metrics = await scheduler.publish(batch)
    expected = {
        "perf/step_time": 5.0,
        "perf/train_wait_time": 2.0,
        "perf/train_time": 3.0,
        "perf/wait_time_ratio": 0.4,
        "perf/overlap_ratio": 0.0,
        "perf/sampler_idle_time": 3.0,
        "perf/step_samples_per_s": 8 / 5,
        "perf/step_tokens_per_s": 8 / 5,
        "async/in_flight_samples_mean": 8 / 5,
        "async/trained_against_version": 0.0,
        "async/version_offset_max": 0.0,
        "async/concurrency_capacity_samples_mean": 12 / 5,
        "rollout/reward": 1.5,
        "rollout/raw_reward": 1.5,
        "rollout/samples_completed": 8.0,
        "rollout/trainable_tokens_mean": 1.0,
        "rollout/queue_time_max": 1.0,
        "producer/published_version": 1.0,
        "producer/rows_submitted_total": 2.0,
        "producer/rows_completed_total": 2.0,
        "producer/source_exhausted": 0.0,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
