"""The async client against the real service process: real gradients, real HTTP, real kills."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import anyio.lowlevel
import numpy as np
import pytest
import pytest_asyncio
import torch

from fwasync import AsyncServiceClient, AsyncTrainingClient, RetryPolicy, errors, types
from fwasync.local import LocalService, launch
from support.proxy import lossy_proxy

MODEL = "fwasync/qwen3-tiny"
ADAM = types.AdamParams(learning_rate=3e-3, beta1=0.9, beta2=0.95, eps=1e-12)


def datum(text: str) -> types.Datum:
    tokens = list(text.encode())
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)},
    )


BATCHES = [[datum(f"batch {i} of {n}") for n in range(4)] for i in range(8)]


async def steps(client: AsyncTrainingClient, batches: list[list[types.Datum]]) -> list[float]:
    losses = []
    for batch in batches:
        output = client.forward_backward(batch, "cross_entropy")
        update = client.optim_step(ADAM)
        losses.append((await output).metrics["loss:sum"])
        await update
    return losses


def weights(local: LocalService, path: str) -> dict[str, bytes]:
    """The files of a checkpoint, to the bit."""
    run, kind, name = path.removeprefix("tinker://").split("/")
    (folder,) = local.data_dir.glob(f"{kind}/{run.replace(':', '?')}/{name}")
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def local() -> AsyncIterator[LocalService]:
    async with launch() as service:
        yield service


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.mark.parametrize("lora_rank", [0, 8])
async def test_loss_falls(local: LocalService, lora_rank: int) -> None:
    async with AsyncServiceClient(local.base_url, local.api_key) as service:
        async with service.create_training_client(MODEL, lora_rank=lora_rank) as client:
            losses = await steps(client, [[datum("to be, or not to be")]] * 12)
    assert losses[-1] < 0.8 * losses[0]


async def test_custom_loss_gives_the_gradient_of_the_built_in_one(local: LocalService) -> None:
    def cross_entropy(data: list[types.Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        return -torch.stack([lp.sum() for lp in logprobs]).sum(), {"mine:sum": 1.0}

    async def slowly(data: list[types.Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        await anyio.lowlevel.checkpoint()
        return cross_entropy(data, logprobs)

    async with AsyncServiceClient(local.base_url, local.api_key) as service:
        norms, losses = [], []
        for loss in ("cross_entropy", cross_entropy, slowly):
            async with service.create_training_client(MODEL, lora_rank=0) as client:
                if isinstance(loss, str):
                    output = await client.forward_backward(BATCHES[0], loss)
                else:
                    output = await client.forward_backward_custom(BATCHES[0], loss)
                    assert output.metrics["mine:sum"] == 1.0
                    assert "surrogate_loss:sum" in output.metrics
                losses.append(output.metrics["loss:sum"])
                norms.append((await client.optim_step(ADAM)).metrics["grad_norm"])
    np.testing.assert_allclose(norms, norms[0], rtol=1e-4)
    np.testing.assert_allclose(losses, losses[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (lambda d, lp: (lp[0].sum() * float("nan"), {}), errors.DatumError, "custom loss is nan"),
        (lambda d, lp: (lp[0].sum(), {}), errors.DatumError, "no gradient for datum 1 of 4"),
        (lambda d, lp: lp[0].sum(), errors.UsageError, r"\(loss, metrics\)"),
        (lambda d, lp: (lp[0], {}), errors.UsageError, "scalar"),
        (lambda d, lp: (lp[0].detach().sum(), {}), errors.UsageError, "detached"),
        (lambda d, lp: 1 / 0, ZeroDivisionError, "division"),
    ],
)
async def test_a_bad_custom_loss_leaves_no_gradient(
    local: LocalService, loss: object, error: type[Exception], message: str
) -> None:
    async with AsyncServiceClient(local.base_url, local.api_key) as service:
        async with service.create_training_client(MODEL, lora_rank=0) as client:
            with pytest.raises(error, match=message):
                await client.forward_backward_custom(BATCHES[0], loss)  # type: ignore[arg-type]
            with pytest.raises(errors.OperationFailedError):  # there is nothing to apply
                await client.optim_step(ADAM)
            await steps(client, BATCHES[:1])


async def test_an_adapter_is_loaded_and_the_optimizer_starts_anew(local: LocalService) -> None:
    async with AsyncServiceClient(local.base_url, local.api_key) as service:
        async with service.create_training_client(MODEL, lora_rank=8) as client:
            await steps(client, BATCHES)
            snapshot = (await client.save_weights_for_sampler("adapter")).path
            state = (await client.save_state("state")).path
            trained = (await client.forward(BATCHES[0], "cross_entropy")).metrics["loss:sum"]
        saved = []
        for load in ("load_adapter", "load_state"):
            async with service.create_training_client(MODEL, lora_rank=8, seed=5) as client:
                await steps(client, BATCHES[1:2])
                gathered = client.forward_backward(BATCHES[1], "cross_entropy")
                await getattr(client, load)(snapshot if load == "load_adapter" else state)
                await gathered
                assert (await client.forward(BATCHES[0], "cross_entropy")).metrics["loss:sum"] == trained
                with pytest.raises(errors.OperationFailedError):  # what was gathered is dropped
                    await client.optim_step(ADAM)
                await steps(client, BATCHES[:1])
                saved.append(weights(local, (await client.save_state("after")).path))
        assert saved[0] == saved[1]


@pytest.mark.parametrize(
    ("lora_rank", "path", "told"),
    [
        (4, "{adapter}", "the adapter holds a LoRA adapter of rank 8, .* this model trains a LoRA adapter of rank 4"),
        (0, "{adapter}", "this model trains all parameters"),
        (8, "{full}", "full holds no LoRA adapter"),
        (8, "{state}", "there is no snapshot"),
        (8, "accounts/local/models/never", "there is no model accounts/local/models/never that was promoted here"),
        (8, "gs://bucket/adapter", "'gs://bucket/adapter' is no adapter of this service: give a promoted model as"),
    ],
)
async def test_an_adapter_that_does_not_fit_changes_nothing(
    local: LocalService, lora_rank: int, path: str, told: str
) -> None:
    async with AsyncServiceClient(local.base_url, local.api_key) as service:
        paths: dict[str, str] = {}
        for rank, name in ((8, "adapter"), (0, "full")):
            async with service.create_training_client(MODEL, lora_rank=rank) as client:
                paths[name] = (await client.save_weights_for_sampler(name)).path
                paths["state"] = (await client.save_state("state")).path
        async with service.create_training_client(MODEL, lora_rank=lora_rank) as client:
            before = await client.forward(BATCHES[0], "cross_entropy")
            with pytest.raises(errors.OperationFailedError, match=told):
                await client.load_adapter(path.format(**paths))
            assert (await client.forward(BATCHES[0], "cross_entropy")).metrics == before.metrics
            await steps(client, BATCHES[:1])


async def test_kill_9_and_resume_gives_the_same_weights_as_an_undisturbed_run(tmp_path: Path) -> None:
    async with launch(tmp_path / "a") as local, AsyncServiceClient(local.base_url, local.api_key) as service:
        async with service.create_training_client(MODEL, lora_rank=0) as client:
            undisturbed = await steps(client, BATCHES)
            whole = weights(local, (await client.save_state("end")).path)

    with pytest.raises(errors.FwasyncError):
        async with launch(tmp_path / "b") as local, AsyncServiceClient(local.base_url, local.api_key) as service:
            async with service.create_training_client(MODEL, lora_rank=0) as client:
                first = await steps(client, BATCHES[:4])
                checkpoint = (await client.save_state("middle")).path
                await steps(client, BATCHES[4:6])  # not saved, and lost
                os.kill(local.pid, signal.SIGKILL)
                await client.optim_step(ADAM, timeout=1)

    async with launch(tmp_path / "b") as local, AsyncServiceClient(local.base_url, local.api_key) as service:
        async with service.create_training_client(MODEL, lora_rank=0) as client:
            await client.load_state_with_optimizer(checkpoint)
            second = await steps(client, BATCHES[4:])
            resumed = weights(local, (await client.save_state("end")).path)

    assert first + second == undisturbed
    assert resumed == whole
    assert whole


async def test_two_tenants_at_once_train_as_if_alone(local: LocalService, tmp_path: Path) -> None:
    async def train(batches: list[list[types.Datum]]) -> dict[str, bytes]:
        async with AsyncServiceClient(local.base_url, local.api_key) as service:
            async with service.create_training_client(MODEL, lora_rank=0) as client:
                await steps(client, batches)
                return weights(local, (await client.save_state("end")).path)

    tenants = [BATCHES, BATCHES[::-1]]
    alone = [await train(batches) for batches in tenants]
    together: list[dict[str, bytes]] = [{}, {}]

    async def one(index: int) -> None:
        together[index] = await train(tenants[index])

    async with anyio.create_task_group() as group:
        group.start_soon(one, 0)
        group.start_soon(one, 1)
    assert together == alone
    assert alone[0] != alone[1]


async def test_lost_answers_change_nothing(local: LocalService) -> None:
    async def train(url: str) -> dict[str, bytes]:
        async with AsyncServiceClient(url, local.api_key, retry=RetryPolicy(base_s=0.01)) as service:
            async with service.create_training_client(MODEL, lora_rank=0) as client:
                await steps(client, BATCHES)
                return weights(local, (await client.save_state("end")).path)

    clean = await train(local.base_url)
    async with lossy_proxy(local.base_url, lambda path, n: n % 3 == 1) as proxy:
        lossy = await train(proxy.base_url)
    assert proxy.lost["forward_backward"] >= 4
    assert proxy.lost["optim_step"] >= 4
    assert proxy.lost["save_weights"] == 1
    assert lossy == clean


async def test_sampling_follows_the_seed_and_agrees_with_the_trainer(local: LocalService) -> None:
    async with AsyncServiceClient(local.base_url, local.api_key) as service:
        async with service.create_training_client(MODEL, lora_rank=0) as client:
            await steps(client, BATCHES * 2)
            snapshot = await client.save_weights_for_sampler("s")
            prompt = list(b"batch ")
            params = types.SamplingParams(max_tokens=12, seed=7)
            async with service.create_sampling_client(model_path=snapshot.path) as sampler:
                first, second = [await sampler.sample(types.ModelInput.from_ints(prompt), 2, params) for _ in range(2)]
                tokens = prompt + list(first.sequences[0].tokens)
                prompt_logprobs = await sampler.compute_logprobs(types.ModelInput.from_ints(tokens))
            assert [list(s.tokens) for s in first.sequences] == [list(s.tokens) for s in second.sequences]
            forward = await client.forward(
                [
                    types.Datum(
                        model_input=types.ModelInput.from_ints(tokens[:-1]),
                        loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)},
                    )
                ]
            )
    trainer = forward.loss_fn_outputs[0]["logprobs"].to_numpy()
    np.testing.assert_allclose(trainer[len(prompt) - 1 :], first.sequences[0].logprobs_np, atol=1e-4)
    np.testing.assert_allclose(trainer, prompt_logprobs[1:], atol=1e-4)


async def test_unknown_things_are_named(local: LocalService) -> None:
    async with AsyncServiceClient(local.base_url, local.api_key) as service:
        with pytest.raises(errors.FwasyncError, match=r"qwen3-tiny"):
            async with service.create_training_client("no/such-model"):
                pass
        with pytest.raises(errors.FwasyncError, match="rank"):
            async with service.create_training_client(MODEL, lora_rank=100_000):
                pass
        with pytest.raises(errors.FwasyncError, match="nowhere"):
            async with service.create_sampling_client(model_path="tinker://nowhere/sampler_weights/x"):
                pass
        async with service.create_training_client(MODEL, lora_rank=0) as client:
            with pytest.raises(errors.FwasyncError, match="nothing"):
                await client.load_state("nothing")
            with pytest.raises(errors.FwasyncError, match="no_such_loss"):
                await client.forward_backward(BATCHES[0], "no_such_loss")
            await steps(client, BATCHES[:1])


async def test_a_result_that_the_service_forgot_is_told(local: LocalService) -> None:
    from fwasync._http.client import Http
    from fwasync._http.retrieve import retrieve

    async with Http(local.base_url, local.api_key) as http:
        with pytest.raises(errors.ResultLostError, match="load the last checkpoint"):
            await retrieve(http, "req-unknown", what="optim_step")


async def test_a_cancelled_crowd_of_samples_leaves_nothing_behind(local: LocalService) -> None:
    async with AsyncServiceClient(local.base_url, local.api_key) as service:
        async with service.create_sampling_client(base_model=MODEL) as sampler:
            before = asyncio.all_tasks()
            params = types.SamplingParams(max_tokens=400)
            async with anyio.create_task_group() as group:
                for _ in range(200):
                    group.start_soon(sampler.sample, types.ModelInput.from_ints([1, 2, 3]), 1, params)
                while sampler.in_flight < 200:
                    await anyio.lowlevel.checkpoint()
                group.cancel_scope.cancel()
            assert sampler.in_flight == 0
            response = await sampler.sample(types.ModelInput.from_ints([1]), 1, types.SamplingParams(max_tokens=1))
            assert len(response.sequences) == 1
            assert len(asyncio.all_tasks() - before) <= 0


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts file descriptors in /proc")
async def test_no_socket_is_left_wherever_the_client_is_cancelled(local: LocalService) -> None:
    def sockets() -> int:
        return sum(Path(f"/proc/self/fd/{fd}").is_socket() for fd in range(1024))

    async def body() -> None:
        async with AsyncServiceClient(local.base_url, local.api_key) as service:
            async with service.create_training_client(MODEL, lora_rank=0) as client:
                await steps(client, BATCHES[:2])

    before_sockets, before_tasks = sockets(), asyncio.all_tasks()
    struck = 0
    for n in range(25):
        task = asyncio.ensure_future(body())
        await asyncio.sleep(n * 0.001)  # where that strikes is up to the machine; it is right wherever it does
        struck += not task.done()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == before_tasks
    for _ in range(10):
        await asyncio.sleep(0)
    assert struck >= 2
    assert sockets() == before_sockets
