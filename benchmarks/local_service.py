"""What the local service bears: sampling through HTTP, and its own loop while it trains.

python benchmarks/local_service.py [--seconds 5]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Awaitable, Callable

import anyio
import harness
import httpx
import numpy as np

from fwasync import AsyncSamplingClient, AsyncServiceClient, AsyncTrainingClient, types
from fwasync.local import launch

MODEL = "fwasync/qwen3-tiny"
REQUESTS = TOKENS = 64


async def sampling(sampler: AsyncSamplingClient) -> float:
    """Tokens a second of 64 concurrent requests of 64 tokens each."""
    tokens = 0

    async def one(seed: int) -> None:
        nonlocal tokens
        params = types.SamplingParams(max_tokens=TOKENS, seed=seed, stop=[])
        response = await sampler.sample(types.ModelInput.from_ints([1, 2, seed]), 1, params)
        tokens += len(response.sequences[0].tokens)

    started = time.perf_counter()
    async with anyio.create_task_group() as group:
        for seed in range(REQUESTS):
            group.start_soon(one, seed)
    assert tokens == REQUESTS * TOKENS
    return tokens / (time.perf_counter() - started)


async def healthz(url: str, seconds: float) -> list[float]:
    """Latencies of `GET /healthz` in ms, sorted."""
    latencies: list[float] = []
    async with httpx.AsyncClient(trust_env=False) as client:
        await client.get(url)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            started = time.perf_counter()
            await client.get(url)
            latencies.append((time.perf_counter() - started) * 1e3)
            await anyio.sleep(0.005)
    return sorted(latencies)


async def training(client: AsyncTrainingClient) -> None:
    """Batches of 32 x 128 tokens, without end."""
    tokens = np.arange(128) % 200
    datum = types.Datum(
        model_input=types.ModelInput.from_ints(tokens.tolist()),
        loss_fn_inputs={"target_tokens": tokens, "weights": np.ones(128, dtype=np.float32)},
    )
    while True:
        forward_backward = client.forward_backward([datum] * 32)
        await client.optim_step(types.AdamParams())
        await forward_backward


async def beside(work: Callable[[], Awaitable[None]], url: str, seconds: float) -> list[float]:
    async with anyio.create_task_group() as group:
        group.start_soon(work)
        latencies = await healthz(url, seconds)
        group.cancel_scope.cancel()
    return latencies


def say(name: str, latencies: list[float]) -> None:
    count = len(latencies)
    p50, p99 = latencies[count // 2], latencies[int(count * 0.99)]
    print(
        f"healthz, {name:<22} p50 {p50:5.1f} ms   p99 {p99:5.1f} ms   max {latencies[-1]:5.1f} ms   ({count} requests)"
    )


async def main(seconds: float) -> None:
    print(harness.machine().line())
    async with launch() as local, AsyncServiceClient(local.base_url, local.api_key) as service:
        url = f"{local.base_url}/api/v1/healthz"
        async with service.create_sampling_client(base_model=MODEL) as sampler:
            rates = sorted([await sampling(sampler) for _ in range(6)][1:])
            print(
                f"{REQUESTS} concurrent samples of {TOKENS} tokens: {rates[0]:,.0f} / {rates[len(rates) // 2]:,.0f} / "
                f"{rates[-1]:,.0f} tokens a second (min / median / max of {len(rates)})"
            )

            say("idle", await healthz(url, seconds))
            async with service.create_training_client(MODEL, lora_rank=0) as client:
                say("training", await beside(lambda: training(client), url, seconds))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=5.0)
    anyio.run(main, parser.parse_args().seconds)
