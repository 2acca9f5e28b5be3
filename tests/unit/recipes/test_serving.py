"""The seam between recipes and samplers, where every version is a snapshot: commit, drain, failure and cancellation."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, Self

import anyio
import anyio.lowlevel
import numpy as np
import pytest

from fwasync import ConcurrencyConfig, concurrency_controller
from fwasync.errors import HotLoadFailedError, OperationFailedError, ServiceUnreachableError, UsageError
from fwasync.recipes import serving
from fwasync.recipes.serving import ServedPolicy, serve_policy
from fwasync.recipes.trainers import Trainers
from fwasync.types import SampledSequence, SampleResponse
from unit.recipes.trainer import Service, Trainer


class Client:
    """A sampling client that answers when it is told to."""

    def __init__(self, world: World, path: str) -> None:
        self.world, self.path = world, path
        self.is_open = False

    async def __aenter__(self) -> Self:
        await anyio.lowlevel.checkpoint()
        if self.world.refuses:
            raise ServiceUnreachableError("nobody there")
        self.is_open = True
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.is_open = False

    async def sample(self, prompt: Any, num_samples: int, params: Any) -> SampleResponse:
        self.world.asked.append((self.world.clients.index(self), prompt.to_ints(), num_samples, params))
        await self.world.answer.wait()
        assert self.is_open, "it is closed while it is in use"
        sequence = SampledSequence(
            stop_reason="length",
            sequence_id="s",
            tokens_np=np.array([7, 8], np.int32),
            logprobs_np=np.array([-0.5, -1.5], np.float32),
        )
        return SampleResponse(sequences=[sequence] * num_samples)


class World:
    def __init__(self, directory: Any) -> None:
        self.trainer = Trainer(directory)
        self.clients: list[Client] = []
        self.asked: list[Any] = []
        self.answer = anyio.Event()
        self.answer.set()
        self.refuses = False

    def client(self, path: str) -> Client:
        self.clients.append(Client(self, path))
        return self.clients[-1]

    @property
    def open(self) -> list[bool]:
        return [client.is_open for client in self.clients]

    @asynccontextmanager
    async def served(self, **more: Any) -> AsyncIterator[ServedPolicy]:
        service: Any = Service(make_sampler=self.client)
        policy: Any = self.trainer
        async with serve_policy(Trainers(service, policy), **more) as served:
            yield served


@pytest.fixture
def world(tmp_path: Any) -> World:
    return World(tmp_path / "tokenizer")


async def test_what_is_published_is_sampled(world: World) -> None:
    async with world.served(tokenizer=SimpleNamespace(stop_tokens=[3])) as served:
        assert served.version is None
        with pytest.raises(UsageError, match="publish a version first"):
            await served.sample_with_prompt_tokens([1, 2])
        path = await served.publish(5)
        assert (served.version, path) == (5, world.clients[0].path)
        first, second = await served.sample_with_prompt_tokens([1, 2], 2, max_tokens=9, seed=4)
        assert first.full_tokens == second.full_tokens == [1, 2, 7, 8]
        assert (first.completion_tokens, first.inference_logprobs, first.truncated) == ([7, 8], [-0.5, -1.5], True)
        (_, prompt, count, params) = world.asked[0]
        assert (prompt, count) == ([1, 2], 2)
        assert (params.max_tokens, params.seed, params.stop, params.top_k) == (9, 4, [3], -1)
        await served.sample_with_prompt_tokens([1], stop="\n", top_k=2)
        assert (world.asked[1][3].stop, world.asked[1][3].top_k) == ("\n", 2)
    assert world.open == [False]
    assert served.version is None


async def test_an_old_version_is_closed_when_its_last_request_has_ended(world: World) -> None:
    async with world.served() as served, anyio.create_task_group() as tasks:
        await served.publish(0)
        world.answer = anyio.Event()
        for _ in range(2):
            tasks.start_soon(served.sample_with_prompt_tokens, [1])
        await anyio.wait_all_tasks_blocked()
        await served.publish(1)
        tasks.start_soon(served.sample_with_prompt_tokens, [1])
        await anyio.wait_all_tasks_blocked()
        assert world.open == [True, True]
        assert [client for client, *_ in world.asked] == [0, 0, 1]
        world.answer.set()
        await anyio.wait_all_tasks_blocked()
        assert world.open == [False, True]
        await served.publish(2)
        await anyio.wait_all_tasks_blocked()
        assert world.open == [False, False, True]


async def test_a_request_that_waits_for_its_turn_gets_the_newest_version(world: World) -> None:
    limit = ConcurrencyConfig(mode="fixed", max_concurrency=1)
    async with world.served(concurrency=limit) as served, anyio.create_task_group() as tasks:
        await served.publish(0)
        world.answer = anyio.Event()
        for _ in range(2):
            tasks.start_soon(served.sample_with_prompt_tokens, [1])
        await anyio.wait_all_tasks_blocked()
        await served.publish(1)
        world.answer.set()
        await anyio.wait_all_tasks_blocked()
        assert [client for client, *_ in world.asked] == [0, 1]


async def test_what_fails_is_not_published(world: World) -> None:
    async with world.served() as served:
        await served.publish(0)
        world.refuses = True
        with pytest.raises(ServiceUnreachableError):
            await served.publish(1)
        world.refuses = False
        assert served.version == 0
        await served.sample_with_prompt_tokens([1])
        assert world.asked[-1][0] == 0

        save = world.trainer.save_weights_for_sampler

        def fails(name: str) -> Any:
            raise OperationFailedError("disk full")

        world.trainer.save_weights_for_sampler = fails
        with pytest.raises(OperationFailedError):
            await served.publish(1)
        world.trainer.save_weights_for_sampler = save
        assert served.version == 0
        await served.publish(1)
        await served.sample_with_prompt_tokens([1])
        assert (served.version, world.clients[world.asked[-1][0]].is_open) == (1, True)


async def test_cancelled_at_any_moment_it_has_one_version_and_one_client(world: World) -> None:
    seen: set[int | None] = set()
    for moment in range(12):
        async with world.served() as served:
            await served.publish(0)
            before = len(world.clients) - 1
            async with anyio.create_task_group() as tasks:
                with anyio.CancelScope() as scope:

                    async def cancel(scope: anyio.CancelScope = scope, moment: int = moment) -> None:
                        for _ in range(moment):
                            await anyio.lowlevel.checkpoint()
                        scope.cancel()

                    tasks.start_soon(cancel)
                    await served.publish(1)
                tasks.cancel_scope.cancel()
            await anyio.wait_all_tasks_blocked()
            await served.sample_with_prompt_tokens([1])
            seen.add(served.version)
            assert sum(world.open[before:]) == 1
            assert world.asked[-1][0] - before == (0 if served.version == 0 else len(world.clients) - 1 - before)
            await served.publish(2)
            assert served.version == 2
    assert not any(world.open)
    assert seen == {0, 1}


@pytest.mark.parametrize(("stage", "left"), [("saving", 0), ("loading", None)])
async def test_a_deployment_whose_load_failed_is_not_sampled(stage: str, left: int | None) -> None:
    stops: list[Any] = []

    class Syncer:
        base_identity: str | None = "step-0"

        async def save_and_hotload(self, name: str) -> str:
            if name == "sampler-1":
                self.base_identity = None if stage == "loading" else self.base_identity
                raise HotLoadFailedError("no", snapshot=name)
            return name

    class Sampler:
        concurrency = concurrency_controller(ConcurrencyConfig())

        async def sample_with_prompt_tokens(self, prompt: list[int], n: int, **options: Any) -> list[int]:
            assert (options["logprobs"], options["http_timeout"]) == (True, 5)
            stops.append(options["stop"])
            return prompt

    sampler: Any = Sampler()
    syncer: Any = Syncer()
    tokenizer: Any = SimpleNamespace(stop_tokens=[3], decode_all=lambda tokens: f"<{tokens[0]}>")
    served = serving._Deployed(sampler, syncer, None, tokenizer=tokenizer, timeout=5)
    assert await served.publish(0) == "sampler-0"
    with pytest.raises(HotLoadFailedError):
        await served.publish(1)
    assert served.version == left
    if left is None:
        with pytest.raises(UsageError, match="not known which weights"):
            await served.sample_with_prompt_tokens([1])
    await served.publish(2)
    assert await served.sample_with_prompt_tokens([1]) == [1]
    assert served.version == 2
    for stop in ([3], [3, 4, "x"], "y"):
        await served.sample_with_prompt_tokens([1], stop=stop)
    assert stops == [None, None, ["<4>", "x"], "y"]
