"""The loop of the recipes that train on the rows of a file: `open_loop` prepares it, `Loop.go` trains.

Steps are pipelined: `pipeline_depth` of them are submitted before the results of the first are awaited, so that the
trainer never waits for the network or for us. Checkpoints and evaluations take their places in that order. A recipe
says by a function what a step is.

Invariants
    * A run that is killed at any moment and started again takes the steps that it would have taken.
    * Every row of the file is trained on once in each pass, or told to be left out.
    * What can be found wrong is found before anything is brought up that costs money.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import anyio
import anyio.to_thread
from pydantic import Field

from fwasync import APIFuture
from fwasync.checkpoints.ledger import CheckpointEntry
from fwasync.checkpoints.resume import ResumeInfo
from fwasync.checkpoints.saving import CheckpointKind, PendingCheckpoint
from fwasync.config import DeployConfig
from fwasync.config.base import ResourceId
from fwasync.data.chat import ChatTokenizer
from fwasync.errors import FwasyncError, UsageError
from fwasync.losses import Reduction, check_normalization
from fwasync.recipes.batches import Batch
from fwasync.recipes.callbacks import EvalFn, StepCallback, called, judged
from fwasync.recipes.config import RecipeConfig
from fwasync.recipes.optimizer import adam_params, remote_metrics
from fwasync.recipes.plan import Plan
from fwasync.recipes.recording import recording
from fwasync.recipes.rows import Item, TrainingRows
from fwasync.recipes.runner import Runner
from fwasync.recipes.saving import DATA_KEY, Checkpoints, find_start
from fwasync.recipes.stopping import StopRequest
from fwasync.recipes.syncing import WeightSync
from fwasync.recipes.trainers import Trainers, Where
from fwasync.tracking.run import Run

if TYPE_CHECKING:
    from fwasync.types import ForwardBackwardOutput, OptimStepResponse

__all__ = (
    "Evaluation",
    "Hooks",
    "Loop",
    "LoopConfig",
    "Result",
    "Submit",
    "SubmitEvaluation",
    "Submitted",
    "open_loop",
)

C = TypeVar("C", bound="LoopConfig")
R = TypeVar("R", bound=Item)


class LoopConfig(RecipeConfig):
    """What the configurations of these recipes have in common."""

    reduction: ClassVar[Reduction]
    """What the recipe's loss is of its terms."""

    not_taken: ClassVar[Mapping[str, str]] = {
        "grad_accum": "the cookbook ignores it, so that runs with it would be others here; raise batch_size instead",
    }

    renderer_name: str = Field(
        default="", description="Another renderer, as module:attribute. Empty: the tokenizer's own chat template."
    )
    job_id: ResourceId | None = Field(
        default=None,
        description="The trainer job. One that is there is used and left in place; else it is made under this id, and "
        "removed in the end.",
    )
    pipeline_depth: int = Field(default=4, ge=1, description="Steps that are submitted at a time.")
    grad_accumulation_normalization: str | None = Field(
        default=None,
        description="What the trainer divides the gradient by. Unset: nothing, as the loss is normalised here.",
    )

    @property
    def jobs(self) -> tuple[str | None, str | None]:
        """The trainer jobs to use that may be there already."""
        return self.job_id, None

    def problems(self) -> list[str]:
        """What keeps the run from being started, as sentences."""
        found = super().problems()
        if self.infra.training_shape_id is not None and not self.tokenizer_model:
            found.append(
                "tokenizer_model is empty; name it, so that the data are checked before a trainer costs money."
            )
        try:
            check_normalization(self.reduction, self.grad_accumulation_normalization)
        except UsageError as error:
            found.append(f"{error}.")
        return found


@dataclass(frozen=True, slots=True)
class Result(Generic[R]):
    """How a run ended.

    Attributes:
        steps: The optimizer steps that are done, those of earlier processes among them.
        total_steps: The steps of the whole run.
        checkpoint: The last one that was saved; `None` if there is none.
        rows: The rows that it had, with an account of those that were left out.
        stopped: Why it was stopped before its end; `None` if it was not.
        job_id: The trainer job, where there was one.
    """

    steps: int
    total_steps: int
    checkpoint: CheckpointEntry | None
    rows: TrainingRows[R]
    stopped: str | None = None
    job_id: str | None = None


Evaluation = Callable[[], Awaitable[Mapping[str, float]]]
"""Waits for an evaluation that was submitted; its metrics."""


@dataclass(frozen=True, slots=True)
class Submitted:
    """The forward and backward pass of a step, submitted.

    Attributes:
        future: Its result.
        tokens: How many tokens are predicted in it.
        metrics: The recipe's own metrics of the result, beside what the trainer tells.
    """

    future: APIFuture[ForwardBackwardOutput]
    tokens: int
    metrics: Callable[[ForwardBackwardOutput], Mapping[str, float]]


Submit = Callable[[Batch], Awaitable[Submitted]]
"""Submits the forward and backward pass of a batch."""

SubmitEvaluation = Callable[[], Awaitable[Evaluation]]
"""Submits what is evaluated at the end of a pass."""


@dataclass(frozen=True, slots=True)
class Hooks:
    """What a caller of a recipe has given; see the recipes' `train`."""

    where: Where | None = None
    run: Run | None = None
    stop: StopRequest | None = None
    on_step: StepCallback | None = None
    evaluate: EvalFn | None = None


@asynccontextmanager
async def open_loop(
    config: C,
    phase: str,
    load: Callable[[C, ChatTokenizer], Awaitable[list[TrainingRows[R]]]],
    limit: Callable[[C, list[TrainingRows[R]], int], list[TrainingRows[R]]],
    hooks: Hooks,
    *,
    reference: bool = False,
    deploy: DeployConfig | None = None,
) -> AsyncGenerator[Loop[R]]:
    """Check the configuration, read the rows, find out where the run goes on, and bring up what it needs.

    Args:
        config: The recipe's configuration.
        phase: The recipe's name in what is logged.
        load: Reads the files: first the rows to train on.
        limit: Leaves out what has more tokens than the trainer takes; called in a worker thread.
        hooks: What the caller gave.
        reference: Whether a frozen reference is needed, for a part of the run.
        deploy: The deployment that gets the weights, if one does.

    Raises:
        UsageError: The configuration or the data cannot be trained on.
        FwasyncError: What the service's operations raise.

    **Cancellation:** what was created is removed.
    """
    config.check()
    where = Where() if hooks.where is None else hooks.where

    async def loaded(tokenizer_name: str) -> list[TrainingRows[R]]:
        return await load(config, await anyio.to_thread.run_sync(ChatTokenizer.load, tokenizer_name))

    async with recording(config, hooks.run) as (run, runner):
        data = await loaded(config.tokenizer_model) if config.tokenizer_model else None
        start = await find_start(config, where, run, phase)
        path = start.path if start else None
        async with where.open(
            config, start=path, reference=reference, early_release=True, deploy=deploy, tell=run.message
        ) as trainers:
            data = data or await loaded(await trainers.tokenizer_name(config))
            rows, *others = await anyio.to_thread.run_sync(limit, config, data, await trainers.max_seq_len(config))
            if rows.dropped:
                run.message(rows.describe_dropped())
            checkpoints = Checkpoints(
                config, trainers, run, {DATA_KEY: rows.digest()}, timeout=config.checkpoint_timeout_s
            )
            await checkpoints.go_on(start, where, phase)
            plan = Plan.of(config, rows.usable, start)
            yield Loop(config, phase, hooks, run, runner, trainers, rows, others, start, plan, checkpoints)


@dataclass(frozen=True, slots=True)
class Loop(Generic[R]):
    """A run that is ready to train. Made by `open_loop`.

    Attributes:
        config: The recipe's configuration.
        phase: Its name in what is logged.
        hooks: What the caller gave.
        run: Where it is logged.
        runner: The files of the program that started it.
        trainers: What trains.
        rows: The rows to train on.
        others: The rows of further files, in order.
        start: Where it goes on; `None` is from the beginning.
        plan: The steps that are left.
        checkpoints: Saves them.
    """

    config: LoopConfig
    phase: str
    hooks: Hooks
    run: Run
    runner: Runner
    trainers: Trainers
    rows: TrainingRows[R]
    others: list[TrainingRows[R]]
    start: ResumeInfo | None
    plan: Plan
    checkpoints: Checkpoints

    async def go(
        self, submit: Submit, *, submit_evaluation: SubmitEvaluation | None = None, sync: WeightSync | None = None
    ) -> Result[R]:
        """Train to the end, or until a stop is asked for; then save, and promote what is to be promoted.

        Args:
            submit: What a step is.
            submit_evaluation: What is evaluated at the end of each pass, beside what the caller judges.
            sync: Brings the weights into a deployment, if they are to be there.

        Raises:
            FwasyncError: What the service's operations raise.

        **Cancellation:** the run keeps what was logged; checkpoints that were listed stay.
        """
        training = _Training(self, submit, submit_evaluation, sync, self.start.entry if self.start else None)
        steps, stopped = await training.go(StopRequest() if self.hooks.stop is None else self.hooks.stop)
        if stopped is not None:
            told = f"{stopped}: step {steps} of {self.plan.total} is done. The same log_path goes on from there."
            self.run.message(told)
        await self.checkpoints.end(training.checkpoint, self.runner, stopped=stopped)
        return Result(steps, self.plan.total, training.checkpoint, self.rows, stopped, self.trainers.job_id)


@dataclass(frozen=True, slots=True)
class _Step:
    """A step in flight."""

    number: int
    batch: Batch
    learning_rate: float
    submitted: Submitted
    optim_step: APIFuture[OptimStepResponse]
    saving: PendingCheckpoint | None
    evaluation: Evaluation | None


@dataclass
class _Training:
    """The steps of a loop: submitted, and finished in the same order."""

    loop: Loop[Any]
    submit: Submit
    submit_evaluation: SubmitEvaluation | None
    sync: WeightSync | None
    checkpoint: CheckpointEntry | None
    last_time: float = 0.0

    async def go(self, stop: StopRequest) -> tuple[int, str | None]:
        """Train; the steps that are done, and why it was stopped before the end, if it was."""
        loop, config = self.loop, self.loop.config
        number, consumed, total = loop.plan.step, loop.plan.consumed, loop.plan.total
        loop.run.begin(loop.phase, total)
        loop.runner.begin(number, total)
        if self.sync is not None:
            await self.sync.begin(number)
            if number >= total and self.sync.is_due(number, last=True):  # an earlier process may not have come to it
                await self.sync.sync(number, last=True)
        self.last_time = anyio.current_time()
        in_flight: deque[_Step] = deque()
        is_saved = True
        for batch in loop.plan.batches():
            if stop.requested:
                break
            number, consumed = number + 1, batch.consumed
            step = await self._submitted(number, batch)
            in_flight.append(step)
            is_saved = step.saving is not None
            depth = 1 if self._settles(step) else config.pipeline_depth
            while len(in_flight) >= depth:
                await self._finish(in_flight.popleft())
        stopped = stop.reason if number < total else None
        pending = None
        if stopped is not None and not is_saved:
            pending = loop.checkpoints.save(number, consumed)
        elif stopped is None and number == loop.plan.step and config.save_final_checkpoint and not self._has_snapshot():
            pending = loop.checkpoints.save(number, consumed, CheckpointKind.BOTH)
        while in_flight:
            await self._finish(in_flight.popleft())
        if pending is not None:
            self.checkpoint = await loop.checkpoints.finish(pending)
        return number, stopped

    def _has_snapshot(self) -> bool:
        return self.checkpoint is not None and self.checkpoint.sampler_path is not None

    def _ends_pass(self, number: int, batch: Batch) -> bool:
        return batch.ends_epoch or number == self.loop.plan.total

    def _is_synced(self, number: int) -> bool:
        return self.sync is not None and self.sync.is_due(number, last=number == self.loop.plan.total)

    def _settles(self, step: _Step) -> bool:
        """Whether somebody has to see the weights of this step before the next one is submitted."""
        judged = self.loop.hooks.evaluate is not None and self._ends_pass(step.number, step.batch)
        return judged or self._is_synced(step.number)

    async def _submitted(self, number: int, batch: Batch) -> _Step:
        config, total = self.loop.config, self.loop.plan.total
        learning_rate = config.lr_scheduler.rate(config.learning_rate, number, total)
        adam = adam_params(config.adam, learning_rate, grad_clip_norm=config.grad_clip_norm)
        submitted = await self.submit(batch)
        optim_step = self.loop.trainers.policy.optim_step(
            adam, config.grad_accumulation_normalization, timeout=config.step_timeout_s
        )
        saving = self.loop.checkpoints.submit(number, batch.consumed, last=number == total)
        evaluation = None
        if self.submit_evaluation is not None and self._ends_pass(number, batch):
            evaluation = await self.submit_evaluation()
        return _Step(number, batch, learning_rate, submitted, optim_step, saving, evaluation)

    async def _finish(self, step: _Step) -> None:
        loop, tokens = self.loop, step.submitted.tokens
        output, update = await step.submitted.future, await step.optim_step
        now = anyio.current_time()
        seconds, self.last_time = max(now - self.last_time, 1e-9), now
        metrics = {
            **remote_metrics(output, update),
            **step.submitted.metrics(output),
            "train/step_tokens": tokens,
            "train/lr": step.learning_rate,
            "train/epoch": step.batch.epoch,
            "train/step_time_sec": seconds,
            "train/tokens_per_sec": tokens / seconds,
        }
        failure: Exception | None = None
        try:
            metrics |= await self._evaluated(step)
            if self.sync is not None and self._is_synced(step.number):
                metrics |= await self.sync.sync(step.number, last=step.number == loop.plan.total)
        except Exception as error:  # the step is done nevertheless: it is logged, and its checkpoint is listed
            failure = error
        loop.run.log(loop.phase, step.number, metrics)
        if step.saving is not None:
            self.checkpoint = await loop.checkpoints.finish(step.saving)
        if failure is not None:
            raise failure
        await loop.runner.step(step.number, metrics, tokens=tokens)
        if loop.hooks.on_step is not None:
            await called(loop.hooks.on_step(step.number, metrics))

    async def _evaluated(self, step: _Step) -> dict[str, float]:
        """The evaluation at the end of a pass. The recipe's own may fail, and is told then."""
        loop = self.loop
        metrics: dict[str, float] = {}
        if step.evaluation is not None:
            try:
                metrics |= await step.evaluation()
            except FwasyncError as error:
                loop.run.message(f"step {step.number} could not be evaluated: {error}")
        if loop.hooks.evaluate is not None and self._ends_pass(step.number, step.batch):
            metrics |= await judged(loop.hooks.evaluate(step.number, loop.trainers.policy))
        return metrics
