"""The client of the control plane against the local service: jobs, deployments, shapes, models, promotion."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from fwasync import AsyncServiceClient, errors, types
from fwasync.config import DeploymentConfig, TrainerJobConfig
from fwasync.config.launch import Progress
from fwasync.control.client import AsyncFireworksClient
from fwasync.control.deployments import AsyncDeploymentManager
from fwasync.control.trainer_jobs import AsyncTrainerJobManager
from service.control_client import BASE, SHAPE, Control, start_control
from unit.training.test_client import datum


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Control]:
    running = start_control(tmp_path_factory.mktemp("control"), startup_s=0.3)
    yield running
    running.close()
    running.service.close()


@pytest.fixture
async def fireworks(control: Control) -> AsyncIterator[AsyncFireworksClient]:
    async with AsyncFireworksClient(str(control.http.base_url), control.service.key) as client:
        yield client


async def test_the_life_of_a_trainer_job(fireworks: AsyncFireworksClient, control: Control) -> None:
    jobs = AsyncTrainerJobManager(fireworks)
    config = TrainerJobConfig(base_model=BASE, training_shape_ref=SHAPE, requested_job_id="life", display_name="mine")
    created = await jobs.create(config)
    assert (created.job_id, created.created) == ("life", True)
    assert not (await jobs.create(config)).created
    assert await jobs.exists("life")

    told: list[Progress] = []
    endpoint = await jobs.wait_for_ready("life", on_progress=told.append)
    assert endpoint.base_url.endswith("/training/v1/rlorTrainerJobs/local/life")
    assert {at.state for at in told[:-1]} <= {"CREATING"}
    assert told[-1].state == "RUNNING"
    info = await jobs.get("life")
    assert (info.display_name, info.base_model, info.state) == ("mine", BASE, "RUNNING")
    assert "life" in [job.job_id async for job in jobs.list(page_size=1)]

    async with (
        AsyncServiceClient(endpoint.base_url, control.service.key) as service,
        service.create_training_client(BASE, lora_rank=0) as client,
    ):
        await client.forward_backward([datum()])
        await client.optim_step(types.AdamParams(learning_rate=1e-3))
        saved = (await client.save_weights_for_sampler_ext("final")).snapshot_name
    rows = [row async for row in fireworks.list_checkpoints("life")]
    assert [(row.checkpoint_id, row.promotable) for row in rows] == [(saved, True)]

    control.post("/v1/accounts/local/rlorTrainerJobs/life:cancel")
    with pytest.raises(errors.TrainerJobFailedError, match="CANCELLED"):
        await jobs.wait_for_ready("life")
    assert await jobs.reconnect_and_wait("life") == endpoint

    await jobs.delete("life")
    await jobs.delete("life")
    assert not await jobs.exists("life")
    assert "life" not in [job.job_id async for job in jobs.list()]
    model = await fireworks.promote_checkpoint("life", saved, "promoted-model")
    assert (model.name, model.state) == ("accounts/local/models/promoted-model", "READY")
    assert model.name in [entry.name async for entry in fireworks.list_models()]
    with pytest.raises(errors.TrainerJobFailedError, match="gone for good"):
        await jobs.reconnect_and_wait("life")


async def test_the_life_of_a_deployment(fireworks: AsyncFireworksClient) -> None:
    deployments = AsyncDeploymentManager(fireworks)
    config = DeploymentConfig(deployment_id="served", base_model=BASE, min_replica_count=1, accelerator_type=None)
    assert (await deployments.create(config)).created
    assert not (await deployments.create(config)).created
    info = await deployments.wait_for_ready("served")
    assert (info.state, info.base_model, info.inference_model) == ("READY", BASE, "accounts/local/deployments/served")
    assert (await deployments.update("served", min_replica_count=2, max_replica_count=2)).replica_count == 2
    assert [entry.deployment_id async for entry in deployments.list()] == ["served"]
    await deployments.delete("served")
    await deployments.delete("served")
    assert await deployments.base_model_of("served") is None


async def test_shapes_and_models(fireworks: AsyncFireworksClient) -> None:
    shape = await fireworks.resolve_training_profile(SHAPE)
    assert shape.training_shape_version == f"{SHAPE}/versions/v1"
    assert (shape.base_model, shape.trainer_mode) == (BASE, "POLICY_TRAINER")
    assert (await fireworks.resolve_training_profile(f"{SHAPE}-lora")).supports_lora
    deployment = await fireworks.resolve_deployment_profile(shape.deployment_shape)
    assert deployment.deployment_shape_version == shape.deployment_shape_version
    assert (await fireworks.get_model(BASE)).supports_lora
    assert BASE in [model.name async for model in fireworks.list_models(account="fwasync", page_size=1)]


async def test_refusals_say_what_to_do(fireworks: AsyncFireworksClient, control: Control) -> None:
    jobs, deployments = AsyncTrainerJobManager(fireworks), AsyncDeploymentManager(fireworks)
    with pytest.raises(errors.NotFoundError, match=r"trainer job nobody.*check the id"):
        await jobs.get("nobody")
    with pytest.raises(errors.NotFoundError, match="nobody"):
        await deployments.wait_for_ready("nobody")
    with pytest.raises(errors.NotFoundError, match="no-such-shape"):
        await fireworks.resolve_training_profile("accounts/fwasync/trainingShapes/no-such-shape")
    await jobs.create(TrainerJobConfig(base_model="accounts/fwasync/models/unknown", requested_job_id="doomed"))
    with pytest.raises(errors.TrainerJobFailedError, match="unknown"):
        await jobs.wait_for_ready("doomed")
    async with AsyncFireworksClient(str(control.http.base_url), "wrong-key") as stranger:
        with pytest.raises(errors.AuthenticationError) as caught:
            await stranger.account_id()
        assert "wrong-key" not in str(caught.value)
