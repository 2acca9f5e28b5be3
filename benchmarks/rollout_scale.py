"""What the rollout scheduler costs: memory and event-loop lag with 256, 1,024 and 4,096 rollouts in flight.

python benchmarks/rollout_scale.py [--batches 2]

Each size runs in a process of its own, on one event loop, against a sampler that answers after 4 to 8 s with 64
tokens. A rollout is a conversation of two turns. Memory is the growth of the resident set from before the scheduler is
entered to its peak; lag is how late a task is that wakes every 5 ms.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import random
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import anyio
import harness
import numpy as np

from fwasync import AsyncRolloutScheduler, Rollout, RolloutContext, RolloutSettings, types

SIZES = (256, 1024, 4096)
GROUP, TOKENS, PROMPT = 8, 64, 128
TICK_S = 0.005


class StubSampler:
    """Answers after a while, with tokens that cost nothing."""

    def __init__(self) -> None:
        self.in_flight = 0
        self.most = 0
        self.tokens = np.arange(TOKENS, dtype=np.int32)
        self.logprobs = np.full(TOKENS, -0.5, dtype=np.float32)

    async def sample(self, *_: Any) -> types.SampleResponse:
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        await anyio.sleep(random.uniform(4, 8))
        self.in_flight -= 1
        sequence = types.SampledSequence(
            stop_reason="stop", sequence_id="s", tokens_np=self.tokens, logprobs_np=self.logprobs
        )
        return types.SampleResponse(sequences=[sequence])


async def rollout(_row: int, ctx: RolloutContext) -> Rollout:
    session = ctx.session()
    session.append(range(PROMPT))
    await session.sample(max_tokens=TOKENS)
    session.append(range(16))
    await session.sample(max_tokens=TOKENS)
    return session.rollout(float(ctx.rollout_index))


async def ticking(lags: list[float]) -> None:
    while True:
        due = time.perf_counter() + TICK_S
        await anyio.sleep(TICK_S)
        lags.append((time.perf_counter() - due) * 1e3)


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize() / 2**20


async def measure(in_flight: int, batches: int) -> dict[str, float]:
    settings = RolloutSettings(groups_per_batch=in_flight // GROUP, group_size=GROUP, max_staleness=0)
    sampler, lags = StubSampler(), list[float]()
    await sampler.sample()
    types.ModelInput.from_ints([1])
    types.SamplingParams(max_tokens=1)
    sampler.most = 0
    gc.collect()
    gc.freeze()  # what is imported, torch perhaps, is not looked at by the garbage collector while we measure
    before, peak = resident_mb(), 0.0
    started, cpu = time.perf_counter(), time.process_time()
    rows = batches * in_flight // GROUP
    async with AsyncRolloutScheduler(range(rows), rollout, settings, sampler=sampler) as scheduler:
        async with anyio.create_task_group() as group:
            group.start_soon(ticking, lags)
            async for batch in scheduler:
                groups = await batch.collect()
                assert len(groups) == in_flight // GROUP
                peak = max(peak, resident_mb())
                await scheduler.publish(batch)
            group.cancel_scope.cancel()
    lags.sort()
    return {
        "in_flight": sampler.most,
        "mb": peak - before,
        "lag_p50": statistics.median(lags),
        "lag_p99": lags[int(len(lags) * 0.99)],
        "lag_max": lags[-1],
        "rollouts_per_s": rows * GROUP / (time.perf_counter() - started),
        "cpu_ms_per_rollout": (time.process_time() - cpu) * 1e3 / (rows * GROUP),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--one", type=int)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(anyio.run(measure, options.one, options.batches)))
        return
    where = harness.machine()
    print(where.line())
    print("in flight   memory MB  KB a rollout   lag ms: p50     p99     max   CPU ms a rollout   rollouts/s")
    rows: list[dict[str, float]] = []
    for size in SIZES:
        command = [sys.executable, __file__, "--one", str(size), "--batches", str(options.batches)]
        row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        rows.append(row)
        print(
            f"{row['in_flight']:9,d}  {row['mb']:10.1f}  {row['mb'] * 1024 / size:12.1f}  {row['lag_p50']:13.1f}  "
            f"{row['lag_p99']:6.1f}  {row['lag_max']:6.1f}  {row['cpu_ms_per_rollout']:17.2f}  "
            f"{row['rollouts_per_s']:11,.0f}"
        )
    harness.RESULTS.mkdir(exist_ok=True, parents=True)
    stored = {"name": "rollout_scale", "machine": dataclasses.asdict(where), "rows": rows}
    (harness.RESULTS / "rollout_scale.json").write_text(json.dumps(stored, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
