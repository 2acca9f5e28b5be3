"""Reinforcement learning that samples and trains at the same time.

Rollouts run all the while: during forward passes of the reference, during each chunk of the gradient, and while new
weights travel to the samplers. How far they may run ahead is bounded: nothing is trained on that is more than
`max_head_offpolicy_versions` versions older than the weights that learn. What is older than these is corrected by the
logprobs of the very weights that sampled it (see `fwasync.losses`).

The publication of a step's weights is the commit: with it the step's rows are done for good, and there is room to
sample further ahead.

Invariants
    * Each row of a pass ends as kept, filtered or failed, once; also in a run that is killed and started again.
    * No token is staler than the bound, and the oldest version that it can be of is known.
    * However a run ends, it says why, and from where it can go on.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import anyio
import anyio.to_thread

from fwasync import AsyncRewardPool, AsyncRolloutScheduler
from fwasync.checkpoints.ledger import CheckpointEntry
from fwasync.checkpoints.saving import PendingCheckpoint
from fwasync.data.chat import ChatTokenizer
from fwasync.data.prompts import PromptRow
from fwasync.errors import FwasyncError, RolloutStalledError, UsageError
from fwasync.recipes.async_config import Config
from fwasync.recipes.batches import Batches
from fwasync.recipes.callbacks import StepCallback, called, judged
from fwasync.recipes.collecting import Collected, RowCounts
from fwasync.recipes.groups import PromptGroup, RewardFn, TakenRow, is_async
from fwasync.recipes.meanwhile import meanwhile
from fwasync.recipes.named import describe_named, load_reward, load_rollout
from fwasync.recipes.optimizer import adam_params
from fwasync.recipes.policy_session import (
    PolicySession,
    Result,
    SampledEvalFn,
    dry_policy_run,
    open_session,
    recorded_policy_run,
)
from fwasync.recipes.policy_update import Passes, rollout_batch
from fwasync.recipes.recovery import TrainerLostError, is_gone
from fwasync.recipes.rollout_metrics import rollout_metrics, write_trajectories
from fwasync.recipes.rollouts import FittingRollout, PromptRollout, SingleTurn, answered
from fwasync.recipes.runner import Runner
from fwasync.recipes.stopping import StopRequest
from fwasync.recipes.trainers import Where
from fwasync.rollout.batch import RolloutBatch
from fwasync.rollout.cursor import RolloutState
from fwasync.rollout.trajectory import RolloutGroup, rewards_differ
from fwasync.rollout.watchdog import StallReport
from fwasync.tracking.run import Run

__all__ = ("PHASE", "Config", "Result", "dry_run", "train")

logger = logging.getLogger(__name__)

PHASE = "async_rl"

_ROLLOUTS = "rollouts"
_LOOK_S = 0.25
_RESCUE_S = 600.0

Keep = Callable[[RolloutGroup[TakenRow]], bool]


async def train(
    config: Config,
    *,
    reward: RewardFn | None = None,
    rollout: PromptRollout | None = None,
    where: Where | None = None,
    run: Run | None = None,
    rows: Sequence[PromptRow] | None = None,
    keep: Keep = rewards_differ,
    stop: StopRequest | None = None,
    on_step: StepCallback | None = None,
    evaluate: SampledEvalFn | None = None,
) -> Result:
    """Reinforce what is rewarded; go on where the run in `config.log_path` was interrupted, if it was.

    Args:
        config: What to do.
        reward: `reward(text, row) -> float`, sync or async: then a rollout is one answer to the prompt.
        rollout: Or: `async def rollout(prompt, ctx) -> Rollout | None`, which may take turns and rewards itself.
            Without either, the configuration names one.
        where: Where; by default on the service that the environment names.
        run: Where to log; by default in `config.log_path`. The recipe's page in the documentation lists the metrics.
        rows: The rows of `config.dataset`, if they were read already.
        keep: Which groups are trained on; the others are dropped, and further rows take their places.
        stop: If it is asked, the run finishes the step in hand, saves a checkpoint and returns.
        on_step: Called after each step.
        evaluate: Called before the first step, every `config.evaluation_interval` steps, and after the last. Nothing is
            published meanwhile.

    Raises:
        UsageError: The configuration or the data cannot be trained on; nothing was. Or a function that it names raised.
        DatasetError: No group was kept: nothing was trained.
        CircuitBreakerTrippedError: Too many rollouts failed.
        RolloutStalledError: Nothing moved for `config.stall_timeout`, and `config.on_stall` is "stop".
        FwasyncError: What the service's operations raise.
        Exception: What the user's functions raise. A note of each says from where the run can go on.

    **Cancellation:** the run keeps what was logged; checkpoints that were listed stay. All rollouts end.
    """
    config.check()
    reward, rollout = await _of_the_user(config, reward, rollout)
    where, stop = where or Where(), StopRequest() if stop is None else stop
    restarts = config.trainer_restarts if where.service is None and where.trainers is None else 0
    async with recorded_policy_run(config, run) as (run, runner), _in_processes(config, reward) as reward:
        while True:
            try:
                async with open_session(config, PHASE, where, run, rows) as session:
                    own = rollout or _single_turn(config, reward, session)
                    training = _Training(config, session, run, runner, own, keep, on_step, evaluate)
                    result = await training.go(stop)
                    await session.checkpoints.end(result.checkpoint, runner, stopped=result.stopped)
                return result
            except TrainerLostError as lost:
                if not restarts or lost.checkpoint is None or stop.requested:
                    for note in getattr(lost, "__notes__", ()):  # of what could not be removed
                        lost.error.add_note(note)
                    raise lost.error from lost.error.__cause__
                restarts -= 1
                told = f"the trainer is lost ({lost.error}); going on from {lost.checkpoint.state_path}"
                logger.warning("%s", told)
                run.message(told)


async def dry_run(config: Config, *, tokenizer: ChatTokenizer | None, max_seq_len: int | None) -> list[str]:
    """Import the reward or rollout, and check the prompts as `dry_policy_run` does; nothing is started."""
    config.check()
    reward, rollout = await _of_the_user(config)
    found = await dry_policy_run(config, tokenizer=tokenizer, max_seq_len=max_seq_len)
    return [describe_named(reward or rollout), *found]


async def _of_the_user(
    config: Config, reward: RewardFn | None = None, rollout: PromptRollout | None = None
) -> tuple[RewardFn | None, PromptRollout | None]:
    """The reward or the rollout, whichever there is."""
    if reward is None and rollout is None:
        reward = await load_reward(config.reward) if config.reward else None
        rollout = await load_rollout(config.rollout) if config.rollout else None
    if (reward is None) == (rollout is None):
        raise UsageError(
            "give async_rl either a reward, or a rollout of your own that rewards itself: one argument, or one of the "
            "settings reward and rollout as module:function or file.py:function"
        )
    return reward, rollout


@asynccontextmanager
async def _in_processes(config: Config, reward: RewardFn | None) -> AsyncGenerator[RewardFn | None]:
    if reward is None or not config.reward_processes:
        yield reward
        return
    if is_async(reward):
        raise UsageError("reward_processes is for rewards that are plain functions; set it to 0 for an async one")
    async with AsyncRewardPool(config.reward_processes, timeout=config.reward_timeout) as pool:

        async def judged(text: str, row: PromptRow) -> float:
            return await pool.run(reward, text, row)  # pyright: ignore[reportReturnType]  # it is not async there

        yield judged


def _single_turn(config: Config, reward: RewardFn | None, session: PolicySession) -> SingleTurn:
    assert reward is not None, "it is that or a rollout"
    return SingleTurn(reward, config.max_completion_tokens, session.max_seq_len, config.temperature)


# -- the steps ---------------------------------------------------------------------------------------


@dataclass
class _Training:
    """The loop: take what is sampled, train on it, publish."""

    config: Config
    session: PolicySession
    run: Run
    runner: Runner
    rollout: PromptRollout
    keep: Keep
    on_step: StepCallback | None
    evaluate: SampledEvalFn | None
    total: int = 0
    number: int = 0
    is_between_steps: bool = True
    is_over: bool = False
    checkpoint: CheckpointEntry | None = None
    saving: PendingCheckpoint | None = None
    filtered: list[PromptGroup] = field(default_factory=list[PromptGroup])
    state: RolloutState = field(default_factory=RolloutState)
    cursors: array[int] = field(default_factory=lambda: array("q", [0]))
    waiting: anyio.CancelScope = field(default_factory=anyio.CancelScope)

    async def go(self, stop: StopRequest) -> Result:
        config, session = self.config, self.session
        start = session.start
        self.number, self.checkpoint = (start.step, start.entry) if start else (0, None)
        began, self.state = self.number, _state(self.checkpoint)
        order, self.total = session.plan()
        self.run.begin(PHASE, self.total)
        self.runner.begin(self.number, self.total)
        scheduler = AsyncRolloutScheduler(
            self._rows(order),
            FittingRollout(self.rollout, session.max_seq_len),
            config.rollouts(),
            sampler=nullcontext(session.served),
            tokenizer=session.tokenizer,
            keep=self._is_kept,
            concurrency=session.served.concurrency if config.concurrency.mode else None,
            state=self.state,
            on_stall=self._stalled,
        )
        self.is_over = self.number >= self.total
        try:
            if not self.is_over:
                await self._sample_and_train(scheduler, stop)
        except Exception as error:
            await self._say_how_to_go_on(error)
            raise
        rows = RowCounts(self.state.kept, self.state.filtered, self.state.failed)
        stopped = None if self.is_over else stop.reason
        result = Result(self.number, self.total, self.checkpoint, rows, stopped, session.trainers.job_id)
        return await session.conclude(self.run, result, self._consumed(), began=began, more=self._marks())

    async def _sample_and_train(self, scheduler: AsyncRolloutScheduler[TakenRow], stop: StopRequest) -> None:
        served = self.session.served
        is_new = not self.number and not any(record.phase == PHASE for record in self.run.records)
        await served.publish(self.number)
        if self.evaluate is not None and is_new:
            self.run.log(PHASE, 0, await judged(self.evaluate(0, served)))
        async with scheduler, meanwhile(self._look, scheduler, stop):
            while not self.is_over and not stop.requested:
                batch = None
                with anyio.CancelScope() as self.waiting:  # a stop need not wait for what is sampled
                    batch = await anext(scheduler, None)
                    self.is_over = batch is None
                if batch is not None:
                    await self._step(self.number + 1, batch, scheduler)
                elif self.is_over:
                    self.state = scheduler.state()  # with the rows that were dropped behind the last step

    async def _step(
        self, number: int, batch: RolloutBatch[TakenRow], scheduler: AsyncRolloutScheduler[TakenRow]
    ) -> None:
        config, session = self.config, self.session
        client, served, timeout = session.trainers.policy, session.served, config.step_timeout_s
        learning_rate = config.lr_scheduler.rate(config.learning_rate, number, self.total)
        adam = adam_params(config.adam, learning_rate, grad_clip_norm=config.grad_clip_norm)
        passes = Passes()
        async for chunk in batch:
            groups = sorted(chunk, key=lambda group: group.row_index)
            part = await anyio.to_thread.run_sync(rollout_batch, groups, batch.version)
            passes.add(part, await session.update.submit(part))
        self.is_between_steps = False
        optim_step = client.optim_step(adam, config.grad_accumulation_normalization, timeout=timeout)
        remote = await passes.metrics(optim_step)
        unserved: FwasyncError | None = None
        syncing = anyio.current_time()
        try:
            await served.publish(number)
        except FwasyncError as error:  # the step is done nevertheless, and is counted
            unserved = error
        sync_s = anyio.current_time() - syncing
        told = await scheduler.publish(batch)
        self.number, self.is_between_steps = number, True
        now = scheduler.statistics()
        is_last = now.source_exhausted and not now.account.in_flight + now.account.waiting
        self.is_over = number >= self.total or is_last
        before, self.state, self.filtered, filtered = self.state, scheduler.state(), [], self.filtered
        consumed, marks = self._consumed(), self._marks()
        self.saving = session.checkpoints.submit(number, consumed, last=self.is_over, more=marks)
        if self.saving is None and unserved is not None:
            self.saving = session.checkpoints.save(number, consumed, more=marks)
        kept = [answered(group) for group in sorted(batch.groups, key=lambda group: group.row_index)]
        metrics: dict[str, float] = {
            **told,
            **rollout_metrics(Collected(kept, filtered, [], 0), step=batch.version),
            **remote,
            "rollout/sample_fails": self.state.failed - before.failed,
            "rollout/in_flight": told["async/in_flight_samples_mean"],
            "train/lr": learning_rate,
            "train/data_consumed": consumed,
            **session.concurrency_metrics(),
            "perf/ref_forward_time": passes.reference_s,
            "perf/weight_sync_time": sync_s,
            "perf/train_tokens_per_s": passes.targets / max(told["perf/train_time"], 1e-9),
        }
        try:
            if self.evaluate is not None and (self.is_over or number % config.evaluation_interval == 0):
                metrics |= {} if unserved else await judged(self.evaluate(number, served))
            if config.trajectory_dir is not None:
                await anyio.to_thread.run_sync(write_trajectories, config.trajectory_dir, number, kept)
        finally:
            self.run.log(PHASE, number, metrics)
        if self.saving is not None:
            await self._finish(self.saving)
        if unserved is not None:
            raise unserved
        await self.runner.step(number, metrics, tokens=passes.targets)
        if self.on_step is not None:
            await called(self.on_step(number, metrics))

    async def _finish(self, pending: PendingCheckpoint) -> None:
        try:
            self.checkpoint = await self.session.checkpoints.finish(pending)
        except FwasyncError:
            self.saving = None  # it may be tried anew
            raise
        self.saving = None

    # -- rows ----------------------------------------------------------------------------------------

    def _rows(self, order: Batches) -> Iterator[TakenRow]:
        """All rows from the beginning: the scheduler passes by those that are done."""
        for prompt in self.session.prompts.taken(order):
            self.cursors.append(prompt.cursor)
            yield prompt

    def _consumed(self) -> int:
        """Rows of the file that are done without a gap; the state knows those beyond."""
        if self.state.position < len(self.cursors):
            return self.cursors[self.state.position]
        return self.session.start.data_consumed if self.session.start else 0  # nothing was asked for yet

    def _marks(self) -> Mapping[str, Any]:
        return {_ROLLOUTS: self.state.as_dict()}

    def _is_kept(self, group: RolloutGroup[TakenRow]) -> bool:
        kept = self.keep(group)
        if not kept:
            self.filtered.append(answered(group))
        return kept

    # -- meanwhile, and in the end -------------------------------------------------------------------

    async def _look(self, scheduler: AsyncRolloutScheduler[TakenRow], stop: StopRequest) -> None:
        while True:
            now = scheduler.statistics()
            self.run.gauge("rollout/in_flight", now.in_flight)
            self.run.gauge("rollout/groups_ready", now.account.waiting)
            if stop.requested:
                self.waiting.cancel()
            await anyio.sleep(_LOOK_S)

    def _stalled(self, report: StallReport) -> None:
        told = "\n  ".join([str(report), *self.session.trainers.unfinished()])
        if self.config.on_stall == "stop":
            raise RolloutStalledError(told, tasks=report.tasks)
        logger.warning("%s\n%s", told, report.tasks)
        self.run.message(told)

    async def _say_how_to_go_on(self, error: Exception) -> None:
        """Save what is not saved, if the trainer is there, and add to the error from where the run can go on.

        Raises:
            TrainerLostError: It is not there.
        """
        checkpoints, saved = self.session.checkpoints, self.checkpoint
        lost = await is_gone(self.session.trainers.policy, error)
        if not lost and self.is_between_steps and self.number > (saved.step if saved else 0):
            try:
                with anyio.fail_after(min(self.config.weight_sync.dcp_timeout, _RESCUE_S)):
                    pending = self.saving or checkpoints.save(self.number, self._consumed(), more=self._marks())
                    await self._finish(pending)
            except (FwasyncError, TimeoutError) as why:
                error.add_note(f"step {self.number} could not be saved: {why or type(why).__name__}")
        if self.checkpoint is None:
            error.add_note("no checkpoint was saved, so the run cannot go on: see dcp_save_interval")
        else:
            at = f"step {self.checkpoint.step} ({self.checkpoint.state_path})"
            error.add_note(f"the run can go on from {at}: start it again with the same log_path")
        if lost:
            raise TrainerLostError(error, self.checkpoint)


def _state(entry: CheckpointEntry | None) -> RolloutState:
    if entry is None:
        return RolloutState()
    if _ROLLOUTS not in entry.extra:
        raise UsageError(
            f"checkpoint {entry.name} was not saved by async RL, so it is not known which rows are done. Give another "
            f"log_path, and {entry.state_path} as init_from_checkpoint."
        )
    return RolloutState.from_dict(entry.extra[_ROLLOUTS])
