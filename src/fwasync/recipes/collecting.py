"""As many groups as a step of training wants: rows in their order, and one more for each group that is dropped.

Invariants
    * Each row that is taken ends in one of three ways: kept, filtered or failed.
    * Which rows are taken depends on their outcomes alone, and not on which arrives first: they are the shortest
      beginning of what is left that has so many groups to keep. Groups are in the order of their rows.
    * Only bad luck is a failure: a service that is busy, a connection that broke (see `fwasync.rollout.failures`).
      Whatever else is raised ends the run, and so does bad luck that does not end.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import anyio
from anyio.abc import TaskGroup

from fwasync.recipes.groups import GroupFilter, PromptGroup, TakenRow, rewards_differ
from fwasync.rollout.failures import is_recoverable

__all__ = ("Collected", "Collector", "RowCounts")

T = TypeVar("T")

_MOST_FAILURES = 8


@dataclass(slots=True)
class Collected:
    """What one step gets.

    Attributes:
        kept: Groups to train on, in the order of their rows.
        filtered: Groups that were dropped, in the same order.
        failed: Why rows could not be sampled or rewarded, in the same order.
        consumed: Rows that are consumed with these.
    """

    kept: list[PromptGroup]
    filtered: list[PromptGroup]
    failed: list[Exception]
    consumed: int


@dataclass(frozen=True, slots=True)
class RowCounts:
    """How many rows were sampled, and what became of them; `sampled` is the sum of the others."""

    kept: int = 0
    filtered: int = 0
    failed: int = 0

    @property
    def sampled(self) -> int:
        """All of them."""
        return self.kept + self.filtered + self.failed

    def __add__(self, other: RowCounts) -> RowCounts:
        return RowCounts(self.kept + other.kept, self.filtered + other.filtered, self.failed + other.failed)

    def __str__(self) -> str:
        return f"{self.sampled} sampled, {self.kept} kept, {self.filtered} filtered, {self.failed} failed"

    @classmethod
    def of(cls, collected: Collected | None) -> RowCounts:
        """Those of one step; `None` has none."""
        if collected is None:
            return cls()
        return cls(len(collected.kept), len(collected.filtered), len(collected.failed))


class Collector:
    """Takes rows, and gathers what becomes of them.

    Args:
        rows: What is left of the rows, in order.
        consumed: Rows that are consumed already.
        sample: Samples and rewards a group.
        keep: Which groups are trained on.
        refill: Whether another row is taken for each that is dropped.
        tell: Told how many rows are being sampled, whenever that changes.
    """

    def __init__(
        self,
        rows: Iterator[TakenRow],
        consumed: int,
        sample: Callable[[TakenRow], Awaitable[PromptGroup]],
        *,
        keep: GroupFilter = rewards_differ,
        refill: bool = True,
        tell: Callable[[int], None] | None = None,
    ) -> None:
        self.consumed = consumed
        self._rows = rows
        self._next = next(rows, None)
        self._sample = sample
        self._keep = keep
        self._refill = refill
        self._tell = tell
        self._failures = 0

    @property
    def is_exhausted(self) -> bool:
        """Whether no row is left."""
        return self._next is None

    async def collect(self, target: int, *, after: Collected | None = None) -> Collected:
        """So many groups to train on; fewer where the rows come to an end, or are not refilled.

        Args:
            target: How many.
            after: What was collected before and is to be told together with this.

        Raises:
            Exception: What sampling, the reward function or the filter raises that is no bad luck, or is the last of
                so much that it is none any more.

        **Cancellation:** all requests end. The rows that were taken are lost to this object.
        """
        step = _Step(target)
        before = after or Collected([], [], [], 0)
        try:
            async with anyio.create_task_group() as tasks:
                for _ in range(target):
                    self._start(tasks, step)
        except ExceptionGroup as errors:
            first, *others = errors.exceptions
            if others:
                first.add_note(f"{len(others)} other {'prompt' if len(others) == 1 else 'prompts'} failed too")
            raise first from first.__cause__
        return Collected(
            before.kept + _ordered(step.kept),
            before.filtered + _ordered(step.filtered),
            before.failed + _ordered(step.failed),
            self.consumed,
        )

    def _start(self, tasks: TaskGroup, step: _Step) -> None:
        if self._next is not None:
            taken, self._next = self._next, next(self._rows, None)
            self.consumed = taken.cursor
            self._count(step, 1)
            tasks.start_soon(self._settle, tasks, step, taken)

    async def _settle(self, tasks: TaskGroup, step: _Step, taken: TakenRow) -> None:
        try:
            group = await self._sample(taken)
        except Exception as error:
            self._failures += 1
            if not is_recoverable(error):
                raise
            if self._failures >= max(_MOST_FAILURES, 2 * step.target):
                error.add_note(f"{self._failures} rows one after the other could not be sampled or rewarded")
                raise
            step.failed[taken.cursor] = error
        else:
            self._failures = 0
            (step.kept if self._keep(group) else step.filtered)[taken.cursor] = group
        finally:
            self._count(step, -1)
        if self._refill and taken.cursor not in step.kept:
            self._start(tasks, step)

    def _count(self, step: _Step, change: int) -> None:
        step.in_flight += change
        if self._tell is not None:
            self._tell(step.in_flight)


@dataclass(slots=True)
class _Step:
    """A step on its way: what became of the rows, by their cursors."""

    target: int
    in_flight: int = 0
    kept: dict[int, PromptGroup] = field(default_factory=dict[int, PromptGroup])
    filtered: dict[int, PromptGroup] = field(default_factory=dict[int, PromptGroup])
    failed: dict[int, Exception] = field(default_factory=dict[int, Exception])


def _ordered(outcomes: dict[int, T]) -> list[T]:
    return [outcomes[cursor] for cursor in sorted(outcomes)]
