"""Async RL where things go wrong: the run ends right, says what happened, and loses nothing that was counted."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from fwasync import AsyncServiceClient, RetryPolicy, Rollout, RolloutContext
from fwasync.checkpoints.ledger import CheckpointLedger
from fwasync.errors import (
    CircuitBreakerTrippedError,
    FwasyncError,
    HotLoadFailedError,
    NotFoundError,
    RecoverableRolloutError,
    RolloutStalledError,
)
from fwasync.recipes import async_rl
from fwasync.recipes.groups import TakenRow
from fwasync.recipes.serving import ServedPolicy
from fwasync.recipes.trainers import Where
from fwasync.rollout.trajectory import RolloutGroup
from fwasync.testing import (
    AsyncScriptedService,
    FailHotLoad,
    Fault,
    FaultPlan,
    Preempt,
    SlowFuture,
    Status,
    local_service,
)
from service.control_client import BASE, SHAPE
from service.endless import endless
from service.test_recipe_async_rl import settings, trained_rows
from service.test_recipe_rl import ROWS, TOKENS, records, reward, write_prompts


def jobs(local: AsyncScriptedService, tmp_path: Path, **more: Any) -> async_rl.Config:
    """Settings of a run on trainer jobs."""
    on_jobs = {"base_model": BASE, "infra": {"training_shape_id": SHAPE}}
    tokenizer = str(local.data_dir / "tokenizer")
    return settings(tmp_path, trajectory_dir=tmp_path / "answers", tokenizer_model=tokenizer, **on_jobs, **more)


@pytest.fixture(autouse=True)
def data(tmp_path: Path) -> None:
    write_prompts(tmp_path)


async def answer(prompt: TakenRow, ctx: RolloutContext) -> Rollout:
    session = ctx.session()
    session.append(prompt.prompt_tokens)
    turn = await session.sample(max_tokens=TOKENS)
    return session.rollout(reward(turn.text, prompt.row))


def is_accounted_for(tmp_path: Path, result: async_rl.Result) -> None:
    """Every row ended once; every one that was kept was trained on once; every step was logged once."""
    assert result.rows.sampled == ROWS
    trained = trained_rows(tmp_path / "answers")
    assert set(trained.values()) == {1}
    assert len(trained) == result.rows.kept
    assert [record["step"] for record in records(tmp_path / "run")] == list(range(1, result.steps + 1))
    assert result.checkpoint is not None
    assert result.checkpoint.data_consumed == ROWS
    assert max(record["version/sample_staleness_max"] for record in records(tmp_path / "run")) <= 1


def keep_all(group: RolloutGroup[TakenRow]) -> bool:
    """No row is left over when the last step is logged, so that its record has all that was counted."""
    return True


async def test_rollouts_that_fail_now_and_then(tmp_path: Path) -> None:
    failed = 0

    async def rollout(prompt: TakenRow, ctx: RolloutContext) -> Rollout:
        nonlocal failed
        if ctx.seed % 20 == 0:
            failed += 1
            raise RecoverableRolloutError("the sandbox went away")
        return await answer(prompt, ctx)

    config = settings(tmp_path, trajectory_dir=tmp_path / "answers", min_group_size=2)
    async with local_service() as local:
        where = Where(local.base_url, local.api_key)
        result = await async_rl.train(config, rollout=rollout, where=where, keep=keep_all)
    assert failed > 0
    is_accounted_for(tmp_path, result)
    assert records(tmp_path / "run")[-1]["producer/drops/RecoverableRolloutError"] == failed


async def test_a_rollout_that_is_stuck(tmp_path: Path) -> None:
    ended: list[tuple[Any, int]] = []

    async def rollout(prompt: TakenRow, ctx: RolloutContext) -> Rollout:
        who = (prompt.row.ground_truth, ctx.rollout_index)
        try:
            if who == (3, 0):
                await anyio.sleep_forever()
            return await answer(prompt, ctx)
        except anyio.get_cancelled_exc_class():
            ended.append(who)
            raise

    config = settings(tmp_path, trajectory_dir=tmp_path / "answers", rollout_timeout=10.0)
    async with local_service() as local:
        where = Where(local.base_url, local.api_key)
        result = await async_rl.train(config, rollout=rollout, where=where, keep=keep_all)
    is_accounted_for(tmp_path, result)
    assert (3, 0) in ended  # and on a machine that stands still perhaps others
    assert records(tmp_path / "run")[-1]["producer/drops/RolloutTimeoutError"] == len(ended)


async def test_a_reward_that_never_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIDS", str(tmp_path / "pids"))
    more: dict[str, Any] = {"reward_processes": 2, "reward_timeout": 10.0, "completions_per_prompt": 2}
    config = settings(tmp_path, trajectory_dir=tmp_path / "answers", **more)
    async with local_service() as local:
        where = Where(local.base_url, local.api_key)
        result = await async_rl.train(config, reward=endless, where=where, keep=keep_all)
    is_accounted_for(tmp_path, result)
    assert result.rows.failed == 1
    assert records(tmp_path / "run")[-1]["producer/drops/RewardTimeoutError"] == 2
    for pid in set((tmp_path / "pids").read_text().split()):
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


async def test_a_storm_of_429(tmp_path: Path) -> None:
    """Half of all requests for samples are refused, and asked again."""
    config = settings(tmp_path, trajectory_dir=tmp_path / "answers")
    storm = FaultPlan([Fault(Status(429, retry_after_s=0.02), "asample", probability=0.5)], seed=3)
    async with local_service(storm) as local:
        result = await async_rl.train(config, reward=reward, where=Where(local.base_url, local.api_key))
        assert (await local.fired()).fired[0] > ROWS
    is_accounted_for(tmp_path, result)
    assert result.rows.failed == 0


async def test_a_hot_load_that_fails_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with local_service(FaultPlan([Fault(FailHotLoad(), "hot_load", nth=3)])) as local:
        config = jobs(local, tmp_path)
        result = await async_rl.train(config, reward=reward, where=Where(local.base_url, local.api_key))
    is_accounted_for(tmp_path, result)
    assert "is sent once more, with all weights" in caplog.text


async def test_a_deployment_that_takes_no_more_weights(tmp_path: Path) -> None:
    twice = [Fault(FailHotLoad(), "hot_load", nth=3), Fault(FailHotLoad(), "hot_load", nth=4)]
    async with local_service(FaultPlan(twice)) as local:
        config = jobs(local, tmp_path)
        where = Where(local.base_url, local.api_key)
        with pytest.raises(HotLoadFailedError) as error:
            await async_rl.train(config, reward=reward, where=where)
        assert how_to_go_on(error.value) == 2  # the step whose weights did not get there is done, and counted
        assert len(records(tmp_path / "run")) == 2
        result = await async_rl.train(config, reward=reward, where=where)
    is_accounted_for(tmp_path, result)


def how_to_go_on(error: BaseException) -> int:
    """The step from which the run can go on, as the error says."""
    (note,) = [note for note in error.__notes__ if note.startswith("the run can go on from step ")]
    return int(note.split()[7])


async def test_a_trainer_that_is_pre_empted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plan = FaultPlan([Fault(Preempt(message="the machines are gone"), "optim_step", nth=4)])
    async with local_service(plan) as local:
        config = jobs(local, tmp_path, dcp_save_interval=2)
        result = await async_rl.train(config, reward=reward, where=Where(local.base_url, local.api_key))
        assert (await local.fired()).fired == [1]
    is_accounted_for(tmp_path, result)
    assert "the trainer is lost" in caplog.text
    entries = await CheckpointLedger(tmp_path / "run").entries()
    assert entries[0].step == 2
    assert entries[0].source_job_id != entries[-1].source_job_id


async def test_a_trainer_that_is_pre_empted_once_too_often(tmp_path: Path) -> None:
    async with local_service(FaultPlan([Fault(Preempt(), "forward_backward", nth=5)])) as local:
        config = jobs(local, tmp_path, dcp_save_interval=1, trainer_restarts=0)
        where = Where(local.base_url, local.api_key)
        with pytest.raises(NotFoundError) as error:
            await async_rl.train(config, reward=reward, where=where)
        assert how_to_go_on(error.value) == 2
        await local.set_faults(FaultPlan([]))
        result = await async_rl.train(config, reward=reward, where=where)
    is_accounted_for(tmp_path, result)


Rollouts = Callable[[TakenRow, RolloutContext], Awaitable[Rollout]]


async def broken_in_the_middle(prompt: TakenRow, ctx: RolloutContext) -> Rollout:
    if ctx.version >= 1 and prompt.cursor % 2:
        await anyio.sleep(0.3)  # another chunk of the step is trained on by then
        raise RecoverableRolloutError("the sandboxes are gone")
    return await answer(prompt, ctx)


async def broken(prompt: TakenRow, ctx: RolloutContext) -> Rollout:
    if ctx.version >= 2:
        raise RecoverableRolloutError("the sandboxes are gone")
    return await answer(prompt, ctx)


async def stalled(prompt: TakenRow, ctx: RolloutContext) -> Rollout:
    if ctx.version >= 2:
        ctx.note("waiting for a sandbox")
        await anyio.sleep_forever()
    return await answer(prompt, ctx)


async def faulty(prompt: TakenRow, ctx: RolloutContext) -> Rollout:
    if ctx.version >= 2:
        raise KeyError("a typo")
    return await answer(prompt, ctx)


@pytest.mark.parametrize(
    ("rollout", "expected"),
    [
        (broken, CircuitBreakerTrippedError),
        (broken_in_the_middle, CircuitBreakerTrippedError),
        (stalled, RolloutStalledError),
        (faulty, KeyError),
    ],
)
async def test_rollouts_that_end_the_run_leave_it_where_it_can_go_on(
    tmp_path: Path, rollout: Rollouts, expected: type[Exception]
) -> None:
    """Without a checkpoint at any interval: the last step is saved when the run breaks off."""
    config = settings(
        tmp_path,
        trajectory_dir=tmp_path / "answers",
        stall_timeout=15.0 if rollout is stalled else None,
        max_head_offpolicy_versions=1,
        runner={"status_file": tmp_path / "status.json"},
    )
    async with local_service() as local:
        where = Where(local.base_url, local.api_key)
        with pytest.raises(expected) as error:
            await async_rl.train(config, rollout=rollout, where=where)
        step = how_to_go_on(error.value)
        assert step == len(records(tmp_path / "run")) >= 1
        assert json.loads((tmp_path / "status.json").read_text())["status"] == "failed"
        if rollout is stalled:
            assert "waiting for a sandbox" in str(error.value)
        result = await async_rl.train(config, rollout=answer, where=where)
    is_accounted_for(tmp_path, result)


async def test_the_watchdog_may_only_warn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def rollout(prompt: TakenRow, ctx: RolloutContext) -> Rollout:
        while prompt.row.ground_truth == 3 and "has moved" not in caplog.text:
            await anyio.sleep(0.05)
        return await answer(prompt, ctx)

    config = settings(tmp_path, trajectory_dir=tmp_path / "answers", stall_timeout=0.5, on_stall="warn")
    with caplog.at_level(logging.WARNING):
        async with local_service() as local:
            result = await async_rl.train(config, rollout=rollout, where=Where(local.base_url, local.api_key))
    assert "no rollout, row, batch or publication has moved" in caplog.text
    is_accounted_for(tmp_path, result)


async def test_a_trainer_that_does_not_answer_is_named_with_its_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def release(local: AsyncScriptedService) -> None:
        with anyio.fail_after(120):
            while "the policy has no result of forward_backward: admitted, request " not in caplog.text:
                await anyio.sleep(0.05)
        await local.release()

    config = settings(tmp_path, trajectory_dir=tmp_path / "answers", stall_timeout=0.5, on_stall="warn")
    withheld = FaultPlan([Fault(SlowFuture(), "forward_backward", nth=2)])
    with caplog.at_level(logging.WARNING):
        async with local_service(faults=withheld) as local, anyio.create_task_group() as tasks:
            tasks.start_soon(release, local)
            result = await async_rl.train(config, reward=reward, where=Where(local.base_url, local.api_key))
    is_accounted_for(tmp_path, result)


async def test_an_evaluation_that_fails_leaves_the_step_logged_and_its_checkpoint_listed(tmp_path: Path) -> None:
    def judge(step: int, policy: ServedPolicy) -> dict[str, float]:
        if step == 2:
            raise LookupError("no such benchmark")
        return {"eval/score": 1.0}

    config = settings(tmp_path, dcp_save_interval=2)
    async with local_service() as local:
        where = Where(local.base_url, local.api_key)
        with pytest.raises(LookupError) as error:
            await async_rl.train(config, reward=reward, where=where, evaluate=judge)
        assert how_to_go_on(error.value) == 2
        result = await async_rl.train(config, reward=reward, where=where)
    assert result.rows.sampled == ROWS
    assert [record["step"] for record in records(tmp_path / "run")] == list(range(result.steps + 1))


async def test_a_service_that_dies(tmp_path: Path) -> None:
    async def kill(step: int, metrics: Any) -> None:
        if step == 2:
            await local.kill()

    config, impatient = settings(tmp_path, dcp_save_interval=1), RetryPolicy(base_s=0.01, cap_s=0.05, budget_s=0.5)
    async with local_service() as local:
        with pytest.raises(FwasyncError) as error:
            async with AsyncServiceClient(local.base_url, local.api_key, retry=impatient) as service:
                await async_rl.train(config, reward=reward, where=Where(service=service), on_step=kill)
        assert how_to_go_on(error.value) == 2
        await local.restart()
        result = await async_rl.train(config, reward=reward, where=Where(local.base_url, local.api_key))
    assert result.rows.sampled == ROWS
