"""Weight sync on fakes: what is sent, how it ends, and what follows whatever went wrong."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import anyio
import pytest

from fwasync import errors
from fwasync.testing import virtual_time
from fwasync.weights.syncer import AsyncWeightSyncer, SyncProgress
from unit.weights.fakes import ONCE, Deployment, Trainer

MOST_STEPS = 400


def syncer(deployment: Deployment, **more: Any) -> AsyncWeightSyncer:
    return AsyncWeightSyncer(deployment.trainer, deployment, "dep", base_model="base", **more)


async def goes_on(sync: AsyncWeightSyncer, deployment: Deployment) -> None:
    """Two more syncs succeed, and the second is a delta."""
    first, second = await sync.save_and_hotload("next"), await sync.save_and_hotload("next")
    assert deployment.serving == [second, second]
    assert deployment.loads[-1] == (second, first)
    assert sync.base_identity == second


@virtual_time
async def test_a_base_and_then_deltas_with_progress() -> None:
    deployment = Deployment(Trainer(latency=1.0), latency=0.5)
    told: list[SyncProgress] = []
    sync = syncer(deployment, on_progress=told.append)
    names = [await sync.save_and_hotload(name) for name in ("a", "b", "b")]
    a, b, c = (f"{name}{ONCE}" for name in ("a", "b", "b-2"))
    assert names == [a, b, c]
    assert deployment.loads == [(a, None), (b, a), (c, b)]
    assert deployment.warm == 3
    assert await sync.check_deployment_state() == c
    stages = [(entry.stage, entry.snapshot, entry.ready, entry.replicas) for entry in told[: len(told) // 3]]
    assert stages == [
        ("saving", "a", 0, 0),
        ("loading", a, 0, 2),
        ("loading", a, 1, 2),
        ("loading", a, 1, 2),
        ("loading", a, 2, 2),
        ("warming up", a, 2, 2),
        ("done", a, 2, 2),
    ]
    timing = sync.last_timing
    assert timing.keys() == {"save_time_s", "hotload_time_s", "warmup_time_s", "total_time_s"}
    assert (timing["save_time_s"], timing["warmup_time_s"]) == (2.0, 0.5)
    assert timing["total_time_s"] == pytest.approx(0.5 + sum(timing.values()) - timing["total_time_s"])


@pytest.mark.parametrize("told", ["syncer", "client"])
def test_lora_is_always_loaded_in_full(told: str) -> None:
    @virtual_time
    async def run() -> None:
        deployment = Deployment(Trainer(lora_rank=8 if told == "client" else None))
        sync = syncer(deployment, lora_rank=8 if told == "syncer" else 0)
        for name in "ab":
            await sync.save_and_hotload(name)
        assert [previous for _, previous in deployment.loads] == [None, None]
        assert deployment.trainer.kinds == ["base", "base"]

    run()


@virtual_time
async def test_what_was_done_on_the_client_itself_forces_a_base() -> None:
    deployment = Deployment(Trainer())
    sync = syncer(deployment)
    for name in "ab":
        await sync.save_and_hotload(name)
    await deployment.trainer.save_weights_for_sampler_ext("by hand")
    deployment.trainer.snapshot_epoch += 1
    with pytest.raises(errors.UsageError, match="not known to be served"):
        await sync.save_only("c", "delta")
    await sync.save_and_hotload("d")
    assert deployment.trainer.kinds == ["base", "delta", "base", "base"]
    await goes_on(sync, deployment)


@virtual_time
async def test_without_a_deployment_it_only_saves() -> None:
    trainer = Trainer()
    sync = AsyncWeightSyncer(trainer)
    assert [await sync.save_and_hotload("a"), await sync.save_only("b")] == [f"a{ONCE}", f"b{ONCE}"]
    assert trainer.kinds == ["base", "base"]
    with pytest.raises(errors.UsageError, match="no deployment to load into"):
        await sync.hotload(f"a{ONCE}")


@virtual_time
async def test_saved_first_and_loaded_later() -> None:
    deployment = Deployment(Trainer())
    sync = syncer(deployment)
    await sync.hotload(await sync.save_only("a"))
    await sync.hotload(await sync.save_only("b"))
    assert deployment.trainer.kinds == ["base", "delta"]
    delta = await sync.save_only("c")
    deployment.serving = ["foreign", "foreign"]
    with pytest.raises(errors.HotLoadFailedError, match=f"{delta} is a delta on b{ONCE}.*sync again"):
        await sync.hotload(delta)
    await sync.hotload("promoted", "base")
    await goes_on(sync, deployment)


@virtual_time
async def test_what_others_loaded_forces_a_base() -> None:
    deployment = Deployment(Trainer())
    sync = syncer(deployment)
    await sync.save_and_hotload("a")
    deployment.serving[1] = "foreign"
    await sync.save_and_hotload("b")
    assert deployment.trainer.kinds == ["base", "base"]
    await goes_on(sync, deployment)


@virtual_time
async def test_a_restored_trainer_forces_a_base() -> None:
    deployment = Deployment(Trainer())
    sync = syncer(deployment)
    await sync.save_and_hotload("a")
    sync.reset_delta_chain()
    await sync.save_and_hotload("b")
    assert deployment.trainer.kinds == ["base", "base"]
    await goes_on(sync, deployment)


@pytest.mark.parametrize(
    ("breaks", "error", "text"),
    [
        ("refused", errors.BadRequestError, "no"),
        ("error", errors.HotLoadFailedError, "2 of 2 replicas failed: broken"),
        ("answer lost", errors.RetryBudgetExhaustedError, "no answer"),
        ("stuck", errors.HotLoadTimeoutError, r"after 600 s: 0 of 2 replicas ready; the others: loading, serving a-"),
        ("status", errors.ServiceUnavailableError, "down"),
        ("save", errors.OperationFailedError, "disk full"),
    ],
)
def test_a_base_follows_every_failure(breaks: str, error: type[Exception], text: str) -> None:
    @virtual_time
    async def run() -> None:
        deployment = Deployment(Trainer())
        sync = syncer(deployment)
        await sync.save_and_hotload("a")
        deployment.breaks, deployment.trainer.fails = breaks, breaks == "save"
        with pytest.raises(error, match=text) as caught:
            await sync.save_and_hotload("b")
        if isinstance(caught.value, errors.WeightSyncError):
            assert (caught.value.snapshot, caught.value.deployment) == (f"b{ONCE}", "dep")
        deployment.breaks, deployment.trainer.fails = None, False
        if breaks != "status":  # which failed before anything was changed
            await sync.save_and_hotload("b")
            assert deployment.loads[-1][1] is None
        await goes_on(sync, deployment)

    run()


@virtual_time
async def test_cold_deployments_are_warmed_up_and_that_is_never_an_error() -> None:
    deployment = Deployment(Trainer())
    deployment.cold = 3
    sync = syncer(deployment)
    await sync.save_and_hotload("a")
    assert deployment.warm == 4
    assert sync.last_timing["warmup_time_s"] == 30.0
    deployment.cold = 1000
    await sync.save_and_hotload("b")
    assert deployment.warm == 14
    slow = syncer(deployment, hotload_timeout=25.0)
    await slow.save_and_hotload("c")
    assert sum(slow.last_timing[key] for key in ("hotload_time_s", "warmup_time_s")) == 25.0
    await goes_on(slow, deployment)


@virtual_time
async def test_a_deployment_that_is_still_starting_is_waited_for() -> None:
    deployment = Deployment(Trainer())
    deployment.absent = 3
    assert len(await syncer(deployment).wait_for_hotload_ready()) == 2
    deployment.absent = 3
    await goes_on(syncer(deployment), deployment)
    deployment.absent = 10**6
    with pytest.raises(errors.HotLoadTimeoutError, match="deployment dep was not ready after 300 s"):
        await syncer(deployment).wait_for_hotload_ready()
    with pytest.raises(errors.HotLoadTimeoutError, match="no look at its replicas yet"):
        await syncer(deployment).save_and_hotload("a")


@virtual_time
async def test_a_progress_callback_that_raises_breaks_nothing() -> None:
    for at in range(7):
        deployment = Deployment(Trainer())
        calls = 0

        def tell(_: SyncProgress, at: int = at) -> None:
            nonlocal calls
            calls += 1
            if calls == at + 1:
                raise ZeroDivisionError

        sync = syncer(deployment, on_progress=tell)
        with suppress(ZeroDivisionError):
            await sync.save_and_hotload("a")
        await goes_on(sync, deployment)


@virtual_time
async def test_syncs_at_a_time_happen_one_after_another() -> None:
    deployment = Deployment(Trainer(latency=1.0), latency=1.0)
    sync = syncer(deployment)
    async with anyio.create_task_group() as group:
        for name in "abc":
            group.start_soon(sync.save_and_hotload, name)
    assert deployment.trainer.kinds == ["base", "delta", "delta"]
    assert len(deployment.loads) == 3


@pytest.mark.parametrize(
    ("arguments", "text"),
    [({"hotload_timeout": 0.0}, "above 0"), ({"first_checkpoint_type": "full"}, "'base' or 'delta'")],
)
def test_arguments_that_cannot_be(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(errors.UsageError, match=text):
        AsyncWeightSyncer(Trainer(), **arguments)


async def test_a_first_delta_is_a_base_and_that_is_told(caplog: pytest.LogCaptureFixture) -> None:
    deployment = Deployment(Trainer())
    await syncer(deployment, first_checkpoint_type="delta").save_and_hotload("a")
    assert deployment.trainer.kinds == ["base"]
    assert caplog.messages == ["first_checkpoint_type is 'delta'; the first snapshot is a base all the same"]


async def test_a_delta_that_could_not_be_loaded_is_not_saved() -> None:
    trainer = Trainer()
    with pytest.raises(errors.UsageError, match="not known to be served"):
        await AsyncWeightSyncer(trainer).save_only("a", "delta")
    assert not trainer.saved


@pytest.mark.parametrize("before", [0, 1, 2])
@pytest.mark.parametrize("native", [True, False])
def test_cancelled_at_every_await(before: int, native: bool) -> None:
    """The n-th hit strikes at the n-th step, until the sync completes untouched; after each, the syncer goes on."""

    @virtual_time
    async def run() -> None:
        struck_at: set[tuple[int, int, int]] = set()
        for n in range(MOST_STEPS):
            deployment = Deployment(Trainer())
            sync = syncer(deployment)
            for _ in range(before):
                await sync.save_and_hotload("before")
            scope = anyio.CancelScope()

            async def body(scope: anyio.CancelScope = scope, sync: AsyncWeightSyncer = sync) -> None:
                with scope:
                    await sync.save_and_hotload("hit")

            task = asyncio.ensure_future(body())
            for _ in range(n):
                await asyncio.sleep(0)
            while (running := not task.done()) and n and deployment.stage == "loading" and n % 2:
                await asyncio.sleep(0.1)  # odd hits strike also in the pauses between looks
                if n % 3:
                    break
            struck_at.add((len(deployment.trainer.saved), len(deployment.loads), deployment.warm))
            if native:
                task.cancel()
            else:
                scope.cancel()
            with suppress(asyncio.CancelledError):
                await task
            assert deployment.loads[before:] == [] or sync.base_identity in (None, deployment.loads[-1][0])
            await goes_on(sync, deployment)
            assert asyncio.all_tasks() == {asyncio.current_task()}
            if not running:
                break
        else:
            raise AssertionError("the sync never completed")
        assert {saved for saved, _, _ in struck_at} == {before, before + 1}
        assert {loads for _, loads, _ in struck_at} == {before, before + 1}

    run()


@pytest.mark.parametrize("before", [0, 1, 2])
def test_cancelled_at_every_instant(before: int) -> None:
    """As above, with latencies, so that the cancellations fall also between cause and effect of each request."""

    @virtual_time
    async def run() -> None:
        stages: set[str] = set()
        for n in range(MOST_STEPS):
            deployment = Deployment(Trainer(latency=1.0), latency=1.0)
            told: list[SyncProgress] = []
            sync = syncer(deployment, on_progress=told.append)
            for _ in range(before):
                await sync.save_and_hotload("before")
            told.clear()
            with anyio.move_on_after(n * 0.25) as scope:
                await sync.save_and_hotload("hit")
            stages.add(told[-1].stage if told else "")
            await goes_on(sync, deployment)
            if not scope.cancelled_caught:
                break
        else:
            raise AssertionError("the sync never completed")
        assert stages >= {"saving", "loading", "warming up", "done"}

    run()
