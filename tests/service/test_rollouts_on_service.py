"""Rollouts against a deployment whose weights are swapped beneath them, and a trainer that learns from them."""

from __future__ import annotations

from collections.abc import Iterator

import anyio
import pytest

from fwasync import AsyncRolloutScheduler, AsyncServiceClient, Rollout, RolloutContext, RolloutSettings, rollout_datums
from fwasync import types as t
from fwasync.control.client import AsyncFireworksClient
from fwasync.sampling.deployment import AsyncDeploymentSampler
from fwasync.weights.hot_load import AsyncHotLoadManager
from fwasync.weights.syncer import AsyncWeightSyncer
from service.control_client import BASE, Control, start_control
from service.test_weight_sync_on_service import deployed


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Control]:
    running = start_control(tmp_path_factory.mktemp("rollouts"))
    yield running
    running.close()
    running.service.close()


async def rollout(row: int, ctx: RolloutContext) -> Rollout:
    """Two turns, the second of which may be of newer weights; low tokens are rewarded."""
    session = ctx.session()
    session.append([72, 101, row % 256])
    await session.sample(max_tokens=4)
    session.append([10])
    turn = await session.sample(max_tokens=4)
    return session.rollout(sum(token < 128 for token in turn.tokens) / max(1, len(turn.tokens)))


async def test_a_deployment_is_sampled_while_its_weights_are_trained(control: Control) -> None:
    url, key = deployed(control, "rl", replicas=1), control.service.key
    settings = RolloutSettings(groups_per_batch=2, group_size=4, max_staleness=1, chunks_per_batch=2)
    offsets: list[float] = []
    async with (
        AsyncFireworksClient(str(control.http.base_url), key) as fireworks,
        AsyncServiceClient(url, key) as service,
        service.create_training_client(BASE, lora_rank=0) as client,
    ):
        syncer = AsyncWeightSyncer(client, AsyncHotLoadManager(fireworks), "rl", base_model=BASE)
        await syncer.save_and_hotload("version-0")
        sampler = AsyncDeploymentSampler(str(control.http.base_url), "accounts/local/deployments/rl", key)
        with anyio.fail_after(200):
            async with AsyncRolloutScheduler(range(6), rollout, settings, sampler=sampler) as scheduler:
                async for batch in scheduler:
                    async for chunk in batch:
                        await client.forward_backward(rollout_datums(chunk), "importance_sampling")
                    await client.optim_step(t.AdamParams(learning_rate=1e-3))
                    await syncer.save_and_hotload(f"version-{batch.version + 1}")
                    metrics = await scheduler.publish(batch)
                    offsets.append(metrics["async/version_offset_max"])
                account = scheduler.statistics().account
    assert offsets == [0, 1, 1]
    assert (account.submitted, account.kept, scheduler.version) == (6, 6, 3)
