"""Scripted faults of trainer jobs, deployments, hot-loads and completions, and what our clients make of each."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import anyio
import anyio.lowlevel
import pytest
import pytest_asyncio

from fwasync import (
    AdaptiveConcurrencyController,
    AsyncDeploymentManager,
    AsyncDeploymentSampler,
    AsyncFireworksClient,
    AsyncHotLoadManager,
    AsyncServiceClient,
    AsyncTrainerJobManager,
    AsyncTrainingClient,
    AsyncWeightSyncer,
    DeploymentConfig,
    RetryPolicy,
    TrainerJobConfig,
    errors,
)
from fwasync.sampling.attempts import AttemptPolicy
from fwasync.testing import (
    AsyncScriptedService,
    CutStream,
    Drop,
    FailHotLoad,
    FailProvisioning,
    Fault,
    FaultPlan,
    Preempt,
    SlowStream,
    StaleReplica,
    Status,
    StuckProvisioning,
)
from service import scripted
from service.scripted import SMALL, TINY, deploy, full_name, load_when
from service.test_faults import ADAM, BATCHES, weights

QUICK = RetryPolicy(base_s=0.01, cap_s=0.05)
SOON = AttemptPolicy(base_s=0.01, cap_s=0.05, hotload_retry_interval=0.02)
PROMPT = [5, 6, 7, 8]

running, service = scripted.running, scripted.service
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module", autouse=True)
async def deployed(running: AsyncScriptedService) -> None:
    await deploy(running, "sampled")


@dataclass
class Plane:
    fireworks: AsyncFireworksClient
    jobs: AsyncTrainerJobManager
    deployments: AsyncDeploymentManager


@pytest_asyncio.fixture(loop_scope="module")
async def plane(service: AsyncScriptedService) -> AsyncIterator[Plane]:
    async with AsyncFireworksClient(service.base_url, service.api_key, retry=QUICK) as fireworks:
        yield Plane(fireworks, AsyncTrainerJobManager(fireworks), AsyncDeploymentManager(fireworks))


def job(job_id: str) -> TrainerJobConfig:
    return TrainerJobConfig(base_model=TINY, requested_job_id=job_id)


def sampler_of(
    service: AsyncScriptedService, name: str = "sampled", attempts: AttemptPolicy = SOON
) -> AsyncDeploymentSampler:
    return AsyncDeploymentSampler(service.base_url, full_name(name), service.api_key, attempts=attempts)


@asynccontextmanager
async def trainer(service: AsyncScriptedService, base_url: str) -> AsyncIterator[AsyncTrainingClient]:
    async with AsyncServiceClient(base_url, service.api_key, retry=QUICK) as client:
        async with client.create_training_client(TINY, lora_rank=0) as model:
            yield model


async def train(model: AsyncTrainingClient, first: int, last: int) -> None:
    for batch in BATCHES[first:last]:
        await model.forward_backward(batch)
        await model.optim_step(ADAM)


async def saved_weights(service: AsyncScriptedService, model: AsyncTrainingClient, name: str) -> dict[str, bytes]:
    await model.save_state(name)
    return weights(service.data_dir, f"tinker://{model.model_id}/weights/{name}")


# -- trainer jobs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["JOB_STATE_FAILED", "JOB_STATE_PAUSED"])
async def test_a_job_that_is_pre_empted_is_resumed_and_goes_on_from_its_checkpoint(
    service: AsyncScriptedService, plane: Plane, state: str
) -> None:
    job_id = f"taken-{state.rpartition('_')[2].lower()}"
    await plane.jobs.create(job(job_id))
    endpoint = await plane.jobs.wait_for_ready(job_id)
    async with trainer(service, endpoint.base_url) as model:
        await train(model, 0, 6)
        calm = await saved_weights(service, model, "calm")

    preempted = Preempt(state, "the machines are gone")  # pyright: ignore[reportArgumentType]
    await service.set_faults(FaultPlan([Fault(preempted, "optim_step", nth=5)]))
    with pytest.raises(errors.NotFoundError, match=f"no trainer runs for .*{state}"):
        async with trainer(service, endpoint.base_url) as model:
            await train(model, 0, 3)
            saved = (await model.save_state("middle")).path
            await train(model, 3, 6)
    [event] = (await service.fired()).log
    assert (event.action, event.route, event.resource, event.seq_id) == ("preempt", "optim_step", job_id, 11)

    with pytest.raises(errors.TrainerJobFailedError, match=r"the machines are gone.*resume it"):
        await plane.jobs.wait_for_ready(job_id)
    endpoint = await plane.jobs.reconnect_and_wait(job_id)
    async with trainer(service, endpoint.base_url) as model:
        await model.load_state_with_optimizer(saved)
        await train(model, 3, 6)
        resumed = await saved_weights(service, model, "resumed")
    assert resumed == calm


async def test_a_job_can_be_pre_empted_while_it_is_waited_for(service: AsyncScriptedService, plane: Plane) -> None:
    await plane.jobs.create(job("watched"))
    await plane.jobs.wait_for_ready("watched")
    await service.set_faults(FaultPlan([Fault(Preempt(), "get_trainer_job", nth=1)]))
    with pytest.raises(errors.TrainerJobFailedError, match="pre-empted by a scripted fault"):
        await plane.jobs.wait_for_existing("watched")
    await service.set_faults(FaultPlan([Fault(Preempt(), "get_trainer_job", nth=1)]))
    assert (await plane.jobs.reconnect_and_wait("watched")).job_id == "watched"


async def test_a_job_that_waits_for_machines_is_waited_for(service: AsyncScriptedService, plane: Plane) -> None:
    await service.set_faults(FaultPlan([Fault(StuckProvisioning(), "create_trainer_job", nth=1)]))
    await plane.jobs.create(job("queued"))
    with pytest.raises(errors.ProvisioningTimeoutError, match=r"PENDING.*waiting for machines"):
        await plane.jobs.wait_for_ready("queued", timeout_s=60, pending_timeout_s=0.1)
    states: list[str] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: plane.jobs.wait_for_ready("queued", on_progress=lambda at: states.append(at.state)))
        while not states:
            await anyio.sleep(0.01)
        assert await service.release(resource="queued") == 1
    assert states[0] == "PENDING"
    assert states[-1] == "RUNNING"
    assert await service.release() == 0


async def test_a_job_that_does_not_come_up_is_told_and_can_be_resumed(
    service: AsyncScriptedService, plane: Plane
) -> None:
    plan = [Fault(FailProvisioning("no quota"), "create_trainer_job"), Fault(StuckProvisioning(0.1), nth=1)]
    await service.set_faults(FaultPlan(plan))
    await plane.jobs.create(job("unlucky"))
    with pytest.raises(errors.TrainerJobFailedError, match="FAILED: no quota"):
        await plane.jobs.wait_for_ready("unlucky")
    await service.set_faults(FaultPlan())
    assert (await plane.jobs.get("unlucky")).state == "FAILED"  # a new plan raises no dead
    assert (await plane.jobs.reconnect_and_wait("unlucky")).job_id == "unlucky"


async def test_a_lost_answer_creates_one_job(service: AsyncScriptedService, plane: Plane) -> None:
    await service.set_faults(FaultPlan([Fault(Drop(after=True), "create_trainer_job", first=2)]))
    created = await plane.jobs.create(job("once"))
    assert created.job_id == "once"
    assert (await service.fired()).fired == [2]
    names = [each.job_name async for each in plane.jobs.list()]
    assert names.count(created.job_name) == 1


# -- deployments -----------------------------------------------------------------------------------


async def test_a_deployment_that_is_stuck_answers_425_until_it_is_released(
    service: AsyncScriptedService, plane: Plane
) -> None:
    await service.set_faults(FaultPlan([Fault(StuckProvisioning(), "create_deployment", nth=1)]))
    await plane.deployments.create(DeploymentConfig(deployment_id="stuck", base_model=TINY))
    with pytest.raises(errors.ProvisioningTimeoutError, match="CREATING"):
        await plane.deployments.wait_for_ready("stuck", timeout_s=4)  # which is to have looked once
    patient = replace(SOON, hotload_max_retries=10_000)
    async with sampler_of(service, "stuck", patient) as sampler, anyio.create_task_group() as tasks:
        tasks.start_soon(sampler.sample_with_prompt_tokens, PROMPT)
        while not (seen := sampler.drain_metrics()):
            await anyio.sleep(0.01)
        assert seen[0].http_status_code == 425
        assert await service.release(resource=full_name("stuck")) == 1
    assert sampler.drain_metrics()[-1].http_status_code == 200


async def test_a_deployment_that_does_not_come_up_is_told(service: AsyncScriptedService, plane: Plane) -> None:
    await service.set_faults(FaultPlan([Fault(FailProvisioning("out of capacity"), "create_deployment", nth=1)]))
    config = DeploymentConfig(deployment_id="failed", base_model=TINY)
    await plane.deployments.create(config)
    with pytest.raises(errors.DeploymentFailedError, match=r"FAILED.*out of capacity"):
        await plane.deployments.wait_for_ready("failed")
    await plane.deployments.delete("failed")
    await plane.deployments.create(config)
    await plane.deployments.wait_for_ready("failed")


# -- hot-loads -------------------------------------------------------------------------------------


@asynccontextmanager
async def synced(
    service: AsyncScriptedService, plane: Plane, name: str, **options: float
) -> AsyncIterator[tuple[AsyncWeightSyncer, AsyncTrainingClient]]:
    """A trainer and three replicas that have its first snapshot, so that the next would be a delta."""
    created = await plane.jobs.create(job(name))
    endpoint = await plane.jobs.wait_for_ready(name)
    await plane.deployments.create(
        DeploymentConfig(
            deployment_id=name,
            base_model=TINY,
            min_replica_count=3,
            max_replica_count=3,
            hot_load_trainer_job=created.job_name,
        )
    )
    async with trainer(service, endpoint.base_url) as model:
        hot_loads = AsyncHotLoadManager(plane.fireworks)
        syncer = AsyncWeightSyncer(model, hot_loads, name, base_model=TINY, warmup_after_hotload=False, **options)
        await syncer.wait_for_hotload_ready(poll_interval_s=0.05)
        await syncer.save_and_hotload("first")
        await train(model, 0, 1)
        yield syncer, model


@pytest.mark.parametrize(("replica", "says"), [(1, "1 of 3 replicas failed: disk full"), (None, "3 of 3 replicas")])
async def test_a_hot_load_that_fails_is_told_and_a_base_follows(
    service: AsyncScriptedService, plane: Plane, replica: int | None, says: str
) -> None:
    name = f"failing-{replica}".lower()
    async with synced(service, plane, name) as (syncer, _):
        before = await syncer.check_deployment_state()
        await service.set_faults(FaultPlan([Fault(FailHotLoad(replica, "disk full"), nth=1)]))
        with pytest.raises(errors.HotLoadFailedError, match=says):
            await syncer.save_and_hotload("second")
        assert syncer.base_identity is None
        # All of the others swap, and the one that failed serves what it had.
        serving = {
            state.snapshot for state in await AsyncHotLoadManager(plane.fireworks).hotload_check_status(name, TINY)
        }
        assert before in serving
        third = await syncer.save_and_hotload("third")  # the service takes no delta onto these replicas
        assert await syncer.check_deployment_state() == third
    [event] = (await service.fired()).log
    assert (event.route, event.resource) == ("hot_load", name)


async def test_a_replica_that_stays_behind_is_seen_and_a_base_follows(
    service: AsyncScriptedService, plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with synced(service, plane, "stale") as (syncer, _):
        before = await syncer.check_deployment_state()
        await service.set_faults(FaultPlan([Fault(StaleReplica(2), nth=1)]))
        with monkeypatch.context() as impatient:
            impatient.setattr(syncer, "_timeout", 5.0)
            with pytest.raises(
                errors.HotLoadTimeoutError, match=f"2 of 3 replicas ready; the others: idle, serving {before}"
            ):
                await syncer.save_and_hotload("second")
        third = await syncer.save_and_hotload("third")
        assert await syncer.check_deployment_state() == third


# -- completions -----------------------------------------------------------------------------------


async def test_425_until_ready_is_waited_out(service: AsyncScriptedService) -> None:
    await service.set_faults(FaultPlan([Fault(Status(425), "completions", first=8)]))
    async with sampler_of(service) as sampler:
        assert await sampler.sample_with_prompt_tokens(PROMPT, max_tokens=2)
        assert [each.http_status_code for each in sampler.drain_metrics()] == [425] * 8 + [200]
        await service.set_faults(FaultPlan([Fault(Status(425), "completions")]))
        with pytest.raises(errors.ServiceUnavailableError, match=r"425.*scripted"):
            await sampler.sample_with_prompt_tokens(PROMPT)
        assert (await service.fired()).fired == [11]


async def test_a_storm_of_429_shrinks_the_window_and_passes(service: AsyncScriptedService) -> None:
    await service.set_faults(FaultPlan([Fault(Status(429, retry_after_s=0.03), "completions", every=2)]))
    # One request may be refused again and again while others come between.
    async with sampler_of(service, attempts=replace(SOON, attempts=100)) as sampler:
        controller = sampler.concurrency
        assert isinstance(controller, AdaptiveConcurrencyController)
        group = await sampler.sample_with_prompt_tokens(PROMPT, 16, max_tokens=2)
        assert len(group) == 16
        metrics = sampler.drain_metrics()
        figures = controller.step_completed()
    refused = [each for each in metrics if each.http_status_code == 429]
    assert len(refused) == (await service.fired()).fired[0] >= 15
    assert min(figures["window"], figures["avg_window"]) < 8


async def test_one_failure_ends_its_siblings(service: AsyncScriptedService) -> None:
    await deploy(service, "siblings", base_model=SMALL)
    before = await service.sampling()
    await service.set_faults(FaultPlan([Fault(Status(400), "completions", nth=7)]))
    async with sampler_of(service, "siblings") as sampler:
        with pytest.raises(errors.BadRequestError, match="scripted"):
            await sampler.sample_with_prompt_tokens(PROMPT, 8, max_tokens=1000, temperature=0)
        after = await load_when(service, running=0)
    assert after.tokens - before.tokens < 7 * 1000


@pytest.mark.parametrize("clean", [True, False])
async def test_a_stream_that_is_cut_is_told_after_what_had_come(service: AsyncScriptedService, clean: bool) -> None:
    await service.set_faults(FaultPlan([Fault(CutStream(3, clean), nth=1)]))
    async with sampler_of(service) as sampler:
        [whole] = await sampler.sample_with_prompt_tokens(PROMPT, max_tokens=6, seed=1, logprobs=True)
        options = {"max_tokens": 6, "seed": 1, "logprobs": True}
        told: list[int] = []
        with pytest.raises(errors.StreamBrokenError, match="broke off"):
            async with sampler.stream_with_prompt_tokens(PROMPT, **options) as stream:
                async for piece in stream:
                    told += piece.token_ids
        assert told == whole.completion_tokens[:3]
        assert sampler.concurrency.in_flight == 0
        async with sampler.stream_with_prompt_tokens(PROMPT, **options) as stream:
            assert [token async for piece in stream for token in piece.token_ids] == whole.completion_tokens
    await load_when(service, running=0)
    assert (await service.fired()).fired == [1]  # whole answers are no occasion


async def test_a_stream_is_cut_before_its_first_event_too(service: AsyncScriptedService) -> None:
    await service.set_faults(FaultPlan([Fault(CutStream(0))]))
    async with sampler_of(service) as sampler:
        with pytest.raises(errors.StreamBrokenError):
            async with sampler.stream_with_prompt_tokens(PROMPT, max_tokens=4) as stream:
                assert [piece async for piece in stream] == []


async def test_a_slow_stream_is_the_same_stream_and_can_be_left(service: AsyncScriptedService) -> None:
    await service.set_faults(FaultPlan([Fault(SlowStream(0.01), nth=1), Fault(SlowStream(60), nth=2)]))
    async with sampler_of(service) as sampler:
        [whole] = await sampler.sample_with_prompt_tokens(PROMPT, max_tokens=6, seed=1)
        async with sampler.stream_with_prompt_tokens(PROMPT, max_tokens=6, seed=1) as stream:
            pieces = [piece async for piece in stream]
        assert stream.completion.full_tokens == whole.full_tokens
        assert len(pieces) == 7
        with anyio.move_on_after(0.2) as scope:
            async with sampler.stream_with_prompt_tokens(PROMPT, max_tokens=6) as stream:
                await anext(stream)
        assert scope.cancelled_caught
        with pytest.raises(errors.StreamBrokenError, match="no answer within 1 s"):
            await service.set_faults(FaultPlan([Fault(SlowStream(60))]))
            async with sampler.stream_with_prompt_tokens(PROMPT, max_tokens=6, http_timeout=1) as stream:
                await anext(stream)
        assert sampler.concurrency.in_flight == 0
    await load_when(service, running=0)
