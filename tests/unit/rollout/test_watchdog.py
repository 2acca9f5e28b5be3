"""The watchdog: a run that does not move says what it waits for, and ends or goes on as it was told to."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from typing import Any

import anyio
import pytest

from fwasync.errors import RolloutStalledError
from fwasync.rollout import producer
from fwasync.rollout.context import RolloutContext
from fwasync.rollout.scheduler import AsyncRolloutScheduler
from fwasync.rollout.trajectory import Rollout
from fwasync.rollout.watchdog import StallReport, waiting_at
from fwasync.testing import virtual_time
from unit.rollout.runs import Counted, made, settings, train

PATIENT = {"rollout_timeout": 1e6, "stall_timeout": 600.0}


async def a_tool_that_never_answers() -> None:
    await anyio.sleep_forever()


async def stuck(row: int, ctx: RolloutContext) -> Rollout:
    await anyio.sleep(row)
    if row == 1 and ctx.rollout_index == 2:
        ctx.note("waiting for the tool")
        await a_tool_that_never_answers()
    return made(ctx)


@virtual_time
async def test_a_stuck_rollout_ends_the_run_with_its_name_and_its_place() -> None:
    rollout = Counted(stuck)
    async with AsyncRolloutScheduler(range(2), rollout, settings(**PATIENT), sampler=object()) as scheduler:
        with pytest.raises(RolloutStalledError) as caught:
            await train(scheduler)
        assert anyio.current_time() == pytest.approx(601, abs=0.5)
    text = str(caught.value)
    assert "row 1, rollout 2 (version 0): waiting for the tool for 600" in text
    assert "test_watchdog.py" in text
    assert "in a_tool_that_never_answers" in text
    assert "waiting for a batch" in text
    assert "a_tool_that_never_answers" in caught.value.tasks
    assert rollout.running == 0


@virtual_time
async def test_a_stuck_trainer_is_told_from_a_stuck_rollout_and_is_ended_where_it_waits() -> None:
    ended = False
    with pytest.raises(RolloutStalledError, match="the trainer is training since 600") as caught:
        async with AsyncRolloutScheduler(range(2), stuck_never, settings(**PATIENT), sampler=object()) as scheduler:
            async for batch in scheduler:
                await batch.collect()
                try:
                    await a_tool_that_never_answers()
                finally:
                    ended = True
    assert ended
    assert "in a_tool_that_never_answers, version 0 is published" in str(caught.value)
    assert caught.value.tasks.count("await a_tool_that_never_answers()") == 1, "all of a task's frames are told"
    assert len(asyncio.all_tasks()) == 1


async def stuck_never(row: int, ctx: RolloutContext) -> Rollout:
    return made(ctx)


@virtual_time
async def test_a_source_that_does_not_answer_is_named() -> None:
    async def rows() -> AsyncGenerator[int]:
        yield 0
        await anyio.sleep_forever()

    async with AsyncRolloutScheduler(rows(), stuck_never, settings(**PATIENT), sampler=object()) as scheduler:
        with pytest.raises(RolloutStalledError, match="the source has been asked for its next row since 600"):
            await train(scheduler)


@virtual_time
async def test_who_asks_to_be_called_decides() -> None:
    reports: list[StallReport] = []

    async def slow(row: int, ctx: RolloutContext) -> Rollout:
        await anyio.sleep(2000)
        return made(ctx)

    async with AsyncRolloutScheduler(
        range(2), slow, settings(**PATIENT), sampler=object(), on_stall=reports.append
    ) as scheduler:
        assert len(await train(scheduler)) == 1
    assert [round(report.stalled_s) for report in reports] == [600, 1200, 1800]
    assert len(reports[0].rollouts) == 8
    assert reports[0].statistics.in_flight == 8
    assert reports[0].tasks


@virtual_time
async def test_a_callback_that_raises_ends_the_run_with_what_it_raised() -> None:
    def give_up(report: StallReport) -> None:
        raise LookupError(report.stalled_s)

    async with AsyncRolloutScheduler(
        range(2), stuck, settings(**PATIENT), sampler=object(), on_stall=give_up
    ) as scheduler:
        with pytest.raises(LookupError):
            await train(scheduler)


@virtual_time
async def test_what_says_that_it_moves_is_not_stuck() -> None:
    async def slow(row: int, ctx: RolloutContext) -> Rollout:
        for part in range(20):
            ctx.note(f"part {part}")
            await anyio.sleep(500)
        return made(ctx)

    async with AsyncRolloutScheduler(range(2), slow, settings(**PATIENT), sampler=object()) as scheduler:
        assert len(await train(scheduler)) == 1


@virtual_time
async def test_a_run_that_is_over_is_not_stuck() -> None:
    async with AsyncRolloutScheduler(range(2), stuck_never, settings(**PATIENT), sampler=object()) as scheduler:
        await train(scheduler)
        await anyio.sleep(10_000)


@virtual_time
async def test_a_caller_who_hides_that_it_was_ended_is_told_nevertheless() -> None:
    with pytest.raises(RolloutStalledError):
        async with AsyncRolloutScheduler(range(2), stuck_never, settings(**PATIENT), sampler=object()):
            with contextlib.suppress(asyncio.CancelledError):
                await anyio.sleep_forever()


@virtual_time
async def test_without_a_limit_nobody_watches() -> None:
    limits = settings(rollout_timeout=1e6, stall_timeout=None)
    async with AsyncRolloutScheduler(range(2), stuck, limits, sampler=object()) as scheduler:
        with anyio.move_on_after(5000) as scope:
            await train(scheduler)
        assert scope.cancelled_caught


@virtual_time
async def test_a_row_that_could_never_be_admitted_is_an_error_and_no_hang() -> None:
    scheduler = AsyncRolloutScheduler(range(3), stuck_never, settings(), sampler=object())
    scheduler._producer.staleness.reserved += 100  # what no run should come to
    async with scheduler:
        with pytest.raises(RolloutStalledError, match=r"row 0 can never be admitted.*100 reserved"):
            await train(scheduler)


async def test_who_does_not_let_itself_be_cancelled_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(producer, "_STAYING_S", 0.01)
    begun, hangs_at = anyio.Event(), time.monotonic() + 60

    async def rollout(row: int, ctx: RolloutContext) -> Rollout:
        begun.set()
        while "cannot be left" not in caplog.text and time.monotonic() < hangs_at:
            with contextlib.suppress(asyncio.CancelledError):
                await anyio.sleep(0.001)
        return made(ctx)

    limits = settings(group_size=1, groups_per_batch=1)
    async with AsyncRolloutScheduler(range(1), rollout, limits, sampler=object()):
        await begun.wait()
    assert "row 0, rollout 0 (version 0): running for" in caplog.text


async def test_an_event_loop_that_stood_still_is_seen() -> None:
    async with AsyncRolloutScheduler([], stuck_never, settings(), sampler=object()) as scheduler:
        await anyio.sleep(0.01)
        time.sleep(0.8)  # noqa: ASYNC251  # the point
        await anyio.sleep(0.05)
        assert scheduler.statistics().worst_lag_s > 0.4


async def test_the_place_of_a_task_that_is_done_or_unknown_is_empty() -> None:
    async def nothing() -> None: ...

    async with asyncio.TaskGroup() as tasks:
        task: asyncio.Task[Any] = tasks.create_task(nothing())
    assert waiting_at(task) == waiting_at(None) == ""
