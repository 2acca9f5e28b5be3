"""RL that samples and trains at the same time beside RL that alternates, where sampling takes as long as training.

python benchmarks/async_rl.py [--seeds 3] [--steps 30]

Both learn for real, to write lower-case letters, on one local service. In a real run neither the trainer nor the
sampler is on this machine, so both are slowed at no cost of CPU: each optimizer step is held up for two seconds, and
each request for samples until sampling a step takes as long as all the rest of it, as measured in a first run. Then,
seed after seed, the two recipes take the same number of steps on the same rows, in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio
import harness

from fwasync.data.prompts import PromptRow
from fwasync.recipes import async_rl, rl
from fwasync.recipes.trainers import Where
from fwasync.testing import AsyncScriptedService, Delay, Fault, FaultPlan, local_service

GROUPS, SIZE, TOKENS = 8, 8, 8
TRAINING_S = 2.0
EDGE = 5

Records = list[dict[str, float]]


def reward(text: str, _row: PromptRow) -> float:
    return sum("a" <= letter <= "z" for letter in text) / TOKENS


def settings(directory: Path, name: str, steps: int, seed: int) -> dict[str, Any]:
    return {
        "log_path": directory / name,
        "dataset": str(directory / "prompts.jsonl"),
        "max_rows": None,
        "base_model": "fwasync/qwen3-tiny",
        "learning_rate": 1e-3,
        "adam": "fast",
        "prompt_groups_per_step": GROUPS,
        "completions_per_prompt": SIZE,
        "max_completion_tokens": TOKENS,
        "kl_beta": 0,
        "max_steps": steps,
        "seed": seed,
        "save_final_checkpoint": False,
    }


def records(log_path: Path) -> Records:
    return [json.loads(line) for line in (log_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


async def alternate(local: AsyncScriptedService, directory: Path, steps: int, seed: int) -> Records:
    config = rl.Config(**settings(directory, f"alternating-{steps}-{seed}", steps, seed))
    where = Where(local.base_url, local.api_key)
    await rl.train(config, reward=reward, where=where, keep=lambda _: True)
    return records(config.log_path)


async def overlap(local: AsyncScriptedService, directory: Path, steps: int, seed: int) -> Records:
    config = async_rl.Config(
        **settings(directory, f"async-{seed}", steps, seed), max_head_offpolicy_versions=1, pipeline_chunks_per_step=1
    )
    where = Where(local.base_url, local.api_key)
    await async_rl.train(config, reward=reward, where=where, keep=lambda _: True)
    return records(config.log_path)


def samples_per_s(found: Records) -> float:
    """From the end of the first step on, so that nothing counts of what it takes to start."""
    samples = sum(record["rollout/samples_completed"] for record in found[1:])
    return samples / (found[-1]["time_s"] - found[0]["time_s"])


def edges(found: Records) -> tuple[float, float, float]:
    """Rewards: of the first steps, the last steps, and all."""
    values = [record["rollout/reward"] for record in found]
    return statistics.mean(values[:EDGE]), statistics.mean(values[-EDGE:]), statistics.mean(values)


async def measure(seeds: int, steps: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        rows = [
            {"messages": [{"role": "user", "content": f"Write letters, number {n}"}]} for n in range(GROUPS * steps)
        ]
        (directory / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        async with local_service() as local:
            slow_trainer = Fault(Delay(TRAINING_S), "optim_step")
            await local.set_faults(FaultPlan([slow_trainer]))
            first = (await alternate(local, directory, 10, 1000))[2:]
            sampling = statistics.median(record["perf/sample_wait_time"] for record in first)
            training = statistics.median(record["perf/step_wall_time"] for record in first) - sampling
            delay = max(training - sampling, 0.0)
            print(f"a step: {training:.2f} s of training, {sampling:.2f} s of sampling, slowed by {delay:.2f} s")
            await local.set_faults(FaultPlan([slow_trainer, Fault(Delay(delay), "asample")]))
            print("seed   samples/s: alternating    async   ratio   reward of the first 5, last 5, all steps: of each")
            ratios: list[float] = []
            lasts: list[tuple[float, float]] = []
            for seed in range(seeds):
                one, two = (
                    await alternate(local, directory, steps, seed),
                    await overlap(local, directory, steps, seed),
                )
                assert len(one) == len(two) == steps
                assert max(record["version/sample_staleness_max"] for record in two) <= 1
                ratios.append(samples_per_s(two) / samples_per_s(one))
                lasts.append((edges(one)[2], edges(two)[2]))
                print(
                    f"{seed:4}   {samples_per_s(one):22.0f} {samples_per_s(two):8.0f} {ratios[-1]:7.2f}   "
                    f"{told(edges(one))}   {told(edges(two))}"
                )
                print(f"       {told_times(one, two)}")
    print(f"ratio: min {min(ratios):.2f}, median {statistics.median(ratios):.2f}, max {max(ratios):.2f}")
    for title, values in zip(("alternating", "async"), zip(*lasts, strict=True), strict=True):
        spread = statistics.stdev(values) if seeds > 1 else 0.0
        print(f"mean reward of all steps, {title}: {statistics.mean(values):.3f} ± {spread:.3f} over seeds")


def told(values: Sequence[float]) -> str:
    return " ".join(f"{value:.3f}" for value in values)


def told_times(one: Records, two: Records) -> str:
    waits = [statistics.mean(record["perf/wait_time_ratio"] for record in found[1:]) for found in (one, two)]
    stale = statistics.mean(record["version/sample_staleness_avg"] for record in two)
    return f"waiting for samples: {waits[0]:.0%}, {waits[1]:.0%}; staleness of async: {stale:.2f} on average, 1 at most"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    print(harness.machine().line())
    anyio.run(measure, options.seeds, options.steps)
    print(f"load {os.getloadavg()[0]:.1f} at the end")


if __name__ == "__main__":
    main()
