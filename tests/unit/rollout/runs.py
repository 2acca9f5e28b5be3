"""Rollouts without a model, and a trainer without a trainer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import anyio

from fwasync.rollout.context import RolloutContext
from fwasync.rollout.scheduler import AsyncRolloutScheduler
from fwasync.rollout.settings import RolloutSettings
from fwasync.rollout.trajectory import Rollout, RolloutGroup
from fwasync.rollout.transcript import TokenTranscript


def made(ctx: RolloutContext, reward: float | None = None) -> Rollout:
    """A rollout of one sampled token."""
    transcript = TokenTranscript()
    transcript.append([1])
    transcript.append_sampled([2], [-0.5], ctx.version)
    return Rollout((transcript.segment(),), float(ctx.rollout_index) if reward is None else reward)


@dataclass
class Counted:
    """Wraps a rollout function: what started, what ended, and how many ran at most."""

    rollout: Callable[[Any, RolloutContext], Awaitable[Rollout | None]]
    running: int = 0
    most: int = 0
    started: list[tuple[int, int, int, int]] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)

    async def __call__(self, row: Any, ctx: RolloutContext) -> Rollout | None:
        self.started.append((ctx.row_index, ctx.rollout_index, ctx.attempt, ctx.version))
        self.seeds.append(ctx.seed)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            return await self.rollout(row, ctx)
        finally:
            self.running -= 1

    @property
    def rows(self) -> list[int]:
        """The rows that were started, in order, once for each attempt."""
        return [row for row, number, _, _ in self.started if number == 0]


@dataclass
class Sampler:
    """Knows whether it is open."""

    name: str = "sampler"
    is_open: bool = False
    closings: int = 0
    failing: bool = False

    async def __aenter__(self) -> Self:
        await anyio.sleep(0.1)
        if self.failing:
            raise ConnectionError("no sampler here")
        self.is_open = True
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.is_open = False
        self.closings += 1


def settings(**changes: Any) -> RolloutSettings:
    return RolloutSettings(**{"groups_per_batch": 2, "group_size": 4, **changes})


async def train(
    scheduler: AsyncRolloutScheduler[Any], *, seconds: float = 0.0, batches: int | None = None
) -> list[list[RolloutGroup[Any]]]:
    """Take batches, work on each of their chunks for so long, and publish them; the groups of each."""
    trained: list[list[RolloutGroup[Any]]] = []
    if batches == 0:
        return trained
    async for batch in scheduler:
        async for _ in batch:
            await anyio.sleep(seconds)
        await scheduler.publish(batch)
        trained.append(batch.groups)
        if len(trained) == batches:
            break
    return trained


def rows_of(batch: list[RolloutGroup[Any]]) -> list[int]:
    return sorted(group.row_index for group in batch)
