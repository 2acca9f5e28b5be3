"""Random programs of several tasks that submit, wait, give up, withdraw and meet faults, against a plain model.

Whatever the program, at its end: what took effect on the service is, in order, exactly what the futures say.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import httpx
from hypothesis import given, settings
from hypothesis import strategies as st

from fwasync import APIFuture, AsyncServiceClient, AsyncTrainingClient, RetryPolicy, errors, types
from fwasync.testing import VirtualClockLoop
from support.fake_trainer import KEY, FakeTrainer, answer
from unit.training.test_client import datum

PATHS = {"forward_backward": "forward_backward", "optim_step": "optim_step", "save_state": "save_weights"}


def submit(client: AsyncTrainingClient, verb: str) -> APIFuture[Any]:
    match verb:
        case "forward_backward":
            return client.forward_backward([datum()])
        case "optim_step":
            return client.optim_step(types.AdamParams())
        case _:
            return client.save_state("s")


def reset() -> None:
    raise httpx.ReadError("connection reset")


FAULTS = {
    "answer lost": reset,
    "503": lambda: answer(503, {"detail": "busy"}),
    "429": lambda: answer(429, {"detail": "slow down"}),
}

COMMANDS = st.one_of(
    st.tuples(st.just("submit"), st.sampled_from(sorted(PATHS))),
    st.tuples(st.just("await"), st.integers(0, 30)),
    st.tuples(st.just("wait a little"), st.integers(0, 30), st.floats(0, 4)),
    st.tuples(st.just("cancel wait"), st.integers(0, 30), st.integers(0, 25)),
    st.tuples(st.just("withdraw"), st.integers(0, 30)),
    st.tuples(st.just("sleep"), st.floats(0, 5)),
    st.tuples(st.just("fault"), st.sampled_from([*PATHS.values(), "retrieve_future"]), st.sampled_from(sorted(FAULTS))),
    st.tuples(st.just("reject next"), st.just("save_weights")),
)


async def perform(
    program: list[tuple[Any, ...]], client: AsyncTrainingClient, trainer: FakeTrainer, futures: list[APIFuture[Any]]
) -> None:
    for command, *args in program:
        if command in ("await", "wait a little", "cancel wait", "withdraw") and not futures:
            continue
        match command:
            case "submit":
                futures.append(submit(client, args[0]))
            case "await":
                with suppress(errors.FwasyncError):
                    await futures[args[0] % len(futures)]
            case "wait a little":
                with suppress(errors.FwasyncError):
                    await futures[args[0] % len(futures)].result(timeout=args[1])
            case "cancel wait":
                task = asyncio.ensure_future(futures[args[0] % len(futures)].result())
                for _ in range(args[1]):
                    await asyncio.sleep(0)
                task.cancel()
                with suppress(asyncio.CancelledError, errors.FwasyncError):
                    await task
            case "withdraw":
                future = futures[args[0] % len(futures)]
                was_queued = future.state == "queued"
                assert future.cancel() is was_queued
            case "sleep":
                await asyncio.sleep(args[0])
            case "fault":
                trainer.next_time(args[0], FAULTS[args[1]])
            case _:
                trainer.reject_next.append(args[0])


@settings(max_examples=150)
@given(
    programs=st.lists(st.lists(COMMANDS, max_size=12), min_size=1, max_size=3),
    counts_rejected=st.booleans(),
    latency=st.sampled_from([0.0, 1.0]),
)
def test_effects_are_what_the_futures_say(
    programs: list[list[tuple[Any, ...]]], counts_rejected: bool, latency: float
) -> None:
    async def main() -> None:
        trainer = FakeTrainer(counts_rejected=counts_rejected, latency=latency)
        futures: list[APIFuture[Any]] = []
        before = asyncio.all_tasks()
        retry = RetryPolicy(base_s=0.1, cap_s=1)
        service = AsyncServiceClient("http://trainer.test", KEY, retry=retry, transport=trainer)
        async with service, service.create_training_client("base") as client:
            tasks = [asyncio.ensure_future(perform(program, client, trainer, futures)) for program in programs]
            for task in tasks:
                await task
            for future in futures:
                with suppress(errors.FwasyncError):
                    await future
            # The client is as good as new.
            await client.optim_step(types.AdamParams())
        verbs = [PATHS[repr(future).split()[1]] for future in futures]
        took = [future.took_effect for future in futures]
        assert None not in took
        assert not trainer.early
        assert trainer.applied == [v for v, effect in zip(verbs, took, strict=True) if effect] + ["optim_step"]
        for future in futures:
            assert future.state in ("done", "failed", "withdrawn")
            assert future.took_effect is (future.state == "done")
        assert asyncio.all_tasks() == before

    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        runner.run(main())
