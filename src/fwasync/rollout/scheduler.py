"""`AsyncRolloutScheduler`: rollouts and training at the same time, with a bound on how stale what is trained on may be.

Invariants
    * A batch is trained on tokens that are at most `max_staleness` versions older than its weights.
    * `publish` is the commit: before it, none of the batch's rows is settled; after it, all are.
    * Nothing runs after the `async with`: every rollout, its siblings and its sampler have ended.
    * A run that cannot move says what it waits for.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterable, Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import anyio

from fwasync.errors import ClosedError, RolloutStalledError, UsageError
from fwasync.rollout.advantages import group_advantages
from fwasync.rollout.batch import RolloutBatch
from fwasync.rollout.cursor import RolloutState
from fwasync.rollout.producer import RolloutProducer, WindowedConcurrency
from fwasync.rollout.runner import RolloutExecutor, RolloutFunction
from fwasync.rollout.settings import RolloutSettings
from fwasync.rollout.telemetry import RolloutStatistics, TrainerState, step_metrics
from fwasync.rollout.trajectory import RolloutGroup
from fwasync.rollout.watchdog import StallReport, dump_tasks, waiting_at

__all__ = ("AsyncRolloutScheduler",)

logger = logging.getLogger("fwasync.rollout")

RowT = TypeVar("RowT")

_LOOK_S = 0.25


class AsyncRolloutScheduler(Generic[RowT]):
    """Samples groups of rollouts of rows, batch after batch, while the caller trains.

    ```python
    async with AsyncRolloutScheduler(rows, rollout, settings, sampler=sampler) as scheduler:
        async for batch in scheduler:
            async for chunk in batch:
                await client.forward_backward(rollout_datums(chunk), "importance_sampling")
            await client.optim_step(adam)
            ...  # the weights to the sampler
            metrics = await scheduler.publish(batch)
    ```

    Args:
        rows: What to roll out, each row once. Rows may be anything; async iterables may wait for theirs.
        rollout: `async def rollout(row, ctx) -> Rollout | None`.
        settings: What to keep to.
        sampler: What `ctx.sampler` is. An async context manager is entered here and left when the last rollout that
            uses it has ended; to keep that to yourself, wrap it in `contextlib.nullcontext`.
        tokenizer: What `ctx.tokenizer` is.
        keep: Whether a group is trained on; what it drops is replaced by further rows. It runs on the event loop.
        advantages: From the rewards of a group to one advantage for each; a group with one that is not a finite number
            is dropped.
        concurrency: A concurrency controller whose window bounds the rollouts in flight too, but for one row.
        executor: Where rollouts run; on this event loop unless given.
        state: What `state()` said in the run that is to be resumed; `rows` must be the same, from the beginning.
        on_stall: Called by the watchdog instead of ending the run, each time that nothing has moved for another
            `stall_timeout`.
    """

    def __init__(
        self,
        rows: Iterable[RowT] | AsyncIterable[RowT],
        rollout: RolloutFunction[RowT],
        settings: RolloutSettings,
        *,
        sampler: Any,
        tokenizer: Any = None,
        keep: Callable[[RolloutGroup[RowT]], bool] | None = None,
        advantages: Callable[[Sequence[float]], Sequence[float]] | None = None,
        concurrency: WindowedConcurrency | None = None,
        executor: RolloutExecutor | None = None,
        state: RolloutState | None = None,
        on_stall: Callable[[StallReport], None] | None = None,
    ) -> None:
        self._producer = RolloutProducer(
            rows,
            rollout,
            settings,
            tokenizer=tokenizer,
            keep=keep,
            advantages=advantages or _group_advantages,
            executor=executor,
            concurrency=concurrency,
            state=state or RolloutState(),
            owner=self,
        )
        self._settings = settings
        self._sampler = sampler
        self._on_stall = on_stall
        self._batch: RolloutBatch[RowT] | None = None
        self._queued_s: list[float] = []
        self._body = anyio.CancelScope()
        self._waits = False
        self._trainer: asyncio.Task[Any] | None = None
        self._was_entered = False
        self._is_open = False
        self._batch_began_ns = 0
        self._worst_lag = 0.0

    def __repr__(self) -> str:
        account = self._producer.account()
        return (
            f"<AsyncRolloutScheduler version {self.version}: {self._producer.concurrency.in_flight} rollouts in "
            f"flight, {account.waiting} groups waiting, {account.kept} rows kept>"
        )

    @property
    def version(self) -> int:
        """The published policy version."""
        return self._producer.staleness.version

    # -- life ----------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        if self._was_entered:
            raise UsageError("a scheduler is entered once; create another one, with `state` to go on")
        self._was_entered = True
        await self._producer.open(self._sampler)
        self._is_open = True
        self._trainer = asyncio.current_task()
        self._producer.start(self._watch)
        self._body.__enter__()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> bool | None:
        self._is_open = False
        swallowed = self._body.__exit__(exc_type, exc, tb)
        await self._producer.aclose()
        if self._body.cancel_called and (swallowed or exc is None) and self._producer.failure is not None:
            raise self._producer.failure
        return swallowed

    # -- batches -------------------------------------------------------------------------------------

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RolloutBatch[RowT]:
        """The next batch, as soon as its first chunk is full.

        Raises:
            UsageError: The batch before it is not published.
            CircuitBreakerTrippedError: Too many rollouts failed.
            RolloutStalledError: Nothing moves any more.
            Exception: What a rollout, the source, `keep` or `advantages` raised that is not bad luck.

        **Cancellation:** no batch is lost; ask again.
        """
        self._require_open()
        if self._batch is not None:
            raise UsageError(
                f"batch {self._batch.version} is not published: `await scheduler.publish(batch)` comes first"
            )
        producer = self._producer
        await self._until(
            lambda: producer.is_finished or bool(producer.batches and producer.batches[0].is_ready),
            "waiting for a batch",
        )
        if producer.is_finished:
            producer.telemetry.trainer_is(anyio.current_time(), "elsewhere")
            raise StopAsyncIteration
        self._batch = producer.batches[0]
        self._batch_began_ns = time.time_ns()
        return self._batch

    async def publish(self, batch: RolloutBatch[RowT], *, sampler: Any = None) -> dict[str, float]:
        """Commit a batch: the weights that it made are what is sampled from now on.

        Args:
            batch: The one in hand, of which every chunk was taken.
            sampler: The sampler of the new weights, like that of the scheduler; rollouts in flight get it for their
                next turn, and the one before stays open until none of them uses it. Unset: the same sampler has the
                new weights, as a deployment after a hot-load.

        Returns:
            The metrics of the step that ends here, for a log: `async/`, `perf/`, `rollout/` and `producer/`.

        Raises:
            UsageError: It is another batch, or has chunks left.
            Exception: What entering the sampler raises; nothing is committed then.

        **Cancellation:** nothing is committed, and `publish` may be called again. If it returned, all is.
        """
        self._require_open()
        producer = self._producer
        if batch is not self._batch:
            raise UsageError(f"batch {batch.version} is not the one in hand; batches are published in order, and once")
        if not batch.is_consumed:
            raise UsageError(f"batch {batch.version} has chunks that were not taken: `async for chunk in batch` first")
        entered = None if sampler is None else await producer.samplers.enter(sampler)
        # From here to the end nothing is awaited: it all happens, or nothing.
        metrics = producer.telemetry.close_step(anyio.current_time())
        metrics |= step_metrics(
            batch.version, batch.groups, self._queued_s, batch.chunks_taken, metrics["perf/step_time"]
        )
        producer.tracing.record(
            "fwasync.train_batch",
            {"fwasync.policy_version": batch.version, "fwasync.groups": len(batch.groups)},
            started_ns=self._batch_began_ns,
            linked=[span for group in batch.groups for span in producer.ready[group.row_index].spans],
        )
        producer.published(batch, entered)
        self._batch, self._queued_s = None, []
        producer.telemetry.trainer_is(producer.last_progress, "elsewhere")
        return metrics | self.statistics().metrics()

    def state(self) -> RolloutState:
        """What a later run needs to go on from here: save it with the checkpoint of what was published."""
        return self._producer.cursor.state(self.version)

    def statistics(self) -> RolloutStatistics:
        """The run at this moment. Changes nothing."""
        producer, now = self._producer, anyio.current_time()
        telemetry = producer.telemetry
        producer.telemetry.changed(now, producer.concurrency.in_flight, producer.capacity)
        times = telemetry.run
        return RolloutStatistics(
            version=self.version,
            account=producer.account(),
            capacity=producer.capacity,
            in_flight=producer.concurrency.in_flight,
            oldest_s=producer.oldest_s(),
            batches_ready=sum(batch.is_ready for batch in producer.batches),
            trainer=telemetry.trainer,
            trainer_s=now - telemetry.trainer_since,
            drops=dict(telemetry.drops),
            elapsed_s=times.elapsed,
            trainer_idle_s=times.wait,
            sampler_idle_s=times.sampler_idle,
            overlap_s=times.overlap,
            worst_lag_s=self._worst_lag,
            source_exhausted=producer.source.is_exhausted,
        )

    # -- waiting -------------------------------------------------------------------------------------

    async def wait_for_chunk(self, batch: RolloutBatch[Any]) -> None:
        """Return when the batch has a chunk to take, or is whole; called by the batch."""
        self._require_open()
        await self._until(lambda: batch.is_ready, "waiting for a chunk")

    def taken(self, chunk: tuple[RolloutGroup[Any], ...]) -> None:
        """A chunk was taken; called by the batch."""
        self._producer.progress()
        now = self._producer.last_progress
        self._queued_s += [now - self._producer.ready[group.row_index].since for group in chunk]

    async def _until(self, condition: Callable[[], bool], state: TrainerState) -> None:
        """Wait, as the trainer, until it holds, or raise what makes that impossible."""
        producer, telemetry = self._producer, self._producer.telemetry
        before = telemetry.trainer
        telemetry.trainer_is(anyio.current_time(), state)
        self._waits = True
        try:
            while producer.failure is None and not condition():
                await producer.bell.wait()
            if producer.failure is not None:
                raise producer.failure
            before = "training"
        finally:
            self._waits = False
            telemetry.trainer_is(anyio.current_time(), before)

    def _require_open(self) -> None:
        if not self._is_open:
            raise ClosedError(
                "the scheduler is not open: use it as `async with AsyncRolloutScheduler(...) as scheduler:`"
            )

    # -- the watchdog --------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Measure how late the event loop is, and report when nothing has moved for too long."""
        limit, reported_at = self._settings.stall_timeout, -math.inf
        while True:
            due = anyio.current_time() + _LOOK_S
            await anyio.sleep(_LOOK_S)
            now = anyio.current_time()
            self._worst_lag = max(self._worst_lag, now - due)
            if limit is None or self._producer.is_finished:
                continue
            if now - max(self._producer.last_progress, reported_at) < limit:
                continue
            reported_at = now
            self._report(now - self._producer.last_progress)

    def _report(self, stalled_s: float) -> None:
        producer = self._producer
        asked = producer.source.asked_at
        source_s = None if asked is None else anyio.current_time() - asked
        report = StallReport(
            stalled_s, self.statistics(), producer.running(), source_s, waiting_at(self._trainer), dump_tasks()
        )
        if self._on_stall is not None:
            try:
                self._on_stall(report)
            except Exception as error:
                self._end(error)
            return
        self._end(RolloutStalledError(str(report), tasks=report.tasks))

    def _end(self, error: Exception) -> None:
        """End the run, also while the caller is elsewhere."""
        logger.error("the run is ended: %s", error)
        self._producer.fail(error)
        if not self._waits:
            self._body.cancel()


def _group_advantages(rewards: Sequence[float]) -> list[float]:
    return group_advantages(rewards).tolist()
