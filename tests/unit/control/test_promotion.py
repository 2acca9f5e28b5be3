"""Checkpoints are listed and become models."""

from __future__ import annotations

import json
from typing import Any

import anyio
import httpx
import pytest

from fwasync import errors
from fwasync.control.names import output_model_problems
from fwasync.testing import virtual_time
from unit.control.fake_plane import MODEL, Answer, FakePlane

PATH = "/v1/accounts/acme/checkpoints/step-1-aabbccdd:promote"
OPERATION = "accounts/acme/operations/op1"
DONE = {"name": "accounts/acme/models/my-model", "state": "READY", "kind": "HF_BASE_MODEL"}


def plane_with(promote: list[Answer], operation: list[Any] | None = None) -> FakePlane:
    plane = FakePlane()

    def rule(request: httpx.Request) -> Answer | None:
        if request.url.path == PATH:
            return promote.pop(0)
        if request.url.path == f"/v1/{OPERATION}":
            assert operation is not None
            return 200, {"name": OPERATION, **(operation.pop(0) if len(operation) > 1 else operation[0])}
        return None

    plane.rules.append(rule)
    return plane


async def promote(plane: FakePlane, **kw: Any) -> Any:
    async with plane.client() as client:
        return await client.promote_checkpoint("job-1", "step-1-aabbccdd", "my-model", MODEL, **kw)


@virtual_time
async def test_a_promotion_that_is_answered_at_once() -> None:
    plane = plane_with([(200, {"model": {**DONE, "peftDetails": {"baseModel": MODEL, "r": 32}}})])
    model = await promote(plane)
    assert (model.name, model.state, model.peft_base_model) == (DONE["name"], "READY", MODEL)
    assert json.loads(plane.seen[-1].content) == {
        "output_model": "accounts/acme/models/my-model",
        "trainer_job_id": "accounts/acme/rlorTrainerJobs/job-1",
        "base_model": MODEL,
        "async_promotion": True,
    }


@virtual_time
async def test_a_promotion_that_takes_its_time() -> None:
    pending = {"done": False, "metadata": {"statusMessage": "copying"}}
    finished = {"done": True, "response": {"@type": "type.googleapis.com/gateway.Model", **DONE}}
    plane = plane_with([(200, {"operation": {"name": OPERATION, **pending}})], [pending, pending, finished])
    assert (await promote(plane)).name == DONE["name"]
    assert plane.calls[-3:] == [f"GET /v1/{OPERATION}"] * 3


@virtual_time
async def test_an_older_service_is_asked_without_async_promotion() -> None:
    plane = plane_with([(400, {"message": "unknown field async_promotion"}), (200, {"model": DONE})])
    assert (await promote(plane)).name == DONE["name"]
    assert "async_promotion" not in json.loads(plane.seen[-1].content)


@virtual_time
async def test_a_promotion_whose_answer_was_lost_may_have_been_one() -> None:
    taken = (409, {"message": "my-model exists"})
    with pytest.raises(errors.ConflictError, match="my-model exists") as caught:
        await promote(plane_with([(504, {}), taken]))
    assert "may have made accounts/acme/models/my-model: `get_model` tells" in caught.value.__notes__[-1]
    with pytest.raises(errors.ConflictError, match="my-model exists") as caught:
        await promote(plane_with([taken]))
    assert not hasattr(caught.value, "__notes__")


@virtual_time
async def test_promotions_that_fail() -> None:
    begun: Answer = (200, {"operation": {"name": OPERATION}})
    with pytest.raises(errors.OperationFailedError, match="failed: disk full") as failed:
        await promote(plane_with([begun], [{"done": True, "error": {"code": 13, "message": "disk full"}}]))
    assert failed.value.request_id == OPERATION
    with pytest.raises(errors.ProtocolError, match="names no model"):
        await promote(plane_with([begun], [{"done": True}]))
    with pytest.raises(errors.ProtocolError, match="neither a model nor an operation"):
        await promote(plane_with([(200, {})]))
    with pytest.raises(
        errors.BadRequestError, match=r"promoting checkpoint step-1-aabbccdd of trainer job job-1: .*no"
    ):
        await promote(plane_with([(400, {"message": "no"})]))
    before = anyio.current_time()
    with pytest.raises(errors.OperationTimeoutError, match=f"goes on at the service, as {OPERATION}") as late:
        await promote(plane_with([begun], [{"done": False}]), timeout=50)
    assert anyio.current_time() - before == pytest.approx(50)
    assert late.value.request_id == OPERATION


@virtual_time
async def test_the_base_model_is_asked_of_the_job() -> None:
    plane = plane_with([(200, {"model": DONE})])
    job: dict[str, Any] = {"name": "x", "trainingConfig": {"baseModel": MODEL}}
    plane.rules.append(lambda request: (200, job) if request.url.path.endswith("/job-1") else None)
    async with plane.client() as client:
        await client.promote_checkpoint("job-1", "step-1-aabbccdd", "my-model")
        assert json.loads(plane.seen[-1].content)["base_model"] == MODEL
        del job["trainingConfig"]
        with pytest.raises(errors.UsageError, match="pass base_model"):
            await client.promote_checkpoint("job-1", "step-1-aabbccdd", "my-model")


@pytest.mark.parametrize(
    ("model_id", "problems"),
    [("my-model-2", 0), ("x" * 63, 0), ("", 1), ("My_Model", 1), ("x" * 64, 1), ("A" * 64, 2), ("-x", 1), ("x-", 1)],
)
async def test_ids_of_models(model_id: str, problems: int) -> None:
    assert len(output_model_problems(model_id)) == problems
    plane = FakePlane()
    if problems:
        async with plane.client() as client:
            with pytest.raises(errors.UsageError):
                await client.promote_checkpoint("job-1", "c", model_id, MODEL)
        assert not plane.seen


@pytest.mark.parametrize("key", ["checkpoints", "rlorTrainerJobCheckpoints"])
async def test_checkpoints_are_listed(key: str) -> None:
    row = {
        "name": "accounts/acme/rlorTrainerJobs/job-1/checkpoints/step-1-aabbccdd",
        "createTime": "2026-03-24T00:00:00Z",
        "checkpointType": "CHECKPOINT_TYPE_INFERENCE_BASE",
        "promotable": True,
    }
    plane = FakePlane()
    plane.rules.append(lambda request: (200, {key: [row]}) if "checkpoints" in request.url.path else None)
    async with plane.client() as client:
        rows = [found async for found in client.list_checkpoints("job-1")]
    assert [(r.checkpoint_id, r.checkpoint_type, r.promotable) for r in rows] == [
        ("step-1-aabbccdd", "INFERENCE_BASE", True)
    ]
    assert plane.calls[-1] == "GET /v1/accounts/acme/rlorTrainerJobs/job-1/checkpoints?pageSize=200"
