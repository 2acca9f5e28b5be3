"""How soon a thousand samples in flight are over, here and on the service, when they are cancelled. Of Linux only.

python benchmarks/cancel_samples.py [--rounds 7]
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import anyio
import harness

from fwasync import (
    AsyncDeploymentManager,
    AsyncDeploymentSampler,
    AsyncFireworksClient,
    DeploymentConfig,
    FixedConcurrencyController,
)
from fwasync.testing import AsyncScriptedService, local_service

MODEL = "accounts/fwasync/models/qwen3-small"
# What is most likely after it goes on to the end of the context.
PROMPT = [5, 6, 7, 8]
SAMPLES = 1000
TOKENS = 1000


async def deploy(service: AsyncScriptedService) -> None:
    async with AsyncFireworksClient(service.base_url, service.api_key) as fireworks:
        manager = AsyncDeploymentManager(fireworks)
        await manager.create(DeploymentConfig(deployment_id="bench", base_model=MODEL))
        await manager.wait_for_ready("bench")


async def until(service: AsyncScriptedService, requests: int) -> int:
    """Wait until the service has so many requests in hand; the tokens that it has sampled until then."""
    while True:
        load = await service.sampling()
        if load.running + load.waiting == requests:
            return load.tokens
        await anyio.sleep(0.005)


def cpu_of_service() -> float:
    """CPU seconds of all threads of the service, which is this process's only child."""
    (child,) = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    threads = Path(f"/proc/{child}/task").iterdir()
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9


async def cancelled(service: AsyncScriptedService, *, stream: bool) -> tuple[float, float, float, float, int]:
    """Seconds until all tasks have ended, and until the service has nothing left, each with the CPU's; and tokens."""
    name, controller = "accounts/local/deployments/bench", FixedConcurrencyController(SAMPLES)

    async def one() -> None:
        if not stream:
            await sampler.sample_with_prompt_tokens(PROMPT, max_tokens=TOKENS, temperature=0)
            return
        async with sampler.stream_with_prompt_tokens(PROMPT, max_tokens=TOKENS, temperature=0) as pieces:
            async for _ in pieces:
                pass

    async with AsyncDeploymentSampler(service.base_url, name, service.api_key, concurrency=controller) as sampler:
        async with anyio.create_task_group() as tasks:
            for _ in range(SAMPLES):
                tasks.start_soon(one)
            before = await until(service, SAMPLES)
            started, cpu, cpu_there = time.perf_counter(), time.process_time(), cpu_of_service()
            tasks.cancel_scope.cancel()
        here, cpu = time.perf_counter() - started, time.process_time() - cpu
        after = await until(service, 0)
        there, cpu_there = time.perf_counter() - started, cpu_of_service() - cpu_there
        return here, cpu, there, cpu_there, after - before


async def main(rounds: int) -> None:
    print(harness.machine().line())
    print(f"{SAMPLES} samples of {TOKENS} tokens in flight, cancelled at once; min / median / max of {rounds}")
    async with local_service() as service:
        await deploy(service)
        for stream in (False, True):
            found = [await cancelled(service, stream=stream) for _ in range(rounds)]
            print("streamed" if stream else "whole")
            rows = ("tasks ended here", "CPU time of that", "nothing left on the service", "CPU time of the service")
            for column, what in enumerate(rows):
                ms = sorted(row[column] * 1e3 for row in found)
                print(f"  {what:<28} {ms[0]:6.0f} / {ms[len(ms) // 2]:6.0f} / {ms[-1]:6.0f} ms")
            print(f"  {'tokens sampled meanwhile':<28} {max(row[4] for row in found):6d} at most")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    anyio.run(main, parser.parse_args().rounds)
