"""Training operations on one tiny datum: what a client costs where it moves next to nothing.

python benchmarks/training.py [--short] [--cell NAME] [--rounds 5]

One operation at a time and awaited, or pipelined: forward_backward and optim_step are sent one after the other, and the
results of a step are awaited when eight later ones have been sent.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import harness
import trainers
from harness import CPU, MEMORY, RATE, STALL, STALL_CPU, Case, Cell, Column, Measures, Settings
from trainers import Trainer

WINDOW = 8


def squares(_data: Any, logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
    """The least that a loss in torch can be."""
    loss = sum((each * each).sum() for each in logprobs)
    return loss, {"squares:sum": float(loss.detach())}


async def run(trainer: Trainer, url: str, settings: Settings) -> Measures:
    data, custom_data = trainers.policy_data(trainer, 1, settings["tokens"]), None
    took: list[float] = []
    steps: deque[tuple[Awaitable[Any], Awaitable[Any]]] = deque()

    async def forward_backward() -> None:
        assert len(await (await trainer.forward_backward(data))) == 1

    async def optim_step() -> None:
        await (await trainer.optim_step())

    async def custom() -> None:
        nonlocal custom_data
        custom_data = custom_data or trainers.targets_only(trainer, 1, settings["tokens"])
        await (await trainer.forward_backward_custom(custom_data, squares))

    async def pipelined() -> None:
        steps.append((await trainer.forward_backward(data), await trainer.optim_step()))
        if len(steps) > WINDOW:
            for result in steps.popleft():
                await result

    verbs: dict[str, Callable[[], Awaitable[None]]] = {
        "forward_backward": forward_backward,
        "optim_step": optim_step,
        "forward_backward_custom": custom,
        "pipelined": pipelined,
    }
    verb = verbs[settings["verb"]]

    async def timed() -> None:
        began = time.perf_counter()
        await verb()
        took.append(time.perf_counter() - began)

    measures = await harness.measure(timed, url, 1, settings["count"])
    for step in steps:
        for result in step:
            await result
    return measures | {"p50_ms": statistics.median(took[-settings["count"] :]) * 1e3}


TINY = {"tokens": 4}
CASE = Case(
    name="training",
    title="Training operations, one datum of 4 tokens",
    clients=trainers.clients(run, share=0.25),
    cells=[
        Cell("forward_backward", {"verb": "forward_backward", "count": 1000} | TINY, is_short=True),
        Cell("optim_step", {"verb": "optim_step", "count": 1000} | TINY),
        Cell("forward_backward_custom", {"verb": "forward_backward_custom", "count": 400} | TINY),
        Cell("forward_backward and optim_step, pipelined", {"verb": "pipelined", "count": 2000} | TINY, is_short=True),
    ],
    columns=(
        Column("p50_ms", "p50 ms", 2),
        RATE,
        Column("per_s", "rate", against=trainers.TINKER),
        CPU,
        Column("cpu_ms", "CPU", against=trainers.FLOOR_JSON),
        STALL,
        STALL_CPU,
        MEMORY,
    ),
    tiny={"count": 8},
)

if __name__ == "__main__":
    harness.main(CASE)
