"""The training clients that are compared, behind one small face: fwasync, tinker, Fireworks' FireTitan, and the floor.

Each is driven in the way that its own documentation recommends to async code.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any, Protocol

import numpy as np
from harness import Client, Measures, Settings

LOSS = "importance_sampling"
LEARNING_RATE = 1e-4

Arrays = Mapping[str, np.ndarray]
CustomLoss = Callable[[Any, list[Any]], tuple[Any, Mapping[str, float]]]


class Trainer(Protocol):
    """A model under training. Verbs return when the operation has been sent; what they return is its result."""

    def datum(self, tokens: np.ndarray, inputs: Arrays) -> Any: ...

    async def forward_backward(self, data: Sequence[Any]) -> Awaitable[Sequence[Any]]:
        """A result is the output of each datum."""
        ...

    async def optim_step(self) -> Awaitable[Any]: ...

    async def forward_backward_custom(self, data: Sequence[Any], loss_fn: CustomLoss) -> Awaitable[Any]: ...


class _Client:
    """The three clients have their verbs in common; and what is left is whether they are to be awaited."""

    def __init__(self, client: Any, types: Any) -> None:
        self._client, self._types = client, types
        self._adam = types.AdamParams(learning_rate=LEARNING_RATE)

    def datum(self, tokens: np.ndarray, inputs: Arrays) -> Any:
        types = self._types
        return types.Datum(
            model_input=types.ModelInput.from_ints(tokens.tolist()),
            loss_fn_inputs={name: types.TensorData.from_numpy(array) for name, array in inputs.items()},
        )


class AtOnce(_Client):
    """Of fwasync and today's tinker: a verb returns a future at once."""

    async def forward_backward(self, data: Sequence[Any]) -> Awaitable[Sequence[Any]]:
        return outputs(self._client.forward_backward(data, LOSS))

    async def optim_step(self) -> Awaitable[Any]:
        return self._client.optim_step(self._adam)

    async def forward_backward_custom(self, data: Sequence[Any], loss_fn: CustomLoss) -> Awaitable[Any]:
        return self._client.forward_backward_custom(data, loss_fn)


class Awaited(_Client):
    """Of the older tinker, and of FireTitan: async code awaits that a verb has been taken up."""

    async def forward_backward(self, data: Sequence[Any]) -> Awaitable[Sequence[Any]]:
        return outputs(await self._client.forward_backward_async(data, LOSS))

    async def optim_step(self) -> Awaitable[Any]:
        return await self._client.optim_step_async(self._adam)

    async def forward_backward_custom(self, data: Sequence[Any], loss_fn: CustomLoss) -> Awaitable[Any]:
        return await self._client.forward_backward_custom_async(data, loss_fn)


async def outputs(future: Awaitable[Any]) -> Sequence[Any]:
    return (await future).loss_fn_outputs


class ByHand:
    """Of the floor."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def datum(self, tokens: np.ndarray, inputs: Arrays) -> Any:
        from floor_training import Datum

        return Datum(tokens, inputs)

    async def forward_backward(self, data: Sequence[Any]) -> Awaitable[Sequence[Any]]:
        return (await self._trainer.forward_backward(data, LOSS)).result()

    async def optim_step(self) -> Awaitable[Any]:
        return (await self._trainer.optim_step(LEARNING_RATE)).result()

    async def forward_backward_custom(self, data: Sequence[Any], loss_fn: CustomLoss) -> Awaitable[Any]:
        return self._trainer.forward_backward_custom(data, loss_fn)


Open = Callable[[str, str], AbstractAsyncContextManager[Trainer]]


@asynccontextmanager
async def fwasync(url: str, base_model: str, wire: Any) -> AsyncIterator[Trainer]:
    from fwasync import AsyncServiceClient, types

    async with AsyncServiceClient(url, "tml-bench", wire=wire) as service:
        async with service.create_training_client(base_model) as client:
            yield AtOnce(client, types)


@asynccontextmanager
async def tinker(url: str, base_model: str, face: type[_Client]) -> AsyncIterator[Any]:
    from tinker import ServiceClient, types

    service = ServiceClient(base_url=url, api_key="tml-bench")
    yield face(await service.create_lora_training_client_async(base_model, rank=32), types)


@asynccontextmanager
async def firetitan(url: str, base_model: str) -> AsyncIterator[Trainer]:
    from fireworks.training.sdk import FiretitanServiceClient, types

    service = FiretitanServiceClient(base_url=url, api_key="fw-bench")
    yield Awaited(service.create_training_client(base_model, lora_rank=32), types)


@asynccontextmanager
async def by_hand(url: str, base_model: str, wire: str) -> AsyncIterator[Trainer]:
    from floor import Floor
    from floor_training import Trainer as FloorTrainer

    async with Floor(url) as floor:
        yield ByHand(await FloorTrainer.create(floor, base_model, wire))


Run = Callable[[Trainer, str, Settings], Awaitable[Measures]]

FWASYNC_JSON, FWASYNC_PROTOBUF = "fwasync, JSON", "fwasync, protobuf"
TINKER, OLDER, FIRETITAN = "tinker, protobuf", "tinker 0.15, JSON", "FireTitan, JSON"
FLOOR_JSON, FLOOR_PROTOBUF = "floor, JSON", "floor, protobuf"
SLOW = (OLDER, FIRETITAN)


def clients(run: Run, share: float = 1.0) -> dict[str, Client]:
    """All of them, doing the same; those that are slow do that share of it."""

    def of(opened: Open) -> Callable[[str, Settings], Awaitable[Measures]]:
        async def run_client(url: str, settings: Settings) -> Measures:
            async with opened(url, f"{settings['tokens']}-tokens") as trainer:
                return await run(trainer, url, settings)

        return run_client

    return {
        FWASYNC_JSON: Client(of(partial(fwasync, wire="json")), "fwasync"),
        FWASYNC_PROTOBUF: Client(of(partial(fwasync, wire="protobuf")), "fwasync"),
        TINKER: Client(of(partial(tinker, face=AtOnce)), "tinker", "tinker", share),
        OLDER: Client(of(partial(tinker, face=Awaited)), "tinker", "older", share),
        FIRETITAN: Client(of(firetitan), "fireworks-ai", "fireworks", share),
        FLOOR_JSON: Client(of(partial(by_hand, wire="json"))),
        FLOOR_PROTOBUF: Client(of(partial(by_hand, wire="protobuf"))),
    }


def targets_only(trainer: Trainer, datums: int, tokens: int) -> list[Any]:
    """Datums whose only input is int64 targets."""
    return _data(trainer, datums, tokens, lambda _: {})


def policy_data(trainer: Trainer, datums: int, tokens: int) -> list[Any]:
    """Datums with int64 targets and three float32 inputs: logprobs, advantages of a sequence, and a mask."""

    def floats(random: np.random.Generator) -> Arrays:
        return {
            "logprobs": random.normal(-2, 1, tokens).astype(np.float32),
            "advantages": np.full(tokens, random.choice((-0.5, 0.5)), np.float32),
            "weights": np.ones(tokens, np.float32),
        }

    return _data(trainer, datums, tokens, floats)


def _data(trainer: Trainer, datums: int, tokens: int, floats: Callable[[np.random.Generator], Arrays]) -> list[Any]:
    random = np.random.default_rng(0)
    data: list[Any] = []
    for _ in range(datums):
        inputs = {"target_tokens": random.integers(0, 150_000, tokens), **floats(random)}
        data.append(trainer.datum(random.integers(0, 150_000, tokens, dtype=np.int32), inputs))
    return data
