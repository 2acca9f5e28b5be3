"""Weights of a trainer job synced into a deployment of the local service."""

from __future__ import annotations

import pytest

from fwasync import AsyncServiceClient, errors, types
from fwasync.control.client import AsyncFireworksClient
from fwasync.weights.hot_load import AsyncHotLoadManager
from fwasync.weights.syncer import AsyncWeightSyncer, SyncProgress
from service.control_client import BASE, A, Control, start_control
from unit.training.test_client import datum


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory):
    running = start_control(tmp_path_factory.mktemp("control"), hot_load_s=0.3)
    yield running
    running.close()
    running.service.close()


def deployed(control: Control, name: str, replicas: int = 2) -> str:
    """A trainer job and a deployment that follows it; the URL of the trainer."""
    control.job(name, lora_rank=0)
    body = {
        "baseModel": BASE,
        "minReplicaCount": replicas,
        "maxReplicaCount": replicas,
        "enableHotLoad": True,
        "hotLoadTrainerJob": f"accounts/local/rlorTrainerJobs/{name}",
    }
    control.post(f"{A}/deployments", body, deploymentId=name)
    return str(control.gateway(name).http.base_url).removesuffix("/api/v1/")


async def test_a_trainer_is_followed_by_deltas_and_recovers_from_a_foreign_load(control: Control) -> None:
    url, key = deployed(control, "synced"), control.service.key
    told: list[SyncProgress] = []
    async with (
        AsyncFireworksClient(str(control.http.base_url), key) as fireworks,
        AsyncServiceClient(url, key) as service,
        service.create_training_client(BASE, lora_rank=0) as client,
    ):
        manager = AsyncHotLoadManager(fireworks)
        syncer = AsyncWeightSyncer(client, manager, "synced", base_model=BASE, on_progress=told.append)
        assert len(await syncer.wait_for_hotload_ready()) == 2
        names = [await syncer.save_and_hotload("step")]
        for _ in range(2):
            await client.forward_backward([datum()])
            await client.optim_step(types.AdamParams(learning_rate=1e-3))
            names.append(await syncer.save_and_hotload("step"))
        assert len(set(names)) == 3
        assert await syncer.check_deployment_state() == syncer.base_identity == names[-1]
        assert {entry.stage for entry in told} == {"saving", "loading", "warming up", "done"}
        assert {entry.ready for entry in told if entry.stage == "done"} == {2}
        # How many were ready at the other looks depends on when these were.
        assert {entry.replicas for entry in told if entry.stage == "loading"} == {2}

        stray = (await client.save_weights_for_sampler_ext("stray")).snapshot_name
        names.append(await syncer.save_and_hotload("step"))  # a delta would be the difference to the stray one
        assert await syncer.check_deployment_state() == names[-1]
        await manager.hotload("synced", BASE, stray)
        names += [await syncer.save_and_hotload("step"), await syncer.save_and_hotload("step")]
        assert await syncer.check_deployment_state() == names[-1]
        with pytest.raises(errors.HotLoadFailedError, match="no snapshot 'unheard'"):
            await syncer.hotload("unheard", "base")


async def test_a_deployment_that_is_not_there(control: Control) -> None:
    key = control.service.key
    async with AsyncFireworksClient(str(control.http.base_url), key) as fireworks:
        manager = AsyncHotLoadManager(fireworks)
        with pytest.raises(errors.NotFoundError):
            await manager.hotload_check_status("nowhere", BASE)
