"""Ten thousand steps: whether memory and latency stay what they are.

python benchmarks/long_run.py [--rounds 1] [--cell NAME]

A step is forward_backward of 8 datums of 256 tokens and optim_step, pipelined: its results are awaited when four later
steps have been sent. Every 20 steps, 16 samples of 64 tokens run beside them. After each 500 steps: CPU time and
latency of a step (median and 99th percentile), what is resident, and how many tasks, timers and objects there are.
"""

from __future__ import annotations

import asyncio
import gc
import resource
import time
from collections import deque
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import anyio
import harness
import trainers
from harness import RATE, Case, Cell, Client, Column, Measures, Settings

WINDOW = 4
SAMPLES_EVERY, SAMPLES, SAMPLED_TOKENS = 20, 16, 64


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize() / 2**20


def count_live() -> dict[str, float]:
    """What is alive once garbage has been collected."""
    gc.collect()
    loop: Any = asyncio.get_running_loop()
    return {
        "rss_mb": resident_mb(),
        "tasks": len(asyncio.all_tasks()),
        "timers": len(loop._scheduled),
        "objects": len(gc.get_objects()),
    }


async def with_fwasync(url: str, settings: Settings) -> Measures:
    from fwasync import AsyncServiceClient, types

    params = types.SamplingParams(max_tokens=SAMPLED_TOKENS)
    prompt = types.ModelInput.from_ints(list(range(64)))
    pending: deque[tuple[float, Awaitable[Any], Awaitable[Any]]] = deque()
    windows: list[dict[str, float]] = []
    took: list[float] = []

    async def sample() -> None:
        response = await sampler.sample(prompt, 1, params)
        assert len(response.sequences[0].tokens) == SAMPLED_TOKENS

    async def finish_step() -> None:
        began, backward, step = pending.popleft()
        await backward
        await step
        took.append((time.perf_counter() - began) * 1e3)

    service = AsyncServiceClient(url, "tml-bench", wire=settings["wire"])
    async with service, service.create_training_client(f"{settings['tokens']}-tokens") as client:
        async with service.create_sampling_client(base_model="bench") as sampler, anyio.create_task_group() as group:
            adam = types.AdamParams(learning_rate=trainers.LEARNING_RATE)
            face = trainers.AtOnce(client, types)
            data = trainers.policy_data(face, settings["datums"], settings["tokens"])
            started, cpu = time.perf_counter(), time.process_time()
            window_cpu = cpu
            for number in range(1, settings["count"] + 1):
                began = time.perf_counter()
                pending.append((began, client.forward_backward(data, trainers.LOSS), client.optim_step(adam)))
                if number % SAMPLES_EVERY == 0:
                    for _ in range(SAMPLES):
                        group.start_soon(sample)
                if len(pending) > WINDOW:
                    await finish_step()
                if number % settings["window"] == 0:
                    took.sort()
                    cost = {
                        "cpu_ms": (time.process_time() - window_cpu) / settings["window"] * 1e3,
                        "p50_ms": took[len(took) // 2],
                        "p99_ms": took[len(took) * 99 // 100],
                    }
                    windows.append({"step": number} | cost | count_live())
                    took.clear()
                    window_cpu = time.process_time()
            while pending:
                await finish_step()
            wall, cpu = time.perf_counter() - started, time.process_time() - cpu
    first, last = windows[min(1, len(windows) - 1)], windows[-1]
    edges = {
        f"{name}_{key}": window[key]
        for name, window in (("first", first), ("last", last))
        for key in ("cpu_ms", "p50_ms", "p99_ms")
    }
    return edges | {
        "per_s": settings["count"] / wall,
        "cpu_ms": cpu / settings["count"] * 1e3,
        "grown_mb": last["rss_mb"] - first["rss_mb"],
        "tasks": last["tasks"] - first["tasks"],
        "objects": last["objects"] - first["objects"],
        "windows": windows,
    }


STEPS = {"count": 10_000, "window": 500, "datums": 8, "tokens": 256}
CASE = Case(
    name="long_run",
    title="10,000 steps of 8 datums of 256 tokens, with samples beside them; growth is from step 1,000 on",
    clients={"fwasync": Client(with_fwasync, "fwasync")},
    cells=[Cell(wire, STEPS | {"wire": wire}, is_short=wire == "json") for wire in ("json", "protobuf")],
    columns=(
        RATE,
        Column("first_cpu_ms", "CPU ms, first", 2),
        Column("last_cpu_ms", "last", 2),
        Column("first_p50_ms", "p50 ms, first", 2),
        Column("last_p50_ms", "last", 2),
        Column("first_p99_ms", "p99 ms, first", 2),
        Column("last_p99_ms", "last", 2),
        Column("grown_mb", "growth MB", 1),
        Column("tasks", "tasks", 0),
        Column("objects", "objects", 0),
    ),
    tiny={"count": 40, "window": 20, "datums": 1, "tokens": 4},
    rounds=1,
)

if __name__ == "__main__":
    harness.main(CASE)
