"""A loss of one's own in torch: forward_backward_custom of 64 datums of 2,048 tokens, with a loss as GRPO has it.

python benchmarks/custom_loss.py [--short] [--rounds 5]

The same function for all: clipped ratios to the sampler's logprobs, and a KL term to those of a reference. "the loss
alone" is what it costs without any client.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import harness
import numpy as np
import trainers
from harness import MEMORY, STALL, STALL_CPU, Case, Cell, Client, Column, Measures, Settings
from trainers import Trainer

ALONE = "the loss alone"


def grpo(datums: int, tokens: int) -> Callable[[Any, list[Any]], tuple[Any, dict[str, float]]]:
    """The loss of so many sequences, whose other tensors are here already."""
    import torch

    random = np.random.default_rng(1)

    def tensors() -> list[Any]:
        return [torch.from_numpy(random.normal(-2, 1, tokens).astype(np.float32)) for _ in range(datums)]

    sampler, reference, advantages = tensors(), tensors(), random.normal(size=datums).tolist()

    def loss_fn(_data: Any, logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
        loss, kl_sum = torch.zeros(()), 0.0
        for policy, old, ref, advantage in zip(logprobs, sampler, reference, advantages, strict=True):
            ratio = torch.exp(policy - old)
            surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            kl = torch.exp(ref - policy) - (ref - policy) - 1
            loss = loss - (surrogate - 0.01 * kl).sum()
            kl_sum += float(kl.detach().sum())
        return loss, {"kl:sum": kl_sum}

    return loss_fn


async def run(trainer: Trainer, url: str, settings: Settings) -> Measures:
    datums, tokens = settings["datums"], settings["tokens"]
    data, loss_fn = trainers.targets_only(trainer, datums, tokens), grpo(datums, tokens)

    async def one() -> None:
        await (await trainer.forward_backward_custom(data, loss_fn))

    return await harness.measure(one, url, 1, settings["count"], limit_s=60)


async def alone(url: str, settings: Settings) -> Measures:
    import torch

    datums, tokens = settings["datums"], settings["tokens"]
    loss_fn = grpo(datums, tokens)
    rows = np.random.default_rng(0).normal(-2, 1, (datums, tokens)).astype(np.float32)

    async def one() -> None:
        leaves = [torch.from_numpy(row).requires_grad_() for row in rows]
        loss, _ = await asyncio.to_thread(loss_fn, None, leaves)
        await asyncio.to_thread(loss.backward)

    return await harness.measure(one, url, 1, settings["count"], limit_s=60)


CASE = Case(
    name="custom_loss",
    title="forward_backward_custom with a loss as GRPO has it",
    clients=trainers.clients(run, share=0.5) | {ALONE: Client(alone)},
    cells=[Cell("64 datums of 2,048 tokens", {"datums": 64, "tokens": 2048, "count": 20}, is_short=True)],
    columns=(
        Column("cpu_ms", "CPU ms each"),
        Column("cpu_ms", "CPU", against=trainers.FIRETITAN),
        Column("cpu_ms", "CPU", against=trainers.FLOOR_JSON),
        Column("cpu_ms", "CPU", against=trainers.FLOOR_PROTOBUF),
        STALL,
        STALL_CPU,
        MEMORY,
    ),
    tiny={"datums": 2, "tokens": 16, "count": 2},
)

if __name__ == "__main__":
    harness.main(CASE)
