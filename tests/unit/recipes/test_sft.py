"""Supervised fine-tuning: configuration, order of submission, metrics, checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pydantic
import pytest

from fwasync.checkpoints.ledger import CheckpointLedger
from fwasync.errors import UsageError
from fwasync.recipes import sft
from fwasync.recipes.optimizer import grad_norm, warmed_up
from fwasync.tracking.run import open_run
from fwasync.types import OptimStepResponse
from unit.recipes.trainer import Service, Trainer


def test_configuration_is_strict_and_frozen(tmp_path: Path) -> None:
    config = sft.Config(data=tmp_path, log_path=tmp_path)
    with pytest.raises(pydantic.ValidationError):
        config.seed = 3  # pyright: ignore[reportAttributeAccessIssue]
    for wrong in ({"colour": 1}, {"steps": 0}, {"learning_rate": float("nan")}, {"lora_rank": -1}, {"batch_size": 0}):
        with pytest.raises(pydantic.ValidationError):
            sft.Config(data=tmp_path, log_path=tmp_path, **wrong)  # pyright: ignore[reportArgumentType]
    with pytest.raises(pydantic.ValidationError, match="either steps or epochs"):
        sft.Config(data=tmp_path, log_path=tmp_path, steps=3, epochs=3)


@pytest.mark.parametrize(
    ("length", "rows", "consumed", "steps"),
    [({}, 10, 10, 3), ({"epochs": 2}, 10, 20, 5), ({"steps": 7}, 10, 28, 7), ({"epochs": 1}, 3, 3, 1)],
)
def test_length_of_a_run(length: dict[str, int], rows: int, consumed: int, steps: int, tmp_path: Path) -> None:
    config = sft.Config(data=tmp_path, log_path=tmp_path, batch_size=4, **length)  # pyright: ignore[reportArgumentType]
    assert config.consumed_rows(rows) == consumed
    assert config.total_steps(rows) == steps


def test_warm_up_and_the_names_of_the_gradient_norm() -> None:
    assert [warmed_up(1.0, step, 4) for step in range(1, 7)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert warmed_up(1.0, 1, 0) == 1
    assert grad_norm(OptimStepResponse(metrics={"unclipped_grad_l2:mean": 3.0})) == {"train/grad_norm": 3.0}
    assert grad_norm(OptimStepResponse(metrics=None)) == {}


class Fixture:
    """A run with a trainer that remembers."""

    def __init__(self, directory: Path, answers: list[str]) -> None:
        self.data = directory / "data.jsonl"
        rows = [
            {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]}
            for answer in answers
        ]
        self.data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.directory = directory
        self.trainer = Trainer(directory / "tokenizer")

    async def train(self, *, context: int | None = 64, **settings: Any) -> Any:
        config = sft.Config(data=self.data, log_path=self.directory / "run", **settings)
        async with open_run(config.log_path, config=config.model_dump()) as run:
            client: Any = self.trainer
            service: Any = Service(context=context)
            self.result = await sft.train(config, service=service, run=run, client=client)
        return run


async def test_the_next_step_is_submitted_before_this_one_is_awaited(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path, ["a", "b", "c", "d", "e", "f"])
    await fixture.train(batch_size=2)
    log = [entry for entry in fixture.trainer.log if "save" not in entry and "snapshot" not in entry]
    assert log == [
        "forward_backward 1",
        "optim_step 1",
        "forward_backward 2",
        "optim_step 2",
        "await forward_backward 1",
        "await optim_step 1",
        "forward_backward 3",
        "optim_step 3",
        "await forward_backward 2",
        "await optim_step 2",
        "await forward_backward 3",
        "await optim_step 3",
    ]


async def test_weights_are_a_mean_over_trained_tokens_and_metrics_say_so(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path, ["a", "bbbb"])
    run = await fixture.train(batch_size=2, warmup_steps=2, learning_rate=0.5, steps=1)
    ((loss_fn, datums),) = fixture.trainer.batches
    assert loss_fn == "cross_entropy"
    weights = [datum.loss_fn_inputs["weights"].to_numpy() for datum in datums]
    assert sum(array.sum() for array in weights) == pytest.approx(1)
    assert {round(float(value), 6) for array in weights for value in array} == {0.0, round(1 / 7, 6)}
    (record,) = run.records
    assert record.phase == "sft"
    assert record.metrics["train/loss"] == pytest.approx(1.0)
    assert record.metrics["train/tokens"] == 7
    assert record.metrics["train/grad_norm"] == 2.5
    assert record.metrics["train/learning_rate"] == 0.25
    assert record.metrics["perf/tokens_per_s"] > 0
    (adam,) = fixture.trainer.adams
    assert (adam.learning_rate, adam.beta1, adam.beta2, adam.grad_clip_norm) == (0.25, 0.9, 0.95, 1.0)


async def test_checkpoints_keep_their_place_and_are_listed(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path, ["a", "b", "c", "d", "e"])
    await fixture.train(batch_size=2, save_every=2)
    submitted = [entry for entry in fixture.trainer.log if not entry.startswith("await")]
    assert submitted[4:] == [
        "save_state sft-000002",
        "forward_backward 3",
        "optim_step 3",
        "save_state sft-000003",
        "snapshot sft-000003",
    ]
    first, last = await CheckpointLedger(tmp_path / "run").entries()
    assert (first.step, first.data_consumed, first.state_path, first.sampler_path) == (2, 4, "state:sft-000002", None)
    assert (last.step, last.data_consumed, last.sampler_path) == (3, 5, "snapshot:sft-000003")
    assert fixture.result.checkpoint == last


async def test_rows_that_are_too_long_are_told(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path, ["a", "b" * 40, "c"])
    await fixture.train(context=20)
    assert fixture.result.rows.too_long == (2,)
    assert sum(len(datums) for _, datums in fixture.trainer.batches) == 2


async def test_a_context_length_that_nobody_knows(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path, ["a"])
    with pytest.raises(UsageError, match="does not tell the context length of fake; set max_seq_len"):
        await fixture.train(context=None)
    assert not fixture.trainer.log
