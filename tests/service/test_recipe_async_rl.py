"""Async RL on the local service, whole: it learns within its bound, and goes on where it was killed."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anyio
import pytest

from fwasync import Rollout, RolloutContext
from fwasync.checkpoints.ledger import CheckpointLedger
from fwasync.data.prompts import PromptRow
from fwasync.errors import DatasetError, UsageError
from fwasync.local import launch
from fwasync.losses import POLICY_LOSSES
from fwasync.recipes import async_rl
from fwasync.recipes.groups import TakenRow
from fwasync.recipes.serving import ServedPolicy
from fwasync.recipes.stopping import StopRequest
from fwasync.recipes.trainers import Where
from service.control_client import BASE, SHAPE
from service.test_recipe_rl import ROWS, records, reward, weights, without_times, write_prompts
from service.test_recipe_rl import settings as alternating


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_prompts(tmp_path)


def settings(tmp_path: Path, **more: Any) -> async_rl.Config:
    given = alternating(tmp_path).model_dump(exclude_unset=True)
    return async_rl.Config.model_validate(
        {**given, "max_head_offpolicy_versions": 1, "pipeline_chunks_per_step": 2, **more}
    )


def trained_rows(directory: Path) -> Counter[int]:
    """How often the row of each line was trained on, by the files of answers."""
    counts: Counter[int] = Counter()
    for file in directory.iterdir():
        lines = map(json.loads, file.read_text().splitlines())
        counts.update({(line["prompt_group"], line["line"]): line for line in lines}.keys())
    return Counter(line for _, line in counts.elements())


@pytest.mark.parametrize("way", ["a service", "a deployment"])
async def test_it_learns_and_never_beyond_the_bound(tmp_path: Path, data: Path, way: str) -> None:
    deployed = way == "a deployment"
    bound = 1 if deployed else 2
    more: dict[str, Any] = {"epochs": 4, "max_head_offpolicy_versions": bound}
    if deployed:
        more |= {"base_model": BASE, "infra": {"training_shape_id": SHAPE}, "output_model_id": "mine"}
    async with launch() as local:
        where = Where(local.base_url, local.api_key)
        if deployed:
            more["tokenizer_model"] = str(local.data_dir / "tokenizer")
        result = await async_rl.train(settings(tmp_path, **more), reward=reward, where=where)
    found = records(tmp_path / "run")
    assert len(found) == result.steps
    rewards = [record["rollout/raw_reward"] for record in found]
    assert sum(rewards[:3]) * 2 < sum(rewards[-3:])
    staleness = [record["version/sample_staleness_max"] for record in found]
    assert max(staleness) == max(record["async/version_offset_max"] for record in found) == bound
    assert found[0]["train/inference_diff"] < 1e-3  # the first batch is of the weights that learn
    assert all(record["async/realized_training_chunks"] == 2 for record in found[:-1])
    assert (result.rows.sampled, result.rows.failed) == (4 * ROWS, 0)
    assert (result.job_id is not None) == deployed


@pytest.mark.parametrize("loss", POLICY_LOSSES)
async def test_every_loss_trains_on_stale_samples(tmp_path: Path, data: Path, loss: str) -> None:
    async with launch() as local:
        where = Where(local.base_url, local.api_key)
        result = await async_rl.train(settings(tmp_path, policy_loss=loss, max_steps=3), reward=reward, where=where)
    found = records(tmp_path / "run")
    assert result.steps == len(found) == 3
    assert all(record["train/grad_norm"] > 0 for record in found)
    if loss == "decoupled":
        alphas = [record["train/decoupled/alpha"] for record in found]
        assert alphas == [0, 0, 0]  # one version behind, the nearer policy is the one that sampled


async def test_turns_know_the_version_that_sampled_them(tmp_path: Path, data: Path) -> None:
    """A conversation that is in flight when weights are published goes on with the newer ones."""
    seen: list[tuple[int, ...]] = []
    published = anyio.Event()

    async def rollout(prompt: TakenRow, ctx: RolloutContext) -> Rollout:
        session = ctx.session()
        session.append(prompt.prompt_tokens)
        await session.sample(max_tokens=3)
        if ctx.version == 0 and ctx.row_index >= 4:  # ahead of the first batch
            await published.wait()
        session.append([10])
        turn = await session.sample(max_tokens=3)
        done = session.rollout(reward(turn.text, prompt.row))
        (segment,) = done.segments
        seen.append(tuple(sorted(set(segment.versions[segment.mask].tolist()))))
        return done

    def on_step(step: int, metrics: Mapping[str, float]) -> None:
        published.set()

    async with launch() as local:
        config = settings(tmp_path, max_steps=2, max_head_offpolicy_versions=1, pipeline_chunks_per_step=1)
        where = Where(local.base_url, local.api_key)
        await async_rl.train(config, rollout=rollout, where=where, on_step=on_step, keep=lambda group: True)
    assert seen.count((0,)) >= 4 * 6
    assert (0, 1) in seen
    first, second = records(tmp_path / "run")
    assert (first["async/version_offset_max"], second["async/version_offset_max"]) == (0, 1)
    assert first["train/active_tokens"] < first["train/step_tokens"]


MORTAL = """
import os, signal, sys
sys.modules.update(torch=None, transformers=None)  # which take long to import, and are not needed
import anyio
from fwasync.recipes import async_rl
from fwasync.recipes.trainers import Where
from service.test_recipe_rl import reward

def die(step, metrics):
    if step == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)

config = async_rl.Config.model_validate_json(sys.argv[3])
where = Where(sys.argv[1], sys.argv[2])
anyio.run(lambda: async_rl.train(config, reward=reward, where=where, on_step=die))
"""


async def kill_at(step: int, config: async_rl.Config, where: Where) -> None:
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    command = [sys.executable, "-c", MORTAL, str(where.base_url), str(where.api_key)]
    killed = await anyio.run_process(
        [*command, config.model_dump_json(exclude_unset=True), str(step)],
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    assert killed.returncode == -9, killed.stderr.decode()


@pytest.mark.skipif(sys.platform == "win32", reason="kill -9")
async def test_killed_on_policy_it_ends_as_if_nothing_had_been(tmp_path: Path, data: Path) -> None:
    # Groups of two have often the same reward, and are replaced.
    more: dict[str, Any] = {
        "completions_per_prompt": 2,
        "dcp_save_interval": 2,
        "epochs": 3,
        "max_steps": 7,
        "max_head_offpolicy_versions": 0,
        "pipeline_chunks_per_step": 1,
    }
    async with launch() as local:
        where = Where(local.base_url, local.api_key)
        whole_config, config = settings(tmp_path, log_path=tmp_path / "whole", **more), settings(tmp_path, **more)
        whole = await async_rl.train(whole_config, reward=reward, where=where)
        assert whole.steps == 7
        assert whole.rows.filtered > 0
        for dies_at in (3, 5):
            await kill_at(dies_at, config, where)
        assert (await CheckpointLedger(config.log_path).entries())[-1].step == 4
        again = await async_rl.train(config, reward=reward, where=where)
        assert (again.steps, again.rows) == (whole.steps, whole.rows)
        assert learnt(config.log_path) == learnt(tmp_path / "whole")
        assert whole.checkpoint is not None
        assert again.checkpoint is not None
        assert again.checkpoint.data_consumed == whole.checkpoint.data_consumed
        assert again.checkpoint.extra == whole.checkpoint.extra
        assert weights(local, again.checkpoint.state_path or "") == weights(local, whole.checkpoint.state_path or "")
        finished = await async_rl.train(config, reward=reward, where=where)
        assert (finished.steps, finished.rows, finished.checkpoint) == (7, whole.rows, again.checkpoint)


def learnt(log_path: Path) -> list[dict[str, Any]]:
    """What was logged, without what depends on the time or is of one process."""
    timely = ("producer/", "async/", "rollout/in_flight", "rollout/queue_time", "rollout/raw_samples")
    return [
        {name: value for name, value in record.items() if not name.startswith(timely)}
        for record in without_times(log_path)
    ]


@pytest.mark.skipif(sys.platform == "win32", reason="kill -9")
async def test_killed_while_it_samples_ahead_no_row_is_lost_or_trained_twice(tmp_path: Path, data: Path) -> None:
    more = {"dcp_save_interval": 1, "max_head_offpolicy_versions": 2, "trajectory_dir": tmp_path / "answers"}
    async with launch() as local:
        where, config = Where(local.base_url, local.api_key), settings(tmp_path, **more)
        for dies_at in (1, 3):
            await kill_at(dies_at, config, where)
        result = await async_rl.train(config, reward=reward, where=where)
    assert result.rows.sampled == ROWS
    trained = trained_rows(tmp_path / "answers")
    assert set(trained.values()) == {1}
    assert len(trained) == result.rows.kept
    assert result.checkpoint is not None
    assert result.checkpoint.data_consumed == ROWS
    found = records(tmp_path / "run")
    assert [record["step"] for record in found] == list(range(1, result.steps + 1))
    assert max(record["version/sample_staleness_max"] for record in found) <= 2


async def test_a_stop_is_an_end_and_evaluations_see_what_was_published(tmp_path: Path, data: Path) -> None:
    judged: list[tuple[int, int | None]] = []
    stop = StopRequest()

    async def judge(step: int, policy: ServedPolicy) -> dict[str, float]:
        judged.append((step, policy.version))
        (answer,) = await policy.sample_with_prompt_tokens([65], max_tokens=4, temperature=0.0)
        return {"eval/length": len(answer.completion_tokens)}

    def at_two(step: int, metrics: Mapping[str, float]) -> None:
        if step == 2:
            stop.request("enough")

    jobs: dict[str, Any] = {"base_model": BASE, "infra": {"training_shape_id": SHAPE}}
    runner = {"status_file": tmp_path / "status.json"}
    async with launch() as local:
        where = Where(local.base_url, local.api_key)
        jobs["tokenizer_model"] = str(local.data_dir / "tokenizer")
        config = settings(tmp_path, max_steps=4, evaluation_interval=2, runner=runner, **jobs)
        first = await async_rl.train(config, reward=reward, where=where, stop=stop, on_step=at_two, evaluate=judge)
        assert (first.steps, first.stopped) == (2, "enough")
        assert json.loads((tmp_path / "status.json").read_text())["error"] == "stopped: enough"
        last = await async_rl.train(config, reward=reward, where=where, evaluate=judge)
    assert first.job_id != last.job_id
    assert last.steps == 4
    assert judged == [(0, 0), (2, 2), (4, 4)]
    found = records(tmp_path / "run")
    assert [record["step"] for record in found] == [0, 1, 2, 3, 4]
    assert [record.get("eval/length") for record in found] == [4, None, 4, None, 4]
    assert json.loads((tmp_path / "status.json").read_text())["status"] == "completed"


async def test_a_stop_does_not_wait_for_rollouts(tmp_path: Path, data: Path) -> None:
    stop = StopRequest()
    window = 2 * 4 * 6
    began = 0

    async def rollout(prompt: TakenRow, ctx: RolloutContext) -> Rollout:
        nonlocal began
        began += 1
        if began == window:
            stop.request("enough")
        await anyio.sleep_forever()
        raise AssertionError

    async with launch() as local:
        where = Where(local.base_url, local.api_key)
        with anyio.fail_after(200):
            result = await async_rl.train(settings(tmp_path), rollout=rollout, where=where, stop=stop)
    assert (result.steps, result.stopped, result.checkpoint) == (0, "enough", None)
    assert began == window


async def test_a_reference_holds_the_policy(tmp_path: Path, data: Path) -> None:
    distances: list[float] = []
    async with launch() as local:
        for beta in (1e-6, 5.0):
            log_path = tmp_path / str(beta)
            config = settings(tmp_path, log_path=log_path, kl_beta=beta, max_steps=12, epochs=5)
            await async_rl.train(config, reward=reward, where=Where(local.base_url, local.api_key))
            distances.append(records(log_path)[-1]["train/ref_kl"])
    assert distances[1] < distances[0] / 2


async def test_what_cannot_be_done_is_refused_before_anything_starts(tmp_path: Path, data: Path) -> None:
    nowhere = Where("http://127.0.0.1:9", "key")
    with pytest.raises(UsageError, match="either a reward, or a rollout"):
        await async_rl.train(settings(tmp_path), where=nowhere)
    refused = {
        "pipeline_chunks_per_step": 5,
        "max_concurrency_rollout_sample": 5,
        "min_group_size": 7,
        "weight_sync": {"weight_sync_interval": 2},
    }
    with pytest.raises(UsageError) as error:
        await async_rl.train(settings(tmp_path, **refused), reward=reward, where=nowhere)
    assert all(name in str(error.value) for name in refused)
    assert not (tmp_path / "run").exists()


async def test_rewards_that_never_differ_are_an_error_and_no_training(tmp_path: Path, data: Path) -> None:
    def always(text: str, row: PromptRow) -> float:
        return 1.0

    async with launch() as local:
        with pytest.raises(DatasetError, match="nothing was trained: 24 sampled, 0 kept, 24 filtered, 0 failed"):
            await async_rl.train(settings(tmp_path), reward=always, where=Where(local.base_url, local.api_key))
    assert records(tmp_path / "run") == []
