"""GRPO: what a step submits, what it measures, and that arrival order does not matter."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Self

import anyio
import numpy as np
import pytest

from fwasync.checkpoints.ledger import CheckpointLedger
from fwasync.data.chat import ChatTokenizer
from fwasync.data.jsonl import Message
from fwasync.recipes import rl
from fwasync.rollout.groups import Prompt
from fwasync.tracking.run import open_run
from fwasync.types import SampledSequence, SampleResponse
from unit.recipes.trainer import Service, Trainer


class Sampler:
    """Answers requests in an order of its own, once all have come: tokens are a function of the seed."""

    def __init__(self, path: str, expected: int, order: random.Random) -> None:
        self.path = path
        self.expected = expected
        self.order = order
        self.waiting: list[anyio.Event] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        return None

    async def sample(self, prompt: Any, num_samples: int, params: Any) -> SampleResponse:
        arrived = anyio.Event()
        self.waiting.append(arrived)
        if len(self.waiting) == self.expected:
            self.order.shuffle(self.waiting)
            for event in self.waiting:
                event.set()
        await arrived.wait()
        for _ in range(self.order.randrange(5)):
            await anyio.lowlevel.checkpoint()
        rng = np.random.default_rng(params.seed)
        return SampleResponse(
            sequences=[
                SampledSequence(
                    stop_reason="length",
                    sequence_id="s",
                    tokens_np=rng.integers(48, 58, 3).astype(np.int32),
                    logprobs_np=np.full(3, -1.25, np.float32),
                )
                for _ in range(num_samples)
            ]
        )


def prompts(rng: random.Random, count: int) -> list[Prompt]:
    return [Prompt((Message("user", str(rng.random())),)) for _ in range(count)]


async def run_grpo(directory: Path, order: int, **settings: Any) -> tuple[Trainer, list[Any]]:
    trainer: Any = Trainer(directory / "tokenizer")
    arrivals = random.Random(order)
    groups = settings.setdefault("groups_per_step", 3)
    service: Any = Service(make_sampler=lambda path: Sampler(path, groups, arrivals))
    config = rl.Config(log_path=directory / "run", group_size=4, **settings)
    async with open_run(config.log_path, config=config.model_dump()) as run:
        await rl.train(
            config,
            service=service,
            client=trainer,
            tokenizer=ChatTokenizer.load(trainer.directory),
            prompts=prompts,
            reward=lambda prompt, text: float(text < "5"),
            run=run,
        )
    return trainer, run.records


def wire(trainer: Trainer) -> list[Any]:
    """Everything that was sent, to be compared."""
    return [
        (loss_fn, datum.model_input.to_ints(), {name: t.tolist() for name, t in datum.loss_fn_inputs.items()})
        for loss_fn, datums in trainer.batches
        for datum in datums
    ]


async def test_results_do_not_depend_on_the_order_of_arrival(tmp_path: Path) -> None:
    runs = [await run_grpo(tmp_path / str(order), order, steps=2) for order in range(3)]
    first, *others = [wire(trainer) for trainer, _ in runs]
    assert len(first) == 24
    assert all(other == first for other in others)
    other_seed, _ = await run_grpo(tmp_path / "seed", 0, steps=2, seed=1)
    assert wire(other_seed) != first


async def test_a_step_submits_everything_at_once_and_measures(tmp_path: Path) -> None:
    trainer, records = await run_grpo(tmp_path, 0, steps=2, save_every=1)
    assert [entry for entry in trainer.log if "await" not in entry] == [
        "snapshot grpo-sampler-000000",
        "forward_backward 1",
        "optim_step 1",
        "save_state grpo-000001",
        "snapshot grpo-sampler-000001",
        "forward_backward 2",
        "optim_step 2",
        "save_state grpo-000002",
        "snapshot grpo-000002",
    ]
    begins = trainer.log.index("forward_backward 1")
    assert trainer.log[begins + 4] == "await forward_backward 1"
    assert [loss_fn for loss_fn, _ in trainer.batches] == ["importance_sampling"] * 2
    metrics = records[0].metrics
    assert metrics["rollout/staleness"] == 0
    assert metrics["rollout/in_flight"] == 3
    assert metrics["rollout/response_len/mean"] == 3
    assert metrics["rollout/truncated_ratio"] == 1
    assert 0 < metrics["rollout/reward"] < 1
    assert metrics["rollout/accuracy"] == metrics["rollout/reward"]
    assert metrics["train/kl"] == pytest.approx(-0.25)
    assert metrics["train/grad_norm"] == 2.5
    assert [record.step for record in records] == [1, 2]
    first, last = await CheckpointLedger(tmp_path / "run").entries()
    assert (first.state_path, first.sampler_path) == ("state:grpo-000001", None)
    assert (last.step, last.data_consumed, last.sampler_path) == (2, 6, "snapshot:grpo-000002")
