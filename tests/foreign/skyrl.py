"""fwasync against SkyRL, a trainer service of others, on its JAX backend and this machine's processors: `make skyrl`.

Not among the tests that always run: it installs some two gigabytes, and compiles for minutes. It serves the local
service's own model, exported, so that the numbers of two services that share no code can be compared.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import environments
import numpy as np
import pytest

from fwasync import AsyncServiceClient, AsyncTrainingClient, types
from fwasync.data.prompts import PromptRow
from fwasync.errors import BadRequestError, ConflictError, UsageError
from fwasync.local import launch
from fwasync.local.engine.numpy_engine import NumpyEngine
from fwasync.local.tokenizer import save_tokenizer
from fwasync.recipes import async_rl, dpo, orpo, rl, sft
from fwasync.recipes.trainers import Where

SKYRL = ("skyrl[jax,tinker]==0.3.0", "tinker==0.24.1", "jax==0.10.2", "flax==0.12.8", "torch==2.13.0", "uv==0.13.9")
KEY = "tml-any"  # it asks for none
TEXT = list(b"to be, or not to be")

pytestmark = pytest.mark.timeout(1800)  # it compiles for each new shape


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The local service's model, as others can open it."""
    directory = tmp_path_factory.mktemp("model")
    NumpyEngine().trainer("fwasync/qwen3-tiny", None).export(directory)
    save_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def url(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    python = environments.make(".venv-skyrl", *SKYRL)
    place, binaries = tmp_path_factory.mktemp("skyrl"), Path(python).parent
    # It is made for Python 3.12; on 3.11 pydantic wants the newer TypedDict.
    (place / "sitecustomize.py").write_text(
        "import typing, typing_extensions\ntyping.TypedDict = typing_extensions.TypedDict\n"
    )
    backend = {"max_lora_adapters": 24, "max_lora_rank": 16}
    command = [binaries / "uv", "run", "--no-project", "--active", "-m", "skyrl.tinker.api", "--host", "127.0.0.1"]
    options = {
        "port": "0",
        "base-model": model,
        "backend": "jax",
        "backend-config": json.dumps(backend),
        "database-url": f"sqlite:///{place}/tinker.db",
        "checkpoints-base": place / "checkpoints",
    }
    environment = {
        **os.environ,
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "VIRTUAL_ENV": str(binaries.parent),
        "PYTHONPATH": str(place),
        "JAX_PLATFORMS": "cpu",
        "HF_HUB_OFFLINE": "1",
    }
    log = place / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, *(part for name, value in options.items() for part in (f"--{name}", value))],
            stdout=out,
            stderr=out,
            env=environment,
            start_new_session=True,
        )
    try:
        yield _address(process, log)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    for _ in range(600):
        told = log.read_text(errors="replace")
        if "Starting background engine" in told and (found := re.search(r"running on\s+(http://[\d.:]+)", told)):
            return found[1]
        assert process.poll() is None, told
        time.sleep(0.5)
    raise AssertionError(log.read_text(errors="replace"))


def datum(text: list[int] = TEXT) -> types.Datum:
    return types.Datum(
        model_input=types.ModelInput.from_ints(text[:-1]),
        loss_fn_inputs={"target_tokens": text[1:], "weights": [1.0] * (len(text) - 1)},
    )


async def logprobs(client: AsyncTrainingClient, text: list[int] = TEXT) -> np.ndarray:
    output = await client.forward([datum(text)], "cross_entropy")
    return np.array(output.loss_fn_outputs[0]["logprobs"].data)


async def test_one_model_has_the_same_logprobs_there_and_here(url: str, model: Path) -> None:
    async with AsyncServiceClient(url, KEY) as service:
        async with service.create_training_client(str(model), lora_rank=8) as client:
            there = await logprobs(client)
    async with launch() as local, AsyncServiceClient(local.base_url, local.api_key) as service:
        async with service.create_training_client("fwasync/qwen3-tiny", lora_rank=8) as client:
            here = await logprobs(client)
    np.testing.assert_allclose(there, here, atol=1e-4)


async def test_it_trains_is_cancelled_saves_and_samples(url: str, model: Path) -> None:
    async with AsyncServiceClient(url, KEY) as service:
        adam = types.AdamParams(learning_rate=1e-3)
        async with service.create_training_client(str(model), lora_rank=8) as client:
            before = await logprobs(client)
            submitted = [
                (client.forward_backward([datum()], "cross_entropy"), client.optim_step(adam)) for _ in range(10)
            ]
            for output, update in submitted:
                await output
                await update
            assert (await logprobs(client)).sum() > before.sum() + 1

            with anyio.move_on_after(0.01) as scope:
                await client.forward_backward([datum()], "cross_entropy")
            assert scope.cancelled_caught
            await client.forward_backward_custom(
                [datum()], lambda data, found: (-sum(each.sum() for each in found), {})
            )
            await client.optim_step(adam)

            trained = await logprobs(client)
            state, snapshot = await client.save_state("state"), await client.save_weights_for_sampler("snapshot")
            assert await client.list_checkpoints() == [state.path]
        async with service.create_training_client_from_state_with_optimizer(
            state.path, base_model=str(model), lora_rank=8
        ) as client:
            np.testing.assert_allclose(await logprobs(client), trained, atol=1e-5)
        async with service.create_sampling_client(model_path=snapshot.path) as sampler:
            prompt, params = types.ModelInput.from_ints(TEXT), types.SamplingParams(max_tokens=8, seed=7)
            np.testing.assert_allclose((await sampler.compute_logprobs(prompt))[1:], trained, atol=1e-4)
            first, second = [(await sampler.sample(prompt, 1, params)).sequences[0] for _ in range(2)]
            assert list(first.tokens) == list(second.tokens)
            with anyio.move_on_after(0.05) as scope:
                async with anyio.create_task_group() as group:
                    for _ in range(64):
                        group.start_soon(sampler.sample, prompt, 1, types.SamplingParams(max_tokens=8))
            assert scope.cancelled_caught


async def test_what_is_different_there(url: str, model: Path, tmp_path: Path) -> None:
    """As docs/other-services.md tells it."""
    norms: list[float] = []
    async with AsyncServiceClient(url, KEY) as service:
        for weight in (1.0, 2.0):
            async with service.create_training_client(str(model), lora_rank=8, seed=1) as client:
                heavy = datum()
                heavy.loss_fn_inputs["weights"] = types.TensorData.from_numpy(
                    np.full(len(TEXT) - 1, weight, np.float32)
                )
                output = await client.forward_backward([heavy], "cross_entropy")
                update = await client.optim_step(types.AdamParams(learning_rate=0.0))
                assert output.metrics == {}
                assert update.metrics is not None
                norms.append(update.metrics["skyrl.ai/grad_norm"])
                with pytest.raises(BadRequestError, match="literal_error"):
                    await client.forward([datum()], "dro")
                await client.save_state("twice")
                with pytest.raises(ConflictError):
                    await client.save_state("twice")
        assert norms[1] == pytest.approx(norms[0], rel=1e-3), "gradients are means"
        with pytest.raises(BadRequestError, match="lora_config"):
            async with service.create_base_training_client(str(model)):
                raise AssertionError
    (tmp_path / "rows.jsonl").write_text('{"messages": [{"role": "assistant", "content": "hello"}]}\n')
    config = sft.Config(
        log_path=tmp_path / "run",
        dataset=str(tmp_path / "rows.jsonl"),
        base_model=str(model),
        tokenizer_model=str(model),
        lora_rank=8,
    )
    with pytest.raises(UsageError, match="set max_seq_len"):
        await sft.train(config, where=Where(url, KEY))


def reward(text: str, row: PromptRow) -> float:
    return sum("a" <= letter <= "z" for letter in text) / 6


@pytest.mark.parametrize("recipe", [sft, dpo, orpo, rl, async_rl])
async def test_every_recipe_runs(url: str, model: Path, tmp_path: Path, recipe: Any) -> None:
    asked = [{"role": "user", "content": f"say {number}"} for number in range(8)]
    good, bad = {"role": "assistant", "content": "hello"}, {"role": "assistant", "content": "olleh"}
    rows: list[dict[str, Any]]
    given: dict[str, Any] = {"batch_size": 4}
    calls: dict[str, Any] = {}
    if recipe is sft:
        rows = [{"messages": [question, good]} for question in asked]
    elif recipe in (dpo, orpo):
        rows = [{"chosen": {"messages": [q, good]}, "rejected": {"messages": [q, bad]}} for q in asked]
    else:
        rows = [{"messages": [question]} for question in asked]
        given = {"prompt_groups_per_step": 2, "completions_per_prompt": 4, "max_completion_tokens": 6}
        calls = {"reward": reward}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = recipe.Config(
        log_path=tmp_path / "run",
        dataset=str(tmp_path / "rows.jsonl"),
        base_model=str(model),
        tokenizer_model=str(model),
        lora_rank=8,
        learning_rate=1e-3,
        epochs=3,
        max_steps=3,
        max_seq_len=64,
        **given,
    )
    result = await recipe.train(config, where=Where(url, KEY), **calls)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert result.steps == len(records) == 3
    if recipe is sft:
        assert records[-1]["train/ce_loss"] < records[0]["train/ce_loss"]
    if recipe is dpo:
        assert records[-1]["train/margin"] > 0
