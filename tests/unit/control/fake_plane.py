"""A control plane in memory, behind an httpx transport: what exists, what was asked, and what arrives late."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import httpx

from fwasync import RetryPolicy
from fwasync.control.client import AsyncFireworksClient

KEY = "fw-very-secret"
ORIGIN = "http://plane.test"
MODEL = "accounts/fireworks/models/qwen3-8b"
DEPLOYMENT_SHAPE = "accounts/fireworks/deploymentShapes/ds/versions/d1"
RETRY = RetryPolicy(base_s=0.1, cap_s=1.0, budget_s=30)
Answer = tuple[int, Any]
Handler = Callable[[httpx.Request], Answer | None]


class FakePlane(httpx.AsyncBaseTransport):
    """Jobs and deployments that need a number of looks to come up.

    `latency` passes before and after the effect of each request. A request whose client goes away before its effect is
    on its way all the same: it takes effect `late`, after everything else.
    """

    def __init__(self, *, looks: int = 2, latency: float = 0.0) -> None:
        self.looks = looks
        self.latency = latency
        self.jobs: dict[str, list[str]] = {}
        self.deployments: dict[str, list[str]] = {}
        self.seen: list[httpx.Request] = []
        self.rules: list[Handler] = []
        self.late: list[httpx.Request] = []
        self.unhealthy = 0
        self.serving = True

    def client(self, retry: RetryPolicy = RETRY) -> AsyncFireworksClient:
        return AsyncFireworksClient(ORIGIN, KEY, retry=retry, transport=self)

    def arrive(self) -> None:
        """What was on its way arrives."""
        while self.late:
            self.effect(self.late.pop())

    @property
    def calls(self) -> list[str]:
        """Method and path of each request."""
        return [f"{request.method} {request.url.raw_path.decode()}" for request in self.seen]

    @property
    def alive(self) -> set[str]:
        """Names of what exists."""
        return {
            name for found in (self.jobs, self.deployments) for name, states in found.items() if states != ["DELETED"]
        }

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await request.aread()
        self.seen.append(request)
        try:
            await anyio.sleep(self.latency)
        except BaseException:
            self.late.append(request)
            raise
        status, body = self.effect(request)
        await anyio.sleep(self.latency)
        return httpx.Response(status, content=b"" if body is None else json.dumps(body).encode())

    def effect(self, request: httpx.Request) -> Answer:
        for rule in self.rules:
            answer = rule(request)
            if answer is not None:
                return answer
        path = request.url.path
        if path == "/v1/accounts":
            return 200, {"accounts": [{"name": "accounts/acme"}]}
        if path.endswith("/healthz"):
            self.unhealthy -= 1
            return (503, None) if self.unhealthy >= 0 else (200, {"status": "ok"})
        if path == "/inference/v1/completions":
            return (200, {}) if self.serving else (425, {"error": "not yet"})
        if "/trainingShapes/" in path:
            snapshot = {"baseModel": MODEL, "deploymentShapeVersion": DEPLOYMENT_SHAPE}
            version = {"name": path.removeprefix("/v1/") + "/v1", "snapshot": snapshot}
            return 200, {"trainingShapeVersions": [version]}
        kind, _, name = path.removeprefix("/v1/accounts/acme/").partition("/")
        found = {"rlorTrainerJobs": self.jobs, "deployments": self.deployments}[kind]
        return self._resource(request, kind, found, name)

    def _resource(self, request: httpx.Request, kind: str, found: dict[str, list[str]], name: str) -> Answer:
        coming_up = (
            ["JOB_STATE_CREATING"] * self.looks + ["JOB_STATE_RUNNING"]
            if kind == "rlorTrainerJobs"
            else ["UPDATING"] * self.looks + ["READY"]
        )
        if request.method == "POST" and not name:
            name = request.url.params["rlorTrainerJobId" if kind == "rlorTrainerJobs" else "deploymentId"]
            if name in found:
                return 409, {"code": 6, "message": f"{name} already exists"}
            found[name] = coming_up
        elif request.method == "POST" and name.endswith(":resume"):
            name = name.removesuffix(":resume")
            found[name] = coming_up
        elif name not in found:
            return 404, {"code": 5, "message": f"{name} not found"}
        elif request.method == "DELETE":
            found[name] = ["DELETED"]
            return 200, {}
        states = found[name]
        state = states.pop(0) if len(states) > 1 and request.method == "GET" else states[0]
        return 200, {"name": f"accounts/acme/{kind}/{name}", "state": state, "baseModel": MODEL}


@asynccontextmanager
async def nothing_left(plane: FakePlane) -> AsyncGenerator[AsyncFireworksClient]:
    """A client; after it, only what existed before is left, also when everything on its way has arrived."""
    before, tasks = plane.alive, asyncio.all_tasks()
    async with plane.client() as client:
        yield client
    assert asyncio.all_tasks() == tasks
    plane.arrive()
    assert plane.alive == before
