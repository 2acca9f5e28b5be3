"""The side of a run that samples: rows are admitted, their rollouts run, and what is left of them becomes batches.

Invariants
    * Every row that was admitted is in exactly one place: in flight, waiting in a batch, kept, filtered or failed.
    * What is decided when a rollout ends is decided at once, without awaiting: there is no moment in which the counts
      disagree.
    * The first fatal error ends all rollouts. A batch in hand that is whole by then can still be published.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import AsyncIterable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import anyio

from fwasync._background import Background
from fwasync.errors import (
    CircuitBreakerTrippedError,
    RecoverableRolloutError,
    RolloutStalledError,
    RolloutTimeoutError,
    UsageError,
)
from fwasync.rollout.assembly import GroupAssembly
from fwasync.rollout.batch import BatchOwner, RolloutBatch
from fwasync.rollout.bell import Bell
from fwasync.rollout.breaker import CircuitBreaker
from fwasync.rollout.capacity import Capacity, ConcurrencyLimiter, StalenessLimiter
from fwasync.rollout.cursor import RolloutState, RowAccount, RowCursor, Settlement
from fwasync.rollout.failures import is_recoverable, plain_verdict, raisable
from fwasync.rollout.placement import BatchPlacement, Placed
from fwasync.rollout.runner import RolloutExecutor, RolloutFunction, RolloutRunner, Running
from fwasync.rollout.samplers import Samplers
from fwasync.rollout.settings import RolloutSettings
from fwasync.rollout.source import RowSource
from fwasync.rollout.telemetry import RunTelemetry
from fwasync.rollout.tracing import Tracing
from fwasync.rollout.trajectory import Rollout, RolloutGroup
from fwasync.rollout.watchdog import NAMED, RunningRollout, waiting_at

__all__ = ("ReadyGroup", "RolloutProducer", "WindowedConcurrency")

logger = logging.getLogger("fwasync.rollout")

_STAYING_S = 10.0

RowT = TypeVar("RowT")


class WindowedConcurrency(Protocol):
    """A concurrency controller whose window rollouts follow too."""

    @property
    def window_size(self) -> int:
        """How many requests may run at a time, now."""
        ...


@dataclass(slots=True, eq=False)
class _Row(Generic[RowT]):
    """A row that was admitted and has not settled; without a version, it waits to be tried again."""

    index: int
    row: RowT
    attempt: int = 0
    version: int | None = None
    assembly: GroupAssembly[Rollout] = field(default_factory=lambda: GroupAssembly[Rollout](0, 0, 0))
    running: dict[int, Running] = field(default_factory=dict[int, Running])
    spans: list[Any] = field(default_factory=list[Any])


@dataclass(frozen=True, slots=True)
class ReadyGroup:
    """When a kept group became ready, and the spans of its rollouts."""

    since: float
    spans: tuple[Any, ...]


class RolloutProducer(Generic[RowT]):
    """Runs rollouts. Its parts are decisions in files of their own; this is where they meet the event loop.

    The arguments are those of `AsyncRolloutScheduler`.
    """

    def __init__(
        self,
        rows: Iterable[RowT] | AsyncIterable[RowT],
        rollout: RolloutFunction[RowT],
        settings: RolloutSettings,
        *,
        tokenizer: Any,
        keep: Callable[[RolloutGroup[RowT]], bool] | None,
        advantages: Callable[[Sequence[float]], Sequence[float]],
        executor: RolloutExecutor | None,
        concurrency: WindowedConcurrency | None,
        state: RolloutState,
        owner: BatchOwner,
    ) -> None:
        self._owner = owner
        self.settings = settings
        self.bell = Bell()
        self.samplers = Samplers()
        self.tracing = Tracing()
        self.batches: deque[RolloutBatch[RowT]] = deque()
        self.ready: dict[int, ReadyGroup] = {}
        self.failure: Exception | None = None
        self.last_progress = 0.0
        self._keep = keep
        self._advantages = advantages
        size = settings.group_size
        self.staleness = StalenessLimiter(settings.groups_per_batch * size, settings.max_staleness, state.version)
        self.concurrency = ConcurrencyLimiter(_window(settings.max_concurrency, concurrency), size)
        self._placement = BatchPlacement[RolloutGroup[RowT]](
            settings.groups_per_batch, settings.chunks_per_batch, settings.max_staleness, state.version
        )
        self.cursor = RowCursor(state)
        self._breaker = CircuitBreaker(settings.breaker)
        self._background = Background()
        self.source = RowSource(rows, self.cursor.is_settled, self.bell)
        self._runner = RolloutRunner(
            rollout,
            settings,
            samplers=self.samplers,
            tokenizer=tokenizer,
            executor=executor,
            tracing=self.tracing,
            progress=self.progress,
        )
        self._in_flight: dict[int, _Row[RowT]] = {}
        self._retries: deque[_Row[RowT]] = deque()
        self._succeeded_at = -math.inf
        self._owed = 0
        self._refilled = 0
        self._retried = 0
        self.waiting = 0
        self._finished = False
        self._closing = False
        self._telemetry: RunTelemetry | None = None

    # -- life ----------------------------------------------------------------------------------------

    async def open(self, sampler: Any) -> None:
        """Enter the sampler and begin to sample; by the task that closes."""
        await self.samplers.open()
        try:
            self.samplers.follow(await self.samplers.enter(sampler), self.staleness.version)
            self._telemetry = RunTelemetry(anyio.current_time(), self.capacity)
            self.progress()
            await self._background.open()
        except BaseException:
            await self.samplers.aclose()
            raise
        self._background.start(self._pull)
        self._background.start(self._drive)

    async def aclose(self) -> None:
        """Cancel all rollouts, wait for their ends, and leave the samplers."""
        self._closing = True
        reminder = asyncio.get_running_loop().call_later(_STAYING_S, self._name_who_stays)
        try:
            await self._background.aclose()
        finally:
            reminder.cancel()
            await self.samplers.aclose()

    def _name_who_stays(self) -> None:
        staying = "".join(f"\n  {rollout}" for rollout in self.running()[:NAMED])
        logger.warning("the run cannot be left, because rollouts that were cancelled go on:%s", staying)

    def start(self, task: Callable[[], Any]) -> None:
        """Start a task that ends with the rollouts."""
        self._background.start(task)

    def fail(self, error: Exception) -> None:
        """End all rollouts for this reason; the first one counts."""
        if self.failure is None:
            self.failure = raisable(error)
            for row in self._in_flight.values():
                for running in row.running.values():
                    running.scope.cancel()
            self.bell.ring()

    def published(self, batch: RolloutBatch[RowT], entered: Any) -> None:
        """The batch in hand is committed, and the sampler that was entered follows, if there is one."""
        assert batch is self.batches[0], "batches are published in order"
        self.batches.popleft()
        self.staleness.published()
        if entered is None:
            self.samplers.stay(self.staleness.version)
        else:
            self.samplers.follow(entered, self.staleness.version)
        self.waiting -= len(batch.groups)
        for group in batch.groups:
            self.cursor.settle(group.row_index, "kept")
            del self.ready[group.row_index]
        self._place()
        self.observe()
        self.bell.ring()

    # -- what is known -------------------------------------------------------------------------------

    @property
    def telemetry(self) -> RunTelemetry:
        """The states of the run."""
        assert self._telemetry is not None, "open() comes first"
        return self._telemetry

    @property
    def capacity(self) -> Capacity:
        """Samples that may be admitted."""
        return Capacity(self.staleness.capacity, self.concurrency.capacity)

    @property
    def _is_live(self) -> bool:
        return self.failure is None and not self._closing

    @property
    def is_finished(self) -> bool:
        """Whether no further batch will come."""
        return self._finished and not self.batches

    def account(self) -> RowAccount:
        """Where every row is."""
        kept, filtered, failed = (self.cursor[name] for name in ("kept", "filtered", "failed"))
        settled = kept + filtered + failed
        return RowAccount(
            submitted=settled + len(self._in_flight) + self.waiting,
            in_flight=len(self._in_flight),
            waiting=self.waiting,
            kept=kept,
            filtered=filtered,
            failed=failed,
            refilled=self._refilled,
            retried=self._retried,
        )

    def running(self) -> list[RunningRollout]:
        """What is in flight, the longest silent first; may be asked outside of any task."""
        now = asyncio.get_running_loop().time()
        found = [
            RunningRollout(
                row.index,
                running.number,
                row.attempt,
                -1 if row.version is None else row.version,
                now - running.started,
                running.doing,
                now - running.doing_since,
                waiting_at(running.task),
            )
            for row in self._in_flight.values()
            for running in row.running.values()
        ]
        return sorted(found, key=lambda rollout: -rollout.doing_s)

    def oldest_s(self) -> float:
        """For how long the oldest rollout in flight has run."""
        started = [running.started for row in self._in_flight.values() for running in row.running.values()]
        return anyio.current_time() - min(started) if started else 0.0

    def progress(self) -> None:
        """Something moved."""
        self.last_progress = anyio.current_time()

    def observe(self) -> None:
        """Something moved that changes what runs or what may be admitted."""
        self.progress()
        self.telemetry.changed(self.last_progress, self.concurrency.in_flight, self.capacity)

    # -- rows in -------------------------------------------------------------------------------------

    async def _pull(self) -> None:
        try:
            await self.source.run()
        except Exception as error:
            self.fail(error)

    async def _drive(self) -> None:
        """Start what may start, whenever something has changed."""
        size = self.settings.group_size
        while self._is_live:
            if self._retries and self.concurrency.has_room(size):
                self._start(self._retries.popleft())
            elif self.source.next is not None and not self._retries and self.capacity.admission >= size:
                self._admit(_Row(*self.source.take()))
            elif self.source.is_exhausted and self.source.next is None and not self._in_flight:
                self._hand_over(self._placement.finish())
                self._finished = True
                self.bell.ring()
                return
            else:
                self._check_for_dead_end()
                await self.bell.wait()

    def _check_for_dead_end(self) -> None:
        """A row waits, and nothing that runs or is to be published could ever make room for it."""
        if self.source.next is None or self._in_flight or any(batch.is_whole for batch in self.batches):
            return
        self.fail(
            RolloutStalledError(
                f"row {self.source.next[0]} can never be admitted: nothing is in flight, no batch waits for its "
                f"publication, and there is room for {self.capacity.staleness} samples by staleness and "
                f"{self.capacity.concurrency} by concurrency ({self.staleness.accepted} accepted, "
                f"{self.staleness.reserved} reserved, version {self.staleness.version}); a group needs "
                f"{self.settings.group_size}"
            )
        )

    def _admit(self, row: _Row[RowT]) -> None:
        if self._owed:
            self._owed -= 1
            self._refilled += 1
        self._in_flight[row.index] = row
        self.staleness.admitted(self.settings.group_size)
        self._start(row)

    def _start(self, row: _Row[RowT]) -> None:
        """Start all rollouts of a row, of the version that is published now."""
        settings = self.settings
        row.version = self.staleness.version
        row.assembly = GroupAssembly(
            settings.group_size, settings.least_group_size, settings.max_group_retries - row.attempt
        )
        self.concurrency.in_flight += settings.group_size
        for number in range(settings.group_size):
            running = row.running[number] = self._runner.ready(number)
            self._background.start(self._run, row, running)
        self.observe()

    async def _run(self, row: _Row[RowT], running: Running) -> None:
        try:
            ending = await self._runner.run(row.index, row.row, row.attempt, running)
        finally:
            self.concurrency.in_flight -= 1
            del row.running[running.number]
            self.observe()
        if not self._is_live:
            return
        cause = ending.cause
        if cause is None:
            self._breaker.succeeded()
            self._succeeded_at = self.last_progress
        elif row.assembly.given_up:
            cause = "sibling"
        elif ending.error is not None and not self._is_bad_luck(row.index, running, ending.error):
            return
        if cause is not None:
            self.telemetry.drops[cause] += 1
        if self._is_live:
            self._ended(row, running, ending.rollout)

    def _is_bad_luck(self, index: int, running: Running, error: Exception) -> bool:
        """Whether what a rollout raised is bad luck, once too often perhaps; anything else is the end of the run."""
        error.add_note(f"raised by rollout {running.number} of row {index}")
        if not is_recoverable(error):
            self.fail(error)
            return False
        logger.warning("rollout %d of row %d is lost: %r", running.number, index, error)
        is_known = isinstance(error, RecoverableRolloutError) and error.repeated
        # Rollouts that are stuck end last, one after the other; while others succeeded, nothing they share was broken.
        is_alone = isinstance(error, RolloutTimeoutError) and self._succeeded_at > running.started
        reason = None if is_known or is_alone else self._breaker.failed(index)
        if reason is not None:
            tripped = CircuitBreakerTrippedError(f"{reason}, the last with {type(error).__name__}: {error}")
            tripped.__cause__ = error
            self.fail(tripped)
        return True

    # -- rows out ------------------------------------------------------------------------------------

    def _ended(self, row: _Row[RowT], running: Running, rollout: Rollout | None) -> None:
        if rollout is not None:
            row.spans.append(running.span)
        verdict = row.assembly.ended(running.number, rollout)
        if verdict == "give up":
            for sibling in row.running.values():
                sibling.scope.cancel()
        elif verdict == "whole":
            self._judge(row)
        elif verdict == "retry":
            row.attempt, row.version, row.spans = row.attempt + 1, None, []
            self._retried += 1
            self._retries.append(row)
        elif verdict == "failed":
            self._drop(row, "failed")
        self.observe()
        self.bell.ring()

    def _judge(self, row: _Row[RowT]) -> None:
        """Make a group of what is left of a row, and keep it or not."""
        rollouts = tuple(row.assembly.kept)
        assert row.version is not None, "it ran"
        try:
            advantages = tuple(float(value) for value in self._advantages([rollout.reward for rollout in rollouts]))
            if len(advantages) != len(rollouts):
                raise UsageError(f"there are {len(advantages)} advantages for a group of {len(rollouts)} rollouts")
            group = RolloutGroup(row.row, row.index, row.version, rollouts, advantages)
            keep = all(map(math.isfinite, advantages)) and (self._keep is None or plain_verdict(self._keep(group)))
        except Exception as error:
            error.add_note(f"raised for the group of row {row.index}")
            self.fail(error)
            return
        self.telemetry.raw_rewards += [rollout.reward for rollout in rollouts]
        if not keep:
            self.telemetry.step_filtered += 1
            self._drop(row, "filtered")
            return
        del self._in_flight[row.index]
        self.waiting += 1
        self.staleness.accepted_row(self.settings.group_size)
        self.ready[row.index] = ReadyGroup(anyio.current_time(), tuple(row.spans))
        self._placement.add(group.version, group)
        self._place()

    def _drop(self, row: _Row[RowT], settlement: Settlement) -> None:
        del self._in_flight[row.index]
        self.staleness.dropped_row(self.settings.group_size)
        self.cursor.settle(row.index, settlement)
        self._owed += 1
        self._place()

    def _place(self) -> None:
        """Put into batches what may be put there now."""
        now = self.staleness.version
        outstanding = [now if row.version is None else row.version for row in self._in_flight.values()]
        self._hand_over(self._placement.place(outstanding))

    def _hand_over(self, chunks: list[Placed[RolloutGroup[RowT]]]) -> None:
        for chunk in chunks:
            if not self.batches or self.batches[-1].version != chunk.batch:
                self.batches.append(RolloutBatch(chunk.batch, self._owner))
            self.batches[-1].add(chunk.groups, completes=chunk.completes)


def _window(fixed: int | None, controller: WindowedConcurrency | None) -> Callable[[], int] | None:
    if controller is None:
        return None if fixed is None else lambda: fixed
    return lambda: controller.window_size if fixed is None else min(fixed, controller.window_size)
