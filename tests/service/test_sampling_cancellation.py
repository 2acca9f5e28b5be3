"""A thousand samples in flight, and what is left of them on both sides when nobody wants them any more."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio
import pytest
import pytest_asyncio

from fwasync import AsyncDeploymentSampler, AsyncServiceClient, FixedConcurrencyController, errors, types
from fwasync.testing import AsyncScriptedService
from service import scripted
from service.scripted import SMALL, deploy, full_name, load_when

# The most likely token after it is the same again and again, to the end of the context.
PROMPT = [5, 6, 7, 8]
CONTEXT = 1024
SAMPLES = 1000
RUNNING = 64 * 1000
"""Less than those that run at the same time would have sampled, had they gone on."""

running = scripted.running
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(running: AsyncScriptedService) -> AsyncScriptedService:
    await deploy(running, "small", base_model=SMALL)
    return running


def sampler_of(service: AsyncScriptedService, concurrency: int = SAMPLES) -> AsyncDeploymentSampler:
    controller = FixedConcurrencyController(concurrency)
    return AsyncDeploymentSampler(service.base_url, full_name("small"), service.api_key, concurrency=controller)


async def whole(sampler: AsyncDeploymentSampler, seed: int) -> None:
    await sampler.sample_with_prompt_tokens(PROMPT, max_tokens=CONTEXT, temperature=0, seed=seed)


async def group(sampler: AsyncDeploymentSampler, seed: int) -> None:
    await sampler.sample_with_prompt_tokens(PROMPT, 10, max_tokens=CONTEXT, temperature=0, seed=seed)


async def streamed(sampler: AsyncDeploymentSampler, seed: int) -> None:
    async with sampler.stream_with_prompt_tokens(PROMPT, max_tokens=CONTEXT, temperature=0, seed=seed) as stream:
        async for _ in stream:
            pass


KINDS: list[Callable[[AsyncDeploymentSampler, int], Awaitable[None]]] = [whole] * 400 + [streamed] * 300 + [group] * 30


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir())) if sys.platform == "linux" else 0


@pytest.mark.parametrize("how", ["cancelled", "closed"])
async def test_a_thousand_samples_end_on_both_sides(service: AsyncScriptedService, how: str) -> None:
    files, before = open_files(), await load_when(service, running=0)
    ended: Counter[str] = Counter()

    async def note(kind: Callable[[AsyncDeploymentSampler, int], Awaitable[None]], seed: int) -> None:
        try:
            await kind(sampler, seed)
        except BaseException as error:
            ended[type(error).__name__] += 1
            if not isinstance(error, errors.ClosedError):
                raise
        else:
            ended["finished"] += 1

    sampler = sampler_of(service)
    async with anyio.create_task_group() as tasks:
        async with sampler:
            for seed, kind in enumerate(KINDS):
                tasks.start_soon(note, kind, seed)
            await load_when(service, running=64, waiting=SAMPLES - 64)
            if how == "cancelled":
                tasks.cancel_scope.cancel()
    assert ended == {"CancelledError" if how == "cancelled" else "ClosedError": len(KINDS)}
    assert (sampler.concurrency.in_flight, sampler.concurrency.waiting) == (0, 0)
    after = await load_when(service, running=0)
    assert after.tokens - before.tokens < RUNNING
    assert open_files() == files

    async with sampler_of(service) as again:
        [one] = await again.sample_with_prompt_tokens(PROMPT, max_tokens=7, temperature=0)
    assert (await service.sampling()).tokens == after.tokens + one.completion_len == after.tokens + 7


async def test_leaving_a_sampling_client_ends_its_samples_on_both_sides(service: AsyncScriptedService) -> None:
    before, ended = await load_when(service, running=0), Counter[str]()
    prompt, params = types.ModelInput.from_ints(PROMPT), types.SamplingParams(temperature=0)

    async def one() -> None:
        try:
            await client.sample(prompt, sampling_params=params)
        except errors.ClosedError:
            ended["ClosedError"] += 1

    async with AsyncServiceClient(service.base_url, service.api_key) as trainer, anyio.create_task_group() as tasks:
        async with trainer.create_sampling_client(base_model="fwasync/qwen3-small") as client:
            for _ in range(200):
                tasks.start_soon(one)
            await load_when(service, running=64, waiting=136)
        assert (ended, client.in_flight) == ({"ClosedError": 200}, 0)
        after = await load_when(service, running=0)
    assert after.tokens - before.tokens < RUNNING
    assert (await service.sampling()).tokens == after.tokens


async def test_a_session_that_is_finished_ends_its_samples_and_no_others(service: AsyncScriptedService) -> None:
    before = await load_when(service, running=0)
    prompt = {"chunks": [{"type": "encoded_text", "tokens": PROMPT}]}
    async with scripted.plain_client(service) as client:

        async def post(path: str, body: dict[str, object]) -> dict[str, str]:
            answer = await client.post(f"/api/v1/{path}", json=body)
            assert answer.status_code == 200, answer.text
            return answer.json()

        async def begin(count: int, num_samples: int = 1) -> tuple[str, list[str]]:
            session_id = (await post("create_session", {"tags": [], "sdk_version": "0"}))["session_id"]
            opened = {"session_id": session_id, "sampling_session_seq_id": 0, "base_model": "fwasync/qwen3-small"}
            sampler = (await post("create_sampling_session", opened))["sampling_session_id"]
            body = {"sampling_session_id": sampler, "prompt": prompt, "num_samples": num_samples}
            params = {"temperature": 0, "max_tokens": CONTEXT}
            asked = [{**body, "seq_id": number, "sampling_params": params} for number in range(count)]
            return session_id, [(await post("asample", each))["request_id"] for each in asked]

        (finished, futures), (kept, others) = await begin(100), await begin(3, 16)
        await load_when(service, running=64, waiting=39)
        await post(f"sessions/{finished}/finish", {})
        after = await load_when(service, running=3)
        assert after.tokens - before.tokens < RUNNING
        told = await post("retrieve_future", {"request_id": futures[-1]})
        assert (told["error"], told["category"]) == (f"session {finished} was finished", "user")
        await post("cancel_future", {"request_id": others[0]})
        await load_when(service, running=2)
        await post(f"sessions/{kept}/finish", {})
        await load_when(service, running=0)


async def test_a_sampler_goes_on_after_its_samples_were_cancelled(service: AsyncScriptedService) -> None:
    async with sampler_of(service, 20) as sampler:
        for kind in (whole, group, streamed):
            async with anyio.create_task_group() as tasks:
                for seed in range(40):
                    tasks.start_soon(kind, sampler, seed)
                await load_when(service, running=20)
                tasks.cancel_scope.cancel()
            assert (sampler.concurrency.in_flight, sampler.concurrency.waiting) == (0, 0)
            await load_when(service, running=0)
            assert len(await sampler.sample_with_prompt_tokens(PROMPT, 4, max_tokens=2)) == 4
