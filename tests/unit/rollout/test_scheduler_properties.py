"""Random runs: whatever rollouts, trainer and source do, and whenever a run is left, its promises hold.

Each program is run on a virtual clock, with a limit on virtual time: a run that hangs fails.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import anyio
from hypothesis import given, settings
from hypothesis import strategies as st

from fwasync.errors import CircuitBreakerTrippedError
from fwasync.rollout.breaker import BreakerSettings
from fwasync.rollout.context import RolloutContext
from fwasync.rollout.cursor import RolloutState
from fwasync.rollout.scheduler import AsyncRolloutScheduler
from fwasync.rollout.settings import RolloutSettings
from fwasync.rollout.trajectory import Rollout, RolloutGroup
from fwasync.testing.clock import VirtualClockLoop
from unit.rollout.runs import Counted, Sampler, made

MOST_S = 100_000.0


@dataclass(frozen=True)
class Program:
    """One run.

    The luck of a rollout depends on the seed, its row, number and attempt alone.
    """

    seed: int
    rows: int
    settings: RolloutSettings
    failing: float
    dropping: float
    stuck: float
    filtering: float
    trainer_s: float
    source_s: float
    samplers: bool
    stop_after_batches: int | None = None

    def luck(self, *key: Any) -> random.Random:
        return random.Random(f"{self.seed}/{key}")

    async def rollout(self, row: int, ctx: RolloutContext) -> Rollout | None:
        luck = self.luck(row, ctx.rollout_index, ctx.attempt)
        for _ in range(luck.randint(0, 3)):
            assert ctx.sampler is not None
            if isinstance(ctx.sampler, Sampler):
                assert ctx.sampler.is_open
            await anyio.sleep(luck.choice([0, 0.1, 1, 25]))
        fate = luck.random()
        if fate < self.failing:
            raise ConnectionError("bad luck")
        if fate < self.failing + self.stuck:
            await anyio.sleep_forever()
        if fate < self.failing + self.stuck + self.dropping:
            return None
        return made(ctx)

    def keep(self, group: RolloutGroup[int]) -> bool:
        return self.luck("keep", group.row_index).random() >= self.filtering

    async def source(self) -> AsyncGenerator[int]:
        for row in range(self.rows):
            await anyio.sleep(self.source_s * self.luck("source", row).random())
            yield row


programs = st.builds(
    Program,
    seed=st.integers(0, 10_000),
    rows=st.integers(0, 25),
    settings=st.builds(
        lambda groups, size, staleness, concurrency, chunks, retries, least: RolloutSettings(
            groups_per_batch=groups,
            group_size=size,
            max_staleness=staleness,
            max_concurrency=None if concurrency is None else size + concurrency,
            chunks_per_batch=min(chunks, groups),
            min_group_size=min(least, size),
            max_group_retries=retries,
            rollout_timeout=60.0,
            breaker=BreakerSettings(consecutive=12, window=40, least=40, ratio=0.95),
        ),
        st.integers(1, 4),
        st.integers(1, 4),
        st.integers(0, 3),
        st.none() | st.integers(0, 8),
        st.integers(1, 3),
        st.integers(0, 2),
        st.integers(1, 4),
    ),
    failing=st.sampled_from([0.0, 0.05, 0.4]),
    dropping=st.sampled_from([0.0, 0.2]),
    stuck=st.sampled_from([0.0, 0.1]),
    filtering=st.sampled_from([0.0, 0.3]),
    trainer_s=st.sampled_from([0.0, 1.0, 50.0]),
    source_s=st.sampled_from([0.0, 0.0, 20.0]),
    samplers=st.booleans(),
)


@dataclass
class Result:
    trained: list[tuple[int, RolloutGroup[int]]]
    state: RolloutState
    tripped: bool
    rollout: Counted


async def execute(program: Program, state: RolloutState | None = None) -> Result:
    """Run a program and check what must hold at every moment of it."""
    counted = Counted(program.rollout)
    trained: list[tuple[int, RolloutGroup[int]]] = []
    tripped = False
    samplers = [Sampler()]
    scheduler = AsyncRolloutScheduler(
        program.source(),
        counted,
        program.settings,
        sampler=samplers[0] if program.samplers else object(),
        keep=program.keep,
        state=state,
    )
    with anyio.fail_after(MOST_S):
        async with scheduler:
            try:
                async for batch in scheduler:
                    async for chunk in batch:
                        assert chunk
                        await anyio.sleep(program.trainer_s)
                        check(scheduler, program)
                    assert batch.version == scheduler.version
                    if program.samplers:
                        samplers.append(Sampler())
                    before = scheduler.state()
                    await scheduler.publish(batch, sampler=samplers[-1] if program.samplers else None)
                    assert scheduler.state().kept == before.kept + len(batch.groups)
                    trained += [(batch.version, group) for group in batch.groups]
                    check(scheduler, program)
                    if program.stop_after_batches == scheduler.version:
                        break
            except CircuitBreakerTrippedError:
                tripped = True
            final = scheduler.state()
            if not tripped and program.stop_after_batches is None:
                account = scheduler.statistics().account
                assert account.in_flight == account.waiting == 0
                assert final.position == account.submitted == program.rows
    assert counted.running == 0
    assert counted.most <= (program.settings.max_concurrency or counted.most)
    assert program.stop_after_batches or tripped or not scheduler._producer.ready, "nothing piles up"
    assert not any(sampler.is_open for sampler in samplers)
    assert all(sampler.closings == 1 for sampler in samplers if program.samplers)
    return Result(trained, final, tripped, counted)


def check(scheduler: AsyncRolloutScheduler[int], program: Program) -> None:
    now = scheduler.statistics()
    account, limits = now.account, program.settings
    assert account.submitted == account.in_flight + account.waiting + account.kept + account.filtered + account.failed
    if limits.max_concurrency is not None:
        assert now.in_flight <= limits.max_concurrency
    ahead = account.in_flight + account.waiting
    assert ahead <= (limits.max_staleness + 1) * limits.groups_per_batch


def judge(program: Program, trained: list[tuple[int, RolloutGroup[int]]]) -> None:
    rows = [group.row_index for _, group in trained]
    assert len(set(rows)) == len(rows), "no row is trained on twice"
    for version, group in trained:
        assert 0 <= version - group.version <= program.settings.max_staleness
        assert len(group.rollouts) == len(group.advantages) >= program.settings.least_group_size
        for rollout in group.rollouts:
            sampled = rollout.segments[0].versions[rollout.segments[0].mask]
            assert version - sampled.min() <= program.settings.max_staleness
    sizes = [sum(v == version for v, _ in trained) for version in sorted({v for v, _ in trained})]
    assert all(size == program.settings.groups_per_batch for size in sizes[:-1])


def on_virtual_clock(run: Any) -> Any:
    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        result = runner.run(run)
        assert not asyncio.all_tasks(runner.get_loop()), "every task has ended"
        return result


@given(programs)
@settings(max_examples=100)
def test_no_row_is_lost_doubled_or_stale_and_no_run_hangs(program: Program) -> None:
    result = on_virtual_clock(execute(program))
    judge(program, result.trained)
    if not result.tripped:
        kept = {group.row_index for _, group in result.trained}
        assert len(kept) == result.state.kept
        assert result.state.kept + result.state.filtered + result.state.failed == program.rows


@given(programs, st.integers(1, 3))
@settings(max_examples=40)
def test_a_run_that_is_stopped_and_resumed_trains_on_what_one_that_is_not_would(program: Program, stop: int) -> None:
    stopped = Program(**{**vars(program), "stop_after_batches": stop})
    first = on_virtual_clock(execute(stopped))
    if first.tripped:
        return
    second = on_virtual_clock(execute(program, first.state))
    judge(program, first.trained)
    judge(program, second.trained)
    if second.tripped:
        return
    trained = [group.row_index for _, group in first.trained + second.trained]
    assert len(set(trained)) == len(trained)
    # A row's fate depends on nothing but the row, so both ways come to the same.
    whole = on_virtual_clock(execute(program))
    if not whole.tripped:
        assert sorted(trained) == sorted(group.row_index for _, group in whole.trained)


class Interrupted(Exception):
    pass


@given(programs, st.integers(0, 400), st.booleans())
@settings(max_examples=100)
def test_a_run_may_be_left_at_any_await(program: Program, steps: int, cancelled: bool) -> None:
    """Count the turns of the loop, and strike at one of them: by a cancellation from outside, or an error inside."""
    ended: list[Counted] = []

    async def run() -> None:
        counted = Counted(program.rollout)
        ended.append(counted)
        struck = False

        async def strike(scope: anyio.CancelScope) -> None:
            nonlocal struck
            for _ in range(steps):
                await anyio.lowlevel.checkpoint()
            struck = True
            if cancelled:
                scope.cancel()

        async with anyio.create_task_group() as tasks:
            with anyio.CancelScope() as scope:
                tasks.start_soon(strike, scope)
                try:
                    async with AsyncRolloutScheduler(
                        program.source(), counted, program.settings, sampler=Sampler(), keep=program.keep
                    ) as scheduler:
                        async for batch in scheduler:
                            async for _ in batch:
                                await anyio.sleep(program.trainer_s)
                                if struck and not cancelled:
                                    raise Interrupted
                            await scheduler.publish(batch, sampler=Sampler())
                except (Interrupted, CircuitBreakerTrippedError):
                    pass
            assert counted.running == 0
            tasks.cancel_scope.cancel()

    on_virtual_clock(run())
    assert ended[0].running == 0
