"""Every Python example of README and docs runs: whole programs as they stand, functions with a driver of ours."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import anyio.to_thread
import pytest

from fwasync import (
    AsyncDeploymentManager,
    AsyncDeploymentSampler,
    AsyncFireworksClient,
    AsyncServiceClient,
    AsyncTrainerJobManager,
    AsyncTrainingClient,
    DeployConfig,
    SampledCompletion,
    ServiceClient,
    types,
)
from fwasync.local import launch
from fwasync.testing import blocking_local_service, local_service

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [
    pytest.param(match[1], id=f"{page.stem}-{number}")
    for page in PAGES
    for number, match in enumerate(re.finditer(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S))
]
PROGRAMS = [block for block in BLOCKS if "anyio.run(" in str(block.values[0])]
FRAGMENTS = [block for block in BLOCKS if "anyio.run(" not in str(block.values[0])]

TOKENS = list(b"to be, or not to be")
DATUM = types.Datum(
    model_input=types.ModelInput.from_ints(TOKENS[:-1]),
    loss_fn_inputs={"target_tokens": TOKENS[1:], "weights": [1.0] * (len(TOKENS) - 1)},
)


@pytest.mark.parametrize("program", PROGRAMS)
def test_program(program: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
    if "loss" in program:
        losses = [float(number) for number in re.findall(r"loss ([\d.]+)", done.stdout)]
        assert losses[-1] < losses[0]


@asynccontextmanager
async def training() -> AsyncIterator[tuple[AsyncServiceClient, AsyncTrainingClient]]:
    async with launch() as local, AsyncServiceClient(local.base_url, local.api_key) as service:
        async with service.create_training_client("fwasync/qwen3-tiny", lora_rank=0) as client:
            yield service, client


async def drive_pipelined(example: Callable[..., Any]) -> None:
    if not inspect.iscoroutinefunction(example):
        await anyio.to_thread.run_sync(_drive_blocking, example)
        return
    async with training() as (_, client):
        before = (await client.forward([DATUM])).metrics["loss:sum"]
        await example(client, [[DATUM]] * 4, types.AdamParams(learning_rate=3e-3))
        assert (await client.forward([DATUM])).metrics["loss:sum"] < before


def _drive_blocking(example: Callable[..., list[float]]) -> None:
    with blocking_local_service() as local, ServiceClient(local.base_url, local.api_key) as service:
        with service.create_training_client("fwasync/qwen3-tiny", lora_rank=0) as client:
            losses = example(client, [[DATUM]] * 4, types.AdamParams(learning_rate=3e-3))
    assert losses[-1] < losses[0]


async def drive_train(example: Callable[..., list[float]]) -> None:
    async with launch() as local:
        adam = types.AdamParams(learning_rate=3e-2)
        losses = await anyio.to_thread.run_sync(example, local.base_url, local.api_key, [[DATUM]] * 6, adam)
    assert losses[-1] < losses[0]


async def drive_recipe(example: Callable[..., dict[str, float]]) -> None:
    def loss(data: list[types.Datum], logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
        return -logprobs[0].sum(), {"mine:sum": 1.0}

    async with launch() as local:
        endpoint = SimpleNamespace(base_url=local.base_url, job_id="job", job_name="job")
        manager = SimpleNamespace(wait_for_existing=lambda job_id: endpoint)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FIREWORKS_API_KEY", local.api_key)
            arguments = (manager, "job", "fwasync/qwen3-tiny", [DATUM], loss, types.AdamParams())
            metrics = await anyio.to_thread.run_sync(example, *arguments)
    assert metrics["mine:sum"] == 1.0


async def drive_preference_loss(example: Callable[..., Any]) -> None:
    async with training() as (_, client):
        output = await client.forward_backward_custom([DATUM, DATUM], example)
        assert output.metrics["margin:mean"] == pytest.approx(0, abs=1e-5)


async def drive_sample_all(example: Callable[..., Awaitable[list[types.SampleResponse]]]) -> None:
    async with training() as (service, _), service.create_sampling_client(base_model="fwasync/qwen3-tiny") as sampler:
        prompts = [types.ModelInput.from_ints(TOKENS[:n]) for n in (3, 4, 5)]
        responses = await example(sampler, prompts, types.SamplingParams(max_tokens=2))
        assert [len(response.sequences) for response in responses] == [8, 8, 8]


async def drive_patient(example: Callable[..., Awaitable[types.ForwardBackwardOutput]]) -> None:
    async with training() as (_, client):
        assert (await example(client, [DATUM])).metrics["loss:sum"] > 0


async def drive_look_around(example: Callable[..., Awaitable[None]]) -> None:
    async with launch() as local, AsyncFireworksClient(local.base_url, local.api_key) as fireworks:
        await example(AsyncTrainerJobManager(fireworks), AsyncDeploymentManager(fireworks), fireworks)


@asynccontextmanager
async def deployed() -> AsyncIterator[AsyncDeploymentSampler]:
    async with launch() as local, AsyncFireworksClient(local.base_url, local.api_key) as fireworks:
        deployments = AsyncDeploymentManager(fireworks)
        async with (
            DeployConfig().launch(deployments, base_model="accounts/fwasync/models/qwen3-tiny") as deployment,
            AsyncDeploymentSampler(local.base_url, deployment.inference_model, local.api_key) as sampler,
        ):
            yield sampler


async def drive_sample_many(example: Callable[..., Awaitable[list[list[SampledCompletion]]]]) -> None:
    async with deployed() as sampler:
        groups = await example(sampler, [TOKENS[:3], TOKENS[:5]])
    assert [len(group) for group in groups] == [8, 8]


async def drive_first_words(example: Callable[..., Awaitable[list[int]]]) -> None:
    async with deployed() as sampler:
        assert 1 <= len(await example(sampler, TOKENS[:3])) <= 16


async def drive_test_a_bad_network_changes_nothing(example: Callable[..., Awaitable[None]]) -> None:
    with blocking_local_service() as local:
        await example(local)


async def drive_test_another_order(example: Callable[..., Awaitable[None]]) -> None:
    async with local_service() as local, AsyncServiceClient(local.base_url, local.api_key) as service:
        async with service.create_training_client("fwasync/qwen3-tiny", lora_rank=0) as client:
            await example(local, client, [DATUM], types.AdamParams(learning_rate=3e-3))


async def drive_test_resume(example: Callable[..., Awaitable[None]]) -> None:
    await example([DATUM], types.AdamParams(learning_rate=3e-3))


async def drive_test_gives_up_after_an_hour(example: Callable[[], None]) -> None:
    await anyio.to_thread.run_sync(example)  # it brings an event loop of its own


DRIVERS = {name.removeprefix("drive_"): value for name, value in globals().items() if name.startswith("drive_")}


@pytest.mark.parametrize("fragment", FRAGMENTS)
async def test_fragment(fragment: str) -> None:
    namespace: dict[str, Any] = {"anyio": anyio, "types": types}
    exec(compile(fragment, "example", "exec"), namespace)
    functions = re.findall(r"^(?:async )?def (\w+)", fragment, re.M)
    assert functions, "a fragment defines a function that can be driven"
    for name in functions:
        await DRIVERS[name](namespace[name])
