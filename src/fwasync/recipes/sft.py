"""Supervised fine-tuning on chats: what the assistant says is what is learnt.

The loss of a step is the mean over its trained tokens: weights are divided by their sum before they are sent, because
trainers sum. So the optimizer is asked for no normalization (`grad_accumulation_normalization` is `None`), and the
gradient's scale is the same for every batch.

Steps are pipelined: `pipeline_depth` of them are submitted before the results of the first are awaited, so that the
trainer never waits for the network or for us. Checkpoints and evaluations take their places in that order.

Invariants
    * A run that is killed at any moment and started again takes the steps that it would have taken.
    * Every row of the file is trained on once in each pass, or told to be left out.
"""

from __future__ import annotations

import math
import sys
from collections import deque
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Annotated

import anyio
import anyio.to_thread
import numpy as np
from pydantic import BeforeValidator, Field

from fwasync import APIFuture
from fwasync.checkpoints.ledger import CheckpointEntry
from fwasync.checkpoints.resume import ResumeInfo
from fwasync.checkpoints.saving import CheckpointKind, PendingCheckpoint
from fwasync.config import WandBConfig
from fwasync.data.chat import ChatTokenizer
from fwasync.data.jsonl import read_chats
from fwasync.data.rendering import TrainOnWhat
from fwasync.data.supervised import Row, mean_loss, supervised_batch
from fwasync.errors import FwasyncError
from fwasync.recipes.batches import Batch, Batches, carve_out
from fwasync.recipes.callbacks import EvalFn, StepCallback, called
from fwasync.recipes.config import RecipeConfig
from fwasync.recipes.optimizer import adam_params, remote_metrics
from fwasync.recipes.rows import TrainingRows, load_rows
from fwasync.recipes.runner import Runner
from fwasync.recipes.saving import DATA_KEY, Checkpoints, find_start
from fwasync.recipes.stopping import StopRequest
from fwasync.recipes.trainers import Trainers, Where
from fwasync.tracking.run import Run, open_run

if TYPE_CHECKING:
    from fwasync.types import ForwardBackwardOutput, OptimStepResponse

__all__ = ("PHASE", "Config", "Result", "dry_run", "train")

PHASE = "sft"

_LARGEST_EXPONENT = 700.0


def _train_on_what(given: object) -> object:
    return TrainOnWhat.parse(given) if isinstance(given, str) else given


class Config(RecipeConfig):
    """What determines a run."""

    epochs: int = Field(default=3, ge=1, description="Passes over the rows.")
    renderer_name: str = Field(
        default="", description="Another renderer, as module:attribute. Empty: the tokenizer's own chat template."
    )
    train_on_what: Annotated[TrainOnWhat, BeforeValidator(_train_on_what)] = Field(
        default=TrainOnWhat.ALL_ASSISTANT_MESSAGES, description="Which messages are learnt."
    )
    max_examples: int | None = Field(default=None, ge=1, description="Only so many rows of the file are read.")
    pipeline_depth: int = Field(default=4, ge=1, description="Steps that are submitted at a time.")
    evaluation_dataset: str = Field(
        default="", description="A JSONL file on which the loss is measured after each pass."
    )
    eval_auto_carveout: bool = Field(default=False, description="Or: keep a part of the rows for that.")
    eval_carve_ratio: float = Field(default=0.1, gt=0, lt=1, description="That part.")
    max_eval_seqs: int = Field(default=100, ge=1, description="The most rows that are kept for that.")
    wandb: WandBConfig = Field(default=WandBConfig(project="sft-tinker"), description="Weights & Biases.")

    def problems(self) -> list[str]:
        """What keeps the run from being started, as sentences."""
        found = super().problems()
        if self.infra.training_shape_id is not None and not self.tokenizer_model:
            found.append(
                "tokenizer_model is empty; name it, so that the data are checked before a trainer costs money."
            )
        if self.evaluation_dataset and self.eval_auto_carveout:
            found.append("give either evaluation_dataset or eval_auto_carveout, not both.")
        return found


@dataclass(frozen=True, slots=True)
class Result:
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
    rows: TrainingRows
    stopped: str | None = None
    job_id: str | None = None


async def train(
    config: Config,
    *,
    where: Where | None = None,
    run: Run | None = None,
    stop: StopRequest | None = None,
    on_step: StepCallback | None = None,
    evaluate: EvalFn | None = None,
) -> Result:
    """Fine-tune; go on where the run in `config.log_path` was interrupted, if it was.

    Args:
        config: What to do.
        where: Where; by default on the service that the environment names.
        run: Where to log; by default in `config.log_path`. `train/ce_loss` (nats per trained token) and `train/ppl`,
            `train/step_tokens` (targets) and `train/active_tokens` (those that are trained), `train/lr`,
            `train/epoch`, `train/step_time_sec`, `train/tokens_per_sec`, what the trainer tells as `train/<name>`, and
            `eval/loss`, `eval/ppl`, `eval/tokens` at the end of a pass.
        stop: Looked at between steps; if it is asked, the run saves a checkpoint and returns.
        on_step: Called after each step.
        evaluate: Called at the end of each pass.

    Raises:
        UsageError: The configuration or the data cannot be trained on; nothing was.
        FwasyncError: What the service's operations raise.

    **Cancellation:** the run keeps what was logged; checkpoints that were listed stay.
    """
    config.check()
    where = where or Where()
    async with AsyncExitStack() as stack:
        if run is None:
            settings = config.model_dump()
            run = await stack.enter_async_context(
                open_run(config.log_path, config=settings, wandb=config.wandb, resume=True)
            )
        runner = await stack.enter_async_context(Runner(config.runner, accelerators=config.infra.accelerator_count))
        await runner.pending()
        # What can be found wrong is found before anything is brought up that costs money.
        name = config.tokenizer_model
        data = await _loaded(config, await _tokenizer(name)) if name else None
        start = await find_start(config, where, run, PHASE)
        path = start.path if start else None
        trainers = await stack.enter_async_context(where.open(config, start=path, tell=run.message))
        data = data or await _loaded(config, await _tokenizer(await trainers.tokenizer_name(config)))
        limited = partial(_limited, config, data, await trainers.max_seq_len(config))
        rows, held_out = await anyio.to_thread.run_sync(limited)
        if rows.dropped:
            run.message(rows.describe_dropped())
        checkpoints = Checkpoints(config, trainers, run, {DATA_KEY: rows.digest()})
        checkpoints.check_data(start)
        training = _Training(config, trainers, run, runner, checkpoints, rows, held_out, on_step, evaluate)
        result = await training.go(start, StopRequest() if stop is None else stop)
        if result.stopped is None:
            await checkpoints.promote(result.checkpoint, runner)
            await runner.completed()
        else:
            await runner.stopped(result.stopped)
        return result


async def dry_run(config: Config, *, tokenizer: ChatTokenizer | None, max_seq_len: int | None) -> list[str]:
    """Read and tokenize the rows, and count the steps; nothing is started.

    Args:
        config: What would be done.
        tokenizer: The model's, if it can be had.
        max_seq_len: The model's context length, if it is known.

    Returns:
        What was found, in lines.

    Raises:
        UsageError: The configuration or the data cannot be trained on.

    **Cancellation:** nothing remains.
    """
    config.check()
    limit = config.max_seq_len or max_seq_len
    if tokenizer is None or limit is None:
        chats = await anyio.to_thread.run_sync(read_chats, config.dataset, abandon_on_cancel=True)
        usable = [True] * len(chats[: config.max_examples])
        lines = ["tokens: not known without the model's tokenizer and context length"]
    else:
        rows, _ = _limited(config, await _loaded(config, tokenizer), limit)
        kept, usable = rows.chosen(range(len(rows.rows))), rows.usable
        trained = sum(int(np.count_nonzero(row.weights)) for row in kept)
        lines = [f"tokens: {sum(len(row.tokens) for row in kept):,}, of which {trained:,} are trained on"]
        lines.append(rows.describe_dropped() or f"no row has more than {limit} tokens")
    order = Batches(usable, config.batch_size, epochs=config.epochs, seed=config.seed)
    steps = min(order.steps(), config.max_steps or sys.maxsize)
    passes = next(islice(order.after(), steps - 1, None)).consumed / len(usable)
    final, interval = int(config.save_final_checkpoint), config.dcp_save_interval
    checkpoints = final + ((steps - final) // interval if interval else 0)
    return [
        f"{config.dataset}: {len(usable)} rows",
        *lines,
        f"{steps:,} steps of {config.batch_size} rows: {passes:.2f} passes over the data",
        f"{checkpoints} checkpoint(s)",
    ]


# -- the rows ----------------------------------------------------------------------------------------


async def _tokenizer(name: str) -> ChatTokenizer:
    return await anyio.to_thread.run_sync(ChatTokenizer.load, name)


async def _loaded(config: Config, tokenizer: ChatTokenizer) -> list[TrainingRows]:
    """The rows of the data set, and of that for evaluation if there is one."""
    load = partial(
        load_rows, tokenizer=tokenizer, renderer_name=config.renderer_name, train_on_what=config.train_on_what
    )
    data = [await load(config.dataset, max_examples=config.max_examples)]
    if config.evaluation_dataset:
        data.append(await load(config.evaluation_dataset))
    return data


def _limited(config: Config, data: list[TrainingRows], max_seq_len: int) -> tuple[TrainingRows, list[Row]]:
    """The rows to train on, and those to evaluate on."""
    rows, *others = [part.limited(max_seq_len) for part in data]
    if others:
        return rows, others[0].chosen(range(len(others[0].rows)))
    if not config.eval_auto_carveout:
        return rows, []
    ratio, most = config.eval_carve_ratio, config.max_eval_seqs
    rows, apart = rows.split(carve_out(len(rows.rows), ratio=ratio, most=most, seed=config.seed))
    return rows.limited(max_seq_len), apart.chosen(range(len(apart.rows)))


# -- the steps ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Step:
    """A step in flight."""

    number: int
    batch: Batch
    rows: list[Row]
    learning_rate: float
    forward_backward: APIFuture[ForwardBackwardOutput]
    optim_step: APIFuture[OptimStepResponse]
    evaluation: list[tuple[list[Row], APIFuture[ForwardBackwardOutput]]]
    saving: PendingCheckpoint | None


@dataclass
class _Training:
    """The loop: steps are submitted, and finished in the same order."""

    config: Config
    trainers: Trainers
    run: Run
    runner: Runner
    checkpoints: Checkpoints
    rows: TrainingRows
    held_out: list[Row]
    on_step: StepCallback | None
    evaluate: EvalFn | None
    total: int = 0
    checkpoint: CheckpointEntry | None = None
    last_time: float = 0.0

    async def go(self, start: ResumeInfo | None, stop: StopRequest) -> Result:
        config = self.config
        number, consumed = (start.step, start.data_consumed) if start else (0, 0)
        began, self.checkpoint = number, start.entry if start else None
        order = Batches(self.rows.usable, config.batch_size, epochs=config.epochs, seed=config.seed)
        self.total = min(number + order.steps(consumed), config.max_steps or sys.maxsize)
        self.run.begin(PHASE, self.total)
        self.runner.begin(number, self.total)
        self.last_time = anyio.current_time()
        in_flight: deque[_Step] = deque()
        for batch in order.after(consumed):
            if number >= self.total or stop.requested:
                break
            number, consumed = number + 1, batch.consumed
            in_flight.append(await self._submit(number, batch))
            depth = 1 if self.evaluate is not None and self._is_judged(in_flight[-1]) else config.pipeline_depth
            while len(in_flight) >= depth:
                await self._finish(in_flight.popleft())
        stopped = stop.reason if number < self.total else None
        pending = None
        if stopped is not None and number > began and not (in_flight and in_flight[-1].saving):
            pending = self.checkpoints.save(number, consumed)
        elif stopped is None and number == began and config.save_final_checkpoint and not self._has_snapshot():
            pending = self.checkpoints.save(number, consumed, CheckpointKind.BOTH)
        while in_flight:
            await self._finish(in_flight.popleft())
        if pending is not None:
            self.checkpoint = await self.checkpoints.finish(pending)
        if stopped is not None:
            self.run.message(f"{stopped}: step {number} of {self.total} is done. The same log_path goes on from there.")
        return Result(number, self.total, self.checkpoint, self.rows, stopped, self.trainers.job_id)

    def _has_snapshot(self) -> bool:
        return self.checkpoint is not None and self.checkpoint.sampler_path is not None

    async def _submit(self, number: int, batch: Batch) -> _Step:
        config, client, timeout = self.config, self.trainers.policy, self.config.step_timeout_s
        rows = self.rows.chosen(batch.rows)
        learning_rate = config.lr_scheduler.rate(config.learning_rate, number, self.total)
        adam = adam_params(config.adam, learning_rate, grad_clip_norm=config.grad_clip_norm)
        datums = await anyio.to_thread.run_sync(supervised_batch, rows)
        forward_backward = client.forward_backward(datums, "cross_entropy", timeout=timeout)
        optim_step = client.optim_step(adam, timeout=timeout)
        saving = self.checkpoints.submit(number, batch.consumed, last=number == self.total)
        step = _Step(number, batch, rows, learning_rate, forward_backward, optim_step, [], saving)
        if self._is_judged(step):
            for start in range(0, len(self.held_out), config.batch_size):
                part = self.held_out[start : start + config.batch_size]
                datums = await anyio.to_thread.run_sync(supervised_batch, part)
                step.evaluation.append((part, client.forward(datums, "cross_entropy", timeout=timeout)))
        return step

    def _is_judged(self, step: _Step) -> bool:
        return step.batch.ends_epoch or step.number == self.total

    async def _finish(self, step: _Step) -> None:
        output, update = await step.forward_backward, await step.optim_step
        now = anyio.current_time()
        seconds, self.last_time = max(now - self.last_time, 1e-9), now
        targets = sum(len(row.tokens) - 1 for row in step.rows)
        loss = mean_loss(step.rows, output)
        metrics = {
            **remote_metrics(output, update),
            "train/ce_loss": loss,
            "train/ppl": _ppl(loss),
            "train/step_tokens": targets,
            "train/active_tokens": sum(int(np.count_nonzero(row.weights[1:])) for row in step.rows),
            "train/lr": step.learning_rate,
            "train/epoch": step.batch.epoch,
            "train/step_time_sec": seconds,
            "train/tokens_per_sec": targets / seconds,
            **await self._judged(step),
        }
        self.run.log(PHASE, step.number, metrics)
        if step.saving is not None:
            self.checkpoint = await self.checkpoints.finish(step.saving)
        await self.runner.step(step.number, metrics, tokens=targets)
        if self.on_step is not None:
            await called(self.on_step(step.number, metrics))

    async def _judged(self, step: _Step) -> dict[str, float]:
        """The evaluation at the end of a pass. That of the held-out rows may fail, and is told then."""
        metrics: dict[str, float] = {}
        if step.evaluation:
            try:
                metrics |= await _evaluated(step)
            except FwasyncError as error:
                self.run.message(f"step {step.number} could not be evaluated: {error}")
        if self.evaluate is not None and self._is_judged(step):
            metrics |= await called(self.evaluate(step.number, self.trainers.policy))
        return metrics


async def _evaluated(step: _Step) -> dict[str, float]:
    total = tokens = 0.0
    failures: list[FwasyncError] = []
    for rows, future in step.evaluation:
        weight = sum(float(row.weights[1:].sum()) for row in rows)
        try:
            total += mean_loss(rows, await future) * weight
        except FwasyncError as error:  # the others are awaited all the same
            failures.append(error)
        tokens += weight
    if failures:
        raise failures[0]
    return {"eval/loss": total / tokens, "eval/ppl": _ppl(total / tokens), "eval/tokens": tokens}


def _ppl(loss: float) -> float:
    return math.exp(min(loss, _LARGEST_EXPONENT))
