"""`provision` on the local service, interrupted at each request: nothing is left, and nothing else is touched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anyio
import httpx
import pytest

from fwasync import AsyncServiceClient
from fwasync._http.transport import default_transport
from fwasync.config import DeployConfig, InfraConfig
from fwasync.control.client import AsyncFireworksClient
from fwasync.control.deployments import AsyncDeploymentManager
from fwasync.control.provisioning import provision
from fwasync.control.trainer_jobs import AsyncTrainerJobManager
from service.control_client import BASE, SHAPE, A, Control, start_control

INFRA = InfraConfig(training_shape_id=SHAPE, ref_training_shape_id=f"{SHAPE}-forward")


class Counting(httpx.AsyncBaseTransport):
    """The real transport, which cancels a scope at one moment: before or after the n-th request."""

    def __init__(self, base_url: str, scope: anyio.CancelScope, at: int) -> None:
        self._inner = default_transport(base_url)
        self._scope = scope
        self._left = at
        self.struck = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self._count()
        response = await self._inner.handle_async_request(request)
        self._count()
        return response

    async def aclose(self) -> None:
        await self._inner.aclose()

    def _count(self) -> None:
        self._left -= 1
        if self._left == 0:
            self.struck = True
            self._scope.cancel()


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Control]:
    running = start_control(tmp_path_factory.mktemp("control"))
    running.job("theirs")
    running.post(f"{A}/deployments", {"baseModel": BASE, "minReplicaCount": 1}, deploymentId="theirs-too")
    running.post(f"{A}/deployments", {"baseModel": BASE, "minReplicaCount": 1}, deploymentId="used")
    yield running
    running.close()
    running.service.close()


def alive(control: Control) -> list[dict[str, Any]]:
    """All that there is, but for what a run may change of a deployment that it was told to use: whom it follows."""
    jobs, deployments = control.get(f"{A}/rlorTrainerJobs"), control.get(f"{A}/deployments")
    rows = [*jobs["rlorTrainerJobs"], *deployments["deployments"]]
    followed = ("hotLoadTrainerJob", "hotLoadBucketUrl", "updateTime", "state", "replicaCount")
    used = f"{A.removeprefix('/v1/')}/deployments/used"
    return [{k: v for k, v in row.items() if row["name"] != used or k not in followed} for row in rows]


async def interrupted(control: Control, at: int, deploy: DeployConfig) -> bool:
    """Provision, and be cancelled at one moment; whether it came to that."""
    url = str(control.http.base_url)
    with anyio.CancelScope() as scope:
        transport = Counting(url, scope, at)
        async with AsyncFireworksClient(url, control.service.key, transport=transport) as fireworks:
            jobs, deployments = AsyncTrainerJobManager(fireworks), AsyncDeploymentManager(fireworks)
            async with provision(jobs, deployments, infra=INFRA, deploy=deploy, base_model=BASE) as up:
                async with AsyncServiceClient(up.policy.base_url, control.service.key) as service:
                    assert (await service.get_server_capabilities()).supported_models
    return transport.struck


@pytest.mark.parametrize("deployment_id", [None, "used"])
async def test_interrupted_at_every_request(control: Control, deployment_id: str | None) -> None:
    before, at = alive(control), 1
    assert len(before) == 3
    while await interrupted(control, at, DeployConfig(deployment_id=deployment_id)):
        assert alive(control) == before, f"after an interruption at moment {at}"
        at += 1
    assert alive(control) == before
    assert at > 20
