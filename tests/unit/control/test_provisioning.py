"""`provision`: all come up together, and nothing is left of them, whatever happens."""

from __future__ import annotations

import json
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any

import anyio
import httpx
import pytest

from fwasync import errors
from fwasync.config import DeployConfig, InfraConfig
from fwasync.control.client import AsyncFireworksClient
from fwasync.control.deployments import AsyncDeploymentManager
from fwasync.control.provisioning import Provisioned, provision
from fwasync.control.trainer_jobs import AsyncTrainerJobManager
from fwasync.testing import virtual_time
from support.sweep import STEP_S, struck
from unit.control.fake_plane import DEPLOYMENT_SHAPE, MODEL, Answer, FakePlane, nothing_left

SHAPE = "accounts/fireworks/trainingShapes/ts"
INFRA = InfraConfig(training_shape_id=SHAPE, ref_training_shape_id=f"{SHAPE}-forward", trainer_timeout_s=60)


def everything(client: AsyncFireworksClient, **kw: Any) -> AbstractAsyncContextManager[Provisioned]:
    settings: dict[str, Any] = {"infra": INFRA, "deploy": DeployConfig(), "base_model": MODEL, "lora_rank": 8, **kw}
    return provision(AsyncTrainerJobManager(client), AsyncDeploymentManager(client), **settings)


@virtual_time
async def test_all_come_up_together() -> None:
    plane = FakePlane(latency=0.1)
    async with nothing_left(plane) as client:
        async with everything(client) as up:
            assert up.reference is not None
            assert up.deployment is not None
            assert plane.alive == {up.policy.job_id, up.reference.job_id, up.deployment.deployment_id}
            assert anyio.current_time() < 6
    bodies = [json.loads(r.content) for r in plane.seen if r.method == "POST" and "/accounts/" in r.url.path]
    assert [body["hotLoadTrainerJob"] for body in bodies if "hotLoadTrainerJob" in body] == [up.policy.job_name]
    assert sorted(body.get("forwardOnly", False) for body in bodies if "serviceMode" in body) == [False, True]


@pytest.mark.parametrize(
    ("deploy", "infra", "shape", "accelerator"),
    [
        (DeployConfig(), INFRA, DEPLOYMENT_SHAPE, None),
        (DeployConfig(deployment_shape=f"{DEPLOYMENT_SHAPE}2"), INFRA, f"{DEPLOYMENT_SHAPE}2", None),
        (DeployConfig(deployment_accelerator_type="X"), INFRA, None, "X"),
        (DeployConfig(), InfraConfig(accelerator_type="Y"), None, "Y"),
    ],
)
def test_a_deployment_that_names_no_hardware_has_the_shape_that_goes_with_the_trainers(
    deploy: DeployConfig, infra: InfraConfig, shape: str | None, accelerator: str | None
) -> None:
    @virtual_time
    async def run() -> None:
        plane = FakePlane()
        async with nothing_left(plane) as client, everything(client, infra=infra, deploy=deploy):
            pass
        [body] = [json.loads(r.content) for r in plane.seen if r.method == "POST" and "deploymentId" in r.url.params]
        assert (body.get("deploymentShape"), body.get("acceleratorType")) == (shape, accelerator)

    run()


@virtual_time
async def test_a_shape_that_cannot_be_resolved_creates_nothing() -> None:
    plane = FakePlane()
    plane.rules.append(lambda request: (404, {}) if "/trainingShapes/" in request.url.path else None)
    async with nothing_left(plane) as client:
        with pytest.raises(errors.NotFoundError, match="resolving shape"):
            async with everything(client):
                raise AssertionError
    assert {request.method for request in plane.seen} == {"GET"}


@virtual_time
async def test_what_is_not_configured_is_not_brought_up() -> None:
    plane = FakePlane()
    async with nothing_left(plane) as client:
        async with everything(client, infra=InfraConfig(), deploy=None) as up:
            assert (up.reference, up.deployment) == (None, None)
            assert plane.alive == {up.policy.job_id}


@virtual_time
async def test_a_deployment_of_before_is_attached_and_left_in_place() -> None:
    plane = FakePlane()
    plane.deployments["mine"] = ["READY"]
    async with nothing_left(plane) as client:
        async with everything(client, deploy=DeployConfig(deployment_id="mine")) as up:
            patches = [request for request in plane.seen if request.method == "PATCH"]
            assert [json.loads(request.content) for request in patches] == [{"hotLoadTrainerJob": up.policy.job_name}]


@pytest.mark.parametrize("native", [True, False])
def test_cancelled_at_every_instant(native: bool) -> None:
    async def hit(at: float) -> bool:
        plane = FakePlane(latency=0.1)
        async with nothing_left(plane) as client:
            return await struck(partial(everything, client), at=at, stay_s=0.5, native=native)

    @virtual_time
    async def run() -> None:
        n = 0
        while await hit(n * STEP_S):
            n += 1
        assert n > 40

    run()


@pytest.mark.parametrize("fails", ["deployments", "rlorTrainerJobs"])
def test_the_first_failure_ends_the_others_at_once(fails: str) -> None:
    @virtual_time
    async def run() -> None:
        plane = FakePlane(looks=10_000)

        def rule(request: httpx.Request) -> Answer | None:
            forward = request.method == "POST" and b"forwardOnly" in request.content
            deployment = request.method == "POST" and request.url.path.endswith("/deployments")
            refused = deployment if fails == "deployments" else forward
            return (400, {"message": "no shape"}) if refused else None

        plane.rules.append(rule)
        async with nothing_left(plane) as client:
            with pytest.raises(errors.BadRequestError, match="no shape"):
                async with everything(client):
                    raise AssertionError
        assert anyio.current_time() < 2

    run()


@virtual_time
async def test_left_by_an_exception() -> None:
    plane = FakePlane()
    async with nothing_left(plane) as client:
        with pytest.raises(ZeroDivisionError):
            async with everything(client):
                _ = 1 / 0


def told(error: BaseException) -> list[str]:
    """What was not removed, as an error and its notes tell."""
    said = [str(error), *getattr(error, "__notes__", ())]
    return sorted(text.partition(" was not removed: ")[0].split()[-1] for text in said if "was not removed: " in text)


@virtual_time
async def test_what_could_not_be_removed_is_told() -> None:
    plane = FakePlane()
    plane.rules.append(lambda request: (403, {"message": "locked"}) if request.method == "DELETE" else None)
    async with plane.client() as client:
        with pytest.raises(errors.ProvisioningError, match=r"was not removed: .*locked") as caught:
            async with everything(client):
                pass
    assert told(caught.value) == sorted(plane.alive)
    assert len(plane.alive) == 3


@pytest.mark.parametrize("fails", ["the block", "the deployment"])
def test_what_could_not_be_removed_is_told_beside_what_failed(fails: str) -> None:
    @virtual_time
    async def run() -> None:
        plane = FakePlane()

        def rule(request: httpx.Request) -> Answer | None:
            if request.method == "POST" and request.url.path.endswith("/deployments") and fails == "the deployment":
                return 500, {"message": "broken"}
            return (403, {"message": "locked"}) if request.method == "DELETE" else None

        plane.rules.append(rule)
        async with plane.client() as client:
            with pytest.raises((ZeroDivisionError, errors.ServiceUnavailableError)) as caught:
                async with everything(client):
                    _ = 1 / 0
        not_known = {name for name in told(caught.value) if name.startswith("qwen3-8b-")}  # it may have been created
        assert set(told(caught.value)) == plane.alive | not_known
        assert len(plane.alive | not_known) == 3

    run()
