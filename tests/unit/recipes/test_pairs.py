"""The recipes on preferences: configuration, which rows they have, what they submit, and when weights are synced."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pydantic
import pytest

from fwasync import DeployConfig, WeightSyncConfig
from fwasync.checkpoints.ledger import CheckpointLedger
from fwasync.data.chat import ChatTokenizer
from fwasync.errors import DatasetError, HotLoadFailedError, UsageError
from fwasync.recipes import dpo, orpo, syncing
from fwasync.recipes.trainers import Trainers, Where
from unit.recipes.trainer import Service, Trainer

SHAPE = {"training_shape_id": "accounts/fireworks/trainingShapes/s"}
BOTH = {**SHAPE, "ref_training_shape_id": "accounts/fireworks/trainingShapes/s-forward"}
RECIPES = [pytest.param(recipe, id=recipe.PHASE) for recipe in (dpo, orpo)]


def config(recipe: Any, **settings: Any) -> Any:
    return recipe.Config.model_validate({"log_path": "run", "dataset": "d", **settings})


@pytest.mark.parametrize("beta", [0, -0.1, float("nan"), float("inf")])
def test_beta_is_above_zero(beta: float) -> None:
    with pytest.raises(pydantic.ValidationError, match="beta"):
        config(dpo, beta=beta)


def test_lambda_may_be_nothing_but_not_less() -> None:
    assert config(orpo, orpo_lambda=0).orpo_lambda == 0
    with pytest.raises(pydantic.ValidationError, match="orpo_lambda"):
        config(orpo, orpo_lambda=-1)


def problems(recipe: Any, **settings: Any) -> str:
    with pytest.raises(UsageError) as caught:
        config(recipe, **settings).check()
    return str(caught.value)


def test_nothing_is_divided_twice() -> None:
    for mode in ("num_loss_tokens", "NUM_SEQUENCES"):
        assert "would divide the gradient twice" in problems(dpo, grad_accumulation_normalization=mode)
    assert "would divide the gradient twice" in problems(orpo, grad_accumulation_normalization="num_loss_tokens")
    config(orpo, grad_accumulation_normalization="num_sequences").check()
    config(dpo, grad_accumulation_normalization="none").check()
    assert "must be one of" in problems(dpo, grad_accumulation_normalization="mean")


def test_what_cannot_be_brought_up_is_told_before() -> None:
    named = {"tokenizer_model": "t"}
    assert "infra.ref_training_shape_id is unset" in problems(dpo, infra=SHAPE, **named)
    config(dpo, infra=SHAPE, lora_rank=4, **named).check()
    config(dpo, infra=BOTH, **named).check()
    config(orpo, infra=SHAPE, **named).check()
    assert "tokenizer_model is empty" in problems(orpo, infra=SHAPE)
    assert "this recipe has no reference" in problems(orpo, infra=BOTH, **named)
    assert "or no trainer comes up" in problems(dpo, infra={"ref_training_shape_id": BOTH["ref_training_shape_id"]})
    assert "a trainer job is named; name its shape" in problems(dpo, job_id="mine")
    assert "name the shape of that job too" in problems(dpo, infra=SHAPE, lora_rank=4, reference_job_id="r", **named)
    assert "set infra too" in problems(dpo, weight_sync={"weight_sync_interval": 2})
    assert "would never get weights" in problems(dpo, deployment={"deployment_id": "mine"})
    config(dpo, infra=BOTH, weight_sync={"weight_sync_interval": 2}, deployment={"deployment_id": "a"}, **named).check()


def test_the_interval_of_checkpoints_may_stand_where_it_stood() -> None:
    section = config(dpo, weight_sync={"dcp_save_interval": 3})
    assert (section.dcp_save_interval, section.is_synced) == (3, False)
    given = WeightSyncConfig(weight_sync_interval=0, dcp_save_interval=4)
    assert config(dpo, weight_sync=given).dcp_save_interval == 4
    assert config(dpo, weight_sync={"dcp_save_interval": 3}, dcp_save_interval=3).dcp_save_interval == 3
    assert "differ" in problems(dpo, weight_sync={"dcp_save_interval": 3}, dcp_save_interval=5)


def test_without_torch_nothing_is_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "torch, which is not installed" in problems(dpo)


class Fixture:
    """Runs with a trainer that remembers."""

    def __init__(self, directory: Path, rows: list[Any]) -> None:
        self.directory = directory
        self.data = directory / "pairs.jsonl"
        self.data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.trainer, self.reference = Trainer(directory / "tokenizer"), Trainer(directory / "reference")
        self.opened = 0

    @asynccontextmanager
    async def open_reference(self):
        self.opened += 1
        yield self.reference

    async def train(
        self, recipe: Any, *, trainers: dict[str, Any] | None = None, on_step: Any = None, **more: Any
    ) -> Any:
        settings = {"log_path": self.directory / "run", "dataset": str(self.data), "pipeline_depth": 2, **more}
        service, policy, reference = Service(context=64), self.trainer, self.open_reference
        up = Trainers(service, policy, passing_reference=reference, **trainers or {})  # pyright: ignore[reportArgumentType]
        return await recipe.train(recipe.Config(**settings), where=Where(trainers=up), on_step=on_step)


def preference(chosen: str, rejected: str) -> dict[str, str]:
    return {"input": "?", "preferred_output": chosen, "non_preferred_output": rejected}


@pytest.mark.parametrize("recipe", RECIPES)
async def test_pairs_that_are_left_out_are_told_and_counted(tmp_path: Path, recipe: Any) -> None:
    rows = [preference("a", "b"), preference("c", "c"), preference("d", "e" * 60), preference("f", "g"), {"input": "?"}]
    fixture = Fixture(tmp_path, rows)
    with pytest.raises(DatasetError, match="line 5"):
        await fixture.train(recipe)
    fixture = Fixture(tmp_path, rows[:-1])
    result = await fixture.train(recipe)
    assert [problem.line for problem in result.rows.dropped] == [2, 3]
    told = result.rows.describe_dropped()
    assert told.startswith("2 of 4 rows are left out: line 2: without a difference: both sides have the same tokens")
    assert "line 3: 65 tokens are more than 64" in told
    assert (result.steps, result.checkpoint.data_consumed) == (1, 4)
    assert fixture.trainer.normalizations == [None]
    ((_, datums),) = fixture.trainer.batches
    answers = [bytes(datum.loss_fn_inputs["target_tokens"].data[-2:-1]) for datum in datums]
    assert sorted(answers) == [b"a", b"b", b"f", b"g"]
    assert {answers.index(b"b") - answers.index(b"a"), answers.index(b"g") - answers.index(b"f")} == {1}
    assert fixture.opened == (recipe is dpo)
    assert len(fixture.reference.forwards) == (2 if recipe is dpo else 0)


@pytest.mark.parametrize("recipe", RECIPES)
async def test_the_cap_is_of_pairs_that_can_be_trained_on(tmp_path: Path, recipe: Any) -> None:
    rows = [preference("a", "b"), preference("c", "c"), preference("f", "g"), preference("h", "i")]
    result = await Fixture(tmp_path, rows).train(recipe, max_pairs=2, batch_size=1)
    assert (result.steps, len(result.rows.rows), [problem.line for problem in result.rows.dropped]) == (2, 3, [2])


async def test_checkpoints_have_the_time_that_they_are_given(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path, [preference("a", "b")])
    await fixture.train(dpo, weight_sync=WeightSyncConfig(weight_sync_interval=0, dcp_timeout=7))
    assert fixture.trainer.save_timeouts == [7, 7]
    assert config(dpo).checkpoint_timeout_s == 2700
    assert config(orpo).checkpoint_timeout_s is None  # as the client has it


async def test_a_dry_run_tells_of_the_pairs(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path, [preference("a", "b"), preference("c", "c"), preference("f", "g")])
    given = config(dpo, dataset=str(fixture.data), epochs=3, batch_size=2, dcp_save_interval=2)
    told = await dpo.dry_run(given, tokenizer=ChatTokenizer.load(fixture.trainer.directory), max_seq_len=64)
    assert told[0].endswith("pairs.jsonl: 3 rows, 2 pairs to train on")
    assert told[1] == "tokens: 24, on both sides"
    assert told[2].startswith("1 of 3 rows are left out: line 2: without a difference")
    assert told[3:] == [
        "rendering: 3 compared, with the chat template's tokens",
        "3 steps of 2 rows: 3.00 passes over the data",
        "2 checkpoint(s)",
    ]
    told = await orpo.dry_run(config(orpo, dataset=str(fixture.data)), tokenizer=None, max_seq_len=64)
    assert told[0].endswith("3 rows")
    assert "not known" in told[1]


async def test_training_begins_before_all_is_known_of_the_reference(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path, [preference("a", "b"), preference("c", "d"), preference("e", "f")])
    trained, forward = anyio.Event(), fixture.reference.forward

    class Held:
        def __init__(self, output: Any) -> None:
            self.output = output

        def __await__(self):
            yield from trained.wait().__await__()
            return (yield from self.output.__await__())

    def held(data: Any, loss_fn: str, *, timeout: float) -> Any:
        output = forward(data, loss_fn, timeout=timeout)
        return output if len(fixture.reference.forwards) == 1 else Held(output)

    fixture.reference.forward = held  # pyright: ignore[reportAttributeAccessIssue]
    with anyio.fail_after(60):
        result = await fixture.train(dpo, batch_size=1, pipeline_depth=1, on_step=lambda *_: trained.set())
    assert result.steps == 3


async def test_weights_are_synced_when_they_are_those_of_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixture = Fixture(tmp_path, [preference("a", "b"), preference("c", "d"), preference("e", "f")])

    class Syncer:
        def __init__(self, policy: Any, manager: Any, deployment_id: str, **settings: Any) -> None:
            assert (manager, deployment_id, settings["lora_rank"]) == ("manager", "mine", 4)

        def reset_delta_chain(self) -> None:
            fixture.trainer.log.append("reset")

        async def save_and_hotload(self, name: str, checkpoint_type: str | None = None) -> None:
            fixture.trainer.log.append(f"sync {name} {checkpoint_type}")

    monkeypatch.setattr(syncing, "AsyncWeightSyncer", Syncer)
    deployed = {"deployment": type("Info", (), {"deployment_id": "mine"}), "hot_loads": "manager"}
    settings = {
        "tokenizer_model": str(fixture.trainer.directory),
        "infra": SHAPE,
        "lora_rank": 4,
        "batch_size": 1,
        "save_final_checkpoint": False,
        "weight_sync": {"weight_sync_interval": 2, "weight_sync_before_training": True},
        "deployment": DeployConfig(deployment_id="mine"),
        "pipeline_depth": 4,
    }
    await fixture.train(dpo, trainers=deployed, **settings)
    log = [entry.removeprefix("await ") for entry in fixture.trainer.log if "forward" not in entry]
    assert log == [
        "sync step-0-base base",
        "optim_step 1",
        "optim_step 2",
        "optim_step 1",
        "optim_step 2",
        "sync step-2 None",
        "optim_step 3",
        "optim_step 3",
        "reset",
        "sync final-step-3 None",
    ]
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert ["perf/weight_sync_time" in record for record in records] == [False, True, True]


async def test_weights_that_are_not_taken_cost_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fixture = Fixture(tmp_path, [preference("a", "b"), preference("c", "d")])

    class Syncer:
        def __init__(self, *args: Any, **settings: Any) -> None:
            pass

        def reset_delta_chain(self) -> None:
            pass

        async def save_and_hotload(self, name: str, checkpoint_type: str | None = None) -> None:
            raise HotLoadFailedError(f"no memory for {name}")

    monkeypatch.setattr(syncing, "AsyncWeightSyncer", Syncer)
    deployed = {"deployment": type("Info", (), {"deployment_id": "mine"}), "hot_loads": "manager"}
    settings = {
        "tokenizer_model": str(fixture.trainer.directory),
        "infra": SHAPE,
        "lora_rank": 4,
        "batch_size": 1,
        "weight_sync": {"weight_sync_interval": 2},
    }
    with pytest.raises(HotLoadFailedError, match="final-step-2"):
        await fixture.train(dpo, trainers=deployed, **settings)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2]
    entry = await CheckpointLedger(tmp_path / "run").latest()
    assert entry is not None
    assert (entry.name, entry.sampler_path) == ("step-2", "snapshot:step-2")
