"""A service with scripted faults for the tests of a module, and deployments on it.

A module takes the fixtures as its own: `running = scripted.running`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import httpx
import pytest
import pytest_asyncio

from fwasync import AsyncDeploymentManager, AsyncFireworksClient, DeploymentConfig
from fwasync.testing import AsyncScriptedService, FaultPlan, SamplingLoad, local_service

TINY = "accounts/fwasync/models/qwen3-tiny"
SMALL = "accounts/fwasync/models/qwen3-small"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[AsyncScriptedService]:
    """The module's service, which takes no scripted fault, and no client that goes away, for a fault of its own."""
    async with local_service(data_dir=tmp_path_factory.mktemp("scripted")) as service:
        yield service
    assert (service.data_dir / "service.log").read_text() == ""


@pytest_asyncio.fixture(loop_scope="module")
async def service(running: AsyncScriptedService) -> AsyncIterator[AsyncScriptedService]:
    """The module's service, without faults at the end of each test."""
    yield running
    await running.set_faults(FaultPlan())


def full_name(deployment: str) -> str:
    return f"accounts/local/deployments/{deployment}"


async def deploy(service: AsyncScriptedService, *names: str, base_model: str = TINY) -> None:
    """Deployments of a base model, ready to be sampled."""
    async with AsyncFireworksClient(service.base_url, service.api_key) as fireworks:
        manager = AsyncDeploymentManager(fireworks)
        for name in names:
            await manager.create(DeploymentConfig(deployment_id=name, base_model=base_model))
            await manager.wait_for_ready(name)


@asynccontextmanager
async def plain_client(service: AsyncScriptedService) -> AsyncIterator[httpx.AsyncClient]:
    """A client that is not ours."""
    headers = {"X-API-Key": service.api_key}
    async with httpx.AsyncClient(base_url=service.base_url, headers=headers, timeout=100, trust_env=False) as client:
        yield client


async def load_when(service: AsyncScriptedService, *, running: int, waiting: int = 0) -> SamplingLoad:
    """The load, as soon as there are so many requests."""
    with anyio.fail_after(100):
        while True:
            load = await service.sampling()
            if (load.running, load.waiting) == (running, waiting):
                return load
            await anyio.sleep(0.01)
