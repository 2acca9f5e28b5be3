"""How long the caller's event loop stands still while a large batch is sent and its answer is read.

A task on the same loop wakes every millisecond; its worst delay is the stall. Each client runs in a process of its own,
in turn, against one neutral server.

    python benchmarks/loop_stall.py [--rounds 5] [--datums 128] [--tokens 4096]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
CLIENTS = ("fwasync json", "fwasync protobuf", "tinker")
WARM_UP = 1


def datums(count: int, tokens: int) -> list[Any]:
    from tinker.types import Datum, ModelInput

    random = np.random.default_rng(0)

    def floats() -> np.ndarray:
        return random.normal(size=tokens).astype(np.float32)

    return [
        Datum(
            model_input=ModelInput.from_ints(random.integers(0, 150_000, tokens).tolist()),
            loss_fn_inputs={
                "target_tokens": random.integers(0, 150_000, tokens),
                "logprobs": floats(),
                "advantages": floats(),
            },
        )
        for _ in range(count)
    ]


async def measured(call: Callable[[], Awaitable[Any]]) -> dict[str, float]:
    """Stall in ms and CPU in s of one call."""
    late: list[float] = []

    async def tick() -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(0.001)
            late.append(time.perf_counter() - before - 0.001)

    ticker = asyncio.ensure_future(tick())
    await asyncio.sleep(0.05)
    late.clear()
    cpu = time.process_time()
    await call()
    cpu = time.process_time() - cpu
    await asyncio.sleep(0.005)
    ticker.cancel()
    return {"stall_ms": max(late) * 1e3, "cpu_s": cpu}


async def with_fwasync(url: str, wire: Any, data: list[Any], rounds: int) -> list[dict[str, float]]:
    from fwasync import AsyncServiceClient

    async with AsyncServiceClient(url, "tml-key", wire=wire) as service:
        async with service.create_training_client("base") as client:

            async def call() -> None:
                await client.forward_backward(data, "importance_sampling")

            return [await measured(call) for _ in range(rounds)]


async def with_tinker(url: str, data: list[Any], rounds: int) -> list[dict[str, float]]:
    import tinker

    service = tinker.ServiceClient(base_url=url, api_key="tml-key")
    client = await service.create_lora_training_client_async("base", rank=32)

    async def call() -> None:
        await (await client.forward_backward_async(data, "importance_sampling"))

    return [await measured(call) for _ in range(rounds)]


def run_one(client: str, url: str, arguments: argparse.Namespace) -> None:
    data = datums(arguments.datums, arguments.tokens)
    rounds = arguments.rounds + WARM_UP
    name, _, wire = client.partition(" ")
    main = with_tinker(url, data, rounds) if name == "tinker" else with_fwasync(url, wire, data, rounds)
    print(json.dumps(asyncio.run(main)[WARM_UP:]), flush=True)
    os._exit(0)  # tinker leaves a thread behind


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--datums", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--client")
    parser.add_argument("--url")
    arguments = parser.parse_args()
    if arguments.client:
        run_one(arguments.client, arguments.url, arguments)
        return
    size = [str(arguments.datums), str(arguments.tokens)]
    server = subprocess.Popen(
        [sys.executable, HERE / "neutral_server.py", *size], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    url = server.stdout.readline().strip()
    found: dict[str, list[dict[str, float]]] = {client: [] for client in CLIENTS}
    environment = {**os.environ, "TINKER_TELEMETRY": "0", "OPENBLAS_NUM_THREADS": "1"}
    for _ in range(2):  # in turn, so that a busy minute of the machine hits all
        for client in CLIENTS:
            command = [sys.executable, __file__, "--client", client, "--url", url, "--rounds", str(arguments.rounds)]
            command += ["--datums", size[0], "--tokens", size[1]]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
            if done.returncode:
                sys.exit(f"{client}: {done.stderr}")
            found[client] += json.loads(done.stdout.splitlines()[-1])
    server.communicate()
    print(f"{' x '.join(size)} tokens, {date.today()}, Python {platform.python_version()}, {os.cpu_count()} cores")
    print(f"{'client':<18} {'stall ms: min':>13} {'median':>7} {'max':>7} {'CPU s':>7} {'stall ratio':>12}")
    reference = statistics.median(r["stall_ms"] for r in found["tinker"])
    for client, rows in found.items():
        stalls = [r["stall_ms"] for r in rows]
        middle = statistics.median(stalls)
        cpu = statistics.median(r["cpu_s"] for r in rows)
        print(
            f"{client:<18} {min(stalls):13.1f} {middle:7.1f} {max(stalls):7.1f} {cpu:7.3f} {middle / reference:12.2f}"
        )


if __name__ == "__main__":
    main()
