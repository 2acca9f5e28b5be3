"""Cancelling many samples in flight at once.

python benchmarks/cancelling.py [--short] [--cell NAME] [--rounds 5]

How long until every task has ended, and what is left: tasks that ended otherwise, connections still open and samples
that the server still generates, a second later. The Fireworks SDK always streams, and its pool lets 256 requests out at
a time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import harness
from harness import MEMORY, Case, Cell, Client, Column, Measures, Settings

PROMPT = list(range(64))
TOKENS = 200
MODEL = "accounts/bench/deployments/100-events-400-ms"
SLOW = "40000-ms"


async def cancelled(one: Callable[[], Awaitable[object]], url: str, settings: Settings) -> Measures:
    """Begin so many, wait until the server generates them (or gets no more), and cancel."""
    in_flight, settle_s = settings["in_flight"], settings["settle_s"]
    tasks = [asyncio.ensure_future(one()) for _ in range(in_flight)]
    generating, since = 0.0, time.perf_counter()
    while generating < in_flight and (not generating or time.perf_counter() - since < 5):
        await asyncio.sleep(0.05)
        before, generating = generating, harness.server_counts(url)["generating"]
        if before != generating:
            since = time.perf_counter()
    await asyncio.sleep(settle_s)
    cpu, started = time.process_time(), time.perf_counter()
    with harness.Stall() as stall:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    wall, cpu = time.perf_counter() - started, time.process_time() - cpu
    await asyncio.sleep(settle_s)
    left = harness.server_counts(url)
    return {
        "generating": generating,
        "ended_ms": wall * 1e3,
        "cpu_ms": cpu * 1e3,
        "stall_ms": stall.ms,
        "not_cancelled": sum(not task.cancelled() for task in tasks),
        "connections": left["connections"] - 1,  # without that which asks
        "still_generating": left["generating"],
    }


async def with_fwasync(url: str, settings: Settings) -> Measures:
    from fwasync import AsyncDeploymentSampler, FixedConcurrencyController

    async def whole() -> None:
        await sampler.sample_with_prompt_tokens(PROMPT, max_tokens=TOKENS, logprobs=True)

    async def streamed() -> None:
        async with sampler.stream_with_prompt_tokens(PROMPT, max_tokens=TOKENS, logprobs=True) as stream:
            async for _ in stream:
                pass

    controller = FixedConcurrencyController(settings["in_flight"])
    async with AsyncDeploymentSampler(url, MODEL, "fw-bench", concurrency=controller) as sampler:
        return await cancelled(streamed if settings["stream"] else whole, url, settings)


async def with_fireworks(url: str, settings: Settings) -> Measures:
    from fireworks.training.sdk import DeploymentSampler, FixedConcurrencyController

    controller = FixedConcurrencyController(settings["in_flight"])
    sampler = DeploymentSampler(url, MODEL, "fw-bench", concurrency_controller=controller)

    async def one() -> None:
        await sampler.sample_with_prompt_tokens(PROMPT, max_tokens=TOKENS, logprobs=True)

    return await cancelled(one, url, settings)


async def with_floor(url: str, settings: Settings) -> Measures:
    from floor import Floor, complete, stream

    ask = stream if settings["stream"] else complete
    request = {"model": MODEL, "prompt": PROMPT, "max_tokens": TOKENS, "stream": settings["stream"], "logprobs": True}
    async with Floor(url) as floor:
        return await cancelled(lambda: ask(floor, request), url, settings)


async def with_fwasync_samples(url: str, settings: Settings) -> Measures:
    from fwasync import AsyncServiceClient, types

    prompt, params = types.ModelInput.from_ints(PROMPT), types.SamplingParams(max_tokens=TOKENS)
    async with AsyncServiceClient(url, "tml-bench") as service:
        async with service.create_sampling_client(base_model=SLOW) as sampler:
            return await cancelled(lambda: sampler.sample(prompt, 1, params), url, settings)


async def with_tinker(url: str, settings: Settings) -> Measures:
    import tinker

    prompt, params = tinker.ModelInput.from_ints(PROMPT), tinker.SamplingParams(max_tokens=TOKENS)
    service = tinker.ServiceClient(base_url=url, api_key="tml-bench")
    sampler = await service.create_sampling_client(base_model=SLOW)

    async def one() -> None:
        await sampler.sample(prompt, 1, params)

    return await cancelled(one, url, settings)


DEPLOYMENT = ("fwasync", "Fireworks SDK", "floor")
SETTINGS = {"in_flight": 1000, "settle_s": 1.0}
TRAINER_API = ("fwasync, trainer API", "tinker")

CASE = Case(
    name="cancelling",
    title="Cancelling samples in flight",
    clients={
        "fwasync": Client(with_fwasync, "fwasync"),
        "Fireworks SDK": Client(with_fireworks, "fireworks-ai", "fireworks", short_rounds=1),
        "floor": Client(with_floor),
        "fwasync, trainer API": Client(with_fwasync_samples, "fwasync"),
        "tinker": Client(with_tinker, "tinker", "tinker"),
    },
    cells=[
        Cell("1,000 streamed", SETTINGS | {"stream": True}, is_short=True, without=TRAINER_API),
        Cell("1,000 whole", SETTINGS | {"stream": False}, is_short=True, without=["Fireworks SDK", *TRAINER_API]),
        Cell("1,000 of the trainer API", SETTINGS, is_short=True, without=DEPLOYMENT),
    ],
    columns=(
        Column("generating", "in flight", 0),
        Column("ended_ms", "all ended after ms", 0),
        Column("cpu_ms", "CPU ms", 0),
        Column("stall_ms", "longest stall ms", 0),
        Column("not_cancelled", "not cancelled", 0),
        Column("connections", "still open", 0),
        Column("still_generating", "still generated", 0),
        MEMORY,
    ),
    plot="ended_ms",
    tiny={"in_flight": 4, "settle_s": 0.1},
)

if __name__ == "__main__":
    harness.main(CASE)
