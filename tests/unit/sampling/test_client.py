"""Sampling: many at once, exactly the numbers that were sampled, and cancellation that is told to the service."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import anyio.lowlevel
import httpx
import numpy as np
import pytest

from fwasync import (
    AdaptiveConcurrencyController,
    AsyncDeploymentSampler,
    AsyncSamplingClient,
    AsyncServiceClient,
    ConcurrencyController,
    FixedConcurrencyController,
    errors,
    types,
)
from fwasync.testing import virtual_time
from support.fake_trainer import KEY, FakeTrainer, answer

PROMPT = types.ModelInput.from_ints([1, 2])


@asynccontextmanager
async def connected(
    trainer: FakeTrainer, concurrency: ConcurrencyController | None = None
) -> AsyncIterator[AsyncSamplingClient]:
    service = AsyncServiceClient("http://trainer.test", KEY, transport=trainer)
    async with service, service.create_sampling_client(base_model="base", concurrency=concurrency) as sampler:
        yield sampler


async def test_a_sample() -> None:
    trainer = FakeTrainer()
    async with connected(trainer) as sampler:
        response = await sampler.sample(PROMPT, 2, types.SamplingParams(max_tokens=3, stop=["x"], temperature=0.7))
    assert [list(s.tokens) for s in response.sequences] == [[1, 2], [1, 2]]
    np.testing.assert_array_equal(response.sequences[0].logprobs_np, np.float32([-0.5, -0.25]))
    assert response.sequences[0].stop_reason == "stop"
    assert len({s.sequence_id for s in response.sequences}) == 2
    assert trainer.sent[-2].body == {
        "type": "sample",
        "sampling_session_id": "sampler",
        "seq_id": 0,
        "num_samples": 2,
        "prompt": {"chunks": [{"tokens": [1, 2], "type": "encoded_text"}]},
        "sampling_params": {"max_tokens": 3, "stop": ["x"], "temperature": 0.7},
    }


async def test_compute_logprobs_has_an_entry_for_each_token() -> None:
    trainer = FakeTrainer()
    async with connected(trainer) as sampler:
        assert await sampler.compute_logprobs(PROMPT) == [None, -1.5]
        trainer.results["sample-1"] = {"sequences": [], "prompt_logprobs": [-1.5]}
        assert await sampler.compute_logprobs(PROMPT) == [None, -1.5]


async def test_many_at_once_have_numbers_of_their_own() -> None:
    trainer = FakeTrainer()
    async with connected(trainer) as sampler, anyio.create_task_group() as group:
        for _ in range(100):
            group.start_soon(sampler.sample, PROMPT)
    numbers = [sent.seq_id for sent in trainer.sent if sent.path == "asample"]
    assert sorted(numbers) == list(range(100))


async def test_a_cancelled_sample_is_told_to_the_service() -> None:
    trainer = FakeTrainer()
    async with connected(trainer) as sampler:
        gate = trainer.hold("retrieve_future")
        async with anyio.create_task_group() as group:
            group.start_soon(sampler.sample, PROMPT)
            while not trainer.polls:
                await anyio.lowlevel.checkpoint()
            assert sampler.in_flight == 1
            group.cancel_scope.cancel()
        assert sampler.in_flight == 0
        gate.set()
        while trainer.sent[-1].path != "cancel_future":
            await anyio.lowlevel.checkpoint()
    assert trainer.sent[-2].body == {"request_id": "sample-0"}


async def test_leaving_the_block_ends_what_is_in_flight_and_tells_the_service() -> None:
    trainer, closed = FakeTrainer(), list[str]()

    async def one() -> None:
        with pytest.raises(errors.ClosedError, match="the sampling client was closed while this was in progress"):
            await sampler.sample(PROMPT)
        closed.append("yes")

    async with AsyncServiceClient("http://trainer.test", KEY, transport=trainer) as service:
        async with anyio.create_task_group() as group:
            concurrency = FixedConcurrencyController(40)
            async with service.create_sampling_client(base_model="base", concurrency=concurrency) as sampler:
                trainer.hold("retrieve_future")
                for _ in range(50):
                    group.start_soon(one)
                while trainer.polls < 40:
                    await anyio.lowlevel.checkpoint()
            assert sampler.in_flight == concurrency.in_flight == concurrency.waiting == 0
            told = [sent.body["request_id"] for sent in trainer.sent if sent.path == "cancel_future"]
            assert sorted(told) == sorted(f"sample-{number}" for number in range(40))
    assert len(closed) == 50
    with pytest.raises(errors.ClosedError, match="not open"):
        await sampler.sample(PROMPT)


async def test_a_cancelled_block_tells_the_service_what_it_leaves_behind() -> None:
    trainer = FakeTrainer()
    async with anyio.create_task_group() as group:
        async with connected(trainer) as sampler:
            trainer.hold("retrieve_future")
            for _ in range(3):
                group.start_soon(sampler.sample, PROMPT)
            while trainer.polls < 3:
                await anyio.lowlevel.checkpoint()
            group.cancel_scope.cancel()
            await anyio.sleep_forever()
    told = [sent.body["request_id"] for sent in trainer.sent if sent.path == "cancel_future"]
    assert sorted(told) == ["sample-0", "sample-1", "sample-2"]


async def test_a_service_that_knows_no_cancelling_is_not_asked_for_each_sample() -> None:
    trainer = FakeTrainer()
    async with connected(trainer) as sampler:
        trainer.hold("retrieve_future")
        for _ in range(100):
            trainer.next_time("cancel_future", lambda: answer(404, {"detail": "no such path"}))
        async with anyio.create_task_group() as group:
            for _ in range(100):
                group.start_soon(sampler.sample, PROMPT)
            while trainer.polls < 100:
                await anyio.lowlevel.checkpoint()
            group.cancel_scope.cancel()
    assert 0 < len([sent for sent in trainer.sent if sent.path == "cancel_future"]) < 50


@virtual_time
async def test_a_service_that_does_not_answer_does_not_hold_up_who_leaves() -> None:
    trainer = FakeTrainer()
    async with anyio.create_task_group() as group:
        async with AsyncServiceClient("http://trainer.test", KEY, transport=trainer) as service:
            async with service.create_sampling_client(base_model="base") as sampler:
                trainer.hold("retrieve_future")
                trainer.hold("cancel_future")
                group.start_soon(sampler.sample, PROMPT)
                while not trainer.polls:
                    await anyio.lowlevel.checkpoint()
                group.cancel_scope.cancel()
                left = anyio.current_time()
            assert anyio.current_time() - left == pytest.approx(3.0)


async def test_a_lost_sample_is_asked_for_anew_and_not_for_ever() -> None:
    trainer = FakeTrainer()
    async with connected(trainer) as sampler:
        trainer.next_time("asample", lambda: trainer.results.clear())
        await sampler.sample(PROMPT)
        assert [sent.seq_id for sent in trainer.sent if sent.path == "asample"] == [0, 1]
        for _ in range(100):
            trainer.next_time("asample", lambda: trainer.results.clear())
        with pytest.raises(errors.ResultLostError):
            await sampler.sample(PROMPT)
    assert len([sent for sent in trainer.sent if sent.path == "asample"]) == 6


@virtual_time
async def test_timeout() -> None:
    trainer = FakeTrainer()
    async with connected(trainer) as sampler:
        trainer.hold("retrieve_future")
        with pytest.raises(errors.OperationTimeoutError, match=r"after 3\.0 s"):
            await sampler.sample(PROMPT, timeout=3)


@virtual_time
async def test_back_pressure_is_waited_out() -> None:
    trainer = FakeTrainer()
    async with connected(trainer) as sampler:
        for _ in range(3):
            trainer.next_time("asample", lambda: answer(429, {"detail": "slow down"}))
        await sampler.sample(PROMPT)
    assert len({sent.key for sent in trainer.sent if sent.path == "asample"}) == 1


async def test_misuse() -> None:
    service = AsyncServiceClient("http://trainer.test", KEY, transport=FakeTrainer())
    with pytest.raises(errors.UsageError, match="either base_model or model_path"):
        service.create_sampling_client()
    async with service:
        sampler = service.create_sampling_client(model_path="tinker://x/sampler_weights/y")
        with pytest.raises(errors.ClosedError, match="async with"):
            await sampler.sample(PROMPT)
        async with sampler:
            with pytest.raises(errors.UsageError, match="num_samples is 0"):
                await sampler.sample(PROMPT, 0)


# -- concurrency -----------------------------------------------------------------------------------


async def test_a_slot_is_held_from_the_first_attempt_to_the_result() -> None:
    trainer = FakeTrainer()
    controller = FixedConcurrencyController(3)
    async with connected(trainer, controller) as sampler:
        gate = trainer.hold("retrieve_future")
        async with anyio.create_task_group() as group:
            for _ in range(10):
                group.start_soon(sampler.sample, PROMPT)
            while trainer.polls < 3:
                await anyio.lowlevel.checkpoint()
            assert (controller.in_flight, controller.waiting) == (3, 7)
            assert len([sent for sent in trainer.sent if sent.path == "asample"]) == 3
            gate.set()
    assert (controller.in_flight, controller.waiting) == (0, 0)
    assert controller.statistics().requests == 10


async def test_a_cancelled_sample_leaves_its_slot_or_its_place_in_the_queue() -> None:
    trainer = FakeTrainer()
    controller = FixedConcurrencyController(1)
    async with connected(trainer, controller) as sampler:
        trainer.hold("retrieve_future")
        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(sampler.sample, PROMPT)
            while not trainer.polls:
                await anyio.lowlevel.checkpoint()
            group.cancel_scope.cancel()
        assert (controller.in_flight, controller.waiting) == (0, 0)
        assert controller.statistics().requests == 0
    assert len([sent for sent in trainer.sent if sent.path == "asample"]) == 1


@virtual_time
async def test_refusals_shrink_the_window_though_they_are_repeated() -> None:
    trainer = FakeTrainer()
    controller = AdaptiveConcurrencyController()
    async with connected(trainer, controller) as sampler:
        trainer.next_time("asample", lambda: answer(429, {"detail": "slow down"}))
        await sampler.sample(PROMPT)
    assert controller.window_size == 4
    assert controller.statistics().requests == 2


async def test_one_controller_serves_every_sampling_path() -> None:
    async def complete(_: httpx.Request) -> httpx.Response:
        assert controller.in_flight <= 2
        await anyio.lowlevel.checkpoint()
        choice = {"text": "a", "finish_reason": "stop", "raw_output": {"completion_token_ids": [5]}}
        return httpx.Response(200, json={"choices": [choice]})

    controller = FixedConcurrencyController(2)
    deployment = AsyncDeploymentSampler(
        "http://s.test", "m", KEY, concurrency=controller, transport=httpx.MockTransport(complete)
    )
    async with connected(FakeTrainer(), controller) as client, deployment:
        async with anyio.create_task_group() as group:
            for _ in range(5):
                group.start_soon(client.sample, PROMPT)
                group.start_soon(deployment.sample_with_prompt_tokens, [1])
    assert controller.statistics().max_in_flight == 2
    assert controller.statistics().requests == 10
