"""Every Python example of README and docs runs: whole programs as they stand, functions with a driver of ours."""

from __future__ import annotations

import inspect
import json
import operator
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import anyio.to_thread
import numpy as np
import pytest

from fwasync import (
    AsyncDeploymentManager,
    AsyncFireworksClient,
    AsyncRolloutScheduler,
    AsyncServiceClient,
    AsyncTrainerJobManager,
    AsyncTrainingClient,
    DeployConfig,
    Rollout,
    RolloutSettings,
    SampledCompletion,
    ServiceClient,
    rollout_datums,
    types,
)
from fwasync.data.chat import ChatTokenizer
from fwasync.data.messages import Message
from fwasync.data.prompts import PromptRow
from fwasync.data.rendering import resolve_renderer
from fwasync.local import launch
from fwasync.local.tokenizer import CHAT_TEMPLATE, build_tokenizer
from fwasync.losses import PolicyInputs, PolicyLoss
from fwasync.recipes import async_rl
from fwasync.recipes.trainers import Where
from fwasync.testing import blocking_local_service, local_service

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [
    pytest.param(match[1], id=f"{page.stem}-{number}")
    for page in PAGES
    for number, match in enumerate(re.finditer(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S))
]
NEEDS_TORCH = r"\b(torch|losses|dpo|orpo)\b"
"""In a program whose losses are computed with it."""
PROGRAMS = [block for block in BLOCKS if "anyio.run(" in str(block.values[0])]
FRAGMENTS = [block for block in BLOCKS if "anyio.run(" not in str(block.values[0])]

TOKENS = list(b"to be, or not to be")
DATUM = types.Datum(
    model_input=types.ModelInput.from_ints(TOKENS[:-1]),
    loss_fn_inputs={"target_tokens": TOKENS[1:], "weights": [1.0] * (len(TOKENS) - 1)},
)


# As it is where torch is not installed, which is what a newcomer has; importing it would take most of the time.
WITHOUT_TORCH = (
    "import sys; sys.modules.update(torch=None, transformers=None)\n"
    "import runpy; runpy.run_path(sys.argv[1], run_name='__main__')"
)


@pytest.mark.parametrize("program", PROGRAMS)
def test_program(program: str, tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    path.write_text(program, encoding="utf-8")
    how = [str(path)] if re.search(NEEDS_TORCH, program) else ["-c", WITHOUT_TORCH, str(path)]
    done = subprocess.run(
        [sys.executable, "-W", "error", *how],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
    if "loss" in program:
        losses = [float(number) for number in re.findall(r"loss ([\d.]+)", done.stdout)]
        assert losses[-1] < losses[0]


@pytest.mark.skipif(not shutil.which("bash"), reason="commands are for a shell")
def test_the_commands_of_the_readme(tmp_path: Path) -> None:
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGES[0].read_text(encoding="utf-8"), re.M | re.S)
    (commands,) = [block for block in blocks if "fwasync train" in block]
    chat = {"messages": [{"role": "user", "content": "ping"}, {"role": "assistant", "content": "pong"}]}
    (tmp_path / "chats.jsonl").write_text(f"{json.dumps(chat)}\n" * 8)
    own = f'set -ex\nfwasync() {{ {shlex.quote(sys.executable)} -W error -m fwasync.cli "$@"; }}\n'
    configured = ("FWASYNC_", "FIREWORKS_", "TINKER_")
    done = subprocess.run(
        ["bash", "-c", own + commands],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if not name.startswith(configured)},
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    dry, run = done.stdout.split("Nothing was started or spent.\n")
    assert "chats.jsonl: 8 rows" in dry
    assert re.search(r"^ok +sample +fwasync/qwen3-tiny gave token", run, re.M)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chats.jsonl", "run.toml", "runs"]
    checkpoints = (tmp_path / "runs" / "first" / "checkpoints.jsonl").read_text().splitlines()
    assert json.loads(checkpoints[-1])["data_consumed"] == 24


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


async def drive_look_around_blocking(example: Callable[..., tuple[str, list[str]]]) -> None:
    async with launch() as local:
        model, names = await anyio.to_thread.run_sync(example, local.base_url, local.api_key)
    assert (model, names) == ("accounts/fwasync/models/qwen3-tiny", [])


async def drive_preference_loss(example: Callable[..., Any]) -> None:
    async with training() as (_, client):
        output = await client.forward_backward_custom([DATUM, DATUM], example)
        assert output.metrics["margin:mean"] == pytest.approx(0, abs=1e-5)


async def drive_policy_step(example: Callable[..., Any]) -> None:
    async with training() as (_, client):
        output = await client.forward([DATUM])
        seen = [record["logprobs"].to_numpy() for record in output.loss_fn_outputs]
        metrics, update = await example(client, [DATUM], [1.0], [3], seen, types.AdamParams(learning_rate=1e-3))
        assert metrics["loss:sum"] == pytest.approx(-(len(TOKENS) - 3), rel=1e-3)
        assert update["grad_norm"] > 0


async def drive_soft_clipped(example: Callable[..., PolicyLoss]) -> None:
    async with training() as (_, client):
        output = await client.forward([DATUM])
        seen = [record["logprobs"].to_numpy() for record in output.loss_fn_outputs]
        loss_fn = example().custom(PolicyInputs([1.0], None, 3, seen))
        metrics = (await client.forward_backward_custom([DATUM], loss_fn)).metrics
        assert metrics["mine/ratio"] == pytest.approx(1, rel=1e-3)


async def drive_loop(example: Callable[..., Awaitable[int]], directory: Path) -> None:
    async with launch() as local, AsyncServiceClient(local.base_url, local.api_key) as service:
        adam, batches = types.AdamParams(learning_rate=3e-3), [[DATUM]] * 5
        async with service.create_training_client("fwasync/qwen3-tiny", lora_rank=0) as client:
            assert await example(client, str(directory), batches[:3], adam) == 3
        async with service.create_training_client("fwasync/qwen3-tiny", lora_rank=0) as client:
            assert await example(client, str(directory), batches, adam) == 5
            assert client.statistics().submitted == 1 + 3 * 2 + 2


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


async def drive_test_a_bad_network_changes_nothing(example: Callable[..., Awaitable[None]]) -> None:
    with blocking_local_service() as local:
        await example(local)


async def drive_test_another_order(example: Callable[..., Awaitable[None]]) -> None:
    async with local_service() as local, AsyncServiceClient(local.base_url, local.api_key) as service:
        async with service.create_training_client("fwasync/qwen3-tiny", lora_rank=0) as client:
            await example(local, client, [DATUM], types.AdamParams(learning_rate=3e-3))


@asynccontextmanager
async def deployed() -> AsyncIterator[tuple[str, str, str]]:
    async with launch() as local, AsyncFireworksClient(local.base_url, local.api_key) as fireworks:
        deployments = AsyncDeploymentManager(fireworks)
        async with DeployConfig().launch(deployments, base_model="accounts/fwasync/models/qwen3-tiny") as deployment:
            yield local.base_url, local.api_key, deployment.inference_model


async def drive_sample_groups(example: Callable[..., Awaitable[list[list[SampledCompletion]]]]) -> None:
    async with deployed() as (url, key, name):
        groups = await example(url, key, name, [TOKENS[:n] for n in (3, 4)])
        assert [[each.prompt_len for each in group] for group in groups] == [[3] * 8, [4] * 8]


async def drive_stream(example: Callable[..., Awaitable[str]]) -> None:
    async with deployed() as (url, key, name):
        assert await example(url, key, name, TOKENS)


async def drive_share(example: Callable[..., Awaitable[None]]) -> None:
    async with deployed() as (url, key, name):
        await example(url, key, name, TOKENS)


async def drive_on_a_service(example: Callable[..., Awaitable[None]]) -> None:
    async with local_service() as local:
        await example(local)


drive_test_provisioning = drive_test_hot_loads = drive_test_sampling = drive_on_a_service


async def drive_test_pre_emption(example: Callable[..., Awaitable[None]]) -> None:
    async with local_service() as local:
        await example(local, [DATUM], types.AdamParams(learning_rate=3e-3))


async def drive_test_resume(example: Callable[..., Awaitable[None]]) -> None:
    await example([DATUM], types.AdamParams(learning_rate=3e-3))


async def drive_test_gives_up_after_an_hour(example: Callable[[], None]) -> None:
    await anyio.to_thread.run_sync(example)  # it brings an event loop of its own


async def drive_use_the_calculator(example: Callable[..., Awaitable[Rollout]]) -> None:
    async def calculator(text: str) -> str:
        return "4"

    async with training() as (service, client):
        name = (await client.get_info()).model_data.tokenizer_id
        tokenizer = await anyio.to_thread.run_sync(ChatTokenizer.load, name)
        row = {"question": "2+2?", "truth": "4", "calculator": calculator}
        limits = RolloutSettings(groups_per_batch=1, group_size=2)
        sampler = service.create_sampling_client(base_model="fwasync/qwen3-tiny")
        async with AsyncRolloutScheduler([row], example, limits, sampler=sampler, tokenizer=tokenizer) as scheduler:
            batch = await anext(scheduler)
            (group,) = await batch.collect()
            await scheduler.publish(batch)
        # The service scores the very tokens that were sampled as the sampler did.
        for datum, rollout in zip(rollout_datums([group]), group.rollouts, strict=True):
            (segment,) = rollout.segments
            scored = (await client.forward([datum], "importance_sampling")).loss_fn_outputs[0]["logprobs"].to_numpy()
            np.testing.assert_allclose(scored[segment.mask[1:]], segment.logprobs[segment.mask], atol=1e-4)
            changes = np.flatnonzero(np.diff(segment.mask.astype(int)))
            assert len(changes) == 3, "given, sampled, given, sampled"


async def drive_ask_again(example: Callable[..., Awaitable[Rollout]]) -> None:
    rows = [PromptRow((Message("user", "Yes or no?"),), None, {}, line) for line in range(1, 5)]
    with tempfile.TemporaryDirectory() as directory:
        config = async_rl.Config(
            log_path=Path(directory, "run"), dataset="rows", base_model="fwasync/qwen3-tiny", kl_beta=0
        )
        async with launch() as local:
            where = Where(local.base_url, local.api_key)
            result = await async_rl.train(config, rollout=example, where=where, rows=rows, keep=lambda group: True)
    assert (result.steps, result.rows.kept) == (4, 4)


async def drive_graded(example: Callable[..., Awaitable[bool]]) -> None:
    assert await example(operator.eq, "4", "4")


async def drive_qwen3(example: Callable[..., Any]) -> None:
    """With a stand-in for tinker-cookbook, which has its methods: a token for each message."""

    def build(chat: list[dict[str, Any]], train_on_what: str = "") -> tuple[types.ModelInput, Any]:
        weights = [float(message.get("trainable", 0)) for message in chat]
        tokens = types.ModelInput.from_ints([len(message["content"]) for message in chat])
        return tokens, SimpleNamespace(numpy=lambda: np.asarray(weights))

    renderer = SimpleNamespace(build_supervised_example=build, build_generation_prompt=lambda chat: build(chat)[0])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "renderers": SimpleNamespace(get_renderer=lambda name, tokenizer: renderer),
            "third_party.openai_compat": SimpleNamespace(openai_messages_to_tinker=lambda messages: messages),
            "tokenizer_utils": SimpleNamespace(get_tokenizer=lambda name: None),
        }.items():
            patch.setitem(sys.modules, f"tinker_cookbook.{name}", value)
        patch.setitem(sys.modules, "tinker_cookbook", SimpleNamespace())
        patch.setitem(sys.modules, "tinker_cookbook.third_party", SimpleNamespace())
        made = resolve_renderer(example(None), None)
    assert made is not None
    messages = [Message("user", "a"), Message("assistant", "bb")]
    tokens, weights = made.supervised(messages, [1])
    assert (list(tokens), list(weights)) == ([1, 2], [0, 1])
    assert list(made.render(messages[:1], add_generation_prompt=True)) == [1]
    with pytest.raises(ValueError, match="declare tools"):
        made.render(messages, tools=[{}])


async def drive_compare(example: Callable[..., Any]) -> None:
    tokenizer = ChatTokenizer(build_tokenizer(), CHAT_TEMPLATE, {})
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as rows:
        rows.write('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<|end|>"}]}')
        rows.flush()
        failure = example(tokenizer, tokenizer, rows.name)
    assert failure.divergence.their_text.startswith("<|end|>")


async def drive_datum_of(example: Callable[..., Any]) -> None:
    datum, aligned = example([1, 2], [3], [-0.5])
    assert datum.loss_fn_inputs["loss_mask"].to_numpy().tolist() == [0, 1]
    assert aligned.tolist() == [0, -0.5]


async def drive_letters(example: Callable[[str, object], float]) -> None:
    assert [example(text, None) for text in ("", "ab", "aB")] == [0, 1, 0.5]


DRIVERS = {name.removeprefix("drive_"): value for name, value in globals().items() if name.startswith("drive_")}


@pytest.mark.parametrize("fragment", FRAGMENTS)
async def test_fragment(fragment: str, tmp_path: Path) -> None:
    namespace: dict[str, Any] = {"anyio": anyio, "types": types}
    exec(compile(fragment, "example", "exec"), namespace)
    functions = re.findall(r"^(?:async )?def (\w+)", fragment, re.M)
    assert functions, "a fragment defines a function that can be driven"
    for name in functions:
        driver = DRIVERS[name]
        await (driver(namespace[name], tmp_path) if name == "loop" else driver(namespace[name]))
