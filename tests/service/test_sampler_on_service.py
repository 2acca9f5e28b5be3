"""The deployment sampler against the local service: tokens, logprobs, echo, streams, cancellation."""

from __future__ import annotations

from collections.abc import Iterator

import anyio
import anyio.lowlevel
import pytest

from fwasync import errors
from fwasync.sampling.attempts import AttemptPolicy
from fwasync.sampling.concurrency import FixedConcurrencyController
from fwasync.sampling.deployment import AsyncDeploymentSampler
from service.control_client import BASE, A, Control, start_control

PROMPT = [72, 101, 108, 108, 111]
DEPLOYMENT = "accounts/local/deployments/sampled"


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Control]:
    running = start_control(tmp_path_factory.mktemp("sampler"))
    running.post(
        f"{A}/deployments", {"baseModel": BASE, "minReplicaCount": 1, "maxReplicaCount": 1}, deploymentId="sampled"
    )
    yield running
    running.close()
    running.service.close()


@pytest.fixture
def sampler(control: Control) -> AsyncDeploymentSampler:
    return AsyncDeploymentSampler(
        str(control.http.base_url),
        DEPLOYMENT,
        control.service.key,
        concurrency=FixedConcurrencyController(16),
        attempts=AttemptPolicy(hotload_max_retries=0),
    )


async def test_a_group_is_sampled_reproducibly_and_each_token_has_its_logprob(sampler: AsyncDeploymentSampler) -> None:
    async with sampler:
        first = await sampler.sample_with_prompt_tokens(PROMPT, 8, max_tokens=6, seed=1, logprobs=True)
        again = await sampler.sample_with_prompt_tokens(PROMPT, 8, max_tokens=6, seed=1, logprobs=True)
        metrics = sampler.drain_metrics()
    assert [each.full_tokens for each in first] == [each.full_tokens for each in again]
    assert len({tuple(each.completion_tokens) for each in first}) > 1
    for each in first:
        assert each.inference_logprobs is not None
        assert len(each.inference_logprobs) == each.completion_len == len(each.completion_tokens)
        assert each.sampling_logprobs == each.inference_logprobs
        assert max(each.inference_logprobs) <= 0
    assert len(metrics) == 16
    assert {each.prompt_tokens for each in metrics} == {len(PROMPT)}


async def test_sampling_logprobs_are_those_of_the_distribution_that_was_drawn_from(
    sampler: AsyncDeploymentSampler,
) -> None:
    async with sampler:
        [greedy] = await sampler.sample_with_prompt_tokens(PROMPT, max_tokens=6, temperature=0, logprobs=True)
        [few] = await sampler.sample_with_prompt_tokens(PROMPT, max_tokens=6, top_k=3, seed=1, logprobs=True)
        cool = await sampler.sample_with_prompt_tokens(PROMPT, 8, max_tokens=1, temperature=0.5, seed=1, logprobs=True)
        async with sampler.stream_with_prompt_tokens(PROMPT, max_tokens=6, top_k=3, seed=1, logprobs=True) as stream:
            async for _ in stream:
                pass
    assert greedy.sampling_logprobs == [0.0] * 6
    assert few.inference_logprobs is not None
    assert few.sampling_logprobs is not None
    for own, drawn in zip(few.inference_logprobs, few.sampling_logprobs, strict=True):
        assert drawn is not None
        assert own < drawn <= 0
    assert stream.completion.sampling_logprobs == few.sampling_logprobs
    # The logprobs of one distribution differ from each other as the model's do, by the temperature.
    firsts = [(each.inference_logprobs[0], each.sampling_logprobs[0]) for each in cool]
    assert len(set(firsts)) > 1
    for own, drawn in firsts:
        assert drawn - firsts[0][1] == pytest.approx((own - firsts[0][0]) / 0.5, abs=1e-4)


async def test_an_echo_and_a_stream_tell_the_same_as_a_plain_answer(sampler: AsyncDeploymentSampler) -> None:
    async with sampler:
        [plain] = await sampler.sample_with_prompt_tokens(PROMPT, max_tokens=6, seed=2, logprobs=True)
        [echo] = await sampler.sample_with_prompt_tokens(PROMPT, max_tokens=6, seed=2, logprobs=True, echo=True)
        async with sampler.stream_with_prompt_tokens(PROMPT, max_tokens=6, seed=2, logprobs=True) as stream:
            pieces = [piece async for piece in stream]
    assert plain.inference_logprobs is not None
    assert echo.inference_logprobs is not None
    assert echo.full_tokens == plain.full_tokens == stream.completion.full_tokens
    assert len(echo.inference_logprobs) == len(echo.full_tokens) - 1
    assert echo.logprobs_echoed
    assert echo.inference_logprobs[len(PROMPT) - 1 :] == pytest.approx(plain.inference_logprobs, abs=1e-4)
    assert stream.completion.inference_logprobs == pytest.approx(plain.inference_logprobs, abs=1e-4)
    assert [token for piece in pieces for token in piece.token_ids] == plain.completion_tokens
    assert "".join(piece.text for piece in pieces) == stream.completion.text


async def test_a_cancelled_group_leaves_the_sampler_as_it_was(sampler: AsyncDeploymentSampler) -> None:
    async with sampler:
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: sampler.sample_with_prompt_tokens(PROMPT, 32, max_tokens=200))
            while sampler.concurrency.in_flight < 16:
                await anyio.lowlevel.checkpoint()
            group.cancel_scope.cancel()
        assert (sampler.concurrency.in_flight, sampler.concurrency.waiting) == (0, 0)
        assert len(await sampler.sample_with_prompt_tokens(PROMPT, 4, max_tokens=2)) == 4


async def test_refusals_are_told(control: Control) -> None:
    url, policy = str(control.http.base_url), AttemptPolicy(hotload_max_retries=0)
    async with AsyncDeploymentSampler(url, "accounts/local/deployments/no", control.service.key, attempts=policy) as no:
        with pytest.raises(errors.NotFoundError, match="no deployment"):
            await no.sample_with_prompt_tokens(PROMPT)
    async with AsyncDeploymentSampler(url, DEPLOYMENT, "wrong", attempts=policy) as wrong:
        with pytest.raises(errors.AuthenticationError):
            await wrong.sample_with_prompt_tokens(PROMPT)
