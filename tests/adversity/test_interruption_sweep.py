"""Every verb, hit at every step: by a cancellation, by a time-out, by the loss of the connection.

The n-th hit strikes at the n-th step, n = 0, 1, 2 …, until the operation completes untouched. After each hit the same
client goes on: what follows succeeds in order, each effect has happened exactly once or not at all, as the future
says, and nothing is left running.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import anyio
import pytest

from fwasync import APIFuture, AsyncServiceClient, AsyncTrainingClient, RetryPolicy, errors, types
from fwasync._http.session import Wire
from fwasync.testing import virtual_time
from support.fake_trainer import KEY, FakeTrainer
from unit.training.test_client import datum

ADAM = types.AdamParams()
Verb = Callable[[AsyncTrainingClient], APIFuture[Any]]

BATCH_OF_THREE: Verb = lambda c: c.forward_backward([datum(), datum(), datum()])  # noqa: E731
"""A batch that is cut in three."""


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fwasync.training.batch.MAX_CHUNK_DATUMS", 1)


VERBS: dict[str, tuple[Verb, list[str]]] = {
    "batch of three": (BATCH_OF_THREE, ["forward_backward"] * 3),
    "forward": (lambda c: c.forward([datum()]), ["forward"]),
    "forward_backward": (lambda c: c.forward_backward([datum()]), ["forward_backward"]),
    "optim_step": (lambda c: c.optim_step(ADAM), ["optim_step"]),
    "save_state": (lambda c: c.save_state("s"), ["save_weights"]),
    "load_state": (lambda c: c.load_state("s"), ["load_weights"]),
    "load_state_with_optimizer": (lambda c: c.load_state_with_optimizer("s"), ["load_weights"]),
    "save_weights_for_sampler": (lambda c: c.save_weights_for_sampler("s"), ["save_weights_for_sampler"]),
}
CUSTOM: Verb = lambda c: c.forward_backward_custom([datum()], lambda _, lp: (lp[0].sum(), {}))  # noqa: E731
FOLLOWING = ["forward_backward", "optim_step"]
WIRES = [("json", "json"), ("protobuf", "x-protobuf")]
MOST_STEPS = 10_000  # far more than any takes; a worker thread may let the loop turn often

wires = pytest.mark.parametrize(("wire", "takes"), WIRES)


def as_sent(effects: list[str], wire: str) -> list[str]:
    """In protobuf a forward goes to the path of forward_backward."""
    return ["forward_backward" if wire == "protobuf" and e == "forward" else e for e in effects]


@asynccontextmanager
async def connected(trainer: FakeTrainer, wire: Wire) -> AsyncIterator[AsyncTrainingClient]:
    before = asyncio.all_tasks()
    retry = RetryPolicy(base_s=0.01, cap_s=0.05, budget_s=20)
    service = AsyncServiceClient("http://trainer.test", KEY, wire=wire, retry=retry, transport=trainer)
    async with service, service.create_training_client("base") as client:
        yield client
    assert asyncio.all_tasks() == before
    assert not trainer.early, "a hole in the numbers"


async def follow(client: AsyncTrainingClient) -> None:
    """The next operations on the same client."""
    fb, step = client.forward_backward([datum()]), client.optim_step(ADAM)
    await step
    await fb


async def settle(future: APIFuture[Any]) -> bool | None:
    """Wait for the outcome again; whether it took effect."""
    said = future.took_effect
    try:
        assert await future is not None
    except errors.OperationWithdrawnError:
        assert said is False
    assert said in (None, future.took_effect), "what the future said has to stay true"
    return future.took_effect


async def steps(n: int) -> None:
    for _ in range(n):
        await asyncio.sleep(0)


async def sweep(hit: Callable[[int], Awaitable[bool]]) -> int:
    """Hit at step 0, 1, 2 … until one hit comes too late; how many struck."""
    for n in range(MOST_STEPS):
        if not await hit(n):
            return n
    raise AssertionError("the operation never completed")


@wires
@pytest.mark.parametrize("verb", [*VERBS, "custom"])
@pytest.mark.parametrize("native", [True, False])
async def test_cancelled_at_every_step(verb: str, wire: Wire, takes: str, native: bool) -> None:
    call, effects = VERBS.get(verb, (CUSTOM, ["forward", "forward_backward"]))

    async def hit(n: int) -> bool:
        trainer = FakeTrainer(takes=takes)
        async with connected(trainer, wire) as client:
            future = call(client)
            scope = anyio.CancelScope()

            async def wait() -> None:
                with scope:
                    await future

            task = asyncio.ensure_future(wait())
            await steps(n)
            struck = not task.done()
            if native:
                task.cancel()
            else:
                scope.cancel()
            with suppress(asyncio.CancelledError):
                await task
            await follow(client)
            took = await settle(future)
        assert trainer.applied == as_sent(effects * bool(took) + FOLLOWING, wire)
        assert not struck or took is not None
        return struck

    assert await sweep(hit) >= 5


@wires
@pytest.mark.parametrize("verb", VERBS)
def test_timed_out_at_every_instant(verb: str, wire: Wire, takes: str) -> None:
    call, effects = VERBS[verb]

    @virtual_time
    async def run() -> None:
        async def hit(n: int) -> bool:
            trainer = FakeTrainer(takes=takes, latency=1.0)
            async with connected(trainer, wire) as client:
                future = call(client)
                struck = False
                try:
                    await future.result(timeout=n * 0.5)
                except errors.OperationTimeoutError as error:
                    struck = True
                    assert error.future is future
                await follow(client)
                took = await settle(future)
            assert trainer.applied == as_sent(effects * bool(took) + FOLLOWING, wire)
            return struck

        assert await sweep(hit) >= 8

    run()


@wires
@pytest.mark.parametrize("verb", VERBS)
def test_connection_lost_on_every_way(verb: str, wire: Wire, takes: str) -> None:
    call, effects = VERBS[verb]

    @virtual_time
    async def run() -> None:
        directions: set[str | None] = set()

        async def hit(n: int) -> bool:
            trainer = FakeTrainer(takes=takes)
            async with connected(trainer, wire) as client:
                trainer.travels, trainer.loses_at = 0, n + 1
                future = call(client)
                await future
                struck = trainer.lost is not None
                directions.add(trainer.lost)
                trainer.loses_at = 0
                await follow(client)
                assert future.took_effect is True
            assert trainer.applied == as_sent(effects + FOLLOWING, wire)
            return struck

        assert await sweep(hit) == 4 * len(effects)  # there and back, for each submit and each result
        assert directions == {"before", "after", None}

    run()


@wires
async def test_a_custom_loss_timed_out_at_every_step(wire: Wire, takes: str) -> None:
    async def hit(n: int) -> bool:
        trainer = FakeTrainer(takes=takes)
        async with connected(trainer, wire) as client:
            future = CUSTOM(client)
            other = asyncio.ensure_future(future.result())  # who waits patiently, and keeps it going
            await steps(n)
            struck = False
            try:
                await future.result(timeout=0)
            except errors.OperationTimeoutError:
                struck = True
            await other
            await follow(client)
            assert await settle(future) is True
        assert trainer.applied == as_sent(["forward", "forward_backward", *FOLLOWING], wire)
        return struck

    assert await sweep(hit) >= 5


@wires
async def test_a_custom_loss_loses_the_connection_on_every_way(wire: Wire, takes: str) -> None:
    async def hit(n: int) -> bool:
        trainer = FakeTrainer(takes=takes)
        async with connected(trainer, wire) as client:
            trainer.travels, trainer.loses_at = 0, n + 1
            future = CUSTOM(client)
            await future
            struck = trainer.lost is not None
            trainer.loses_at = 0
            await follow(client)
        assert trainer.applied == as_sent(["forward", "forward_backward", *FOLLOWING], wire)
        return struck

    assert await sweep(hit) == 8


PIPELINE: list[str] = ["forward_backward", "optim_step", "save_state", "forward", "optim_step"]


def pipeline_effects(took: list[bool | None]) -> list[str]:
    return [effect for verb, happened in zip(PIPELINE, took, strict=True) for effect in VERBS[verb][1] * bool(happened)]


@wires
@pytest.mark.parametrize("awaited", range(len(PIPELINE)))
async def test_a_pipeline_of_five_cancelled_at_every_step(awaited: int, wire: Wire, takes: str) -> None:
    async def hit(n: int) -> bool:
        trainer = FakeTrainer(takes=takes)
        async with connected(trainer, wire) as client:
            futures = [VERBS[verb][0](client) for verb in PIPELINE]
            task = asyncio.ensure_future(futures[awaited].result())
            await steps(n)
            struck = not task.done()
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            await follow(client)
            took = [await settle(future) for future in futures]
        assert trainer.applied == as_sent(pipeline_effects(took) + FOLLOWING, wire)
        assert took.count(False) <= 1, "only the awaited one may be withdrawn"
        assert all(took[i] for i in range(len(PIPELINE)) if i != awaited)
        return struck

    assert await sweep(hit) >= 5


@wires
@pytest.mark.parametrize("awaited", range(len(PIPELINE)))
def test_a_pipeline_of_five_timed_out_at_every_instant(awaited: int, wire: Wire, takes: str) -> None:
    @virtual_time
    async def run() -> None:
        async def hit(n: int) -> bool:
            trainer = FakeTrainer(takes=takes, latency=1.0)
            async with connected(trainer, wire) as client:
                futures = [VERBS[verb][0](client) for verb in PIPELINE]
                struck = False
                try:
                    await futures[awaited].result(timeout=n * 0.5)
                except errors.OperationTimeoutError:
                    struck = True
                await follow(client)
                took = [await settle(future) for future in futures]
            assert trainer.applied == as_sent(pipeline_effects(took) + FOLLOWING, wire)
            assert [i for i, effect in enumerate(took) if not effect] in ([], [awaited])
            return struck

        assert await sweep(hit) >= 8

    run()


@wires
def test_a_pipeline_of_five_loses_the_connection_on_every_way(wire: Wire, takes: str) -> None:
    @virtual_time
    async def run() -> None:
        async def hit(n: int) -> bool:
            trainer = FakeTrainer(takes=takes)
            async with connected(trainer, wire) as client:
                trainer.travels, trainer.loses_at = 0, n + 1
                futures = [VERBS[verb][0](client) for verb in PIPELINE]
                for future in futures:
                    await future
                struck = trainer.lost is not None
                trainer.loses_at = 0
                await follow(client)
            assert trainer.applied == as_sent(pipeline_effects([True] * 5) + FOLLOWING, wire)
            return struck

        assert await sweep(hit) == 4 * len(PIPELINE)

    run()


@wires
@pytest.mark.parametrize("verb", [*VERBS, "custom"])
@pytest.mark.parametrize("native", [True, False])
async def test_the_block_is_left_at_every_step(verb: str, wire: Wire, takes: str, native: bool) -> None:
    """The whole client is cancelled: what was being sent is still acknowledged, and the future says what is true."""
    call, effects = VERBS.get(verb, (CUSTOM, ["forward", "forward_backward"]))

    async def hit(n: int) -> bool:
        trainer = FakeTrainer(takes=takes)
        futures: list[APIFuture[Any]] = []
        scope = anyio.CancelScope()

        async def body() -> None:
            with scope:
                async with connected(trainer, wire) as client:
                    futures.append(call(client))
                    await futures[0]

        task = asyncio.ensure_future(body())
        while not futures and not task.done():
            await asyncio.sleep(0)
        await steps(n)
        struck = not task.done()
        if native:
            task.cancel()
        else:
            scope.cancel()
        with suppress(asyncio.CancelledError):
            await task
        (future,) = futures
        assert future.took_effect in (True, False)
        assert trainer.applied == as_sent(effects * bool(future.took_effect), wire)
        return struck

    assert await sweep(hit) >= 3
