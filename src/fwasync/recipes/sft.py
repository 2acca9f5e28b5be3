"""Supervised fine-tuning on chats: what the assistant says is what is learnt.

The loss of a step is a mean over its trained tokens, so the gradient's scale is the same for every batch.

Steps are pipelined: the next one is submitted before the results of this one are awaited, so the trainer never waits
for the network or for us.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import anyio
import anyio.to_thread
import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from fwasync import APIFuture, AsyncServiceClient, AsyncTrainingClient
from fwasync.checkpoints.ledger import CheckpointEntry, CheckpointLedger
from fwasync.data.chat import ChatTokenizer
from fwasync.data.jsonl import Chat, read_chats
from fwasync.data.supervised import Row, SupervisedRows, mean_loss, supervised_batch, tokenize
from fwasync.errors import UsageError
from fwasync.recipes.optimizer import adam, grad_norm, warmed_up
from fwasync.recipes.saving import Saving, finish_saving, submit_saving
from fwasync.recipes.seeds import batches
from fwasync.tracking.run import Run

if TYPE_CHECKING:
    from fwasync.types import ForwardBackwardOutput, OptimStepResponse

__all__ = ("PHASE", "Config", "Result", "train")

PHASE = "sft"
_DEPTH = 2


class Config(BaseModel):
    """What determines a run.

    Attributes:
        data: A JSONL file of chats; see `fwasync.data.jsonl.read_chats`.
        log_path: The directory of the run.
        base_model: The model to start from.
        lora_rank: Rank of the adapter; 0 trains all parameters.
        learning_rate: Reached after the warm-up, and kept.
        warmup_steps: Steps in which it rises from nothing.
        batch_size: Rows of a step.
        steps: How many steps; or
        epochs: how many passes over the rows. Neither is one pass.
        seed: Of the order of the rows, and of the adapter's first weights.
        max_seq_len: Longer rows are left out, and told. Unset: the model's context length.
        grad_clip_norm: The gradient's norm is clipped to this; 0 does not clip.
        save_every: Steps between checkpoints; 0 saves at the end only.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: Path
    log_path: Path
    base_model: str = "fwasync/qwen3-tiny"
    lora_rank: int = Field(default=32, ge=0)
    learning_rate: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    warmup_steps: int = Field(default=0, ge=0)
    batch_size: int = Field(default=32, ge=1)
    steps: int | None = Field(default=None, ge=1)
    epochs: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0)
    max_seq_len: int | None = Field(default=None, ge=2)
    grad_clip_norm: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    save_every: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give either steps or epochs, not both")
        return self

    def consumed_rows(self, rows: int) -> int:
        """How many rows the whole run consumes, out of a set of `rows`, counting repetitions."""
        return self.steps * self.batch_size if self.steps is not None else rows * (self.epochs or 1)

    def total_steps(self, rows: int) -> int:
        """How many steps that takes; the last one may be smaller."""
        return -(-self.consumed_rows(rows) // self.batch_size)


@dataclass(frozen=True, slots=True)
class Result:
    """How a run ended: its last checkpoint, and the rows that it had."""

    checkpoint: CheckpointEntry
    rows: SupervisedRows


@dataclass(frozen=True, slots=True)
class _Step:
    """A step in flight."""

    number: int
    rows: list[Row]
    learning_rate: float
    forward_backward: APIFuture[ForwardBackwardOutput]
    optim_step: APIFuture[OptimStepResponse]
    saving: Saving | None


async def train(
    config: Config,
    *,
    service: AsyncServiceClient,
    run: Run,
    client: AsyncTrainingClient | None = None,
    chats: Sequence[Chat] | None = None,
) -> Result:
    """Fine-tune.

    Args:
        config: What to do.
        service: Where.
        run: Where to log: `train/loss` (nats per trained token), `train/tokens` (of those), `train/learning_rate`,
            `train/grad_norm`, and `perf/tokens_per_s` (all tokens of the rows).
        client: A model to go on with; by default a new one of `config.base_model` is made.
        chats: The rows of `config.data`, if they were read already.

    Raises:
        DatasetError: The data cannot be trained on; nothing was.
        FwasyncError: What the service's operations raise.

    **Cancellation:** the run keeps what was logged; checkpoints that were listed stay.
    """
    if chats is None:
        chats = await anyio.to_thread.run_sync(read_chats, config.data, abandon_on_cancel=True)
    if client is None:
        async with service.create_training_client(config.base_model, config.lora_rank, seed=config.seed) as client:
            return await train(config, service=service, run=run, client=client, chats=chats)
    rows = await _rows(config, chats, service, client)
    if rows.too_long:
        run.message(rows.describe_too_long())
    ledger = CheckpointLedger(run.log_path)
    total, total_steps = config.consumed_rows(len(rows.rows)), config.total_steps(len(rows.rows))
    run.begin(PHASE, total_steps)
    in_flight: deque[_Step] = deque()
    checkpoint: CheckpointEntry | None = None
    last_time = anyio.current_time()

    async def submit(number: int, batch: list[Row]) -> _Step:
        learning_rate = warmed_up(config.learning_rate, number, config.warmup_steps)
        datums = await anyio.to_thread.run_sync(supervised_batch, batch)
        forward_backward = client.forward_backward(datums, "cross_entropy")
        optim_step = client.optim_step(adam(learning_rate, grad_clip_norm=config.grad_clip_norm))
        saving = None
        last = number == total_steps
        if last or (config.save_every and number % config.save_every == 0):
            consumed = min(number * config.batch_size, total)
            saving = submit_saving(client, PHASE, number, consumed, snapshot=last)
        return _Step(number, batch, learning_rate, forward_backward, optim_step, saving)

    async def finish(step: _Step) -> None:
        nonlocal last_time, checkpoint
        output, update = await step.forward_backward, await step.optim_step
        now = anyio.current_time()
        metrics = {
            "train/loss": mean_loss(step.rows, output),
            "train/tokens": float(sum(np.count_nonzero(row.weights) for row in step.rows)),
            "train/learning_rate": step.learning_rate,
            **grad_norm(update),
            "perf/tokens_per_s": sum(len(row.tokens) for row in step.rows) / max(now - last_time, 1e-9),
        }
        last_time = now
        run.log(PHASE, step.number, metrics)
        if step.saving is not None:
            checkpoint = await finish_saving(step.saving, ledger)

    order = batches(len(rows.rows), config.batch_size, total=total, seed=config.seed)
    for number, indices in enumerate(order, 1):
        in_flight.append(await submit(number, [rows.rows[index] for index in indices]))
        if len(in_flight) == _DEPTH:
            await finish(in_flight.popleft())
    while in_flight:
        await finish(in_flight.popleft())
    assert checkpoint is not None, "the last step saves one"
    return Result(checkpoint, rows)


async def _rows(
    config: Config, chats: Sequence[Chat], service: AsyncServiceClient, client: AsyncTrainingClient
) -> SupervisedRows:
    """The rows in the model's tokens."""
    base_model, max_seq_len = client.base_model or config.base_model, config.max_seq_len
    if max_seq_len is None:
        models = (await service.get_server_capabilities()).supported_models
        max_seq_len = {model.model_name: model.max_context_length for model in models}.get(base_model)
        if max_seq_len is None:
            raise UsageError(f"the service does not tell the context length of {base_model}; set max_seq_len")
    name = (await client.get_info()).model_data.tokenizer_id or base_model

    def prepare(limit: int) -> SupervisedRows:
        return tokenize(config.data, chats, ChatTokenizer.load(name), max_seq_len=limit)

    return await anyio.to_thread.run_sync(prepare, max_seq_len, abandon_on_cancel=True)
