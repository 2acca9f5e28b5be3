"""Supervised fine-tuning on chats: what the assistant says is what is learnt.

The loss of a step is the mean over its trained tokens: weights are divided by their sum before they are sent, because
trainers sum. So the optimizer is asked for no normalization (`grad_accumulation_normalization` is `None`), and the
gradient's scale is the same for every batch.
"""

from __future__ import annotations

import math
import sys
from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar

import anyio.to_thread
import numpy as np
from pydantic import BeforeValidator, Field

from fwasync import APIFuture, AsyncTrainingClient
from fwasync.config import WandBConfig
from fwasync.data.chat import ChatTokenizer
from fwasync.data.jsonl import read_chat
from fwasync.data.loading import source_name
from fwasync.data.rendering import TrainOnWhat
from fwasync.data.supervised import Row, mean_loss, supervised_batch
from fwasync.errors import FwasyncError
from fwasync.losses import Reduction
from fwasync.recipes.batches import Batch, carve_out
from fwasync.recipes.callbacks import EvalFn, StepCallback
from fwasync.recipes.loop import Evaluation, Hooks, Loop, LoopConfig, Result, Submitted, open_loop
from fwasync.recipes.plan import Plan
from fwasync.recipes.rows import TrainingRows, count_rows, describe_parity, load_rows
from fwasync.recipes.stopping import StopRequest
from fwasync.recipes.trainers import Where
from fwasync.tracking.run import Run

if TYPE_CHECKING:
    from fwasync.types import ForwardBackwardOutput

__all__ = ("PHASE", "Config", "Result", "dry_run", "train")

PHASE = "sft"

_LARGEST_EXPONENT = 700.0


def _train_on_what(given: object) -> object:
    return TrainOnWhat.parse(given) if isinstance(given, str) else given


class Config(LoopConfig):
    """What determines a run."""

    reduction: ClassVar[Reduction] = Reduction.MEAN_TOKENS

    epochs: int = Field(default=3, ge=1, description="Passes over the rows.")
    train_on_what: Annotated[TrainOnWhat, BeforeValidator(_train_on_what)] = Field(
        default=TrainOnWhat.ALL_ASSISTANT_MESSAGES, description="Which messages are learnt."
    )
    split: bool = Field(
        default=False,
        description="A row for each answer, after exactly what the model is shown when it gives it: for chat templates "
        "that write earlier turns differently.",
    )
    max_examples: int | None = Field(default=None, ge=1, description="Only so many rows of the file are read.")
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
        if self.evaluation_dataset and self.eval_auto_carveout:
            found.append("give either evaluation_dataset or eval_auto_carveout, not both.")
        if self.split and self.train_on_what is TrainOnWhat.ALL_TOKENS:
            found.append("split makes a row of each answer, and train_on_what is all_tokens; set one of them.")
        return found


async def train(
    config: Config,
    *,
    where: Where | None = None,
    run: Run | None = None,
    stop: StopRequest | None = None,
    on_step: StepCallback | None = None,
    evaluate: EvalFn | None = None,
) -> Result[Row]:
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
    hooks = Hooks(where, run, stop, on_step, evaluate)
    async with open_loop(config, PHASE, _load, _limited, hooks) as loop:
        held_out = loop.others[0].kept() if loop.others else []
        evaluation = partial(_submit_evaluation, config, loop.trainers.policy, held_out) if held_out else None
        return await loop.go(partial(_submit, config, loop), submit_evaluation=evaluation)


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
    limit = config.longest(max_seq_len)
    if tokenizer is None:
        count = await count_rows(config.dataset, read_chat, max_rows=config.max_examples)
        usable, told = [True] * count, "tokens: not known without the model's tokenizer"
        steps = [] if config.split else Plan.of(config, usable).describe(config)
        return [f"{source_name(config.dataset)}: {count} rows", told, *steps]
    rows = _limited(config, await _load(config, tokenizer), limit or sys.maxsize)[0]
    tokens = sum(row.length for row in rows.kept())
    trained = sum(int(np.count_nonzero(row.weights)) for row in rows.kept())
    what = "answers, of which each is a row" if config.split else "rows"
    return [
        f"{source_name(config.dataset)}: {len(rows.rows)} {what}",
        f"tokens: {tokens:,}, of which {trained:,} are trained on",
        rows.describe_dropped() or (f"no row has more than {limit} tokens" if limit else "no row is left out so far"),
        await describe_parity(
            config.dataset, tokenizer, renderer_name=config.renderer_name, max_rows=config.max_examples
        ),
        *Plan.of(config, rows.usable).describe(config),
    ]


# -- the rows ----------------------------------------------------------------------------------------


async def _load(config: Config, tokenizer: ChatTokenizer) -> list[TrainingRows[Row]]:
    """The rows of the data set, and of that for evaluation if there is one."""
    load = partial(
        load_rows,
        tokenizer=tokenizer,
        renderer_name=config.renderer_name,
        train_on_what=config.train_on_what,
        split=config.split,
    )
    data = [await load(config.dataset, max_examples=config.max_examples)]
    if config.evaluation_dataset:
        data.append(await load(config.evaluation_dataset))
    return data


def _limited(config: Config, data: list[TrainingRows[Row]], max_seq_len: int) -> list[TrainingRows[Row]]:
    """The rows to train on, and those to evaluate on, if there are any."""
    data = [part.limited(max_seq_len) for part in data]
    if not config.eval_auto_carveout:
        return data
    rows, ratio, most = data[0], config.eval_carve_ratio, config.max_eval_seqs
    chats = list(dict.fromkeys(rows.lines))  # whose answers stay together, where each of them is a row
    kept = {chats[index] for index in carve_out(len(chats), ratio=ratio, most=most, seed=config.seed)}
    rows, apart = rows.split([index for index, line in enumerate(rows.lines) if line in kept])
    return [rows.limited(max_seq_len), apart]


# -- the steps ---------------------------------------------------------------------------------------


_Parts = list[tuple[list[Row], "APIFuture[ForwardBackwardOutput]"]]


async def _submit(config: Config, loop: Loop[Row], batch: Batch) -> Submitted:
    rows = loop.rows.chosen(batch.rows)
    datums = await anyio.to_thread.run_sync(supervised_batch, rows)
    future = loop.trainers.policy.forward_backward(datums, "cross_entropy", timeout=config.step_timeout_s)
    return Submitted(future, sum(row.length - 1 for row in rows), partial(_metrics, rows))


async def _submit_evaluation(config: Config, client: AsyncTrainingClient, held_out: list[Row]) -> Evaluation:
    parts: _Parts = []
    for start in range(0, len(held_out), config.batch_size):
        rows = held_out[start : start + config.batch_size]
        datums = await anyio.to_thread.run_sync(supervised_batch, rows)
        parts.append((rows, client.forward(datums, "cross_entropy", timeout=config.step_timeout_s)))
    return partial(_evaluated, parts)


def _metrics(rows: list[Row], output: ForwardBackwardOutput) -> dict[str, float]:
    loss = mean_loss(rows, output)
    trained = sum(int(np.count_nonzero(row.weights[1:])) for row in rows)
    return {"train/ce_loss": loss, "train/ppl": _ppl(loss), "train/active_tokens": trained}


async def _evaluated(parts: _Parts) -> dict[str, float]:
    total = tokens = 0.0
    failures: list[FwasyncError] = []
    for rows, future in parts:
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
