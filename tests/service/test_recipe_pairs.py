"""DPO and ORPO on the local service, whole: they learn, go on exactly where they were killed, and give back what they
do not need."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fwasync import (
    AsyncDeploymentManager,
    AsyncFireworksClient,
    AsyncTrainerJobManager,
    AsyncWeightSyncer,
    DeployConfig,
    TrainerJobConfig,
)
from fwasync.checkpoints.ledger import CheckpointLedger
from fwasync.errors import HotLoadFailedError, NotFoundError, OperationFailedError, UsageError
from fwasync.local import LocalService, launch
from fwasync.recipes import dpo, orpo, sort_digits
from fwasync.recipes.stopping import StopRequest
from fwasync.recipes.trainers import Where
from fwasync.testing import FailOperation, Fault, FaultPlan, local_service

SHAPE = "accounts/fwasync/trainingShapes/qwen3-tiny"
BASE = "accounts/fwasync/models/qwen3-tiny"
RECIPES = [pytest.param(recipe, id=recipe.PHASE) for recipe in (dpo, orpo)]
TIMES = ("time_s", "train/step_time_sec", "train/tokens_per_sec")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text(sort_digits.make_pairs(32))
    return path


def settings(recipe: Any, data: Path, name: str = "run", **more: Any) -> Any:
    given = {
        "log_path": data.parent / name,
        "dataset": str(data),
        "base_model": "fwasync/qwen3-tiny",
        "learning_rate": 3e-3,
        "adam": "fast",
        "batch_size": 8,
        "epochs": 2,
        "max_seq_len": 64,
    }
    return recipe.Config.model_validate({**given, **more})


def records(log_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (log_path / "metrics.jsonl").read_text().splitlines()]


def outcome(local: LocalService, log_path: Path) -> Any:
    """What counts of a run: the last weights with their optimizer, every step's numbers, and the cursor."""
    entries = [json.loads(line) for line in (log_path / "checkpoints.jsonl").read_text().splitlines()]
    model_id, _, name = entries[-1]["state_path"].removeprefix("tinker://").partition("/weights/")
    directory = local.data_dir / "weights" / model_id.replace(":", "~") / name
    weights = {file.name: file.read_bytes() for file in directory.glob("*.safetensors")}
    assert len(weights) == 3  # of the model, and Adam's two moments
    steps = [{key: value for key, value in record.items() if key not in TIMES} for record in records(log_path)]
    return weights, steps, (entries[-1]["step"], entries[-1]["data_consumed"])


async def test_dpo_learns(data: Path) -> None:
    config = settings(dpo, data, epochs=5, lr_scheduler={"type": "cosine", "warmup_steps": 2})
    async with launch() as local:
        await dpo.train(config, where=Where(local.base_url, local.api_key))
    found = records(config.log_path)
    assert [record["train/epoch"] for record in found] == [epoch for epoch in range(5) for _ in range(4)]
    assert found[0]["train/dpo_loss"] == pytest.approx(0.6931, abs=1e-3)
    assert found[0]["train/margin"] == pytest.approx(0, abs=1e-2)
    last = found[-1]
    assert last["train/dpo_loss"] < 0.3
    assert last["train/margin"] > 10
    assert last["train/accuracy"] == 1
    assert last["train/chosen_reward"] - last["train/rejected_reward"] == pytest.approx(0.1 * last["train/margin"])
    assert last["train/chosen_reward"] > 0 > last["train/rejected_reward"]


async def test_orpo_learns(data: Path) -> None:
    config = settings(orpo, data, epochs=5, grad_accumulation_normalization="num_sequences", grad_clip_norm=1.0)
    async with launch() as local:
        await orpo.train(config, where=Where(local.base_url, local.api_key))
    first, *_, last = records(config.log_path)
    assert last["train/orpo_loss"] < 0.6 * first["train/orpo_loss"]
    assert last["train/sft_loss"] < 0.6 * first["train/sft_loss"]
    assert last["train/log_odds_ratio"] > 1 > abs(first["train/log_odds_ratio"])
    assert last["train/accuracy"] == 1
    for record in (first, last):
        assert record["train/orpo_loss"] == pytest.approx(record["train/sft_loss"] + record["train/or_loss"])
        assert record["train/loss:sum"] == pytest.approx(8 * record["train/orpo_loss"])


class Crash(Exception):
    pass


@pytest.mark.parametrize("recipe", RECIPES)
async def test_a_run_that_failed_goes_on_as_if_it_had_not(data: Path, recipe: Any) -> None:
    # Five steps a pass, of which the last is smaller; a checkpoint after steps 3 and 6, the second in the second pass.
    more = {"batch_size": 7, "dcp_save_interval": 3, "grad_clip_norm": 1.0, "lora_rank": 4}
    if recipe is dpo:
        more["ref_cache_batch_size"] = 3
    async with launch() as local:
        where = Where(local.base_url, local.api_key)
        whole = settings(recipe, data, "whole", **more)
        await recipe.train(whole, where=where)
        config = settings(recipe, data, **more)
        for at, logged in ((2, 2), (5, 5), (8, 8)):

            def crash(step: int, metrics: Any, at: int = at) -> None:
                if step == at:
                    raise Crash

            with pytest.raises(Crash):
                await recipe.train(config, where=where, on_step=crash)
            assert len(records(config.log_path)) == logged
        assert (await recipe.train(config, where=where)).steps == 10
        assert outcome(local, config.log_path) == outcome(local, whole.log_path)
        assert outcome(local, config.log_path)[2] == (10, 64)
        other = settings(recipe, data, **more, epochs=3, max_pairs=31)
        with pytest.raises(UsageError, match="is not what it was"):
            await recipe.train(other, where=where)


KILLED = """
import json, os, signal, sys
import anyio
from fwasync.recipes import dpo
from fwasync.recipes.trainers import Where

def kill(step, metrics):
    if step == 6:
        os.kill(os.getpid(), signal.SIGKILL)

url, key, config = sys.argv[1:]
config = dpo.Config.model_validate_json(config)
anyio.run(lambda: dpo.train(config, where=Where(url, key), on_step=kill))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="kill -9")
async def test_a_killed_process_goes_on_in_another(data: Path) -> None:
    config = settings(dpo, data, dcp_save_interval=2, epochs=3, pipeline_depth=3)
    async with launch() as local:
        where = Where(local.base_url, local.api_key)
        whole = settings(dpo, data, "whole", dcp_save_interval=2, epochs=3, pipeline_depth=3)
        await dpo.train(whole, where=where)
        command = [sys.executable, "-c", KILLED, local.base_url, local.api_key, config.model_dump_json()]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=200)  # noqa: ASYNC221
        assert done.returncode == -signal.SIGKILL, done.stderr
        entries = await CheckpointLedger(config.log_path).entries()
        assert [entry.step for entry in entries][:2] == [2, 4]
        await dpo.train(config, where=where)
        assert outcome(local, config.log_path) == outcome(local, whole.log_path)


async def test_a_stop_is_kept_and_other_weights_can_be_begun_from(data: Path) -> None:
    stop = StopRequest()
    async with launch() as local:
        where = Where(local.base_url, local.api_key)
        judged: list[int] = []

        async def judge(step: int, client: Any) -> dict[str, float]:
            judged.append(step)
            return {"eval/mine": 1.0}

        config = settings(dpo, data, pipeline_depth=1)
        first = await dpo.train(
            config, where=where, stop=stop, on_step=lambda step, _: stop.request("enough") if step == 2 else None
        )
        assert first.stopped == "enough"
        assert first.checkpoint is not None
        assert first.steps == 2
        second = await dpo.train(config, where=where, evaluate=judge)
        assert (second.steps, second.stopped, judged) == (8, None, [4, 8])
        assert second.checkpoint is not None
        assert second.checkpoint.sampler_path
        assert second.checkpoint.state_path
        assert (await dpo.train(config, where=where)).checkpoint == second.checkpoint
        other = settings(dpo, data, "other", init_from_checkpoint=second.checkpoint.state_path)
        await dpo.train(other, where=where)
    # The reference is the base model, not what the run begins from.
    assert records(other.log_path)[0]["train/margin"] > 3


async def test_a_reference_that_fails_ends_the_run(data: Path) -> None:
    async with local_service() as local:
        where = Where(local.base_url, local.api_key)
        # The first forward is the reference's: those of the policy wait for it.
        await local.set_faults(FaultPlan([Fault(FailOperation(message="no memory"), "forward", nth=1)]))
        with pytest.raises(OperationFailedError, match="no memory"):
            await dpo.train(settings(dpo, data, ref_cache_concurrency=2), where=where)


# -- trainer jobs --------------------------------------------------------------------------------------------


async def jobs(local: LocalService) -> list[str]:
    async with AsyncFireworksClient(local.base_url, local.api_key) as fireworks:
        return [job.job_id async for job in AsyncTrainerJobManager(fireworks).list() if job.state == "RUNNING"]


@pytest.mark.parametrize("rank", [0, 4])
async def test_dpo_on_trainer_jobs_releases_its_reference_and_is_promoted(data: Path, rank: int) -> None:
    running: list[int] = []
    runner = {"status_file": data.parent / "status.json", "output_model_path": data.parent / "model.json"}
    async with launch() as local:
        infra = {"training_shape_id": SHAPE, **({} if rank else {"ref_training_shape_id": SHAPE})}
        named = {"tokenizer_model": str(local.data_dir / "tokenizer"), "base_model": BASE, "infra": infra}
        config = settings(dpo, data, lora_rank=rank, output_model_id="mine", runner=runner, epochs=4, **named)
        whole = settings(dpo, data, "whole", lora_rank=rank, epochs=4)

        async def count(step: int, metrics: Any) -> None:
            running.append(len(await jobs(local)))

        where = Where(local.base_url, local.api_key)
        result = await dpo.train(config, where=where, on_step=count)
        assert running[-1] == 1
        assert await jobs(local) == []
        async with AsyncFireworksClient(local.base_url, local.api_key) as fireworks:
            assert (await fireworks.get_model("accounts/local/models/mine")).name.endswith("/mine")
        await dpo.train(whole, where=where)
    losses = [[record["train/dpo_loss"] for record in records(path)] for path in (config.log_path, whole.log_path)]
    assert losses[0] == losses[1]
    told = json.loads((data.parent / "model.json").read_text())
    assert told == {"model_id": "mine", "checkpoint": "step-16", "job_id": result.job_id}
    assert json.loads((data.parent / "status.json").read_text())["status"] == "completed"


async def test_trainer_jobs_that_are_there_are_used_and_stay(data: Path) -> None:
    async with launch() as local:
        async with AsyncFireworksClient(local.base_url, local.api_key) as fireworks:
            manager = AsyncTrainerJobManager(fireworks)
            for job_id, forward_only in (("mine", False), ("my-reference", True)):
                await manager.create(
                    TrainerJobConfig(
                        base_model=BASE, training_shape_ref=SHAPE, forward_only=forward_only, requested_job_id=job_id
                    )
                )
                await manager.wait_for_ready(job_id)
        config = settings(
            dpo,
            data,
            job_id="mine",
            reference_job_id="my-reference",
            infra={"training_shape_id": SHAPE, "ref_training_shape_id": SHAPE},
            base_model=BASE,
            tokenizer_model=str(local.data_dir / "tokenizer"),
        )
        result = await dpo.train(config, where=Where(local.base_url, local.api_key))
        assert (result.steps, result.job_id) == (8, "mine")
        assert sorted(await jobs(local)) == ["mine", "my-reference"]
    (entry,) = await CheckpointLedger(config.log_path).entries()
    assert entry.state_path == "cross_job://mine/step-8"


async def test_weights_reach_a_deployment_and_what_is_not_ours_stays(data: Path) -> None:
    served: list[str | None] = []
    async with launch() as local:
        async with AsyncFireworksClient(local.base_url, local.api_key) as fireworks:
            deployments = AsyncDeploymentManager(fireworks)
            named = {"tokenizer_model": str(local.data_dir / "tokenizer"), "base_model": BASE}
            config = settings(
                dpo,
                data,
                infra={"training_shape_id": SHAPE},
                lora_rank=4,
                weight_sync={"weight_sync_interval": 3},
                deployment=DeployConfig(deployment_id="mine"),
                **named,
            )

            async def look(step: int, metrics: Any) -> None:
                assert (await deployments.get("mine")).deployment_id == "mine"
                served.append("perf/weight_sync_time" in metrics)

            await dpo.train(config, where=Where(local.base_url, local.api_key), on_step=look)
            with pytest.raises(NotFoundError):
                await deployments.get("mine")
    assert served == [False, False, True, False, False, True, False, True]


async def test_weights_of_the_last_step_get_there_when_a_run_goes_on(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    save_and_hotload = AsyncWeightSyncer.save_and_hotload

    async def fails_once(syncer: AsyncWeightSyncer, name: str, *args: Any, **options: Any) -> Any:
        names.append(name)
        if len(names) == 1:
            raise HotLoadFailedError("no memory")
        return await save_and_hotload(syncer, name, *args, **options)

    monkeypatch.setattr(AsyncWeightSyncer, "save_and_hotload", fails_once)
    async with launch() as local:
        config = settings(
            dpo,
            data,
            infra={"training_shape_id": SHAPE},
            lora_rank=4,
            max_steps=2,
            weight_sync={"weight_sync_interval": 3},
            tokenizer_model=str(local.data_dir / "tokenizer"),
            base_model=BASE,
        )
        where = Where(local.base_url, local.api_key)
        with pytest.raises(HotLoadFailedError):
            await dpo.train(config, where=where)
        result = await dpo.train(config, where=where)
    assert (result.steps, names) == (2, ["final-step-2", "final-step-2"])
