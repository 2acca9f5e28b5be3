"""`RayExecutor`: the same rollouts, counted in the same way, on the machines of a Ray cluster (extra `ray`).

What is sent to another machine is the row, which rollout of it this is, its seed, the policy version and the *address*
of a sampler: a live connection cannot be sent. So a scheduler with this executor is given addresses where others are
given samplers, `sampler=address` and `publish(batch, sampler=address)`, and the executor a function that connects to
one.

A rollout knows the version that was published when it started, to its end. What it notes for the watchdog stays on its
machine.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import anyio

from fwasync.errors import ClosedError, RecoverableRolloutError, UsageError
from fwasync.rollout.context import Policy, RolloutContext
from fwasync.rollout.runner import RolloutFunction, wants_to_exit
from fwasync.rollout.trajectory import Rollout

__all__ = ("RayExecutor",)

_CANCELLING_S = 30.0


@dataclass(frozen=True, slots=True)
class _Shipment:
    """A context without what cannot be sent."""

    row_index: int
    rollout_index: int
    attempt: int
    seed: int
    time_left: float
    version: int
    address: Any


class RayExecutor:
    """Runs rollouts in actors, many at a time in each.

    ```python
    async with RayExecutor(connect, actors=8, tokenizer=load_tokenizer) as executor:
        async with AsyncRolloutScheduler(rows, rollout, settings, sampler=address, executor=executor) as scheduler:
            ...
    ```

    Initialise Ray before you enter it: `ray.init(address=...)`. `connect`, `tokenizer` and the rollout function are
    sent by Ray, and the other machines need the modules that they come from.

    Args:
        connect: Makes a sampler of an address: an async context manager. It is called for each rollout.
        actors: How many actors.
        tokenizer: Makes `ctx.tokenizer`, once in each actor.
        rollouts_per_actor: The most that run in one at a time.
        options: Of the actors, such as `{"num_cpus": 1}`.

    Raises:
        UsageError: Ray is not installed, or a number is less than 1.
    """

    def __init__(
        self,
        connect: Callable[[Any], AbstractAsyncContextManager[Any]],
        *,
        actors: int,
        tokenizer: Callable[[], Any] | None = None,
        rollouts_per_actor: int = 1000,
        options: dict[str, Any] | None = None,
    ) -> None:
        if actors < 1 or rollouts_per_actor < 1:
            raise UsageError(f"actors is {actors} and rollouts_per_actor {rollouts_per_actor}; both are at least 1")
        try:
            self._ray: Any = importlib.import_module("ray")
        except ImportError as error:
            raise UsageError("Ray is not installed: pip install 'fwasync[ray]'") from error
        self._make = lambda: (
            self._ray.remote(_Actor)
            .options(max_concurrency=rollouts_per_actor, **(options or {}))
            .remote(connect, tokenizer)
        )
        self._count = actors
        self._actors: list[Any] = []
        self._turn = itertools.count()

    async def __aenter__(self) -> Self:
        self._actors = [self._make() for _ in range(self._count)]
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        actors, self._actors = self._actors, []
        for actor in actors:
            self._ray.kill(actor)

    async def run(self, rollout: RolloutFunction[Any], row: Any, context: RolloutContext) -> Rollout | None:
        """Run one rollout in the actor whose turn it is.

        Raises:
            RecoverableRolloutError: Its actor or machine is lost; the actor is replaced. The circuit breaker counts
                that once, not for each rollout in it.
            Exception: What the rollout raised.

        **Cancellation:** the rollout is cancelled where it runs, and its end waited for.
        """
        if not self._actors:
            raise ClosedError("the executor is not open: use it as `async with RayExecutor(...) as executor:`")
        place = next(self._turn) % self._count
        actor, policy = self._actors[place], context.policy
        shipment = _Shipment(
            context.row_index,
            context.rollout_index,
            context.attempt,
            context.seed,
            context.time_left,
            policy.version,
            policy.sampler,
        )
        context.note(f"in actor {place}")
        running = actor.run.remote(rollout, row, shipment)
        try:
            return await running
        except anyio.get_cancelled_exc_class():
            self._ray.cancel(running)
            with anyio.move_on_after(_CANCELLING_S, shield=True), contextlib.suppress(self._ray.exceptions.RayError):
                await running  # ends as cancelled
            raise
        except self._ray.exceptions.RayTaskError as error:
            if not isinstance(error.cause, Exception):
                raise
            error.cause.add_note(f"in actor {place}: {error}")
            raise error.cause from None
        except self._ray.exceptions.RayActorError as error:
            is_first = bool(self._actors) and self._actors[place] is actor
            if is_first:
                self._actors[place] = self._make()
            raise RecoverableRolloutError(f"actor {place} was lost: {error}", repeated=not is_first) from error


class _Actor:
    """Runs rollouts on another machine."""

    def __init__(
        self, connect: Callable[[Any], AbstractAsyncContextManager[Any]], tokenizer: Callable[[], Any] | None
    ) -> None:
        self._connect = connect
        self._tokenizer: Any = None if tokenizer is None else tokenizer()

    async def run(self, rollout: RolloutFunction[Any], row: Any, shipment: _Shipment) -> Rollout | None:
        """Run one."""
        async with self._connect(shipment.address) as sampler:
            policy = Policy(sampler, shipment.version)
            context = RolloutContext(
                row_index=shipment.row_index,
                rollout_index=shipment.rollout_index,
                attempt=shipment.attempt,
                seed=shipment.seed,
                deadline=anyio.current_time() + shipment.time_left,
                tokenizer=self._tokenizer,
                policy=lambda: policy,
                note=lambda doing: None,  # noqa: ARG005  # nobody watches here
            )
            try:
                return await rollout(row, context)
            except SystemExit as error:  # of which Ray would say nothing, and the rollout would never end
                raise wants_to_exit(error) from error
