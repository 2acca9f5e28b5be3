"""Supervised fine-tuning: configuration, order of submission, metrics, checkpoints, and where it goes on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import pytest

from fwasync.checkpoints.ledger import CheckpointLedger
from fwasync.data.rendering import TrainOnWhat
from fwasync.errors import DatasetError, OperationFailedError, UsageError
from fwasync.recipes import sft
from fwasync.recipes.stopping import StopRequest
from fwasync.recipes.trainers import Trainers, Where
from unit.recipes.trainer import Future, Service, Trainer


def config(**settings: Any) -> sft.Config:
    return sft.Config.model_validate({"log_path": "run", "dataset": "d", **settings})


def test_configuration_is_strict_and_frozen() -> None:
    with pytest.raises(pydantic.ValidationError):
        config().seed = 3  # pyright: ignore[reportAttributeAccessIssue]
    for wrong in ({"max_steps": 0}, {"learning_rate": float("nan")}, {"lora_rank": -1}, {"batch_size": 0}):
        with pytest.raises(pydantic.ValidationError):
            config(**wrong)
    with pytest.raises(pydantic.ValidationError, match="no field 'learnin_rate'; did you mean 'learning_rate'"):
        config(learnin_rate=1)
    with pytest.raises(pydantic.ValidationError, match="no preset 'slow'; it must be one of default, fast"):
        config(adam="slow")
    with pytest.raises(pydantic.ValidationError, match="lower-case letters"):
        config(output_model_id="My Model")
    with pytest.raises(pydantic.ValidationError, match="log_path"):
        sft.Config.model_validate({})


def test_everything_that_is_wrong_is_told_before_the_start() -> None:
    shape = {"training_shape_id": "accounts/fireworks/trainingShapes/s"}
    with pytest.raises(UsageError) as caught:
        config(base_model="qwen", dataset="", infra=shape, output_model_id="m", save_final_checkpoint=False).check()
    assert [line.split(" ")[0] for line in str(caught.value).splitlines()] == [
        "dataset",
        "base_model",
        "output_model_id",
        "tokenizer_model",
    ]
    with pytest.raises(UsageError, match="only a trainer job's snapshot becomes a model"):
        config(output_model_id="m").check()
    with pytest.raises(UsageError, match="give either evaluation_dataset or eval_auto_carveout"):
        config(evaluation_dataset="e", eval_auto_carveout=True).check()
    with pytest.raises(pydantic.ValidationError, match="train_on_what is 'y'; it must be one of last_assistant"):
        config(train_on_what="y")
    assert config(train_on_what="ALL_TOKENS").train_on_what is TrainOnWhat.ALL_TOKENS
    config().check()


class Fixture:
    """A run with a trainer that remembers."""

    def __init__(self, directory: Path, answers: list[str]) -> None:
        self.directory = directory
        self.data = self.write("data.jsonl", answers)
        self.trainer = Trainer(directory / "tokenizer")

    def write(self, name: str, answers: list[str]) -> Path:
        rows = [
            {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]}
            for answer in answers
        ]
        path = self.directory / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    async def train(
        self, *, context: int | None = 64, job_id: str | None = None, calls: dict[str, Any] | None = None, **more: Any
    ) -> sft.Result:
        settings = {"log_path": self.directory / "run", "dataset": str(self.data), "epochs": 1, "pipeline_depth": 2}
        policy: Any = self.trainer
        service: Any = Service(context=context)
        where = Where(trainers=Trainers(service, policy, job_id=job_id))
        return await sft.train(sft.Config(**{**settings, **more}), where=where, **calls or {})

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.directory / "run" / "metrics.jsonl").read_text().splitlines()]

    @property
    def submitted(self) -> list[str]:
        return [entry for entry in self.trainer.log if not entry.startswith("await")]


async def test_the_next_step_is_submitted_before_this_one_is_awaited(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path, ["a", "b", "c", "d", "e", "f"])
    await fixture.train(batch_size=2, save_final_checkpoint=False)
    assert fixture.trainer.log == [
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
    assert not (tmp_path / "run" / "checkpoints.jsonl").exists()


async def test_weights_are_a_mean_over_trained_tokens_and_metrics_say_so(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path, ["a", "bbbb"])
    schedule, told = {"warmup_steps": 2}, []
    await fixture.train(
        batch_size=2,
        lr_scheduler=schedule,
        learning_rate=0.5,
        grad_clip_norm=1.0,
        calls={"on_step": lambda step, metrics: told.append((step, metrics))},
    )
    ((loss_fn, datums),) = fixture.trainer.batches
    assert loss_fn == "cross_entropy"
    weights = [datum.loss_fn_inputs["weights"].to_numpy() for datum in datums]
    assert sum(array.sum() for array in weights) == pytest.approx(1)
    assert {round(float(value), 6) for array in weights for value in array} == {0.0, round(1 / 7, 6)}
    (record,) = fixture.records
    assert (record["phase"], record["step"]) == ("sft", 1)
    assert record["train/ce_loss"] == pytest.approx(1.0)
    assert record["train/ppl"] == pytest.approx(math.e)
    assert record["train/active_tokens"] == 7
    assert record["train/step_tokens"] == sum(len(array) for array in weights)
    assert record["train/grad_norm"] == 2.5
    assert record["train/loss:sum"] == 3.5
    assert record["train/lr"] == 0.25
    assert fixture.trainer.normalizations == [None]
    assert record["train/tokens_per_sec"] > 0
    assert [(step, metrics["train/lr"]) for step, metrics in told] == [(1, 0.25)]
    (adam,) = fixture.trainer.adams
    assert (adam.learning_rate, adam.beta1, adam.beta2, adam.grad_clip_norm) == (0.25, 0.9, 0.999, 1.0)


async def test_checkpoints_keep_their_place_and_are_listed(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path, ["a", "b", "c", "d", "e"])
    result = await fixture.train(batch_size=2, dcp_save_interval=2)
    assert fixture.submitted[4:] == [
        "save_state step-2",
        "forward_backward 3",
        "optim_step 3",
        "save_state step-3",
        "snapshot step-3",
    ]
    first, last = await CheckpointLedger(tmp_path / "run").entries()
    assert (first.step, first.data_consumed, first.source_job_id) == (2, 4, "model")
    assert (first.state_path, first.sampler_path) == ("state:step-2", None)
    assert (last.step, last.data_consumed, last.sampler_path) == (3, 5, "snapshot:step-3")
    assert (result.steps, result.total_steps, result.checkpoint) == (3, 3, last)


async def test_checkpoints_of_a_trainer_job_can_be_found_from_others(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path, ["a", "b", "c", "d"])
    result = await fixture.train(batch_size=2, job_id="job-1")
    assert result.checkpoint is not None
    assert fixture.submitted[-2:] == ["save_state step-2", "base step-2"]
    assert result.checkpoint.state_path == "cross_job://job-1/step-2"
    assert result.checkpoint.sampler_path == "step-2-0a1b2c3d"
    assert (result.checkpoint.source_job_id, result.job_id) == ("job-1", "job-1")


async def test_rows_that_are_left_out_are_told_and_counted(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path, ["a", "b" * 40, "c"])
    result = await fixture.train(context=20)
    assert [(problem.line, problem.reason) for problem in result.rows.dropped] == [(2, "45 tokens are more than 20")]
    assert result.rows.describe_dropped() == "1 of 3 rows are left out: line 2: 45 tokens are more than 20"
    assert sum(len(datums) for _, datums in fixture.trainer.batches) == 2
    assert result.checkpoint is not None
    assert result.checkpoint.data_consumed == 3
    with pytest.raises(
        DatasetError, match=r"all 3 rows are longer than 2 tokens; nothing is left\. The shortest has \d+ \(line \d\)"
    ):
        await fixture.train(max_seq_len=2, log_path=tmp_path / "other")


async def test_what_is_learnt_and_by_which_renderer(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path, ["abc"])
    await fixture.train(train_on_what="all_tokens", save_final_checkpoint=False)
    ((_, (datum,)),) = fixture.trainer.batches
    assert np.count_nonzero(datum.loss_fn_inputs["weights"].to_numpy()) == datum.model_input.length
    with pytest.raises(UsageError, match="renderer 'mine' must look like 'module:attribute'"):
        await fixture.train(renderer_name="mine", log_path=tmp_path / "other")


async def test_limits_of_a_run(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path, list("abcdefg"))
    result = await fixture.train(batch_size=2, epochs=2, max_examples=5, max_steps=4)
    assert [len(datums) for _, datums in fixture.trainer.batches] == [2, 2, 1, 2]
    assert (result.steps, len(result.rows.rows)) == (4, 5)


async def test_a_context_length_that_nobody_knows(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path, ["a"])
    with pytest.raises(UsageError, match="does not tell the context length of fake; set max_seq_len"):
        await fixture.train(context=None)
    assert not fixture.trainer.log


async def test_a_stop_finishes_what_is_submitted_and_saves(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path, ["a"] * 12)
    stop = StopRequest()

    def on_step(step: int, metrics: Any) -> None:
        if step == 2:
            stop.request("enough")
            stop.request("again")

    result = await fixture.train(batch_size=2, calls={"stop": stop, "on_step": on_step})
    assert (result.steps, result.total_steps, result.stopped) == (3, 6, "enough")
    assert fixture.submitted[-3:] == ["forward_backward 3", "optim_step 3", "save_state step-3"]
    assert [record["step"] for record in fixture.records] == [1, 2, 3]
    assert result.checkpoint is not None
    assert (result.checkpoint.step, result.checkpoint.data_consumed, result.checkpoint.sampler_path) == (3, 6, None)


async def test_a_stop_before_the_first_step_saves_nothing(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path, ["a", "b"])
    stop = StopRequest()
    stop.request("no")
    result = await fixture.train(calls={"stop": stop})
    assert (result.steps, result.checkpoint, fixture.trainer.log) == (0, None, [])


# -- evaluation ----------------------------------------------------------------------------------------------


async def test_the_loss_on_other_rows_after_each_pass(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path, ["a", "b", "c"])
    others = fixture.write("eval.jsonl", ["x", "yyyy", "z"])
    await fixture.train(batch_size=2, epochs=2, evaluation_dataset=str(others), save_final_checkpoint=False)
    assert [entry for entry in fixture.submitted if "optim" not in entry] == [
        "forward_backward 1",
        "forward_backward 2",
        "forward 1",
        "forward 2",
        "forward_backward 3",
        "forward_backward 4",
        "forward 3",
        "forward 4",
    ]
    assert [record.get("eval/loss") for record in fixture.records] == [None, pytest.approx(1), None, pytest.approx(1)]
    assert fixture.records[1]["eval/tokens"] == 2 + 5 + 2
    assert fixture.records[1]["eval/ppl"] == pytest.approx(math.e)


async def test_rows_that_are_carved_out_are_not_trained_on(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path, list("abcdefghijklmnopqrst"))
    carve = {"eval_auto_carveout": True, "eval_carve_ratio": 0.2, "max_eval_seqs": 3}
    result = await fixture.train(batch_size=4, **carve)
    trained = [datum.model_input.to_ints() for _, datums in fixture.trainer.batches for datum in datums]
    judged = [datum.model_input.to_ints() for datums in fixture.trainer.forwards for datum in datums]
    assert (len(trained), len(judged), len(result.rows.rows)) == (17, 3, 17)
    assert not any(row in trained for row in judged)


async def test_an_evaluation_that_fails_is_told_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(Future):
        def __await__(self):
            self._log.append(f"await {self._name}")
            raise OperationFailedError("no memory")
            yield

    awaited: list[str] = []
    fixture = Fixture(tmp_path, ["a", "b"])
    monkeypatch.setattr(fixture.trainer, "forward", lambda *a, **k: Failing("f", awaited, None))
    result = await fixture.train(evaluation_dataset=str(fixture.data), batch_size=1)
    assert result.steps == 2
    assert awaited == ["await f"] * 2
    assert "eval/loss" not in fixture.records[0]


async def test_a_judge_sees_the_weights_of_its_step(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path, list("abcdef"))

    async def judge(step: int, client: Any) -> dict[str, float]:
        client.log.append(f"judge {step}")
        return {"eval/mine": 7.0}

    await fixture.train(batch_size=2, epochs=2, calls={"evaluate": judge}, save_final_checkpoint=False)
    log = fixture.trainer.log
    assert log[log.index("judge 3") - 1] == "await optim_step 3"
    assert log[log.index("judge 3") + 1] == "forward_backward 4"
    assert log[-1] == "judge 6"
    assert [record.get("eval/mine") for record in fixture.records] == [None, None, 7, None, None, 7]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (ValueError("no memory"), "no memory"),
        (3, "must give a mapping of names to numbers, got int"),
        ({"eval/mine": "good"}, "metric 'eval/mine' is 'good', which is no number"),
    ],
)
async def test_a_judge_that_fails_costs_neither_the_step_nor_its_checkpoint(
    tmp_path: Path, given: Any, told: str
) -> None:
    fixture = Fixture(tmp_path, ["a", "b"])

    def judge(step: int, client: Any) -> Any:
        if isinstance(given, Exception):
            raise given
        return given

    with pytest.raises((ValueError, UsageError), match=told):
        await fixture.train(batch_size=1, calls={"evaluate": judge})
    assert [record["step"] for record in fixture.records] == [1, 2]
    entry = await CheckpointLedger(tmp_path / "run").latest()
    assert entry is not None
    assert (entry.name, entry.sampler_path) == ("step-2", "snapshot:step-2")


async def test_a_judge_may_have_nothing_to_tell(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path, ["a", "b"])
    judged: list[int] = []
    result = await fixture.train(batch_size=1, calls={"evaluate": lambda step, client: judged.append(step)})
    assert (result.steps, judged) == (2, [2])


async def test_each_answer_may_be_a_row(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path, [])
    turns = [("user", "?"), ("assistant", "a"), ("user", "!"), ("assistant", "bb")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    fixture.data.write_text(f"{json.dumps(row)}\n" * 3)
    result = await fixture.train(batch_size=6, split=True)
    assert [len(batch) for _, batch in fixture.trainer.batches] == [6]
    lengths = {
        datum.model_input.length: np.count_nonzero(datum.loss_fn_inputs["weights"].to_numpy())
        for _, batch in fixture.trainer.batches
        for datum in batch
    }
    short, long = sorted(lengths)
    assert (lengths[short], lengths[long], short < long) == (2, 3, True)  # with the marker that ends it
    assert result.checkpoint is not None
    assert result.checkpoint.data_consumed == 6
    with pytest.raises(UsageError, match="train_on_what is all_tokens; set one of them"):
        config(split=True, train_on_what="all_tokens").check()


async def test_answers_of_a_chat_are_trained_on_or_evaluated_together(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path, [])
    rows = [
        {"messages": [{"role": role, "content": chat} for role in ("user", "assistant") * 2]} for chat in ("1", "2")
    ]
    fixture.data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    await fixture.train(split=True, eval_auto_carveout=True, eval_carve_ratio=0.5, save_final_checkpoint=False)
    ((_, trained),) = fixture.trainer.batches
    (judged,) = fixture.trainer.forwards
    chats = [[set(b"12") & set(datum.model_input.to_ints()) for datum in batch] for batch in (trained, judged)]
    assert sorted(chats, key=str) == [[{49}, {49}], [{50}, {50}]]


async def test_rows_that_the_model_cannot_take_are_left_out_whatever_is_asked_for(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path, ["a", "b" * 40])
    result = await fixture.train(context=20, max_seq_len=1000)
    assert result.rows.usable == [True, False]
    (tmp_path / "more").mkdir()
    fixture = Fixture(tmp_path / "more", ["a", "b" * 40])
    result = await fixture.train(context=None, max_seq_len=1000)
    assert result.rows.usable == [True, True]
