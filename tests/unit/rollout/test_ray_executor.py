"""Rollouts in actors of Ray: the same coroutine, the same account."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from fwasync.errors import ClosedError, RecoverableRolloutError, UsageError
from fwasync.rollout.breaker import BreakerSettings
from fwasync.rollout.context import RolloutContext
from fwasync.rollout.ray_executor import RayExecutor
from fwasync.rollout.scheduler import AsyncRolloutScheduler
from fwasync.rollout.trajectory import Rollout
from unit.rollout.runs import made, settings, train

ray = pytest.importorskip("ray", reason="needs the extra `ray`")

pytestmark = [
    pytest.mark.timeout(300),
    # Of Ray itself, which leaves sockets and files to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    paths = os.pathsep.join(path for path in sys.path if path)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": paths}})
    yield
    ray.shutdown()


@asynccontextmanager
async def connect(address: str) -> AsyncGenerator[str]:
    yield f"sampler at {address}"


async def rollout(row: int, ctx: RolloutContext) -> Rollout | None:
    assert ctx.sampler == f"sampler at address {ctx.version}"
    assert ctx.tokenizer == "tokenizer"
    assert 0 < ctx.time_left <= 60
    await anyio.sleep(0.01)
    if (row, ctx.rollout_index) == (1, 0):
        raise ConnectionResetError("the tool hung up")
    if (row, ctx.rollout_index) == (1, 1):
        return None
    return made(ctx)


def tokenizer() -> str:
    return "tokenizer"


async def test_rollouts_run_elsewhere_and_are_counted_here() -> None:
    async with RayExecutor(connect, actors=2, tokenizer=tokenizer, options={"num_cpus": 0}) as executor:
        async with AsyncRolloutScheduler(
            range(6), rollout, settings(max_staleness=1, rollout_timeout=60.0), sampler="address 0", executor=executor
        ) as scheduler:
            versions: list[set[int]] = []
            async for batch in scheduler:
                groups = await batch.collect()
                versions.append({int(r.segments[0].versions.max()) for group in groups for r in group.rollouts})
                await scheduler.publish(batch, sampler=f"address {batch.version + 1}")
            statistics = scheduler.statistics()
    assert versions[:2] == [{0}, {0}]
    assert versions[2] <= {1, 2}, "one that waits for its turn to start may find newer weights"
    assert statistics.account.kept == 6
    assert statistics.drops == {"ConnectionResetError": 1, "None": 1}


async def waits(row: str, ctx: RolloutContext) -> Rollout:
    """Tells that it began, and that it ended."""
    place = Path(row) / str(ctx.rollout_index)
    place.with_suffix(".begun").touch()
    try:
        await anyio.sleep(3600)
    finally:
        place.with_suffix(".ended").touch()
    return made(ctx)


async def test_leaving_the_scheduler_ends_rollouts_where_they_run(tmp_path: Path) -> None:
    async with RayExecutor(connect, actors=1, options={"num_cpus": 0}) as executor:
        async with AsyncRolloutScheduler(
            [str(tmp_path)], waits, settings(group_size=2), sampler="a", executor=executor
        ):
            with anyio.fail_after(60):
                while len(list(tmp_path.glob("*.begun"))) < 2:  # noqa: ASYNC240
                    await anyio.sleep(0.05)
        assert len(list(tmp_path.glob("*.ended"))) == 2  # noqa: ASYNC240


async def dies(row: int, ctx: RolloutContext) -> Rollout:
    if ctx.attempt == 0:
        os._exit(1)
    return made(ctx)


async def test_a_lost_actor_is_bad_luck_and_replaced() -> None:
    async with RayExecutor(connect, actors=1, options={"num_cpus": 0}) as executor:
        limits = settings(groups_per_batch=1, group_size=2, max_group_retries=3)
        async with AsyncRolloutScheduler(range(1), dies, limits, sampler="a", executor=executor) as scheduler:
            (batch,) = await train(scheduler)
            drops = scheduler.statistics().drops
    assert len(batch[0].rollouts) == 2
    assert set(drops) <= {RecoverableRolloutError.__name__, "sibling"}


async def dies_once(row: int, ctx: RolloutContext) -> Rollout:
    if (row, ctx.rollout_index, ctx.attempt) == (0, 7, 0):
        os._exit(1)
    if ctx.attempt == 0:
        await anyio.sleep(3600)
    return made(ctx)


async def test_an_actor_that_is_lost_with_many_rollouts_is_one_failure() -> None:
    async with RayExecutor(connect, actors=1, options={"num_cpus": 0}) as executor:
        limits = settings(group_size=8, max_group_retries=1, breaker=BreakerSettings(consecutive=2))
        async with AsyncRolloutScheduler(range(2), dies_once, limits, sampler="a", executor=executor) as scheduler:
            (batch,) = await train(scheduler)
    assert [len(group.rollouts) for group in batch] == [8, 8]


async def exits(row: int, ctx: RolloutContext) -> Rollout:
    sys.exit(2)


async def test_a_rollout_that_wants_to_exit_is_told_of() -> None:
    async with RayExecutor(connect, actors=1, options={"num_cpus": 0}) as executor:
        async with AsyncRolloutScheduler(range(1), exits, settings(), sampler="a", executor=executor) as scheduler:
            with pytest.raises(UsageError, match=r"SystemExit\(2\)"):
                await train(scheduler)


async def test_what_cannot_be() -> None:
    with pytest.raises(UsageError, match="at least 1"):
        RayExecutor(connect, actors=0)
    context: Any = None
    with pytest.raises(ClosedError):
        await RayExecutor(connect, actors=1).run(rollout, 0, context)
