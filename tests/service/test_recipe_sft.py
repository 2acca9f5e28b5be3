"""SFT on the local service, whole: it learns, it goes on, and on trainer jobs its model is promoted."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest

from fwasync import (
    AsyncDeploymentManager,
    AsyncFireworksClient,
    AsyncServiceClient,
    AsyncTrainerJobManager,
    DeployConfig,
    InfraConfig,
    TrainerJobConfig,
    types,
)
from fwasync.checkpoints.ledger import CheckpointLedger
from fwasync.errors import OperationFailedError, RunDirectoryError, UsageError
from fwasync.local import LocalService, launch
from fwasync.recipes import sft
from fwasync.recipes.stopping import StopRequest
from fwasync.recipes.trainers import Where
from fwasync.tracking.run import open_run

SHAPE = "accounts/fwasync/trainingShapes/qwen3-tiny"
BASE = "accounts/fwasync/models/qwen3-tiny"


def write_rows(path: Path, factor: int) -> Path:
    pairs = [(str(number), str(number * factor % 10)) for number in range(10)]
    rows = [{"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "data.jsonl", 7)


def settings(tmp_path: Path, **more: Any) -> sft.Config:
    given = {
        "log_path": tmp_path / "run",
        "dataset": str(tmp_path / "data.jsonl"),
        "base_model": "fwasync/qwen3-tiny",
        "learning_rate": 3e-3,
        "batch_size": 5,
        "epochs": 2,
    }
    return sft.Config.model_validate({**given, **more})


def losses(log_path: Path) -> list[float]:
    return [json.loads(line)["train/ce_loss"] for line in (log_path / "metrics.jsonl").read_text().splitlines()]


async def test_it_learns(tmp_path: Path, data: Path) -> None:
    schedule = {"type": "cosine", "warmup_steps": 5}
    config = settings(tmp_path, epochs=30, lr_scheduler=schedule, adam="fast", evaluation_dataset=str(data))
    async with launch() as local:
        await sft.train(config, where=Where(local.base_url, local.api_key))
    found = losses(config.log_path)
    assert len(found) == 60
    assert 3 * found[-1] < found[0]
    last = json.loads((config.log_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["eval/loss"] == pytest.approx(last["train/ce_loss"], abs=0.3)


async def test_a_run_goes_on_with_more_passes_and_refuses_other_rows(tmp_path: Path, data: Path) -> None:
    async with launch() as local:
        where = Where(local.base_url, local.api_key)
        whole = await sft.train(settings(tmp_path, log_path=tmp_path / "whole", epochs=3), where=where)
        first = await sft.train(settings(tmp_path), where=where)
        again = await sft.train(settings(tmp_path), where=where)
        assert (again.steps, again.checkpoint) == (4, first.checkpoint)
        stopped = settings(tmp_path, log_path=tmp_path / "stopped", pipeline_depth=1)
        stop = StopRequest()
        half = await sft.train(stopped, where=where, stop=stop, on_step=lambda step, metrics: stop.request())
        assert half.stopped == "asked to stop"
        ended = await sft.train(stopped.model_copy(update={"max_steps": half.steps}), where=where)
        assert (ended.steps, half.checkpoint.sampler_path) == (half.steps, None)
        assert ended.checkpoint.sampler_path is not None
        assert (await sft.train(settings(tmp_path, epochs=3), where=where)).steps == whole.steps == 6
        assert losses(tmp_path / "run") == losses(tmp_path / "whole")
        write_rows(data, 3)
        with pytest.raises(UsageError, match=r"is not what it was when .*/run was begun .* as init_from_checkpoint"):
            await sft.train(settings(tmp_path, epochs=4), where=where)
        other = settings(tmp_path, log_path=tmp_path / "other", init_from_checkpoint=first.checkpoint.state_path)
        result = await sft.train(other, where=where)
    assert (result.steps, result.checkpoint.data_consumed) == (4, 20)
    assert result.checkpoint.extra["init_from_checkpoint"] == first.checkpoint.state_path
    assert losses(tmp_path / "other")[0] < losses(tmp_path / "run")[0]


async def test_a_directory_that_was_moved_goes_on_and_says_so(
    tmp_path: Path, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with launch() as local:
        where = Where(local.base_url, local.api_key)
        await sft.train(settings(tmp_path), where=where)
        (tmp_path / "run").rename(tmp_path / "moved")
        result = await sft.train(settings(tmp_path, log_path=tmp_path / "moved", epochs=3), where=where)
    assert result.steps == 6
    assert f'log_path "{tmp_path}/run" → "{tmp_path}/moved"' in caplog.text


async def test_a_run_in_use_is_refused(tmp_path: Path, data: Path) -> None:
    config = settings(tmp_path)
    async with open_run(config.log_path, config={}):
        with pytest.raises(RunDirectoryError, match="is in use by process"):
            await sft.train(config, where=Where("http://127.0.0.1:9", "k"))


async def test_a_checkpoint_that_is_gone_is_told(tmp_path: Path, data: Path) -> None:
    config = settings(tmp_path)
    config.log_path.mkdir()
    line = {"name": "step-2", "step": 2, "data_consumed": 10, "state_path": "tinker://gone:train:0/weights/step-2"}
    (config.log_path / "checkpoints.jsonl").write_text(json.dumps(line) + "\n")
    async with launch() as local:
        with pytest.raises(OperationFailedError, match="there is no checkpoint tinker://gone"):
            await sft.train(config, where=Where(local.base_url, local.api_key))


# -- trainer jobs --------------------------------------------------------------------------------------------


async def test_a_run_on_trainer_jobs_goes_on_in_another_one_and_is_promoted(tmp_path: Path, data: Path) -> None:
    runner = {"status_file": tmp_path / "status.json", "output_model_path": tmp_path / "model.json"}
    jobs: dict[str, Any] = {"base_model": BASE, "infra": {"training_shape_id": SHAPE}, "runner": runner}
    async with launch() as local:
        jobs["tokenizer_model"] = str(local.data_dir / "tokenizer")
        where = Where(local.base_url, local.api_key)
        whole = await sft.train(settings(tmp_path, log_path=tmp_path / "whole", epochs=3), where=where)
        first = await sft.train(settings(tmp_path, **jobs), where=where)
        assert not (tmp_path / "model.json").exists()
        last = await sft.train(settings(tmp_path, **jobs, epochs=3, output_model_id="mine"), where=where)
        async with AsyncFireworksClient(local.base_url, local.api_key) as fireworks:
            model = await fireworks.get_model("accounts/local/models/mine")
    assert first.job_id != last.job_id
    assert first.checkpoint.state_path == f"cross_job://{first.job_id}/step-4"
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert model.name == "accounts/local/models/mine"
    told = json.loads((tmp_path / "model.json").read_text())
    assert told == {"model_id": "mine", "checkpoint": "step-6", "job_id": last.job_id}
    assert json.loads((tmp_path / "status.json").read_text()) == {
        "status": "completed",
        "step": 6,
        "total_steps": 6,
        "progress": 1.0,
    }
    entries = await CheckpointLedger(tmp_path / "run").entries()
    assert [entry.step for entry in entries] == [4, 6]
    assert whole.steps == 6


async def test_a_trainer_job_that_a_killed_process_left_is_told(tmp_path: Path, data: Path) -> None:
    config = settings(tmp_path, base_model=BASE, infra={"training_shape_id": SHAPE})
    said: list[str] = []
    async with launch() as local, AsyncFireworksClient(local.base_url, local.api_key) as fireworks:
        where, jobs = Where(local.base_url, local.api_key), AsyncTrainerJobManager(fireworks)
        await jobs.create(TrainerJobConfig(base_model=BASE, training_shape_ref=SHAPE, requested_job_id="left"))
        endpoint = await jobs.wait_for_ready("left")
        async with AsyncServiceClient(endpoint.base_url, local.api_key) as service:
            async with service.create_training_client(BASE, 0) as client:
                await client.save_state("step-1")
        for _ in range(2):
            async with where.open(config, start="cross_job://left/step-1", tell=said.append) as trainers:
                assert trainers.job_id != "left"
            await jobs.delete("left")
    told = (
        "trainer job left, which saved cross_job://left/step-1, is still running: delete it, unless another run uses it"
    )
    assert [text for text in said if "left" in text] == [told]


async def test_a_failed_run_leaves_no_trainer_and_says_so(tmp_path: Path, data: Path) -> None:
    runner = {"status_file": tmp_path / "status.json"}
    infra = {"training_shape_id": SHAPE}
    config = settings(tmp_path, base_model=BASE, infra=infra, runner=runner, init_from_checkpoint="nobody:step-1")
    async with launch() as local:
        where = Where(local.base_url, local.api_key)
        with pytest.raises(UsageError, match="tokenizer_model is empty"):
            await sft.train(config, where=where)
        config = config.model_copy(update={"tokenizer_model": str(local.data_dir / "tokenizer")})
        with pytest.raises(OperationFailedError, match="trainer job 'nobody' has saved no checkpoint 'step-1'"):
            await sft.train(config, where=where)
        async with AsyncFireworksClient(local.base_url, local.api_key) as fireworks:
            assert [job async for job in AsyncTrainerJobManager(fireworks).list()] == []
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["status"] == "failed"
    assert "nobody" in status["error"]


DATUM_TOKENS = [5, 6, 7, 8]


@pytest.mark.parametrize("way", ["a service", "one trainer", "two trainers"])
async def test_policy_and_reference(tmp_path: Path, data: Path, way: str) -> None:
    infra = InfraConfig() if way == "a service" else InfraConfig(training_shape_id=SHAPE)
    if way == "two trainers":
        infra = infra.model_copy(update={"ref_training_shape_id": SHAPE})
    rank = 4 if way == "one trainer" else 0
    config = settings(tmp_path, base_model="fwasync/qwen3-tiny" if way == "a service" else BASE, lora_rank=rank)
    config = config.model_copy(update={"infra": infra})
    datum = types.Datum(
        model_input=types.ModelInput.from_ints(DATUM_TOKENS[:-1]),
        loss_fn_inputs={"target_tokens": DATUM_TOKENS[1:], "weights": [1.0] * 3},
    )
    deploy = DeployConfig(deployment_id="sampler") if way == "two trainers" else None
    said: list[str] = []
    async with launch() as local:
        where = Where(local.base_url, local.api_key)
        async with where.open(config, reference=True, deploy=deploy, tell=said.append) as trainers:
            assert trainers.reference is not None
            before = (await trainers.reference.forward([datum])).metrics["loss:sum"]
            for _ in range(3):
                await trainers.policy.forward_backward([datum])
                await trainers.policy.optim_step(types.AdamParams(learning_rate=1e-2))
            after = (await trainers.policy.forward([datum])).metrics["loss:sum"]
            assert (await trainers.reference.forward([datum])).metrics["loss:sum"] == before
            assert after < before
            assert (trainers.deployment is not None) == (deploy is not None)
            assert (trainers.promoter is None) == (trainers.job_id is None) == (way == "a service")
            async with Where(trainers=trainers).open(config) as same:
                assert same is trainers
    assert bool(said) == (way != "a service")
    assert len(said) == len(set(said))


async def test_where_a_reference_has_no_place(tmp_path: Path) -> None:
    config = settings(tmp_path, base_model=BASE, infra={"training_shape_id": SHAPE})
    with pytest.raises(UsageError, match=r"set infra\.ref_training_shape_id"):
        async with Where("http://127.0.0.1:9", "k").open(config, reference=True):
            pass
    service = AsyncServiceClient("http://127.0.0.1:9", "k")
    with pytest.raises(UsageError, match="give base_url"):
        async with Where(service=service).open(config):
            pass


KILLED = """
import os, signal, sys
import anyio
from pathlib import Path
from fwasync.recipes import sft
from fwasync.recipes.trainers import Where
url, key, settings = sys.argv[1:]
config = sft.Config.model_validate_json(settings)
def die(step, metrics):
    if step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
anyio.run(lambda: sft.train(config, where=Where(url, key), on_step=die))
"""


async def killed(program: str, local: LocalService, config: sft.Config) -> None:
    command = [sys.executable, "-c", program, local.base_url, local.api_key, config.model_dump_json()]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = await anyio.run_process(command, env=environment, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


async def left_by_a_killed_process(local: LocalService, config: sft.Config) -> str:
    """The trainer job of a run that was killed after its third step."""
    await killed(KILLED, local, config)
    return json.loads((config.log_path / "resources.json").read_text())["names"]["policy"]


class Said:
    """A view that keeps the sentences."""

    def __init__(self) -> None:
        self.sentences: list[str] = []

    def begin(self, phase: str, total_steps: int) -> None: ...

    def show(self, record: object) -> None: ...

    def gauge(self, name: str, value: float) -> None: ...

    def message(self, text: str) -> None:
        self.sentences.append(text)

    def close(self) -> None: ...


async def gone_on(local: LocalService, config: sft.Config, said: Said) -> sft.Result[Any]:
    run = open_run(config.log_path, config=config.model_dump(), view=said, resume=True)
    async with run:
        return await sft.train(config, where=Where(local.base_url, local.api_key), run=run)


async def jobs_of(local: LocalService) -> list[str]:
    async with AsyncFireworksClient(local.base_url, local.api_key) as fireworks:
        return [job.job_id async for job in AsyncTrainerJobManager(fireworks).list()]


@pytest.mark.skipif(sys.platform == "win32", reason="kill -9")
async def test_a_run_that_goes_on_takes_over_the_trainer_job_of_the_process_that_was_killed(
    tmp_path: Path, data: Path
) -> None:
    said = Said()
    async with launch() as local:
        named = {"base_model": BASE, "infra": {"training_shape_id": SHAPE}, "pipeline_depth": 1}
        named |= {"tokenizer_model": str(local.data_dir / "tokenizer"), "dcp_save_interval": 1}
        where = Where(local.base_url, local.api_key)
        whole = await sft.train(settings(tmp_path, log_path=tmp_path / "whole", **named), where=where)
        config = settings(tmp_path, **named)
        for fits in (True, False):
            left = await left_by_a_killed_process(local, config)
            assert await jobs_of(local) == [left]
            then = config if fits else config.model_copy(update={"lora_rank": 2})
            if fits:
                result = await gone_on(local, then, said)
                assert (result.job_id, result.steps) == (left, whole.steps)
                assert losses(tmp_path / "run") == losses(tmp_path / "whole")
                told = f"trainer job {left}, which an earlier process of this run has left, is taken over"
            else:
                with pytest.raises(OperationFailedError, match="this model trains a LoRA adapter of rank 2"):
                    await gone_on(local, then, said)
                told = (
                    f"trainer job {left}, which an earlier process of this run has left, does not fit any more and was "
                )
                told += "deleted"
            assert told in said.sentences
            assert not [sentence for sentence in said.sentences if "is still running" in sentence]
            assert await jobs_of(local) == []
            assert not (tmp_path / "run" / "resources.json").exists()
            config = settings(tmp_path, log_path=tmp_path / "again", **named)


@pytest.mark.skipif(sys.platform == "win32", reason="kill -9")
async def test_the_trainer_job_of_a_directory_that_was_moved_is_left_alone_and_told(tmp_path: Path, data: Path) -> None:
    said = Said()
    async with launch() as local:
        named = {"base_model": BASE, "infra": {"training_shape_id": SHAPE}, "dcp_save_interval": 1, "pipeline_depth": 1}
        config = settings(tmp_path, tokenizer_model=str(local.data_dir / "tokenizer"), **named)
        left = await left_by_a_killed_process(local, config)
        (tmp_path / "run").rename(tmp_path / "moved")
        result = await gone_on(local, config.model_copy(update={"log_path": tmp_path / "moved"}), said)
        assert result.job_id != left
        assert await jobs_of(local) == [left]
    told = rf"trainer job {left}, .* in {re.escape(str(tmp_path))}/run on .*, is still there: delete it, unless"
    assert any(re.search(told, sentence) for sentence in said.sentences)


HOLDING = """
import os, signal, sys
import anyio
from fwasync import DeployConfig
from fwasync.recipes import sft
from fwasync.recipes.trainers import Where
url, key, settings = sys.argv[1:]
async def main():
    config = sft.Config.model_validate_json(settings)
    async with Where(url, key).open(config, reference=True, deploy=DeployConfig()):
        os.kill(os.getpid(), signal.SIGKILL)
anyio.run(main)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="kill -9")
async def test_a_deployment_and_a_reference_are_taken_over_too(tmp_path: Path) -> None:
    infra = {"training_shape_id": SHAPE, "ref_training_shape_id": SHAPE}
    config = settings(tmp_path, base_model=BASE, infra=infra)
    config.log_path.mkdir()
    async with launch() as local, AsyncFireworksClient(local.base_url, local.api_key) as fireworks:
        deployments = AsyncDeploymentManager(fireworks)
        await killed(HOLDING, local, config)
        left = json.loads((config.log_path / "resources.json").read_text())["names"]
        assert sorted(await jobs_of(local)) == sorted([left["policy"], left["reference"]])
        where = Where(local.base_url, local.api_key)
        async with where.open(config, reference=True, deploy=DeployConfig()) as trainers:
            assert trainers.deployment is not None
            assert (trainers.job_id, trainers.deployment.deployment_id) == (left["policy"], left["deployment"])
            assert len(await jobs_of(local)) == 2
        assert await jobs_of(local) == []
        assert [each async for each in deployments.list()] == []
    assert list(config.log_path.iterdir()) == []
