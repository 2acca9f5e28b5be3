"""The seam between recipes and samplers on the local service, in both ways: what is published is what is sampled."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

from fwasync import (
    AsyncRolloutScheduler,
    DeployConfig,
    InfraConfig,
    Rollout,
    RolloutContext,
    RolloutSettings,
    rollout_datums,
    types,
)
from fwasync.data.chat import ChatTokenizer
from fwasync.local import launch
from fwasync.recipes.config import RecipeConfig
from fwasync.recipes.serving import ServedPolicy, serve_policy
from fwasync.recipes.trainers import Trainers, Where
from service.control_client import BASE, SHAPE

PROMPT = list(b"ab")
DATUM = types.Datum(
    model_input=types.ModelInput.from_ints(list(b"abccccccc")),
    loss_fn_inputs={"target_tokens": list(b"bcccccccc"), "weights": [0.0] + [1.0] * 8},
)


@asynccontextmanager
async def serving(directory: Path, *, deployed: bool) -> AsyncIterator[tuple[Trainers, ServedPolicy]]:
    config = RecipeConfig(
        log_path=directory / "run",
        base_model=BASE if deployed else "fwasync/qwen3-tiny",
        infra=InfraConfig(training_shape_id=SHAPE) if deployed else InfraConfig(),
    )
    deploy = DeployConfig(replica_count=2) if deployed else None
    async with (
        launch(directory / "service") as local,
        Where(local.base_url, local.api_key).open(config, deploy=deploy) as trainers,
    ):
        assert local.api_key not in repr(trainers)
        tokenizer = await anyio.to_thread.run_sync(ChatTokenizer.load, await trainers.tokenizer_name(config))
        async with serve_policy(trainers, tokenizer=tokenizer, deploy=deploy) as served:
            yield trainers, served


@pytest.mark.parametrize("deployed", [False, True], ids=["a service", "a deployment"])
async def test_what_is_published_is_sampled(tmp_path: Path, deployed: bool) -> None:
    async with serving(tmp_path, deployed=deployed) as (trainers, served):
        assert served.version == (0 if deployed else None)
        if not deployed:
            await served.publish(0)

        async def sample() -> list[Any]:
            return await served.sample_with_prompt_tokens(PROMPT, 3, max_tokens=8, seed=11)

        first, again = await sample(), await sample()
        assert [each.full_tokens for each in first] == [each.full_tokens for each in again]
        assert len({tuple(each.completion_tokens) for each in first}) == 3
        for _ in range(30):
            trainers.policy.forward_backward([DATUM])
            await trainers.policy.optim_step(types.AdamParams(learning_rate=1e-2))
        await served.publish(30)
        assert served.version == 30
        learnt = await sample()
        assert all(bytes(each.completion_tokens[:4]) == b"cccc" for each in learnt)
        # The sampler's logprobs are the trainer's.
        tokens = learnt[0].full_tokens
        datum = types.Datum(
            model_input=types.ModelInput.from_ints(tokens[:-1]),
            loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)},
        )
        told = (await trainers.policy.forward([datum])).loss_fn_outputs[0]["logprobs"].to_numpy()
        assert learnt[0].inference_logprobs == pytest.approx(told[len(PROMPT) - 1 :].tolist(), abs=1e-4)


@pytest.mark.parametrize("deployed", [False, True], ids=["a service", "a deployment"])
async def test_rollouts_sample_it_while_it_is_trained(tmp_path: Path, deployed: bool) -> None:
    async def rollout(row: int, ctx: RolloutContext) -> Rollout:
        session = ctx.session()
        session.append([*PROMPT, row])
        turn = await session.sample(max_tokens=4, stop=[258, 65])
        return session.rollout(sum(turn.tokens) / 1000)

    settings = RolloutSettings(groups_per_batch=2, group_size=3, max_staleness=1)
    versions: list[int | None] = []
    async with serving(tmp_path, deployed=deployed) as (trainers, served):
        await served.publish(0)
        with anyio.fail_after(200):
            async with AsyncRolloutScheduler(
                range(6), rollout, settings, sampler=nullcontext(served), concurrency=served.concurrency
            ) as scheduler:
                async for batch in scheduler:
                    datums = rollout_datums(await batch.collect())
                    await trainers.policy.forward_backward(datums, "importance_sampling")
                    await trainers.policy.optim_step(types.AdamParams(learning_rate=1e-3))
                    await served.publish(batch.version + 1)
                    await scheduler.publish(batch)
                    versions.append(served.version)
    assert versions == [1, 2, 3]
