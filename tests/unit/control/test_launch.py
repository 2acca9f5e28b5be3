"""`launch`: hit at every instant, nothing of what it created is left behind, and nothing else is touched."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from functools import partial
from typing import Any

import anyio
import httpx
import pytest

from fwasync import RetryPolicy, errors
from fwasync.config import DeployConfig, InfraConfig
from fwasync.config.launch import Progress
from fwasync.control.client import AsyncFireworksClient
from fwasync.control.deployments import AsyncDeploymentManager
from fwasync.control.trainer_jobs import AsyncTrainerJobManager
from fwasync.testing import virtual_time
from support.sweep import STEP_S, struck
from unit.control import fake_plane
from unit.control.fake_plane import MODEL, Answer, FakePlane

KINDS = ["trainer", "named trainer", "deployment", "named deployment", "both"]
both_ways = pytest.mark.parametrize("native", [True, False])
kinds = pytest.mark.parametrize("kind", KINDS)


def launch(kind: str, client: AsyncFireworksClient, **kw: Any) -> AbstractAsyncContextManager[Any]:
    jobs, deployments = AsyncTrainerJobManager(client), AsyncDeploymentManager(client)
    if kind == "both":
        return launch_both(client)
    if kind.endswith("trainer"):
        name = "mine" if "named" in kind else None
        return InfraConfig(trainer_timeout_s=60).launch(jobs, base_model=MODEL, lora_rank=8, job_id=name, **kw)
    name = "mine" if "named" in kind else None
    return DeployConfig(deployment_id=name, deployment_timeout_s=60).launch(deployments, base_model=MODEL, **kw)


@asynccontextmanager
async def launch_both(client: AsyncFireworksClient) -> AsyncGenerator[None]:
    async with launch("deployment", client), launch("trainer", client):
        yield


@asynccontextmanager
async def nothing_left(plane: FakePlane) -> AsyncGenerator[AsyncFireworksClient]:
    """A client beside resources of others."""
    plane.jobs["theirs"], plane.deployments["theirs-too"] = ["JOB_STATE_RUNNING"], ["READY"]
    async with fake_plane.nothing_left(plane) as client:
        yield client


@kinds
@virtual_time
async def test_it_is_there_inside_and_gone_after(kind: str) -> None:
    plane = FakePlane(latency=0.1)
    async with nothing_left(plane) as client:
        async with launch(kind, client):
            assert len(plane.alive) == (4 if kind == "both" else 3)


@kinds
@both_ways
def test_cancelled_at_every_instant(kind: str, native: bool) -> None:
    async def hit(at: float) -> bool:
        plane = FakePlane(latency=0.1)
        async with nothing_left(plane) as client:
            return await struck(partial(launch, kind, client), at=at, stay_s=1, native=native)

    @virtual_time
    async def run() -> None:
        n = 0
        while await hit(n * STEP_S):
            n += 1
        assert n > 40

    run()


@kinds
@virtual_time
async def test_cancelled_at_every_step(kind: str) -> None:
    n, in_time = 0, True
    while in_time:
        plane = FakePlane(looks=0)  # no pauses: only steps
        async with nothing_left(plane) as client:

            async def use(client: AsyncFireworksClient = client) -> None:
                async with launch(kind, client):
                    pass

            task = asyncio.ensure_future(use())
            for _ in range(n):
                await asyncio.sleep(0)
            in_time = not task.done() and n < 2000
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        n += 1
    assert 10 < n < 2000


@kinds
@virtual_time
async def test_cancelled_again_and_again(kind: str) -> None:
    for n in range(60):
        plane = FakePlane(latency=0.1)
        async with nothing_left(plane) as client:

            async def use(client: AsyncFireworksClient = client) -> None:
                async with launch(kind, client):
                    await anyio.sleep(1)

            task = asyncio.ensure_future(use())
            await anyio.sleep(n * STEP_S)
            while not task.done():
                task.cancel()
                await anyio.sleep(0.03)


@kinds
@virtual_time
async def test_left_by_an_exception(kind: str) -> None:
    plane = FakePlane()
    async with nothing_left(plane) as client:
        with pytest.raises(ZeroDivisionError):
            async with launch(kind, client):
                _ = 1 / 0


@pytest.mark.parametrize("kind", KINDS[:4])
@virtual_time
async def test_one_that_never_comes_up_is_removed(kind: str) -> None:
    plane = FakePlane(looks=10_000)
    async with nothing_left(plane) as client:
        with pytest.raises(errors.ProvisioningTimeoutError, match="60 s allowed"):
            async with launch(kind, client):
                raise AssertionError
    assert 60 <= anyio.current_time() < 61


@pytest.mark.parametrize("kind", ["named trainer", "named deployment"])
@virtual_time
async def test_one_that_exists_is_used_and_left_in_place(kind: str) -> None:
    plane = FakePlane()
    plane.jobs["mine"], plane.deployments["mine"] = ["JOB_STATE_PAUSED"], ["READY"]
    async with nothing_left(plane) as client:
        async with launch(kind, client) as found:
            assert "mine" in (getattr(found, "job_id", ""), getattr(found, "deployment_id", ""))
    assert not [request for request in plane.seen if request.method == "DELETE"]


@pytest.mark.parametrize("kind", ["named trainer", "named deployment"])
@virtual_time
async def test_one_that_another_creates_at_the_same_time_is_left_in_place(kind: str) -> None:
    plane = FakePlane()

    def rule(request: httpx.Request) -> Answer | None:
        if request.method == "POST" and not plane.jobs.get("mine") and "v1/accounts" in request.url.path:
            plane.jobs["mine"], plane.deployments["mine"] = ["JOB_STATE_RUNNING"], ["READY"]
        return None

    plane.rules.append(rule)
    async with plane.client() as client:
        async with launch(kind, client):
            pass
    assert plane.alive == {"mine"}


@virtual_time
async def test_a_deployment_of_another_model_is_refused() -> None:
    plane = FakePlane()
    plane.deployments["mine"] = ["READY"]
    async with nothing_left(plane) as client:
        config = DeployConfig(deployment_id="mine")
        with pytest.raises(errors.UsageError, match="serves accounts/fireworks/models/qwen3-8b, not m2"):
            async with config.launch(AsyncDeploymentManager(client), base_model="m2"):
                raise AssertionError


def refuses_to_delete(request: httpx.Request) -> Answer | None:
    return (403, {"message": "locked"}) if request.method == "DELETE" else None


@virtual_time
async def test_what_could_not_be_removed_is_told(caplog: pytest.LogCaptureFixture) -> None:
    plane = FakePlane()
    plane.rules.append(refuses_to_delete)
    async with plane.client() as client:
        with pytest.raises(errors.ProvisioningError, match=r"trainer job mine was not removed: .*locked.*by hand"):
            async with launch("named trainer", client):
                pass
        plane.jobs.clear()
        with pytest.raises(ZeroDivisionError) as caught:
            async with launch("named trainer", client):
                _ = 1 / 0
    assert "trainer job mine was not removed" in caught.value.__notes__[0]
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]


@pytest.mark.parametrize("status", [401, 403, 504])
def test_only_who_could_create_is_told_to_remove_by_hand(status: int, caplog: pytest.LogCaptureFixture) -> None:
    @virtual_time
    async def run() -> None:
        plane = FakePlane()
        changing = ("POST", "DELETE")
        plane.rules.append(lambda request: (status, {"message": "no"}) if request.method in changing else None)
        async with plane.client() as client:
            with pytest.raises(errors.ServiceError, match="creating trainer job") as caught:
                async with launch("trainer", client):
                    raise AssertionError
        notes = " ".join(getattr(caught.value, "__notes__", ()))
        assert ("was not removed" in notes) == (status == 504)
        assert len(caplog.records) == (status == 504)

    run()


@virtual_time
async def test_a_right_that_is_lost_in_between_is_told() -> None:
    plane = FakePlane()
    plane.rules.append(refuses_to_delete)
    async with plane.client() as client:
        with pytest.raises(errors.PermissionDeniedError) as caught:
            async with launch("named trainer", client):
                raise errors.PermissionDeniedError("of something else")
    assert "trainer job mine was not removed" in caught.value.__notes__[0]


async def test_a_client_that_is_not_open_creates_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(errors.ClosedError) as caught:
        async with launch("trainer", FakePlane().client()):
            raise AssertionError
    assert not hasattr(caught.value, "__notes__")
    assert caplog.records == []


@virtual_time
async def test_a_removal_is_bounded() -> None:
    plane = FakePlane()
    async with plane.client(RetryPolicy()) as client:
        with pytest.raises(errors.ProvisioningTimeoutError, match="no answer within 40 s"):
            async with launch("named trainer", client):
                plane.latency = 1e6
                left = anyio.current_time()
    assert anyio.current_time() - left == pytest.approx(40)


@virtual_time
async def test_a_cancelled_creation_that_is_never_answered_is_given_up_in_time() -> None:
    plane = FakePlane()
    async with plane.client(RetryPolicy()) as client:
        await client.account_id()
        plane.latency = 1e6
        with anyio.move_on_after(5):
            async with launch("trainer", client):
                raise AssertionError
    assert anyio.current_time() == pytest.approx(5 + 20 + 40)


@virtual_time
async def test_progress_is_told() -> None:
    plane = FakePlane()
    seen: list[Progress] = []
    async with nothing_left(plane) as client:
        async with launch("named trainer", client, on_progress=seen.append):
            pass
    assert [(p.resource, p.state) for p in seen] == [
        ("trainer job mine", state) for state in ("CREATING", "CREATING", "RUNNING")
    ]
