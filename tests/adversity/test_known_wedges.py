"""The situations A to G in which other clients wedge, lose or poison (`docs/cancellation.md` has the table)."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import anyio
import numpy as np
import pytest
import torch

from fwasync import APIFuture, AsyncServiceClient, AsyncTrainingClient, errors, types
from support.fake_trainer import KEY, FakeTrainer
from unit.training.test_client import connected, datum, until

ADAM = types.AdamParams()


async def cancel_wait(future: APIFuture[object], when: object) -> None:
    task = asyncio.ensure_future(future.result())
    await until(when)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def goes_on(client: AsyncTrainingClient) -> None:
    await client.forward_backward([datum()])
    await client.optim_step(ADAM)


async def test_a_the_wait_for_an_acknowledged_operation_is_cancelled() -> None:
    trainer = FakeTrainer()
    async with connected(trainer) as client:
        gate = trainer.hold("retrieve_future")
        future = client.optim_step(ADAM)
        await cancel_wait(future, lambda: trainer.polls == 2)  # the first was for the model
        assert (future.state, future.took_effect) == ("admitted", True)
        gate.set()
        await goes_on(client)
        assert trainer.applied == ["optim_step", "forward_backward", "optim_step"]
        assert trainer.polls == 4, "the cancelled wait does not go on polling"


async def test_a2_a_result_whose_wait_timed_out_is_not_lost() -> None:
    trainer = FakeTrainer()
    async with connected(trainer) as client:
        gate = trainer.hold("retrieve_future")
        future = client.optim_step(ADAM)
        await until(lambda: future.state == "admitted")
        with pytest.raises(errors.OperationTimeoutError):
            await future.result(timeout=0)
        gate.set()
        assert (await future).metrics == {"grad_norm": 1.0}
        assert (await future).metrics == {"grad_norm": 1.0}


async def test_b_cancelled_while_it_is_sent_before_the_service_has_it() -> None:
    trainer = FakeTrainer()
    gate = trainer.hold("optim_step")
    async with connected(trainer) as client:
        future = client.optim_step(ADAM)
        await cancel_wait(future, lambda: trainer.sent[-1].path == "optim_step")
        assert (future.state, future.took_effect) == ("admitting", None)
        gate.set()
        await goes_on(client)
        assert future.took_effect is True
    assert trainer.applied == ["optim_step", "forward_backward", "optim_step"]


async def test_b2_cancelled_after_the_service_has_it_and_before_it_says_so() -> None:
    trainer = FakeTrainer()
    gate = anyio.Event()
    async with connected(trainer) as client:
        trainer.next_time("optim_step", lambda: trainer.hold("optim_step") and None)
        future = client.optim_step(ADAM)
        await cancel_wait(future, lambda: trainer.applied == ["optim_step"])
        trainer.gates.clear()
        gate.set()
        await goes_on(client)
        assert (await future).metrics == {"grad_norm": 1.0}
    assert trainer.applied == ["optim_step", "forward_backward", "optim_step"]


async def test_c_cancelled_while_it_waits_for_its_turn() -> None:
    trainer = FakeTrainer()
    gate = trainer.hold("save_weights")
    async with connected(trainer) as client:
        slow = client.save_state("s")
        future = client.optim_step(ADAM)
        await cancel_wait(future, lambda: slow.state == "admitting")
        assert future.state == "withdrawn"
        gate.set()
        await goes_on(client)
    assert trainer.applied == ["save_weights", "forward_backward", "optim_step"]


async def test_d_a_custom_loss_is_cancelled_in_its_forward() -> None:
    trainer = FakeTrainer()
    called = 0

    def loss(_: list[types.Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        nonlocal called
        called += 1
        return logprobs[0].sum(), {}

    async with connected(trainer) as client:
        gate = trainer.hold("retrieve_future")
        future = client.forward_backward_custom([datum()], loss)
        await cancel_wait(future, lambda: trainer.polls == 2)
        gate.set()
        await goes_on(client)
        assert future.took_effect is True
    assert called == 1
    assert trainer.applied == ["forward", "forward_backward", "forward_backward", "optim_step"]


async def test_e_a_sample_is_cancelled_and_the_service_is_told() -> None:
    trainer = FakeTrainer()
    service = AsyncServiceClient("http://trainer.test", KEY, transport=trainer)
    async with service, service.create_sampling_client(base_model="base") as sampler:
        gate = trainer.hold("retrieve_future")
        task = asyncio.ensure_future(sampler.sample(types.ModelInput.from_ints([1])))
        await until(lambda: trainer.polls == 1)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        gate.set()
        await until(lambda: trainer.sent[-1].path == "cancel_future")
        await sampler.sample(types.ModelInput.from_ints([1]))


@pytest.mark.parametrize("counts_rejected", [True, False])
async def test_f_a_submit_is_refused(counts_rejected: bool) -> None:
    trainer = FakeTrainer(counts_rejected=counts_rejected, reject={"save_weights"})
    async with connected(trainer) as client:
        with pytest.raises(errors.BadRequestError):
            await client.save_state("s")
        await goes_on(client)
    assert trainer.applied == ["forward_backward", "optim_step"]


async def test_g_a_datum_cannot_be_sent() -> None:
    trainer = FakeTrainer()
    async with connected(trainer) as client:
        with pytest.raises(errors.DatumError, match="nan"):
            await client.forward_backward([datum(2, weights=np.float32([1, np.nan]), target_tokens=np.arange(2))])
        await goes_on(client)
    assert trainer.applied == ["forward_backward", "optim_step"]
