"""What goes over the wire, as literal requests and answers."""

from __future__ import annotations

import json
import traceback
from typing import Any

import anyio
import httpx
import pytest

from fwasync import errors
from fwasync.config import DeploymentConfig, TrainerJobConfig
from fwasync.control.client import AsyncFireworksClient
from fwasync.control.deployments import AsyncDeploymentManager
from fwasync.control.trainer_jobs import AsyncTrainerJobManager
from fwasync.testing import virtual_time
from unit.control.fake_plane import KEY, MODEL, ORIGIN, RETRY, Answer, FakePlane

SHAPE = "accounts/fireworks/trainingShapes/ts"
JOB = {
    "name": "accounts/acme/rlorTrainerJobs/job-1",
    "displayName": "grpo-policy",
    "createTime": "2026-03-24T10:00:00Z",
    "state": "JOB_STATE_CREATING",
    "status": {"code": "OK", "message": ""},
    "serviceMode": True,
    "trainingConfig": {"baseModel": MODEL, "loraRank": 8, "maxContextLength": 131072, "region": "US_OHIO_1"},
    "nodeCount": 1,
    "forwardOnly": False,
    "hotLoadDeploymentId": "",
    "brandNew": {"ignored": True},
}


def answering(plane: FakePlane, method: str, path: str, *answers: Answer) -> None:
    """Answer a path from a script; its last answer stays."""
    script = list(answers)

    def rule(request: httpx.Request) -> Answer | None:
        if (request.method, request.url.path) != (method, path):
            return None
        return script.pop(0) if len(script) > 1 else script[0]

    plane.rules.append(rule)


def sent(plane: FakePlane) -> Any:
    return json.loads(plane.seen[-1].content)


@virtual_time
async def test_a_trainer_job_on_a_shape() -> None:
    plane = FakePlane()
    answering(plane, "POST", "/v1/accounts/acme/rlorTrainerJobs", (200, JOB))
    async with plane.client() as client:
        created = await AsyncTrainerJobManager(client).create(
            TrainerJobConfig(
                base_model=MODEL,
                training_shape_ref=SHAPE,
                custom_image_tag="1.2",
                region="US_OHIO_1",
                trainer_replica_count=2,
                display_name="d",
                forward_only=True,
                preemptible=True,
                inactivity_timeout_s=1800,
                max_context_length=99,
                requested_job_id="job-1",
            )
        )
    assert (created.job_name, created.job_id, created.created) == (JOB["name"], "job-1", True)
    assert plane.calls == [
        "GET /v1/accounts?pageSize=2",
        "POST /v1/accounts/acme/rlorTrainerJobs?trainingShape=accounts%2Ffireworks%2FtrainingShapes%2Fts"
        "&rlorTrainerJobId=job-1",
    ]
    assert sent(plane) == {
        "serviceMode": True,
        "keepAlive": False,
        "dataset": "",
        "trainingConfig": {
            "baseModel": MODEL,
            "loraRank": 0,
            "learningRate": 1e-05,
            "customImageTag": "1.2",
            "region": "US_OHIO_1",
        },
        "trainerReplicaCount": 2,
        "useReservation": True,
        "displayName": "d",
        "forwardOnly": True,
        "preemptible": True,
        "inactivityTimeout": "1800s",
    }
    headers = plane.seen[-1].headers
    assert (headers["x-api-key"], headers["authorization"]) == (KEY, f"Bearer {KEY}")


@virtual_time
async def test_a_trainer_job_by_hand_and_for_a_deployment() -> None:
    plane = FakePlane()
    config = TrainerJobConfig(
        base_model=MODEL,
        lora_rank=4,
        max_context_length=4096,
        custom_image_tag="0.33",
        accelerator_type="NVIDIA_H200_141GB",
        accelerator_count=8,
        hot_load_deployment_id="dep1",
        extra_args=["--a b", "--c"],
        reservation_target="r",
        requested_job_id="j",
    )
    async with plane.client() as client:
        await AsyncTrainerJobManager(client).create(config)
    assert plane.calls[-1].endswith("?deploymentId=dep1&skipValidations=true&rlorTrainerJobId=j")
    assert sent(plane) == {
        "serviceMode": True,
        "keepAlive": False,
        "dataset": "",
        "trainingConfig": {
            "baseModel": MODEL,
            "loraRank": 4,
            "learningRate": 1e-05,
            "maxContextLength": 4096,
            "customImageTag": "0.33",
            "acceleratorType": "NVIDIA_H200_141GB",
            "acceleratorCount": 8,
            "extraArgs": ["--a", "b", "--c"],
        },
        "nodeCount": 1,
        "hotLoadDeploymentId": "dep1",
        "useReservation": False,
        "reservationTarget": "r",
    }


@virtual_time
async def test_a_job_whose_creation_lost_its_answer_is_created_once_and_is_ours() -> None:
    plane = FakePlane()
    lost = iter([True, False])

    def rule(request: httpx.Request) -> Answer | None:
        if request.method == "POST" and next(lost):
            plane.rules.clear()
            plane.effect(request)
            raise httpx.ReadError("reset")
        return None

    plane.rules.append(rule)
    async with plane.client() as client:
        created = await AsyncTrainerJobManager(client).create(TrainerJobConfig(base_model=MODEL))
    assert created.created
    assert plane.alive == {created.job_id}
    posts = [request for request in plane.seen if request.method == "POST"]
    assert len(posts) == 2
    assert len({(str(r.url), r.content, r.headers["x-idempotency-key"]) for r in posts}) == 1


@virtual_time
async def test_an_id_that_was_taken_before_is_not_ours() -> None:
    plane = FakePlane()
    plane.jobs["j"], plane.deployments["d"] = ["JOB_STATE_RUNNING"], ["READY"]
    async with plane.client() as client:
        job = await AsyncTrainerJobManager(client).create(TrainerJobConfig(base_model=MODEL, requested_job_id="j"))
        dep = await AsyncDeploymentManager(client).create(DeploymentConfig(deployment_id="d", base_model=MODEL))
    assert (job.created, job.job_name) == (False, "accounts/acme/rlorTrainerJobs/j")
    assert (dep.created, dep.name) == (False, "accounts/acme/deployments/d")


async def test_the_id_of_a_deleted_job_is_not_given_again() -> None:
    plane = FakePlane()
    plane.jobs["j"] = ["JOB_STATE_DELETED"]
    async with plane.client() as client:
        with pytest.raises(
            errors.ConflictError, match=r"creating trainer job j: it was deleted.*choose another"
        ) as caught:
            await AsyncTrainerJobManager(client).create(TrainerJobConfig(base_model=MODEL, requested_job_id="j"))
    assert caught.value.status == 409


@virtual_time
async def test_a_creation_that_is_refused_or_never_answered() -> None:
    plane = FakePlane()
    path = "/v1/accounts/acme/rlorTrainerJobs"
    answering(plane, "POST", path, (400, {"error": {"message": f"bad shape {KEY}"}}), (503, {"message": "down"}))
    async with plane.client() as client:
        jobs = AsyncTrainerJobManager(client)
        config = TrainerJobConfig(base_model=MODEL, requested_job_id="j")
        with pytest.raises(errors.BadRequestError, match=r"creating trainer job j: .*400.*bad shape \*\*\*") as caught:
            await jobs.create(config)
        assert caught.value.status == 400
        with pytest.raises(errors.ServiceUnavailableError, match=r"creating trainer job j: .*503: down"):
            await jobs.create(config)
        plane.rules.insert(0, raising(httpx.ConnectError("refused")))
        with pytest.raises(errors.ServiceUnreachableError, match="it was not"):
            await jobs.create(config)
        plane.rules.insert(0, raising(httpx.ReadError("reset")))
        with pytest.raises(errors.RetryBudgetExhaustedError, match="is unknown"):
            await jobs.create(config)


def raising(error: Exception) -> Any:
    def rule(request: httpx.Request) -> Answer | None:
        raise error

    return rule


@virtual_time
async def test_reading_resuming_listing_and_deleting_jobs() -> None:
    plane = FakePlane()
    base = "/v1/accounts/acme/rlorTrainerJobs"
    rows = [{**JOB, "name": f"accounts/acme/rlorTrainerJobs/job-{n}"} for n in range(3)]
    answering(
        plane,
        "GET",
        base,
        (200, {"rlorTrainerJobs": rows[:2], "nextPageToken": "p2", "totalSize": 3}),
        (200, {"rlorTrainerJobs": rows[2:], "nextPageToken": ""}),
    )
    answering(plane, "GET", f"{base}/job-1", (200, JOB))
    answering(plane, "POST", f"{base}/job-1:resume", (200, {**JOB, "state": "JOB_STATE_PENDING"}))
    answering(plane, "DELETE", f"{base}/job-1", (200, {}), (404, {"message": "gone"}))
    async with plane.client() as client:
        jobs = AsyncTrainerJobManager(client)
        job = await jobs.get("job-1")
        assert (job.state, job.base_model, job.lora_rank, job.max_context_length) == ("CREATING", MODEL, 8, 131072)
        assert (await jobs.resume("job-1")).state == "PENDING"
        assert plane.seen[-1].content == b""
        await jobs.delete("job-1")
        await jobs.delete("job-1")
        assert [row.job_id async for row in jobs.list(filter='state="X"', page_size=2)] == ["job-0", "job-1", "job-2"]
        assert plane.calls[-2:] == [
            f"GET {base}?pageSize=2&filter=state%3D%22X%22",
            f"GET {base}?pageSize=2&pageToken=p2&filter=state%3D%22X%22",
        ]
        with pytest.raises(errors.NotFoundError, match=r"reading trainer job nope: .*check the id"):
            await jobs.get("nope")
        assert not await jobs.exists("nope")
        with pytest.raises(errors.UsageError, match="'a/b' is not an id"):
            await jobs.get("a/b")
        with pytest.raises(errors.UsageError, match="page_size is 0"):
            await anext(jobs.list(page_size=0))
    with pytest.raises(errors.ClosedError):
        await jobs.get("job-1")


@virtual_time
async def test_a_resumption_whose_answer_was_lost_is_one() -> None:
    plane = FakePlane()
    lost, refused = (503, {"message": "busy"}), (400, {"message": "it is RUNNING"})
    answering(plane, "POST", "/v1/accounts/acme/rlorTrainerJobs/job-1:resume", lost, refused, refused, lost, refused)
    plane.jobs["job-1"] = ["JOB_STATE_RUNNING"]
    async with plane.client() as client:
        jobs = AsyncTrainerJobManager(client)
        assert (await jobs.resume("job-1")).state == "RUNNING"
        with pytest.raises(errors.BadRequestError, match=r"resuming trainer job job-1: .*it is RUNNING"):
            await jobs.resume("job-1")  # it ran before
        plane.jobs["job-1"] = ["DELETED"]
        with pytest.raises(errors.BadRequestError, match=r"resuming trainer job job-1"):
            await jobs.resume("job-1")


@virtual_time
async def test_a_list_that_leads_in_a_circle_ends() -> None:
    plane = FakePlane()
    answering(plane, "GET", "/v1/accounts/acme/deployments", (200, {"deployments": [], "nextPageToken": "p"}))
    async with plane.client() as client:
        with pytest.raises(errors.ProtocolError, match="'p' twice"):
            async for _ in AsyncDeploymentManager(client).list():
                raise AssertionError


@virtual_time
async def test_a_deployment_is_created_changed_and_deleted() -> None:
    plane = FakePlane()
    base = "/v1/accounts/acme/deployments"
    shape = "accounts/fireworks/deploymentShapes/ds/versions/d1"
    answer = {
        "name": "accounts/acme/deployments/dep1",
        "state": "CREATING",
        "baseModel": MODEL,
        "hotLoadBucketUrl": "gs://some-bucket/rl-checkpoints/acme/dep1",
        "deploymentShape": shape,
        "replicaCount": 0,
        "status": {"code": 0, "message": "placing"},
    }
    answering(plane, "POST", base, (200, answer))
    answering(plane, "GET", f"{base}/dep1", (200, answer))
    answering(plane, "PATCH", f"{base}/dep1", (200, answer))
    answering(plane, "DELETE", f"{base}/dep1", (404, {}))
    async with plane.client() as client:
        deployments = AsyncDeploymentManager(client)
        config = DeploymentConfig(
            deployment_id="dep1", base_model=MODEL, deployment_shape=shape, region="US_OHIO_1", min_replica_count=1
        )
        assert (await deployments.create(config)).created
        assert plane.calls[-1] == f"POST {base}?deploymentId=dep1"
        assert sent(plane) == {
            "baseModel": MODEL,
            "minReplicaCount": 1,
            "maxReplicaCount": 1,
            "enableHotLoad": True,
            "placement": {"region": "US_OHIO_1"},
            "hotLoadBucketType": "FW_HOSTED",
            "deploymentShape": shape,
        }
        info = await deployments.get("dep1")
        assert (info.state, info.message, info.inference_model) == ("CREATING", "placing", answer["name"])
        assert (info.hot_load_bucket_url, info.deployment_shape_version) == (answer["hotLoadBucketUrl"], shape)
        await deployments.update("dep1", min_replica_count=0, max_replica_count=0)
        assert plane.calls[-1] == f"PATCH {base}/dep1?updateMask=min_replica_count%2Cmax_replica_count"
        assert sent(plane) == {"minReplicaCount": 0, "maxReplicaCount": 0}
        await deployments.scale_to_zero("dep1")
        assert plane.calls[-1] == plane.calls[-2]
        assert sent(plane) == {"minReplicaCount": 0, "maxReplicaCount": 0}
        assert deployments.inference_url == ORIGIN
        assert sent(plane) == {"minReplicaCount": 0, "maxReplicaCount": 0}
        with pytest.raises(errors.UsageError, match="at least one of"):
            await deployments.update("dep1")
        await deployments.delete("dep1")
        assert plane.calls[-1] == f"DELETE {base}/dep1?ignoreChecks=true&hard=true"


@virtual_time
async def test_a_deployment_by_hand() -> None:
    plane = FakePlane()
    async with plane.client() as client:
        await AsyncDeploymentManager(client).create(
            DeploymentConfig(
                deployment_id="d",
                base_model=MODEL,
                enable_hot_load=False,
                disable_speculative_decoding=True,
                accept_shapeless_risk=True,
                extra_args=["--x y"],
            )
        )
    assert plane.calls[-1].endswith("?deploymentId=d&acceptShapelessRisk=true&disableSpeculativeDecoding=true")
    assert sent(plane) == {
        "baseModel": MODEL,
        "minReplicaCount": 0,
        "maxReplicaCount": 1,
        "enableHotLoad": False,
        "acceleratorType": "NVIDIA_H200_141GB",
        "extraArgs": ["--x", "y"],
    }


@virtual_time
async def test_the_account_is_asked_for_once() -> None:
    plane = FakePlane(latency=1.0)
    async with plane.client() as client, anyio.create_task_group() as group:
        for _ in range(5):
            group.start_soon(client.account_id)
    assert plane.calls == ["GET /v1/accounts?pageSize=2"]
    async with client.copy() as copy:  # which is connected to nothing
        assert await copy.account_id() == "acme"


@virtual_time
async def test_a_cancelled_look_up_of_the_account_leaves_it_to_the_next() -> None:
    plane = FakePlane(latency=1.0)
    async with plane.client() as client:
        with anyio.move_on_after(0.5):
            await client.account_id()
        assert await client.account_id() == "acme"


@pytest.mark.parametrize(
    ("accounts", "found"),
    [([], "none"), ([{"name": "accounts/"}], "none"), ([{"name": "accounts/a"}, {"name": "accounts/b"}], r"\(a, b\)")],
)
async def test_a_key_of_no_account_or_of_several(accounts: list[Any], found: str) -> None:
    plane = FakePlane()
    answering(plane, "GET", "/v1/accounts", (200, {"accounts": accounts}))
    async with plane.client() as client:
        with pytest.raises(errors.AuthenticationError, match=found):
            await client.account_id()


VERSION = {
    "name": f"{SHAPE}/versions/v1",
    "validated": True,
    "latestValidated": True,
    "snapshot": {
        "baseModel": MODEL,
        "parameterCount": "8190735360",
        "trainerMode": "LORA_TRAINER",
        "trainerImageTag": "0.33.0",
        "acceleratorType": "NVIDIA_H200_141GB",
        "acceleratorCount": 8,
        "nodeCount": 2,
        "maxSupportedContextLength": 131072,
        "deploymentShapeVersion": "accounts/fireworks/deploymentShapes/ds/versions/d1",
        "trainerShardingScheme": {"pipelineParallelism": 4},
    },
}


async def test_shapes_are_resolved() -> None:
    plane = FakePlane()
    versions = f"/v1/{SHAPE}/versions"
    answering(plane, "GET", versions, (200, {"trainingShapeVersions": [VERSION]}), (200, {"trainingShapeVersions": []}))
    answering(plane, "GET", f"{versions}/v1", (200, VERSION))
    deployment = {"name": "accounts/fireworks/deploymentShapes/ds/versions/d1", "snapshot": {"acceleratorType": "X"}}
    answering(
        plane,
        "GET",
        "/v1/accounts/fireworks/deploymentShapes/ds/versions",
        (200, {"deploymentShapeVersions": [deployment]}),
    )
    async with plane.client() as client:
        profile = await client.resolve_training_profile(SHAPE)
        assert plane.calls == [f"GET {versions}?filter=latest_validated%3Dtrue&pageSize=1"]
        assert await client.resolve_training_profile(f"{SHAPE}/versions/v1") == profile
        assert (profile.training_shape, profile.training_shape_version) == (SHAPE, VERSION["name"])
        assert (profile.deployment_shape, profile.supports_lora) == (deployment["name"], True)
        assert (profile.node_count, profile.pipeline_parallelism) == (2, 4)
        assert profile.max_supported_context_length == 131072
        found = await client.resolve_deployment_profile("accounts/fireworks/deploymentShapes/ds")
        assert (found.deployment_shape_version, found.accelerator_type) == (deployment["name"], "X")
        with pytest.raises(errors.NotFoundError, match="no latest validated version"):
            await client.resolve_training_profile(SHAPE)
        for name in ("ts", "accounts/fireworks/deploymentShapes/ds", f"{SHAPE}/version/1"):
            with pytest.raises(errors.UsageError, match="full name"):
                await client.resolve_training_profile(name)


async def test_a_model() -> None:
    plane = FakePlane()
    answer = {
        "name": MODEL,
        "state": "READY",
        "kind": "HF_BASE_MODEL",
        "contextLength": 40960,
        "supportsLora": True,
        "baseModelDetails": {"moe": False, "parameterCount": "8190735360"},
    }
    answering(plane, "GET", f"/v1/{MODEL}", (200, answer))
    pages = (200, {"models": [answer], "nextPageToken": "p"}), (200, {"models": [{"name": "m"}]})
    answering(plane, "GET", "/v1/accounts/fireworks/models", *pages)
    answering(plane, "GET", "/v1/accounts/acme/models", (200, {}))
    async with plane.client() as client:
        model = await client.get_model(MODEL)
        assert [row.name async for row in client.list_models(account="fireworks")] == [MODEL, "m"]
        assert [row async for row in client.list_models()] == []
    assert (model.state, model.context_length, model.supports_lora) == ("READY", 40960, True)


def test_keys_go_to_their_vendor_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FWASYNC_BASE_URL", "FIREWORKS_BASE_URL", "FWASYNC_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FIREWORKS_API_KEY", KEY)
    assert AsyncFireworksClient().base_url == "https://api.fireworks.ai"
    with pytest.raises(errors.UsageError, match=r"no API key for plane.test: pass api_key, or set FWASYNC"):
        AsyncFireworksClient(ORIGIN)
    monkeypatch.setenv("FIREWORKS_BASE_URL", ORIGIN)
    monkeypatch.setenv("FWASYNC_API_KEY", "a key")
    with pytest.raises(errors.UsageError, match="was it cut"):
        AsyncFireworksClient()
    assert KEY not in repr(AsyncFireworksClient(ORIGIN, KEY, retry=RETRY))


@pytest.mark.parametrize(
    "given", [(KEY, "https://api.fireworks.ai"), (KEY, None), (f"https://me:{KEY}@{ORIGIN}", None)]
)
def test_a_key_in_the_place_of_the_url_is_not_shown(given: tuple[str, str | None]) -> None:
    with pytest.raises(errors.UsageError) as caught:  # the Fireworks SDK takes them in the other order
        AsyncFireworksClient(*given)
    assert KEY not in "".join(traceback.format_exception(caught.value))
