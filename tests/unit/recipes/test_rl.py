"""RL: what a step submits and in which order, what is counted, where it stops, and what is saved at the end."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, Self

import anyio
import anyio.lowlevel
import numpy as np
import pytest

from fwasync.checkpoints.ledger import CheckpointLedger
from fwasync.data.messages import Message
from fwasync.data.prompts import PromptRow
from fwasync.errors import DatasetError, OperationFailedError, UsageError
from fwasync.recipes import rl
from fwasync.recipes.stopping import StopRequest
from fwasync.recipes.trainers import Trainers, Where
from fwasync.types import SampledSequence, SampleResponse
from unit.recipes.trainer import Future, Service, Trainer


class Sampler:
    """Answers in an order of its own; digits are a function of the seed."""

    def __init__(self, path: str, order: random.Random) -> None:
        self.path, self.order = path, order

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        return None

    async def sample(self, prompt: Any, num_samples: int, params: Any) -> SampleResponse:
        for _ in range(self.order.randrange(12)):
            await anyio.lowlevel.checkpoint()
        rng = np.random.default_rng(params.seed)
        sequences = [
            SampledSequence(
                stop_reason="length",
                sequence_id="s",
                tokens_np=rng.integers(48, 58, 3).astype(np.int32),
                logprobs_np=np.full(3, -1.25, np.float32),
            )
            for _ in range(num_samples)
        ]
        return SampleResponse(sequences=sequences)


class Fixture:
    """Runs with a trainer that remembers; its answers have the reward 1 in half of the cases."""

    def __init__(self, directory: Path, *, order: int = 0, rows: int = 10) -> None:
        self.directory = directory
        self.trainer = Trainer(directory / "tokenizer")
        self.order = random.Random(order)
        self.sampled: list[str] = []
        self.rows = [PromptRow((Message("user", str(number)),), number, {}, number + 1) for number in range(rows)]

    def sampler(self, path: str) -> Sampler:
        self.sampled.append(path)
        return Sampler(path, self.order)

    async def train(
        self, *, reward: Any = None, stages: int = 1, calls: dict[str, Any] | None = None, **more: Any
    ) -> rl.Result:
        settings = {
            "log_path": self.directory / "run",
            "dataset": "rows",
            "completions_per_prompt": 3,
            "prompt_groups_per_step": 2,
            "kl_beta": 0,
            **more,
        }
        policy: Any = self.trainer
        service: Any = Service(make_sampler=self.sampler)
        where = Where(trainers=Trainers(service, policy, pipeline_parallelism=stages))
        return await rl.train(
            rl.Config.model_validate(settings),
            reward=reward or (lambda text, row: float(text < "5")),
            where=where,
            rows=self.rows,
            **calls or {},
        )

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.directory / "run" / "metrics.jsonl").read_text().splitlines()]

    @property
    def submitted(self) -> list[str]:
        """What was asked of the trainer; snapshots of the sampler without the random part of their names."""
        asked = [entry for entry in self.trainer.log if not entry.startswith("await")]
        return [entry.rpartition("-")[0] if entry.startswith("snapshot sampler") else entry for entry in asked]

    @property
    def wire(self) -> list[Any]:
        return [
            (loss_fn, datum.model_input.to_ints(), {name: t.tolist() for name, t in datum.loss_fn_inputs.items()})
            for loss_fn, datums in self.trainer.batches
            for datum in datums
        ]


async def test_what_is_submitted_and_when(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path)
    result = await fixture.train(max_steps=2, dcp_save_interval=1)
    assert fixture.submitted == [
        "snapshot sampler-0",
        "forward 1",
        "forward_backward 1",
        "optim_step 1",
        "snapshot sampler-1",
        "save_state rl-step-1",
        "forward 2",
        "forward_backward 2",
        "optim_step 2",
        "snapshot sampler-2",
        "save_state rl-step-2",
        "snapshot rl-step-2",
    ]
    begins = fixture.trainer.log.index("forward_backward 1")
    assert fixture.trainer.log[begins : begins + 3] == [
        "forward_backward 1",
        "optim_step 1",
        "await forward_backward 1",
    ]
    assert [loss_fn for loss_fn, _ in fixture.trainer.batches] == ["ppo", "ppo"]
    assert fixture.trainer.normalizations == ["num_loss_tokens"] * 2
    assert (result.steps, result.total_steps, result.stopped) == (2, 2, None)
    first, last = await CheckpointLedger(tmp_path / "run").entries()
    assert (first.state_path, first.sampler_path) == ("state:rl-step-1", None)
    assert (last.step, last.sampler_path) == (2, "snapshot:rl-step-2")
    assert last.extra["rows"] == {"kept": 4, "filtered": result.rows.filtered, "failed": 0}
    assert last.data_consumed == result.rows.sampled


async def test_results_do_not_depend_on_the_order_of_arrival(tmp_path: Path) -> None:
    runs = [Fixture(tmp_path / str(order), order=order) for order in range(3)]
    for run in runs:
        await run.train()
    assert len(runs[0].wire) > 12
    assert runs[1].wire == runs[2].wire == runs[0].wire
    other = Fixture(tmp_path / "seed")
    await other.train(seed=1)
    assert other.wire != runs[0].wire


async def test_every_row_is_counted_once(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path, rows=25)
    failing = random.Random(3)
    sample = Sampler.sample

    async def sometimes(self: Sampler, *args: Any) -> SampleResponse:
        if failing.random() < 0.2:
            raise OperationFailedError("busy", category="server")
        return await sample(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sampler, "sample", sometimes)
        result = await fixture.train(epochs=2)
    counts = result.rows
    assert counts.sampled == 50
    assert min(counts.kept, counts.filtered, counts.failed) > 0
    names = ("rollout/valid_prompt_groups", "rollout/filter_drops", "rollout/sample_fails")
    logged = [sum(record[name] for record in fixture.records) for name in names]
    assert logged[0] == counts.kept
    assert sum(logged) <= 50  # rows at the end may have nothing to teach
    assert fixture.records[-1]["train/data_consumed"] == sum(logged)
    assert result.checkpoint is not None
    assert result.checkpoint.data_consumed == 50
    assert all(record["rollout/valid_prompt_groups"] == 2 for record in fixture.records[:-1])


async def test_without_refill_steps_are_smaller(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path)
    result = await fixture.train(refill=False)
    taken = [record["rollout/valid_prompt_groups"] + record["rollout/filter_drops"] for record in fixture.records]
    assert all(count % 2 == 0 for count in taken)
    assert any(record["rollout/valid_prompt_groups"] == 1 for record in fixture.records)
    assert result.rows.sampled == 10


async def test_the_tail_that_teaches_nothing_is_saved_as_done(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path)

    def reward(text: str, row: PromptRow) -> float:
        return float(text < "5") if row.ground_truth < 5 else 0.0

    result = await fixture.train(reward=reward, shuffle=False, dcp_save_interval=1)
    assert result.rows.filtered >= 4
    names = [(entry.name, entry.data_consumed) for entry in await CheckpointLedger(tmp_path / "run").entries()]
    assert names[-2] == (f"rl-step-{result.steps}", fixture.records[-1]["train/data_consumed"])
    assert names[-1] == (f"rl-step-{result.steps}-final", 10)


async def test_it_stops_between_steps_and_saves(tmp_path: Path) -> None:
    fixture, stop = Fixture(tmp_path), StopRequest()
    seen: list[int] = []

    async def on_step(step: int, metrics: Any) -> None:
        seen.append(step)
        stop.request("enough")

    result = await fixture.train(calls={"stop": stop, "on_step": on_step})
    assert (result.steps, result.stopped, seen) == (1, "enough", [1])
    (entry,) = await CheckpointLedger(tmp_path / "run").entries()
    assert (entry.name, entry.sampler_path) == ("rl-step-1", None)
    idle = Fixture(tmp_path / "idle")
    result = await idle.train(calls={"stop": stop})
    assert (result.steps, result.checkpoint, idle.trainer.batches) == (0, None, [])


@pytest.mark.parametrize(("interval", "published", "staleness"), [(2, [0, 2, 4], [0, 1, 0, 1]), (0, [0], [0, 1, 2, 3])])
async def test_weights_are_published_at_intervals(
    tmp_path: Path, interval: int, published: list[int], staleness: list[int]
) -> None:
    fixture = Fixture(tmp_path, rows=30)
    await fixture.train(max_steps=4, weight_sync={"weight_sync_interval": interval}, save_final_checkpoint=False)
    asked = [entry for entry in fixture.submitted if entry.startswith("snapshot")]
    assert asked == [f"snapshot sampler-{version}" for version in published]
    assert [record["version/sample_staleness_max"] for record in fixture.records] == staleness
    assert len(fixture.sampled) == len(published)


async def test_metrics_have_the_cookbooks_names(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path)

    async def judge(step: int, policy: Any) -> dict[str, float]:
        return {"eval/version": policy.version}

    await fixture.train(max_steps=3, evaluation_interval=2, calls={"evaluate": judge})
    record = fixture.records[0]
    ratio = record["perf/sample_wait_time"] / record["perf/step_wall_time"]
    assert record["perf/wait_time_ratio"] == pytest.approx(ratio)
    assert record["perf/overlap_ratio"] == pytest.approx(1 - ratio)
    assert record["train/inference_diff"] == pytest.approx(0.25)
    assert record["train/active_tokens"] == 2 * 3 * 3
    assert record["train/loss"] == pytest.approx(3.5 / 18)
    assert record["train/grad_norm"] == 2.5
    assert record["rollout/in_flight"] == 2
    assert record["train/lr"] == 1e-5
    assert [record.get("eval/version") for record in fixture.records] == [None, 2, 3]


async def test_a_loss_that_the_service_does_not_tell_is_not_logged(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path)
    fixture.trainer.metrics = {}
    await fixture.train(max_steps=1)
    assert "train/loss" not in fixture.records[0]


async def test_nothing_to_learn_is_an_error(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path)
    with pytest.raises(DatasetError, match="nothing was trained: 10 sampled, 0 kept, 10 filtered, 0 failed"):
        await fixture.train(reward=lambda text, row: 0.0)
    fixture.rows = [PromptRow((Message("user", "x" * 100),), None, {}, 1)]
    with pytest.raises(DatasetError, match="all 1 prompts fill 64 tokens"):
        await fixture.train()


async def test_a_failure_of_the_trainer_ends_the_run(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path)

    class Failing(Future):
        def __await__(self) -> Any:
            yield from super().__await__()
            raise OperationFailedError("out of memory")

    fixture.trainer.optim_step = lambda *args, **options: Failing("optim_step", fixture.trainer.log, None)
    with pytest.raises(OperationFailedError, match="out of memory"):
        await fixture.train()
    assert [entry for entry in fixture.submitted if entry.startswith("snapshot")] == ["snapshot sampler-0"]
    assert fixture.records == []


async def test_a_pipeline_has_no_kernels(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path)
    with pytest.raises(UsageError, match="a pipeline of 4 stages, and kernels need one of 1; take another training"):
        await fixture.train(stages=4, loss_path="builtin")
    assert fixture.sampled == []
    names: list[str] = []

    def custom(data: Any, loss_fn: Any, *, timeout: float) -> Future:
        names.append(loss_fn.name)
        return Future("custom", fixture.trainer.log, fixture.trainer._output(data))

    fixture.trainer.forward_backward_custom = custom  # pyright: ignore[reportAttributeAccessIssue]
    await fixture.train(stages=4, max_steps=2)
    assert (names, fixture.trainer.batches) == (["grpo", "grpo"], [])


async def test_a_judge_that_fails_costs_neither_the_step_nor_its_checkpoint(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path)

    def judge(step: int, policy: Any) -> dict[str, float]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fixture.train(dcp_save_interval=1, calls={"evaluate": judge})
    assert [record["step"] for record in fixture.records] == [1]
    assert [entry.step for entry in await CheckpointLedger(tmp_path / "run").entries()] == [1]


async def test_weights_that_are_not_taken_cost_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fixture = Fixture(tmp_path)
    sample = fixture.sampler

    def sampler(path: str) -> Sampler:
        if len(fixture.sampled) == 2:
            raise OperationFailedError("no memory")
        return sample(path)

    monkeypatch.setattr(fixture, "sampler", sampler)
    judged: list[int] = []
    with pytest.raises(OperationFailedError, match="no memory"):
        await fixture.train(calls={"evaluate": lambda step, policy: judged.append(step)})
    assert [record["step"] for record in fixture.records] == [1, 2]
    (entry,) = await CheckpointLedger(tmp_path / "run").entries()
    assert (entry.step, entry.data_consumed, judged) == (2, fixture.records[-1]["train/data_consumed"], [1])


async def test_answers_that_cannot_be_written_cost_no_step(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        await fixture.train(dcp_save_interval=1, trajectory_dir=tmp_path / "file" / "answers")
    assert [record["step"] for record in fixture.records] == [1]
    assert [entry.step for entry in await CheckpointLedger(tmp_path / "run").entries()] == [1]
