"""The training client against a strict trainer without a socket: order, exactly once, waits, refusals, exit."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import anyio.lowlevel
import httpx
import numpy as np
import pytest

from fwasync import AsyncServiceClient, AsyncTrainingClient, errors, types
from fwasync._http.session import Wire
from fwasync.testing import virtual_time
from support.fake_trainer import KEY, FakeTrainer, answer


def datum(length: int = 3, **inputs: np.ndarray) -> types.Datum:
    inputs = inputs or {
        "target_tokens": np.arange(1, length + 1),
        "weights": np.ones(length, dtype=np.float32),
    }
    return types.Datum(model_input=types.ModelInput.from_ints(list(range(length))), loss_fn_inputs=dict(inputs))


@asynccontextmanager
async def connected(trainer: FakeTrainer) -> AsyncIterator[AsyncTrainingClient]:
    service = AsyncServiceClient("http://trainer.test", KEY, transport=trainer)
    async with service, service.create_training_client("base", lora_rank=8) as client:
        yield client


@pytest.fixture
def trainer() -> FakeTrainer:
    return FakeTrainer()


async def until(condition: object) -> None:
    """Let the other tasks run until the condition holds."""
    for _ in range(1000):
        if condition():  # type: ignore[operator]
            return
        await anyio.lowlevel.checkpoint()
    raise AssertionError("it never came true")


async def test_verbs_give_results_in_the_order_of_the_calls(trainer: FakeTrainer) -> None:
    async with connected(trainer) as client:
        fb = client.forward_backward([datum()], "cross_entropy")
        opt = client.optim_step(types.AdamParams(learning_rate=0.5))
        saved = client.save_state("s")
        assert (await saved).path == "tinker://s"
        assert (await opt).metrics == {"grad_norm": 1.0}
        output = await fb
    assert output.metrics == {"loss:sum": 1.0}
    np.testing.assert_array_equal(output.loss_fn_outputs[0]["logprobs"].to_numpy(), np.float32([-0.5] * 3))
    assert trainer.numbers() == [("forward_backward", 1), ("optim_step", 2), ("save_weights", 3)]
    assert trainer.sent[2].body["forward_backward_input"]["data"][0] == {
        "model_input": {"chunks": [{"tokens": [0, 1, 2], "type": "encoded_text"}]},
        "loss_fn_inputs": {
            "target_tokens": {"data": [1, 2, 3], "dtype": "int64", "shape": [3]},
            "weights": {"data": [1.0, 1.0, 1.0], "dtype": "float32", "shape": [3]},
        },
    }


async def test_lost_acknowledgement_is_applied_once(trainer: FakeTrainer) -> None:
    def lost() -> None:
        raise httpx.ReadError("connection reset")

    trainer.next_time("forward_backward", lost)
    async with connected(trainer) as client:
        await client.forward_backward([datum()])
        await client.optim_step(types.AdamParams())
    assert trainer.applied == ["forward_backward", "optim_step"]
    first, second = (s for s in trainer.sent if s.path == "forward_backward")
    assert first.body == second.body
    assert first.key == second.key


async def test_cancelling_the_wait_for_a_queued_operation_withdraws_it(trainer: FakeTrainer) -> None:
    gate = trainer.hold("forward_backward")
    async with connected(trainer) as client:
        first = client.forward_backward([datum()])
        second = client.optim_step(types.AdamParams())
        third = client.save_state("s")
        with anyio.move_on_after(0):
            await second
        assert second.state == "withdrawn"
        assert second.took_effect is False
        gate.set()
        await first
        await third
        with pytest.raises(errors.OperationWithdrawnError):
            await second
    assert trainer.numbers() == [("forward_backward", 1), ("save_weights", 2)]


async def test_cancelling_during_admission_leaves_the_client_in_order(trainer: FakeTrainer) -> None:
    gate = trainer.hold("forward_backward")
    async with connected(trainer) as client:
        first = client.forward_backward([datum()])
        task = asyncio.ensure_future(first.result())
        await until(lambda: first.state == "admitting")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.set()
        await client.optim_step(types.AdamParams())
        assert first.state == "admitted"
        assert first.took_effect is True
        assert (await first).metrics == {"loss:sum": 1.0}
    assert trainer.applied == ["forward_backward", "optim_step"]


@virtual_time
async def test_timeout_names_the_operation_and_keeps_the_result() -> None:
    trainer = FakeTrainer()
    gate = trainer.hold("retrieve_future")
    gate.set()
    async with connected(trainer) as client:
        gate = trainer.hold("retrieve_future")
        future = client.forward_backward([datum()], timeout=5)
        with pytest.raises(
            errors.OperationTimeoutError, match=r"forward_backward .* after 5.0 s: admitted.*req-1"
        ) as e:
            await future
        assert e.value.future is future
        assert isinstance(e.value, TimeoutError)
        with pytest.raises(errors.OperationTimeoutError):
            await future.result(timeout=0.5)
        gate.set()
        assert (await future).metrics == {"loss:sum": 1.0}


async def test_a_second_waiter_takes_over_when_the_polling_one_is_cancelled(trainer: FakeTrainer) -> None:
    async with connected(trainer) as client:
        gate = trainer.hold("retrieve_future")
        future = client.optim_step(types.AdamParams())
        tasks = [asyncio.ensure_future(future.result()) for _ in range(3)]
        await until(lambda: trainer.polls == 2)
        tasks[0].cancel()
        await until(lambda: trainer.polls == 3)
        gate.set()
        assert [r.metrics for r in await asyncio.gather(*tasks[1:])] == [{"grad_norm": 1.0}] * 2
        assert trainer.polls == 3
        assert (await future).metrics == {"grad_norm": 1.0}


@pytest.mark.parametrize("counts_rejected", [True, False])
async def test_a_rejected_request_hurts_only_itself(trainer: FakeTrainer, counts_rejected: bool) -> None:
    trainer.counts_rejected = counts_rejected
    trainer.reject = {"save_weights"}
    async with connected(trainer) as client:
        fb = client.forward_backward([datum()])
        bad = client.save_state("s")
        opt = client.optim_step(types.AdamParams())
        with pytest.raises(errors.BadRequestError, match="save_weights is not to its liking"):
            await bad
        assert bad.took_effect is False
        await fb
        await opt
        await client.forward_backward([datum()])
    assert trainer.applied == ["forward_backward", "optim_step", "forward_backward"]


@pytest.mark.parametrize("counts_rejected", [True, False])
async def test_a_name_that_is_taken_is_not_taken_for_a_number(trainer: FakeTrainer, counts_rejected: bool) -> None:
    trainer.counts_rejected = counts_rejected
    trainer.taken = {"s"}
    async with connected(trainer) as client:
        for _ in range(3):
            with pytest.raises(errors.ConflictError, match="there is a s already"):
                await client.save_state("s")
        await client.optim_step(types.AdamParams())
        await client.save_state("t")
    assert trainer.applied == ["optim_step", "save_weights"]
    assert not trainer.early


@virtual_time
async def test_an_unanswered_submit_breaks_the_sequence_with_a_way_out() -> None:
    trainer = FakeTrainer()

    def lost() -> None:
        raise httpx.ReadError("gone")

    for _ in range(10_000):
        trainer.next_time("optim_step", lost)
    async with connected(trainer) as client:
        opt = client.optim_step(types.AdamParams(), timeout=None)
        later = client.forward_backward([datum()])
        with pytest.raises(errors.RetryBudgetExhaustedError, match="optim_step"):
            await opt
        assert opt.took_effect is None
        with pytest.raises(errors.SequenceBrokenError, match="load the last checkpoint"):
            await later
        with pytest.raises(errors.SequenceBrokenError):
            await client.forward([datum()])
    assert trainer.applied == ["optim_step"]


@virtual_time
@pytest.mark.parametrize("status", [401, 403, 429])
async def test_a_refusal_at_the_door_says_nothing_of_an_attempt_that_was_not_answered(status: int) -> None:
    trainer = FakeTrainer()

    def lost() -> None:
        trainer.at_the_door("optim_step", *[answer(status, {"detail": "not now"})] * 10_000)
        raise httpx.ReadError("gone")

    trainer.next_time("optim_step", lost)
    async with connected(trainer) as client:
        step = client.optim_step(types.AdamParams(), timeout=None)
        with pytest.raises(errors.SequenceBrokenError, match=r"not now.*load the last checkpoint"):
            await step
        assert step.took_effect is None
        with pytest.raises(errors.SequenceBrokenError):
            await client.forward([datum()])
    assert trainer.applied == ["optim_step"]


@virtual_time
async def test_a_refusal_at_the_door_alone_is_no_more_than_that() -> None:
    trainer = FakeTrainer()
    trainer.at_the_door("optim_step", answer(429, {}), answer(403, {"detail": "not you"}))
    async with connected(trainer) as client:
        step = client.optim_step(types.AdamParams())
        with pytest.raises(errors.PermissionDeniedError, match="not you"):
            await step
        assert step.took_effect is False
        await client.optim_step(types.AdamParams())
    assert trainer.applied == ["optim_step"]


async def test_a_failed_operation_tells_its_category(trainer: FakeTrainer) -> None:
    async with connected(trainer) as client:
        trainer.next_time(
            "optim_step", lambda: trainer.results.update({"req-1": {"error": "no gradient", "category": "user"}})
        )
        with pytest.raises(errors.OperationFailedError, match="no gradient") as e:
            await client.optim_step(types.AdamParams())
        assert (e.value.category, e.value.request_id) == ("user", "req-1")
        trainer.next_time("optim_step", lambda: trainer.results.pop("req-2") and None)
        with pytest.raises(errors.ResultLostError, match="may have taken effect"):
            await client.optim_step(types.AdamParams())
        await client.optim_step(types.AdamParams())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "the batch is empty"),
        (
            [datum(), datum(3, target_tokens=np.arange(2))],
            r"datum 1 of 2: loss_fn_inputs\['target_tokens'\] has shape \[2\]",
        ),
        ([datum(2, weights=np.float32([1, np.nan]))], r"'weights'\] is nan at position 1"),
        ([datum(2, weights=np.float32([np.inf, 0]))], r"is inf at position 0"),
        (
            [types.Datum(model_input=types.ModelInput.from_ints([]), loss_fn_inputs={})],
            "datum 0 of 1: model_input is empty",
        ),
    ],
)
async def test_bad_batches_are_refused_before_anything_is_sent(
    trainer: FakeTrainer, data: list[types.Datum], message: str
) -> None:
    async with connected(trainer) as client:
        future = client.forward_backward(data)
        with pytest.raises(errors.DatumError, match=message):
            await future
        assert future.took_effect is False
        await client.optim_step(types.AdamParams())
    assert trainer.numbers() == [("optim_step", 1)]


async def test_large_batches_are_cut_and_their_results_merged(
    trainer: FakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fwasync.training.batch.MAX_CHUNK_DATUMS", 2)
    async with connected(trainer) as client:
        output = await client.forward_backward([datum(n) for n in (1, 2, 3, 4, 5)])
    assert [len(record["logprobs"].to_numpy()) for record in output.loss_fn_outputs] == [1, 2, 3, 4, 5]
    assert output.metrics == {"loss:sum": 5.0}
    assert trainer.numbers() == [("forward_backward", n) for n in (1, 2, 3)]


async def test_a_refused_chunk_after_an_accepted_one_breaks_the_sequence(
    trainer: FakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fwasync.training.batch.MAX_CHUNK_DATUMS", 1)
    trainer.next_time("forward_backward", lambda: trainer.reject.add("forward_backward"))
    async with connected(trainer) as client:
        with pytest.raises(errors.SequenceBrokenError, match="1 of 2 parts"):
            await client.forward_backward([datum(), datum()])
        with pytest.raises(errors.SequenceBrokenError):
            await client.optim_step(types.AdamParams())


async def test_exit_waits_for_what_was_submitted(trainer: FakeTrainer) -> None:
    async with connected(trainer) as client:
        opt = client.optim_step(types.AdamParams())
    assert opt.state == "done"
    assert trainer.applied == ["optim_step"]


async def test_exit_raises_a_failure_that_nobody_awaited(trainer: FakeTrainer) -> None:
    trainer.reject = {"save_weights"}
    with pytest.raises(errors.BadRequestError):
        async with connected(trainer) as client:
            client.save_state("s")
            client.optim_step(types.AdamParams())
    with pytest.raises(ExceptionGroup) as e:
        async with connected(trainer2 := FakeTrainer(reject={"save_weights", "optim_step"})) as client:
            client.save_state("s")
            client.optim_step(types.AdamParams())
    assert len(e.value.exceptions) == 2
    assert trainer2.applied == []


@virtual_time
async def test_exit_by_an_exception_withdraws_what_is_queued(trainer: FakeTrainer) -> None:
    gate = trainer.hold("forward_backward")
    with pytest.raises(KeyError):
        async with connected(trainer) as client:
            first = client.forward_backward([datum()])
            second = client.optim_step(types.AdamParams())
            await until(lambda: first.state == "admitting")
            asyncio.get_running_loop().call_later(0.01, gate.set)
            raise KeyError
    assert (first.state, second.state) == ("admitted", "withdrawn")
    assert trainer.applied == ["forward_backward"]


@virtual_time
async def test_exit_does_not_wait_for_a_stuck_admission() -> None:
    trainer = FakeTrainer()
    trainer.hold("forward_backward")
    started = anyio.current_time()
    with pytest.raises(KeyError):
        async with connected(trainer) as client:
            first = client.forward_backward([datum()])
            await until(lambda: first.state == "admitting")
            raise KeyError
    assert anyio.current_time() - started <= 2
    assert first.state == "failed"
    assert first.took_effect is None


@virtual_time
async def test_a_custom_loss_that_is_left_before_its_backward_had_no_effect() -> None:
    trainer = FakeTrainer()
    trainer.hold("forward")
    with pytest.raises(KeyError):
        async with connected(trainer) as client:
            custom = client.forward_backward_custom([datum()], lambda d, lp: (lp[0].sum(), {}))
            await until(lambda: "forward" in [sent.path for sent in trainer.sent])
            raise KeyError
    assert custom.took_effect is False
    with pytest.raises(errors.SequenceBrokenError, match="had no effect"):
        await custom
    assert trainer.applied == []


async def test_nothing_runs_after_exit(trainer: FakeTrainer) -> None:
    before = asyncio.all_tasks()
    async with connected(trainer) as client:
        await client.forward([datum()])
        assert len(asyncio.all_tasks()) > len(before)
    assert asyncio.all_tasks() == before
    with pytest.raises(errors.ClosedError, match="async with"):
        client.optim_step(types.AdamParams())


async def test_use_before_entering_names_the_right_form() -> None:
    service = AsyncServiceClient("http://trainer.test", KEY, transport=FakeTrainer())
    client = service.create_training_client("base")
    with pytest.raises(errors.ClosedError, match=r"async with service\.create_training_client"):
        client.forward([datum()])
    with pytest.raises(errors.ClosedError, match="async with AsyncServiceClient"):
        await client.__aenter__()


@virtual_time
async def test_a_session_that_the_service_ended_is_told() -> None:
    trainer = FakeTrainer()
    async with connected(trainer) as client:
        trainer.next_time("session_heartbeat", lambda: answer(410, {"detail": "evicted"}))
        await anyio.sleep(15)
        with pytest.raises(errors.SessionLostError, match="evicted"):
            await client.optim_step(types.AdamParams())


async def test_questions_take_no_place_in_the_order(trainer: FakeTrainer) -> None:
    async with connected(trainer) as client:
        assert (await client.get_info()).model_data.tokenizer_id == "t"
        assert await client.list_checkpoints() == ["a"]
        await client.optim_step(types.AdamParams())
    assert trainer.numbers() == [("optim_step", 1)]


async def test_a_service_without_trainer_jobs_lists_a_models_checkpoints_by_path(trainer: FakeTrainer) -> None:
    async with connected(trainer) as client:
        kinds = ("training", "sampler")
        listed = [
            {"checkpoint_id": "a", "checkpoint_type": kind, "time": "", "tinker_path": f"tinker://m/{kind}/a"}
            for kind in kinds
        ]
        trainer.next_time("list_checkpoints", lambda: answer(404, {"detail": "Not Found"}))
        run = f"training_runs/{client.model_id}/checkpoints"
        trainer.next_time(run, lambda: answer(200, {"checkpoints": listed}))
        assert await client.list_checkpoints() == ["tinker://m/training/a"]


async def test_parameters_that_json_cannot_say_are_refused(trainer: FakeTrainer) -> None:
    async with connected(trainer) as client:
        with pytest.raises(errors.UsageError, match="optim_step: learning_rate is nan"):
            client.optim_step(types.AdamParams(learning_rate=float("nan")))
        with pytest.raises(errors.UsageError, match="loss_fn_config: clip_low_threshold is inf"):
            await client.forward_backward([datum()], "ppo", {"clip_low_threshold": float("inf")})
    assert trainer.numbers() == []


async def test_a_service_that_takes_only_protobuf_is_found_out_once() -> None:
    trainer = FakeTrainer(takes="x-protobuf")
    async with connected(trainer) as client:
        first = await client.forward_backward([datum(2), datum(3)])
        await client.optim_step(types.AdamParams())
        await client.forward([datum()])
    assert [len(record["logprobs"].to_numpy()) for record in first.loss_fn_outputs] == [2, 3]
    assert first.metrics == {"loss:sum": 2.0}
    assert trainer.numbers() == [("forward_backward", 1), ("optim_step", 2), ("forward_backward", 3)]


@pytest.mark.parametrize(("wire", "takes"), [("json", "x-protobuf"), ("protobuf", "json")])
async def test_a_chosen_wire_is_kept(wire: Wire, takes: str) -> None:
    trainer = FakeTrainer(takes=takes)
    service = AsyncServiceClient("http://trainer.test", KEY, wire=wire, transport=trainer)
    async with service, service.create_training_client("base") as client:
        with pytest.raises(errors.BadRequestError, match="415"):
            await client.forward_backward([datum()])
        await client.optim_step(types.AdamParams())
    assert trainer.applied == ["optim_step"]


def test_an_unknown_wire() -> None:
    with pytest.raises(errors.UsageError, match="'auto', 'json' or 'protobuf'"):
        AsyncServiceClient("http://trainer.test", KEY, wire="xml")  # type: ignore[arg-type]


async def test_a_batch_is_let_go_once_it_is_sent_or_withdrawn(trainer: FakeTrainer) -> None:
    gate = trainer.hold("optim_step")
    async with connected(trainer) as client:
        batch, other = [datum()], [datum()]
        sent, withdrawn = weakref.ref(batch[0]), weakref.ref(other[0])
        backward = client.forward_backward(batch)
        client.optim_step(types.AdamParams())
        queued = client.forward_backward(other)
        del batch, other
        await until(lambda: client.statistics().admitting and client.statistics().queued == 1)
        assert queued.cancel()
        gate.set()
        await client.optim_step(types.AdamParams())
        gc.collect()
        assert (backward.state, sent()) == ("admitted", None)
        assert (queued.state, withdrawn()) == ("withdrawn", None)


async def test_an_unreadable_result_is_an_outcome(trainer: FakeTrainer) -> None:
    async with connected(trainer) as client:
        trainer.next_time("optim_step", lambda: trainer.results.update({"req-1": {"metrics": "none"}}))
        future = client.optim_step(types.AdamParams())
        with pytest.raises(errors.ProtocolError, match="metrics"):
            await future
        assert (future.state, future.took_effect) == ("failed", True)
        await client.optim_step(types.AdamParams())


async def test_a_session_that_is_gone_is_told_by_the_first_operation(trainer: FakeTrainer) -> None:
    async with connected(trainer) as client:
        trainer.next_time("session_heartbeat", lambda: answer(410, {"detail": "evicted"}))
        trainer.next_time("optim_step", lambda: answer(404, {"detail": "no such model"}))
        with pytest.raises(errors.SessionLostError, match="evicted"):
            await client.optim_step(types.AdamParams())


async def test_a_custom_loss_without_logprobs_had_no_effect(trainer: FakeTrainer) -> None:
    async with connected(trainer) as client:
        result = {"loss_fn_outputs": [{}], "metrics": {}}
        trainer.next_time("forward", lambda: trainer.results.update({"req-1": result}))
        future = client.forward_backward_custom([datum()], lambda d, lp: (lp[0].sum(), {}))
        with pytest.raises(errors.ProtocolError, match="no logprobs"):
            await future
        assert future.took_effect is False
        await client.optim_step(types.AdamParams())
    assert trainer.applied == ["forward", "optim_step"]
