"""The blocking managers, sampler and weight syncer on the local service, and what the cookbook's client takes."""

from __future__ import annotations

import gc
import json
import threading
import time
import traceback
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from fwasync import (
    AsyncFireworksClient,
    AsyncTrainerJobManager,
    DeploymentConfig,
    DeploymentManager,
    DeploymentSampler,
    FireworksClient,
    ReconnectableClient,
    TrainerJobConfig,
    TrainerJobManager,
    TrainerServiceEndpoint,
    WeightSyncer,
    errors,
    types,
)
from fwasync.config.launch import Progress
from fwasync.sampling.attempts import AttemptPolicy
from fwasync.testing import Fault, FaultPlan, Preempt, ScriptedService, blocking_local_service
from fwasync.weights.syncer import SyncProgress

MODEL = "accounts/fwasync/models/qwen3-tiny"
PROMPT = list(b"to be, ")
BATCH = [
    types.Datum(
        model_input=types.ModelInput.from_ints(PROMPT[:-1]),
        loss_fn_inputs={"target_tokens": PROMPT[1:], "weights": [1.0] * (len(PROMPT) - 1)},
    )
]


@pytest.fixture(scope="module")
def shared() -> Iterator[ScriptedService]:
    with blocking_local_service() as service:
        yield service


@pytest.fixture
def local(shared: ScriptedService) -> Iterator[ScriptedService]:
    yield shared
    gc.collect()  # what was forgotten is closed
    end = time.monotonic() + 100
    while threads():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def jobs(local: ScriptedService) -> Iterator[TrainerJobManager]:
    with TrainerJobManager(api_key=local.api_key, base_url=local.base_url) as jobs:
        yield jobs


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "fwasync-sync"]


def job_config(job_id: str, **more: str) -> TrainerJobConfig:
    return TrainerJobConfig(base_model=MODEL, requested_job_id=job_id, training_shape_ref=shape(MODEL), **more)


def shape(model: str) -> str:
    return model.replace("/models/", "/trainingShapes/")


def test_the_life_of_a_trainer_job(jobs: TrainerJobManager) -> None:
    told: list[Progress] = []
    endpoint = jobs.create_and_wait(job_config("life"), timeout_s=100, on_progress=told.append)
    assert told[-1].state == "RUNNING"
    assert endpoint == jobs.wait_for_ready("life", endpoint.job_name, timeout_s=100, poll_interval_s=1)
    assert endpoint == jobs.wait_for_existing("life") == jobs.reconnect_and_wait("life", timeout_s=100)
    assert jobs.exists("life")
    assert "life" in [job.job_id for job in jobs.list(page_size=1)]
    assert next(jobs.list()).job_id  # the rest is not asked for
    assert jobs.get("life").base_model == MODEL
    assert jobs.resolve_training_profile(shape(MODEL)).base_model == MODEL
    with ReconnectableClient(jobs, "life", MODEL, fw_api_key=_key(jobs), endpoint=endpoint) as client:
        client.forward_backward(BATCH)
        snapshot = client.save_weights_for_sampler_ext("s").snapshot_name
    assert snapshot in [row.checkpoint_id for row in jobs.list_checkpoints("life")]
    assert jobs.promote_checkpoint("life", snapshot, "promoted").name.endswith("/models/promoted")
    jobs.delete("life")
    jobs.delete("life")
    assert not jobs.exists("life")


def _key(jobs: TrainerJobManager) -> str:
    return jobs._client._key


def test_a_paused_job_is_resumed(local: ScriptedService, jobs: TrainerJobManager) -> None:
    jobs.create_and_wait(job_config("paused"))
    url = f"{local.base_url}/v1/{jobs.name_of('paused')}:cancel"
    request = urllib.request.Request(url, b"{}", {"X-Api-Key": local.api_key}, method="POST")
    with urllib.request.urlopen(request) as answer:
        assert answer.status == 200
    with pytest.raises(errors.TrainerJobFailedError):
        jobs.wait_for_existing("paused")
    assert jobs.resume_and_wait("paused").job_id == "paused"
    assert jobs.get("paused").state == "RUNNING"


def test_a_recipe_goes_on_after_its_trainer_was_pre_empted(local: ScriptedService, jobs: TrainerJobManager) -> None:
    adam = types.AdamParams(learning_rate=3e-3)
    endpoint = jobs.create_and_wait(job_config("taken"))
    client = ReconnectableClient(jobs, "taken", MODEL, fw_api_key=local.api_key, endpoint=endpoint)
    for _ in range(2):
        client.forward_backward(BATCH)
        client.optim_step(adam)
    client.save_state("step-2")
    loss = client.forward(BATCH, "cross_entropy").metrics["loss:sum"]

    local.set_faults(FaultPlan([Fault(Preempt(), "forward_backward", nth=1)]))
    with pytest.raises(errors.NotFoundError, match="no trainer runs"):
        client.forward_backward(BATCH)
    client.close()
    assert jobs.reconnect_and_wait("taken") == endpoint
    with ReconnectableClient(jobs, "taken", MODEL, fw_api_key=local.api_key) as client:
        client.load_state_with_optimizer(client.resolve_checkpoint_path("step-2"))
        assert client.forward(BATCH, "cross_entropy").metrics["loss:sum"] == loss
        client.forward_backward(BATCH)
        client.optim_step(adam)
        assert client.forward(BATCH, "cross_entropy").metrics["loss:sum"] < loss


@pytest.mark.parametrize("right", [True, False])
def test_a_key_is_never_logged_shown_or_raised(
    local: ScriptedService, caplog: pytest.LogCaptureFixture, right: bool
) -> None:
    key, once = local.api_key if right else "wrong-but-secret", AttemptPolicy(hotload_max_retries=0)
    caplog.set_level("DEBUG")
    with FireworksClient(local.base_url, key) as fireworks:
        jobs, deployments = TrainerJobManager(fireworks), DeploymentManager(fireworks)
        sampler = DeploymentSampler(deployments.inference_url, "no/such", key, attempts=once)
        shown: list[object] = [fireworks, jobs, deployments, sampler]
        for call in (
            lambda: jobs.create_and_wait(job_config("secretive")),
            lambda: ReconnectableClient(jobs, "secretive", MODEL, fw_api_key=key),
            lambda: deployments.create_or_get(DeploymentConfig(deployment_id="secretive", base_model="none")),
            lambda: deployments.hotload("nobody", MODEL, "unheard"),
            lambda: sampler.sample_with_prompt_tokens(PROMPT),
        ):
            try:
                shown.append(call())
            except errors.FwasyncError as error:
                shown += traceback.format_exception(error)
    said = caplog.text + "\n".join(f"{each} {each!r}" for each in shown)
    assert ("secretive is RUNNING" in said) == right
    assert f"status {404 if right else 401}" in said
    assert "request id: " in said
    assert key not in said


def test_the_life_of_a_deployment(local: ScriptedService) -> None:
    config = DeploymentConfig(deployment_id="served", base_model=MODEL, min_replica_count=1)
    with FireworksClient(local.base_url, local.api_key) as fireworks:
        deployments = DeploymentManager(fireworks)
        assert deployments.create_or_get(config).deployment_id == "served"
        assert not deployments.create(config).created
        info = deployments.wait_for_ready("served", timeout_s=100)
        assert deployments.create_or_get(config) == info
        assert [each.name for each in deployments.list()].count(info.name) == 1
        assert deployments.base_model_of("served") == MODEL
        deployments.scale_to_zero("served")
        assert not deployments.get("served").replica_count
        deployments.delete("served")
        assert deployments.base_model_of("served") is None
        assert fireworks.account_id() == "local"
        assert MODEL in [model.name for model in fireworks.list_models(account="fwasync")]


def test_weights_go_from_trainer_to_deployment(local: ScriptedService, jobs: TrainerJobManager) -> None:
    deployments = DeploymentManager(api_key=local.api_key, base_url=local.base_url)
    config = DeploymentConfig(deployment_id="synced", base_model=MODEL, min_replica_count=2, max_replica_count=2)
    model = deployments.create_or_get(config).inference_model
    endpoint = jobs.create_and_wait(job_config("synced", hot_load_deployment_id="synced"))
    deployments.wait_for_ready("synced")
    client = ReconnectableClient(jobs, "synced", MODEL, fw_api_key=local.api_key, endpoint=endpoint)
    sampler = DeploymentSampler(inference_url=deployments.inference_url, model=model, api_key=local.api_key)
    told: list[SyncProgress] = []
    for policy in (client, client.inner):
        syncer = WeightSyncer(
            policy, deployments, "synced", base_model=MODEL, dcp_timeout=2700, on_progress=told.append
        )
    assert len(syncer.wait_for_hotload_ready(timeout_s=100)) == 2
    assert syncer.check_deployment_state() is None
    options = {"max_tokens": 6, "seed": 1, "logprobs": True}
    before = sampler.sample_with_prompt_tokens(PROMPT, 2, **options)
    names = [syncer.save_and_hotload("step-0", "base")]
    assert sampler.sample_with_prompt_tokens(PROMPT, 2, **options) == before  # nothing was learnt
    client.forward_backward(BATCH)
    client.optim_step(types.AdamParams(learning_rate=3e-2))
    names.append(syncer.hotload(syncer.save_only("step-1")))
    assert syncer.base_identity == syncer.check_deployment_state() == names[-1]
    assert set(syncer.last_timing) >= {"hotload_time_s", "warmup_time_s"}
    assert told[-1].stage == "done"
    after = sampler.sample_with_prompt_tokens(PROMPT, 2, **options)
    assert [each.inference_logprobs for each in after] != [each.inference_logprobs for each in before]

    base = client.save_weights_for_sampler_ext("by-hand").snapshot_name
    assert [replica.snapshot for replica in deployments.hotload_and_wait("synced", MODEL, base)] == [base] * 2
    with pytest.raises(errors.HotLoadFailedError, match="unheard"):
        deployments.hotload_and_wait("synced", MODEL, "unheard")
    with pytest.raises(errors.HotLoadTimeoutError, match="2 replicas"):
        deployments.wait_for_hotload(
            "synced", MODEL, "not-asked-for", timeout_seconds=3
        )  # which is to have looked once
    syncer.reset_delta_chain()
    assert syncer.base_identity is None
    with pytest.raises(errors.UsageError, match="no deployment"):
        WeightSyncer(client).hotload(base)
    # Nothing is closed, as recipes of old do.


def test_a_stream_is_a_block_and_a_loop(local: ScriptedService) -> None:
    deployments = DeploymentManager(api_key=local.api_key, base_url=local.base_url)
    info = deployments.create_or_get(DeploymentConfig(deployment_id="streamed", base_model=MODEL, min_replica_count=1))
    deployments.wait_for_ready("streamed")
    with DeploymentSampler(deployments.inference_url, info.inference_model, local.api_key) as sampler:
        with sampler.stream_with_prompt_tokens(PROMPT, max_tokens=5, seed=3, logprobs=True) as stream:
            assert not stream.is_complete
            with pytest.raises(errors.UsageError, match="to its end"):
                _ = stream.completion
            tokens = [token for piece in stream for token in piece.token_ids]
        [whole] = sampler.sample_with_prompt_tokens(PROMPT, max_tokens=5, seed=3, logprobs=True)
        assert stream.completion == whole
        assert tokens == whole.completion_tokens
        with pytest.raises(LookupError), sampler.stream_with_prompt_tokens(PROMPT, max_tokens=5) as stream:
            next(stream)
            raise LookupError
        assert len(sampler.drain_metrics()) == 3
    with pytest.raises(errors.ClosedError):
        sampler.drain_metrics()


# -- the managers of the cookbook's client -------------------------------------------------------


@dataclass
class SdkEndpoint:
    job_name: str
    job_id: str
    base_url: str
    max_context_length: int | None = None


class SdkTrainerJobManager:
    """Stands for the `TrainerJobManager` of the Fireworks SDK: blocking, by a connection of its own."""

    def __init__(self, api_key: str, base_url: str = "https://api.fireworks.ai") -> None:
        self.api_key = api_key
        self.base_url = base_url

    def wait_for_existing(
        self, job_id: str, poll_interval_s: float = 5.0, timeout_s: float = 900, pending_timeout_s: float = 172800
    ) -> SdkEndpoint:
        request = urllib.request.Request(
            f"{self.base_url}/v1/accounts/local/rlorTrainerJobs/{job_id}", headers={"X-Api-Key": self.api_key}
        )
        with urllib.request.urlopen(request) as answer:
            job = json.load(answer)
        assert job["state"] == "JOB_STATE_RUNNING"
        return SdkEndpoint(job["name"], job_id, f"{self.base_url}/training/v1/rlorTrainerJobs/local/{job_id}")


@pytest.fixture
def running(jobs: TrainerJobManager) -> TrainerServiceEndpoint:
    if jobs.exists("running"):
        return jobs.wait_for_existing("running")
    return jobs.create_and_wait(job_config("running"))


def use(local: ScriptedService, manager: object, **more: TrainerServiceEndpoint) -> None:
    client = ReconnectableClient(rlor_mgr=manager, job_id="running", base_model=MODEL, fw_api_key=local.api_key, **more)
    assert client.job_id == client.endpoint.job_id == "running"
    assert client.endpoint.job_name == "accounts/local/rlorTrainerJobs/running"
    assert client.endpoint.base_url.startswith(local.base_url)
    assert client.forward_backward(BATCH).metrics["loss:sum"] > 0
    client.close()


def test_the_cookbook_client_takes_every_manager(
    local: ScriptedService, jobs: TrainerJobManager, running: TrainerServiceEndpoint
) -> None:
    use(local, jobs)
    use(local, SdkTrainerJobManager(local.api_key, local.base_url))
    use(local, None, endpoint=running)


async def test_the_cookbook_client_takes_an_async_manager_whose_loop_it_holds_up(
    local: ScriptedService, running: TrainerServiceEndpoint
) -> None:
    async with AsyncFireworksClient(local.base_url, local.api_key) as fireworks:
        manager = AsyncTrainerJobManager(fireworks)
        assert await manager.wait_for_existing("running") == running
        use(local, manager)
        assert await manager.exists("running")
