"""The hot-load endpoints: bytes on the wire, and what the replicas' answers mean."""

from __future__ import annotations

import json
from typing import Any

import anyio
import httpx
import pytest

from fwasync import errors
from fwasync.control.client import AsyncFireworksClient
from fwasync.testing import virtual_time
from fwasync.weights.hot_load import AsyncHotLoadManager, ReplicaState, judge_load, poll_delay
from unit.control.fake_plane import KEY, MODEL, ORIGIN, RETRY

URL = f"{ORIGIN}/hot_load/v1/models/hot_load"


class Service(httpx.AsyncBaseTransport):
    def __init__(self, *answers: tuple[int, Any]) -> None:
        self.answers = list(answers)
        self.seen: list[httpx.Request] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await request.aread()
        if request.url.path == "/v1/accounts":
            return httpx.Response(200, json={"accounts": [{"name": "accounts/acme"}]})
        self.seen.append(request)
        status, body = self.answers.pop(0)
        return httpx.Response(status, json=body, headers={"x-request-id": f"r-{len(self.seen)}"})

    def client(self) -> AsyncFireworksClient:
        return AsyncFireworksClient(ORIGIN, KEY, retry=RETRY, transport=self)

    @property
    def sent(self) -> list[Any]:
        return [json.loads(request.content) for request in self.seen]


async def test_loads_in_full_and_onto_another() -> None:
    service = Service((200, {}), (200, {"anything": 1}))
    async with service.client() as client:
        manager = AsyncHotLoadManager(client)
        await manager.hotload("dep1", MODEL, "step-1-aabbccdd")
        await manager.hotload("dep1", MODEL, "step-2-aabbccdd", previous_snapshot_identity="step-1-aabbccdd")
    assert service.sent == [
        {"identity": "step-1-aabbccdd", "reset_prompt_cache": True},
        {
            "identity": "step-2-aabbccdd",
            "reset_prompt_cache": True,
            "incremental_snapshot_metadata": {
                "previous_snapshot_identity": "step-1-aabbccdd",
                "compression_format": "arc_v2",
                "checksum_format": "alder32",
            },
        },
    ]
    for request in service.seen:
        assert (request.method, str(request.url)) == ("POST", URL)
        assert request.headers["fireworks-model"] == MODEL
        assert request.headers["fireworks-deployment"] == "accounts/acme/deployments/dep1"
        assert (request.headers["x-api-key"], request.headers["authorization"]) == (KEY, f"Bearer {KEY}")


async def test_a_service_that_does_not_know_the_prompt_cache() -> None:
    refusal = {"error": {"message": "Extra inputs are not permitted, field: 'reset_prompt_cache'"}}
    service = Service((400, refusal), (200, {}), (200, {}), (400, refusal))
    async with service.client() as client:
        manager = AsyncHotLoadManager(client)
        await manager.hotload("dep1", "", "a")
        await manager.hotload("dep1", "", "b")
        with pytest.raises(errors.BadRequestError):
            await manager.hotload("dep1", "", "c")
    assert service.sent == [{"identity": "a", "reset_prompt_cache": True}, *({"identity": name} for name in "abc")]
    assert "fireworks-model" not in service.seen[0].headers


async def test_every_replica_is_told_of() -> None:
    full = {
        "identity": "pod-abc",
        "current_snapshot_identity": "s",
        "readiness": True,
        "loading_state": {"stage": "idle", "target_snapshot_identity": "s"},
        "loaded_adapters": [{"identity": "x", "status": "loaded"}, {"identity": "y", "status": "loading"}],
        "supports_rdma_weight_sync": False,
    }
    bare = {"identity": "pod-def", "loading_state": None}
    service = Service((200, {"replicas": [full, bare]}), (200, {"replicas": []}), (200, {"replicas": {}}))
    async with service.client() as client:
        manager = AsyncHotLoadManager(client)
        assert await manager.hotload_check_status("dep1", MODEL) == (
            ReplicaState("pod-abc", "s", True, "idle", "s", "", ("x",)),
            ReplicaState("pod-def", None, False),
        )
        assert await manager.hotload_check_status("dep1", MODEL) == ()
        with pytest.raises(errors.ProtocolError, match="hot-load status of deployment dep1"):
            await manager.hotload_check_status("dep1", MODEL)


async def test_a_refusal_tells_what_was_wanted_and_what_to_do() -> None:
    gone = {"error": {"code": 404, "message": "no such deployment"}}
    service = Service((404, gone), (404, gone))
    async with service.client() as client:
        manager = AsyncHotLoadManager(client)
        with pytest.raises(errors.NotFoundError, match=r"^hot-loading snapshot s into deployment dep1: .*check the id"):
            await manager.hotload("dep1", MODEL, "s")
        with pytest.raises(errors.NotFoundError, match=r"^reading .* dep1: .*no such deployment.*check") as caught:
            await manager.hotload_check_status("dep1", MODEL)
    assert (caught.value.status, caught.value.request_id) == (404, "r-2")


def replicas(*states: tuple[str, str]) -> tuple[int, dict[str, Any]]:
    """An answer of replicas that serve a snapshot and are at a stage of loading "new"."""
    return 200, {
        "replicas": [
            {
                "current_snapshot_identity": serving,
                "readiness": True,
                "loading_state": {"stage": stage, "target_snapshot_identity": "new"},
            }
            for serving, stage in states
        ]
    }


@virtual_time
async def test_a_load_is_waited_for_until_all_replicas_serve_it() -> None:
    service = Service(
        (200, {}), replicas(), replicas(("new", ""), ("old", "loading")), replicas(("new", ""), ("new", ""))
    )
    async with service.client() as client:
        served = await AsyncHotLoadManager(client).hotload_and_wait(
            "dep1", MODEL, "new", previous_snapshot_identity="old", reset_prompt_cache=False
        )
    assert [replica.snapshot for replica in served] == ["new", "new"]
    assert json.loads(service.seen[0].content)["incremental_snapshot_metadata"]["previous_snapshot_identity"] == "old"


@virtual_time
async def test_a_load_that_fails_or_takes_too_long() -> None:
    failed, stuck = replicas(("new", ""), ("old", "error")), replicas(("old", "loading"))
    service = Service((200, {}), failed, *[stuck] * 20)
    async with service.client() as client:
        manager = AsyncHotLoadManager(client)
        with pytest.raises(
            errors.HotLoadFailedError, match="dep1 did not load snapshot new: 1 of 2 replicas"
        ) as caught:
            await manager.hotload_and_wait("dep1", MODEL, "new")
        assert (caught.value.snapshot, caught.value.deployment) == ("new", "dep1")
        started = anyio.current_time()
        with pytest.raises(errors.HotLoadTimeoutError, match="not ready with snapshot new after 9 s: 0 of 1"):
            await manager.wait_for_hotload("dep1", MODEL, "new", timeout_seconds=9, poll_interval=1)
        assert anyio.current_time() - started == 9


async def test_a_warm_up_is_one_completion() -> None:
    service = Service((200, {}), (503, {}))
    async with service.client() as client:
        manager = AsyncHotLoadManager(client)
        assert [await manager.warm_up("dep1"), await manager.warm_up("dep1")] == [True, False]
        with pytest.raises(errors.UsageError, match="is not an id"):
            await manager.warm_up("accounts/acme/deployments/dep1")
    assert service.sent[0]["model"] == "accounts/acme/deployments/dep1"
    assert str(service.seen[0].url) == f"{ORIGIN}/inference/v1/completions"
    with pytest.raises(errors.ClosedError):
        await manager.hotload_check_status("dep1", MODEL)


def replica(snapshot: str | None, *, ready: bool = True, stage: str = "idle", target: str | None = None, **more: Any):
    return ReplicaState("pod", snapshot, ready, stage, target, **more)


@pytest.mark.parametrize(
    ("replicas", "action", "ready"),
    [
        ([], "wait", 0),
        ([replica("s")], "ready", 1),
        ([replica("tinker://m/sampler_weights/s")], "ready", 1),
        ([replica("s", ready=False)], "wait", 0),
        ([replica("s"), replica("old")], "wait", 1),
        ([replica("s"), replica("old", stage="error", target="s")], "failed", 1),
        ([replica("old", stage="error", target="old")], "wait", 0),
        ([replica("old", stage="error")], "wait", 0),
        ([replica("s", stage="error", target="s")], "ready", 1),
        ([replica(None, adapters=("s",))], "ready", 1),
        ([replica(None)], "wait", 0),
    ],
)
def test_what_replicas_mean(replicas: list[ReplicaState], action: str, ready: int) -> None:
    verdict = judge_load(replicas, "s")
    assert (verdict.action, verdict.ready) == (action, ready)


def test_pauses_rise_to_their_cap() -> None:
    pauses = [poll_delay(looks, cap_s=5.0) for looks in range(1, 12)]
    assert pauses == sorted(pauses)
    assert (pauses[0], pauses[-1], poll_delay(10**6, cap_s=5.0)) == (0.25, 5.0, 5.0)
