"""RL on the local service, whole: it learns in both ways and with every loss, and goes on where it was killed."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest

from fwasync import AsyncFireworksClient, AsyncServiceClient
from fwasync.checkpoints.ledger import CheckpointLedger
from fwasync.data.prompts import PromptRow
from fwasync.errors import DatasetError
from fwasync.local import LocalService, launch
from fwasync.losses import POLICY_LOSSES
from fwasync.recipes import rl
from fwasync.recipes.serving import ServedPolicy
from fwasync.recipes.stopping import StopRequest
from fwasync.recipes.trainers import Where
from service.control_client import BASE, SHAPE

ROWS = 24
TOKENS = 6


def reward(text: str, row: PromptRow) -> float:
    """The part of an answer's tokens that are lower-case letters."""
    return sum("a" <= letter <= "z" for letter in text) / TOKENS


def write_prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{"messages": [{"role": "user", "content": str(row)}], "ground_truth": row} for row in range(ROWS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_prompts(tmp_path)


def settings(tmp_path: Path, **more: Any) -> rl.Config:
    given = {
        "log_path": tmp_path / "run",
        "dataset": str(tmp_path / "prompts.jsonl"),
        "base_model": "fwasync/qwen3-tiny",
        "learning_rate": 3e-3,
        "adam": "fast",
        "prompt_groups_per_step": 4,
        "completions_per_prompt": 6,
        "max_completion_tokens": TOKENS,
        "kl_beta": 0,
    }
    return rl.Config.model_validate({**given, **more})


def records(log_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (log_path / "metrics.jsonl").read_text().splitlines()]


def without_times(log_path: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in record.items() if name != "time_s" and not name.startswith("perf/")}
        for record in records(log_path)
    ]


def weights(local: LocalService, state_path: str) -> dict[str, bytes]:
    """Weights and optimizer of a checkpoint, as they lie on the disk."""
    model_id, _, name = state_path.removeprefix("tinker://").partition("/weights/")
    directory = local.data_dir / "weights" / model_id.replace(":", "~") / name
    return {file.name: file.read_bytes() for file in directory.iterdir() if file.name != "notes.json"}


@pytest.mark.parametrize("way", ["a service", "a deployment"])
async def test_it_learns(tmp_path: Path, data: Path, way: str) -> None:
    deployed = way == "a deployment"
    more: dict[str, Any] = {"anchor_logp": "rollout", "epochs": 4}
    if deployed:
        runner = {"output_model_path": tmp_path / "model.json"}
        more |= {"base_model": BASE, "infra": {"training_shape_id": SHAPE}, "output_model_id": "mine", "runner": runner}
    async with launch() as local:
        if deployed:
            more["deployment"] = {"tokenizer_model": str(local.data_dir / "tokenizer")}
        result = await rl.train(settings(tmp_path, **more), reward=reward, where=Where(local.base_url, local.api_key))
        async with AsyncFireworksClient(local.base_url, local.api_key) as fireworks:
            models = [model.name async for model in fireworks.list_models()]
    found = records(tmp_path / "run")
    assert len(found) == result.steps <= 24
    rewards = [record["rollout/raw_reward"] for record in found]
    assert sum(rewards[:3]) * 2 < sum(rewards[-3:])
    for record in found:
        assert record["version/sample_staleness_max"] == 0
        assert record["train/inference_diff"] < 1e-3  # what was sampled are the weights that learn
    assert (result.rows.sampled, result.rows.failed) == (4 * ROWS, 0)
    assert models == (["accounts/local/models/mine"] if deployed else [])
    assert (result.job_id is not None) == deployed
    assert (tmp_path / "model.json").exists() == deployed


@pytest.mark.parametrize("loss", POLICY_LOSSES)
async def test_every_loss_trains(tmp_path: Path, data: Path, loss: str) -> None:
    config = settings(tmp_path, policy_loss=loss, max_steps=3)
    async with launch() as local:
        result = await rl.train(config, reward=reward, where=Where(local.base_url, local.api_key))
    found = records(tmp_path / "run")
    assert result.steps == len(found) == 3
    assert all(record["train/grad_norm"] > 0 for record in found)
    assert abs(found[0]["train/inference_diff"]) < 1e-3
    # Of the custom path alone, as its losses tell more.
    assert ("train/mask_ratio" in found[0]) == (loss in ("reinforce", "decoupled"))


async def test_both_paths_and_both_anchors_take_the_same_first_step(tmp_path: Path, data: Path) -> None:
    norms: list[float] = []
    async with launch() as local:
        for path in ("builtin", "custom"):
            for anchor in ("old_policy", "rollout"):
                log_path = tmp_path / f"{path}-{anchor}"
                config = settings(tmp_path, log_path=log_path, loss_path=path, anchor_logp=anchor, max_steps=1)
                await rl.train(config, reward=reward, where=Where(local.base_url, local.api_key))
                norms.append(records(log_path)[0]["train/grad_norm"])
    assert norms == pytest.approx([norms[0]] * 4, rel=1e-4)


async def test_a_reference_holds_the_policy(tmp_path: Path, data: Path) -> None:
    distances: list[float] = []
    async with launch() as local:
        for beta in (1e-6, 5.0):
            log_path = tmp_path / str(beta)
            config = settings(tmp_path, log_path=log_path, kl_beta=beta, max_steps=12, epochs=5)
            await rl.train(config, reward=reward, where=Where(local.base_url, local.api_key))
            found = records(log_path)
            assert found[0]["train/ref_kl"] == pytest.approx(0, abs=1e-6)
            distances.append(found[-1]["train/ref_kl"])
    assert distances[1] < distances[0] / 2


MORTAL = """
import json, os, signal, sys
sys.modules.update(torch=None, transformers=None)  # which take long to import, and are not needed
import anyio
from fwasync.recipes import rl
from fwasync.recipes.trainers import Where
from service.test_recipe_rl import reward

def die(step, metrics):
    if step == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)

config = rl.Config.model_validate_json(sys.argv[3])
where = Where(sys.argv[1], sys.argv[2])
anyio.run(lambda: rl.train(config, reward=reward, where=where, on_step=die))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="kill -9")
async def test_killed_and_started_again_it_ends_as_if_nothing_had_been(tmp_path: Path, data: Path) -> None:
    # Groups of two have often the same reward, and are refilled: the cursor is not steps times groups.
    more = {"completions_per_prompt": 2, "dcp_save_interval": 2, "epochs": 3, "max_steps": 7}
    async with launch() as local:
        where = Where(local.base_url, local.api_key)
        whole = await rl.train(settings(tmp_path, log_path=tmp_path / "whole", **more), reward=reward, where=where)
        assert whole.steps == 7
        assert whole.rows.filtered > 0
        config = settings(tmp_path, **more)
        path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
        for dies_at in (3, 5):
            command = [sys.executable, "-c", MORTAL, local.base_url, local.api_key]
            killed = await anyio.run_process(
                [*command, config.model_dump_json(exclude_unset=True), str(dies_at)],
                env={**os.environ, "PYTHONPATH": path},
                check=False,
            )
            assert killed.returncode == -9, killed.stderr.decode()
        assert (await CheckpointLedger(config.log_path).entries())[-1].step == 4
        again = await rl.train(config, reward=reward, where=where)
        assert (again.steps, again.rows) == (whole.steps, whole.rows)
        assert without_times(config.log_path) == without_times(tmp_path / "whole")
        assert whole.checkpoint is not None
        assert again.checkpoint is not None
        assert again.checkpoint.data_consumed == whole.checkpoint.data_consumed
        assert again.checkpoint.extra == whole.checkpoint.extra
        assert weights(local, again.checkpoint.state_path or "") == weights(local, whole.checkpoint.state_path or "")
        finished = await rl.train(config, reward=reward, where=where)
        assert (finished.steps, finished.rows, finished.checkpoint) == (7, whole.rows, again.checkpoint)


async def test_on_a_new_trainer_job_it_goes_on_with_the_weights_that_it_had(tmp_path: Path, data: Path) -> None:
    jobs: dict[str, Any] = {"base_model": BASE, "infra": {"training_shape_id": SHAPE}, "dcp_save_interval": 1}
    stop = StopRequest()
    judged: list[tuple[int, int | None]] = []

    async def judge(step: int, policy: ServedPolicy) -> dict[str, float]:
        judged.append((step, policy.version))
        (answer,) = await policy.sample_with_prompt_tokens([65], max_tokens=4, temperature=0.0)
        return {"eval/length": len(answer.completion_tokens)}

    async with launch() as local:
        where = Where(local.base_url, local.api_key)
        jobs["tokenizer_model"] = str(local.data_dir / "tokenizer")
        config = settings(tmp_path, max_steps=4, evaluation_interval=2, trajectory_dir=tmp_path / "answers", **jobs)
        first = await rl.train(
            config, reward=reward, where=where, stop=stop, on_step=lambda step, metrics: stop.request("enough")
        )
        assert (first.steps, first.stopped) == (1, "enough")
        last = await rl.train(config, reward=reward, where=where, evaluate=judge)
    assert first.job_id != last.job_id
    assert last.steps == 4
    assert judged == [(2, 2), (4, 4)]
    found = records(tmp_path / "run")
    assert [record["step"] for record in found] == [1, 2, 3, 4]
    assert all(record["train/inference_diff"] < 1e-3 for record in found)
    assert found[3]["eval/length"] == 4
    files = sorted((tmp_path / "answers").iterdir())
    assert [file.name for file in files] == [f"step_{step:04d}.jsonl" for step in range(1, 5)]
    lines = [json.loads(line) for line in files[2].read_text().splitlines()]
    assert len(lines) == 4 * 6
    assert {line["prompt_group"] for line in lines} == set(range(4))
    assert lines[0]["reward"] == reward(lines[0]["completion"], PromptRow((), None, {}, 1))
    assert all(int(line["prompt"][0]["content"]) == line["ground_truth"] == line["line"] - 1 for line in lines)


async def test_rewards_that_never_differ_are_an_error_and_no_training(tmp_path: Path, data: Path) -> None:
    async with launch() as local:
        with pytest.raises(DatasetError, match="nothing was trained: 24 sampled, 0 kept, 24 filtered, 0 failed"):
            await rl.train(settings(tmp_path), reward=lambda text, row: 1.0, where=Where(local.base_url, local.api_key))
    assert records(tmp_path / "run") == []


async def test_an_open_service_is_used_as_it_is(tmp_path: Path, data: Path) -> None:
    async def judge(text: str, row: PromptRow) -> float:
        return reward(text, row)

    async with launch() as local, AsyncServiceClient(local.base_url, local.api_key) as service:
        config = settings(tmp_path, max_steps=2, lora_rank=4, concurrency={"mode": "adaptive", "initial_window": 2})
        result = await rl.train(config, reward=judge, where=Where(service=service))
    assert result.steps == 2
    assert records(tmp_path / "run")[0]["concurrency/window"] >= 2
