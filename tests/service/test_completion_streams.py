"""Streams of completions on the wire: each token as it is sampled, for fast readers and slow ones."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import anyio
import anyio.to_thread
import httpx
import pytest
import pytest_asyncio

from fwasync import (
    AdaptiveConcurrencyController,
    AsyncDeploymentSampler,
    ConcurrencyController,
    FixedConcurrencyController,
)
from fwasync._wire.completions import DONE, EventDecoder
from fwasync.testing import AsyncScriptedService
from service import scripted
from service.scripted import SMALL, deploy, full_name, load_when, plain_client

PATH = "/inference/v1/completions"
PROMPT = [5, 6, 7, 8]
# The most likely token again and again, to the end of the context.
ENDLESS = {"max_tokens": 10**6, "temperature": 0}

running = scripted.running
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(running: AsyncScriptedService) -> AsyncScriptedService:
    await deploy(running, "tiny")
    await deploy(running, "small", base_model=SMALL)
    return running


def body(model: str = "tiny", **fields: Any) -> dict[str, Any]:
    asked = {"model": full_name(model), "prompt": PROMPT, "stream": True, "raw_output": True, "logprobs": True}
    return {**asked, "perf_metrics_in_response": True, **fields}


async def events(response: httpx.Response) -> AsyncIterator[bytes]:
    decoder = EventDecoder()
    async for piece in response.aiter_raw():
        for event in decoder.feed(piece):
            yield event


async def test_a_token_comes_while_the_next_ones_are_sampled(service: AsyncScriptedService) -> None:
    async with plain_client(service) as client:
        before = await load_when(service, running=0)
        async with client.stream("POST", PATH, json=body("small", **ENDLESS, n=64)) as response:
            coming = events(response)
            first = json.loads(await anext(coming))
            assert first["choices"][0]["logprobs"]["content"][0]["logprob"] < 0
            assert float(response.headers["fireworks-server-time-to-first-token"]) > 0
            assert float(response.headers["fireworks-prefill-queue-duration"]) >= 0
            assert "fireworks-server-processing-time" not in response.headers
            during = await service.sampling()
            assert during.running == 1, "the first token came when all had been sampled"
        after = await load_when(service, running=0)
        # The client has gone: 64 choices of a thousand tokens each were under way.
        assert after.tokens - before.tokens < 64_000
        assert (await service.sampling()).tokens == after.tokens


async def test_the_metrics_tell_when_the_first_token_came(service: AsyncScriptedService) -> None:
    async with plain_client(service) as client:
        whole = (await client.post(PATH, json=body(stream=False, max_tokens=50, temperature=0))).json()["perf_metrics"]
        async with client.stream("POST", PATH, json=body(max_tokens=50, temperature=0)) as response:
            *_, last, done = [event async for event in events(response)]
    assert done == DONE
    for metrics in (whole, json.loads(last)["perf_metrics"]):
        names = ("prefill-queue-duration", "server-time-to-first-token", "server-processing-time")
        queued, ttft, total = (float(metrics[name]) for name in names)
        assert 0 <= queued < ttft < total


async def test_who_waits_for_a_turn_is_told_how_long(service: AsyncScriptedService) -> None:
    controller = AdaptiveConcurrencyController()

    def sampler_of(concurrency: ConcurrencyController) -> AsyncDeploymentSampler:
        return AsyncDeploymentSampler(service.base_url, full_name("small"), service.api_key, concurrency=concurrency)

    async def one(sampler: AsyncDeploymentSampler, max_tokens: int) -> None:
        await sampler.sample_with_prompt_tokens(PROMPT, max_tokens=max_tokens, temperature=0)

    async with sampler_of(FixedConcurrencyController(128)) as many, sampler_of(controller) as sampler:
        async with anyio.create_task_group() as waiting:
            async with anyio.create_task_group() as crowd:
                for _ in range(128):
                    crowd.start_soon(one, many, 1024)
                await load_when(service, running=64, waiting=64)
                for _ in range(2):
                    waiting.start_soon(one, sampler, 2)
                await load_when(service, running=64, waiting=66)
                seen_at = time.monotonic()
                during = await service.sampling()
                assert (during.running, during.waiting) == (64, 66)
                longer_than = time.monotonic() - seen_at
                crowd.cancel_scope.cancel()
        first, second = sampler.drain_metrics()
        for each in (first, second):
            assert longer_than < each.prefill_queue_duration < each.server_ttft < each.client_latency
        average = (first.prefill_queue_duration + second.prefill_queue_duration) / 2
        assert controller.step_completed()["avg_pq"] == pytest.approx(average)


async def test_choices_grow_side_by_side_and_the_last_event_closes_all(service: AsyncScriptedService) -> None:
    async with plain_client(service) as client:
        async with client.stream("POST", PATH, json=body(max_tokens=8, n=3, seed=1)) as response:
            *pieces, done = [event async for event in events(response)]
    told = [json.loads(piece) for piece in pieces]
    indices = [message["choices"][0]["index"] for message in told]
    assert sorted(indices[:3]) == [0, 1, 2]
    assert [message.get("usage") is not None for message in told] == [False] * (len(told) - 1) + [True]
    assert done == DONE


async def test_a_refusal_comes_before_the_stream(service: AsyncScriptedService) -> None:
    async with plain_client(service) as client:
        refused = await client.post(PATH, json=body(temperature=-1))
    assert refused.status_code == 400
    assert "temperature" in refused.json()["error"]["message"]


def unread(service: AsyncScriptedService, message: dict[str, Any]) -> socket.socket:
    """A connection whose answer waits to be read."""
    address = urlsplit(service.base_url)
    connection = socket.socket()
    connection.settimeout(30)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect((address.hostname, address.port or 0))
    content = json.dumps(message).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nX-API-Key: {service.api_key}\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode() + content)
    return connection


def read_all(connection: socket.socket) -> bytes:
    received = bytearray()
    while piece := connection.recv(1 << 20):
        received += piece
    return bytes(received)


async def test_who_does_not_read_holds_up_nobody_and_loses_nothing(service: AsyncScriptedService) -> None:
    async with plain_client(service) as client:
        # More than the buffers of two sockets hold.
        connection = await anyio.to_thread.run_sync(unread, service, body(**ENDLESS, n=64))
        with connection:
            await load_when(service, running=1)
            other = await client.post(PATH, json=body(stream=False, max_tokens=3))
            assert other.status_code == 200
            await load_when(service, running=0)  # all of it was sampled, though nothing was read
            received = await anyio.to_thread.run_sync(read_all, connection)
    assert received.count(b'"token_id"') == received.count(b'"logprob"') > 64 * 400
    assert received.count(b'"finish_reason":"length"') == 64
    assert received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
