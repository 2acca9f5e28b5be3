"""The verbs and factories beyond the basic ones: what they send, and what their callers get."""

from __future__ import annotations

from enum import Enum

import pytest

from fwasync import AsyncServiceClient, GradAccNormalization, errors, resolve_checkpoint_path, types
from support.fake_trainer import KEY, FakeTrainer, answer
from unit.training.test_client import connected, datum, until


class TheirNormalization(Enum):
    TOKENS = "NUM_LOSS_TOKENS"


@pytest.mark.parametrize(
    ("choice", "sent"),
    [
        (None, None),
        ("num_loss_tokens", "num_loss_tokens"),
        (" Num_Sequences ", "num_sequences"),
        ("NONE", "none"),
        (GradAccNormalization.NUM_SEQUENCES, "num_sequences"),
        (TheirNormalization.TOKENS, "num_loss_tokens"),
    ],
)
async def test_normalization_in_any_spelling(choice: str | None, sent: str | None) -> None:
    trainer = FakeTrainer()
    async with connected(trainer) as client:
        await client.optim_step(types.AdamParams(), grad_accumulation_normalization=choice)
    (step,) = (s.body for s in trainer.sent if s.path == "optim_step")
    assert step.get("grad_accumulation_normalization") == sent
    assert ("grad_accumulation_normalization" in step) is (sent is not None)


async def test_unknown_normalization() -> None:
    async with connected(FakeTrainer()) as client:
        with pytest.raises(errors.UsageError, match="num_loss_tokens, num_sequences, none"):
            client.optim_step(types.AdamParams(), grad_accumulation_normalization="tokens")


async def test_snapshot_names_are_of_this_client_alone() -> None:
    trainer = FakeTrainer()
    async with connected(trainer) as client:
        base = await client.save_weights_for_sampler_ext("step-1")
        delta = await client.save_weights_for_sampler_ext("step-2", "delta")
        plain = await client.save_weights_for_sampler("step-3")
    name, _, suffix = base.snapshot_name.rpartition("-")
    assert (name, len(suffix)) == ("step-1", 8)
    assert delta.snapshot_name == f"step-2-{suffix}"
    assert plain.snapshot_name == "step-3"
    saves = [s.body for s in trainer.sent if s.path == "save_weights_for_sampler"]
    assert [s["path"] for s in saves] == [base.snapshot_name, delta.snapshot_name, "step-3"]
    assert [s.get("checkpoint_type") for s in saves] == ["base", "delta", None]
    assert base.path == f"tinker://{base.snapshot_name}"


@pytest.mark.parametrize(
    ("name", "job", "path"),
    [
        ("step-1", None, "step-1"),
        ("step-1", "job-a", "cross_job://job-a/step-1"),
        ("gs://bucket/x", None, "gs://bucket/x"),
        ("/abs/x", None, "/abs/x"),
        ("tinker://m/weights/x", None, "tinker://m/weights/x"),
    ],
)
def test_checkpoint_paths(name: str, job: str | None, path: str) -> None:
    assert resolve_checkpoint_path(name, job) == path


@pytest.mark.parametrize(("name", "job"), [("x", ""), ("gs://b/x", "job"), ("/x", "job")])
def test_impossible_checkpoint_paths(name: str, job: str) -> None:
    with pytest.raises(errors.UsageError):
        resolve_checkpoint_path(name, job)


async def test_a_reference_is_base_only() -> None:
    trainer = FakeTrainer()
    service = AsyncServiceClient("http://trainer.test", KEY, transport=trainer)
    async with service, service.create_base_training_client("base") as reference:
        await reference.forward([datum()])
    (create,) = (s.body for s in trainer.sent if s.path == "create_model")
    assert create["base_only"] is True
    assert "lora_config" not in create


@pytest.mark.parametrize("with_optimizer", [True, False])
async def test_a_client_from_a_checkpoint(with_optimizer: bool) -> None:
    trainer = FakeTrainer()
    info = {"base_model": "base", "is_lora": True, "lora_rank": 4}
    trainer.next_time("weights_info", lambda: answer(200, info))
    service = AsyncServiceClient("http://trainer.test", KEY, transport=trainer)
    create = (
        service.create_training_client_from_state_with_optimizer
        if with_optimizer
        else service.create_training_client_from_state
    )
    async with service, create("tinker://m/weights/x") as client:
        assert (client.base_model, client.lora_rank) == ("base", 4)
        await client.forward([datum()])
    assert trainer.numbers() == [("load_weights", 1), ("forward", 2)]
    (load,) = (s.body for s in trainer.sent if s.path == "load_weights")
    assert load["optimizer"] is with_optimizer
    (created,) = (s.body for s in trainer.sent if s.path == "create_model")
    assert created["lora_config"]["rank"] == 4


async def test_a_checkpoint_that_cannot_be_loaded_fails_on_entering() -> None:
    trainer = FakeTrainer(reject={"load_weights"})
    service = AsyncServiceClient("http://trainer.test", KEY, transport=trainer)
    async with service:
        with pytest.raises(errors.BadRequestError):
            async with service.create_training_client_from_state("x", base_model="base"):
                raise AssertionError


async def test_what_changes_the_next_delta_is_told() -> None:
    trainer = FakeTrainer()
    async with connected(trainer) as client:
        epochs = [client.snapshot_epoch]
        for call in (
            lambda: client.save_state("a"),
            lambda: client.save_weights_for_sampler("b"),
            lambda: client.save_weights_for_sampler_ext("c"),
            lambda: client.load_state("a"),
            lambda: client.load_state_with_optimizer("a"),
        ):
            future = call()
            epochs.append(client.snapshot_epoch)
            await future
    assert epochs == [0, 0, 1, 2, 3, 4]


async def test_loading_a_checkpoint_has_its_time() -> None:
    trainer = FakeTrainer()
    trainer.hold("load_weights")
    service = AsyncServiceClient("http://trainer.test", KEY, transport=trainer)
    async with service:
        with pytest.raises(errors.OperationTimeoutError, match="load_state"):
            async with service.create_training_client_from_state("x", base_model="base", timeout=0.01):
                raise AssertionError


async def test_unload_waits_and_refuses() -> None:
    trainer = FakeTrainer()
    trainer.results["unload"] = {"model_id": "sess:train:0"}
    trainer.next_time("unload_model", lambda: answer(200, {"request_id": "unload"}))
    async with connected(trainer) as client:
        step = client.optim_step(types.AdamParams())
        await client.unload()
        assert step.state == "done"
        with pytest.raises(errors.ClosedError, match="closed"):
            client.forward([datum()])
    assert [s.path for s in trainer.sent][-3:-1] == ["optim_step", "unload_model"]


async def test_aclose_is_the_end_of_the_block() -> None:
    trainer = FakeTrainer()
    async with connected(trainer) as client:
        step = client.optim_step(types.AdamParams())
        await client.aclose()
        assert step.state == "done"
        with pytest.raises(errors.ClosedError):
            client.forward([datum()])


async def test_statistics_and_repr_count() -> None:
    trainer = FakeTrainer()
    gate = trainer.hold("forward_backward")
    async with connected(trainer) as client:
        first = client.forward_backward([datum()])
        second = client.optim_step(types.AdamParams())
        await until(lambda: first.state == "admitting")
        counts = client.statistics()
        assert (counts.submitted, counts.queued, counts.admitting, counts.unawaited) == (2, 1, 1, 2)
        assert [line.partition(", ")[0] for line in counts.unfinished] == [
            "forward_backward: admitting",
            "optim_step: queued",
        ]
        assert "1 queued, 1 being sent, 2 not awaited" in repr(client)
        assert repr(second) == "<APIFuture optim_step queued took_effect=None>"
        gate.set()
        await first
        await second
        counts = client.statistics()
        assert (counts.queued, counts.admitting, counts.unawaited, counts.last_number) == (0, 0, 0, 2)
        assert counts.unfinished == ()
        assert repr(first) == "<APIFuture forward_backward done took_effect=True request_id=req-1>"


async def test_load_adapter() -> None:
    trainer = FakeTrainer()
    async with connected(trainer) as client:
        trainer.next_time("load_adapter", lambda: answer(200, {"request_id": "adapter"}))
        trainer.results["adapter"] = {"adapter_path": "accounts/a/models/m"}
        await client.load_adapter("accounts/a/models/m")
    (load,) = (s.body for s in trainer.sent if s.path == "load_adapter")
    assert load == {
        "type": "load_adapter",
        "model_id": "sess:train:0",
        "adapter_path": "accounts/a/models/m",
        "seq_id": 1,
    }
