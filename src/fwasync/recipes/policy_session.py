"""`PolicySession`: all that a recipe works with which trains a policy on rewards, brought up in the right order.

Invariants
    * What can be found wrong is found before anything is brought up that costs money.
    * What was brought up is gone when the session is left, in whatever way.
"""

from __future__ import annotations

import math
import sys
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import anyio
import anyio.to_thread

from fwasync.checkpoints.ledger import CheckpointEntry
from fwasync.checkpoints.resume import ResumeInfo
from fwasync.checkpoints.saving import CheckpointKind
from fwasync.data.chat import ChatTokenizer
from fwasync.data.loading import source_name
from fwasync.data.prompts import PromptRow, load_prompts
from fwasync.data.rendering import resolve_renderer
from fwasync.errors import DatasetError, UsageError
from fwasync.losses import PolicyLoss
from fwasync.recipes.batches import Batches
from fwasync.recipes.callbacks import Judgement
from fwasync.recipes.collecting import RowCounts
from fwasync.recipes.policy_config import PolicyConfig
from fwasync.recipes.policy_update import PolicyUpdate
from fwasync.recipes.prompts import Prompts, render_prompts
from fwasync.recipes.recording import recording
from fwasync.recipes.rows import describe_parity
from fwasync.recipes.runner import Runner
from fwasync.recipes.saving import DATA_KEY, Checkpoints, find_start
from fwasync.recipes.serving import ServedPolicy, serve_policy
from fwasync.recipes.trainers import Trainers, Where
from fwasync.tracking.run import Run
from fwasync.training.custom_loss import require_torch

__all__ = ("PolicySession", "Result", "SampledEvalFn", "dry_policy_run", "open_session", "recorded_policy_run")

SampledEvalFn = Callable[[int, ServedPolicy], Judgement]
"""`(step, policy) -> metrics`, called every `evaluation_interval` steps and after the last. Nothing is trained then.
`policy` samples the weights that were published last. The metrics are logged with the step's own."""


@dataclass(frozen=True, slots=True)
class Result:
    """How a run ended.

    Attributes:
        steps: The optimizer steps that are done, those of earlier processes among them.
        total_steps: Those of the whole run if no row were dropped; dropped rows are replaced, which leaves fewer.
        checkpoint: The last one that was saved; `None` if there is none.
        rows: What became of the rows.
        stopped: Why it was stopped before its end; `None` if it was not.
        job_id: The trainer job, where there was one.
    """

    steps: int
    total_steps: int
    checkpoint: CheckpointEntry | None
    rows: RowCounts
    stopped: str | None = None
    job_id: str | None = None


@dataclass(frozen=True, slots=True)
class PolicySession:
    """What is up.

    Attributes:
        config: The recipe's configuration.
        start: Where the run goes on; `None` is from the beginning.
        trainers: The policy and its reference.
        tokenizer: The policy's.
        prompts: The rows as prompts; those that are too long are left out, and told.
        max_seq_len: The longest prompt with its answer.
        checkpoints: Saves them.
        served: The policy as it is sampled.
        update: Submits gradients.
    """

    config: PolicyConfig
    start: ResumeInfo | None
    trainers: Trainers
    tokenizer: ChatTokenizer
    prompts: Prompts
    max_seq_len: int
    checkpoints: Checkpoints
    served: ServedPolicy
    update: PolicyUpdate

    def plan(self) -> tuple[Batches, int]:
        """The order of the rows, and the steps of the whole run if no row were dropped."""
        return _plan(self.config, self.prompts.usable)

    def concurrency_metrics(self) -> dict[str, float]:
        """What the controller tells of the step that ends, if there is one."""
        if self.config.concurrency.mode is None:
            return {}
        return {f"concurrency/{name}": value for name, value in self.served.concurrency.step_completed().items()}

    async def conclude(self, run: Run, result: Result, consumed: int, *, began: int, more: Mapping[str, Any]) -> Result:
        """Save what is not saved yet when a run ends, and tell what became of the rows.

        Args:
            run: Where it logs.
            result: How it ended, with the last checkpoint that was saved.
            consumed: Rows that are consumed.
            began: The steps that were done when this process began.
            more: Further keys of the checkpoint's line.

        Returns:
            The result with the last checkpoint.

        Raises:
            DatasetError: Nothing was trained.
            FwasyncError: What saving raises.

        **Cancellation:** a checkpoint may exist on the service and not be listed.
        """
        saved, step, stopped = result.checkpoint, result.steps, result.stopped
        if stopped is None and not step:
            raise DatasetError(
                f"{source_name(self.config.dataset)}: no group was kept, so nothing was trained: {result.rows}"
            )
        run.message(f"rows: {result.rows}")
        if stopped is not None:
            told = f"{stopped}: step {step} of {result.total_steps} is done. The same log_path goes on from there."
            run.message(told)
            is_due = step > began and (saved is None or saved.step < step)
        else:  # the last rows may have been dropped, all of them, behind the last step
            is_complete = saved is not None and saved.sampler_path is not None and saved.data_consumed == consumed
            is_due = self.config.save_final_checkpoint and not is_complete
        if not is_due:
            return result
        kind = CheckpointKind.BOTH if stopped is None else CheckpointKind.STATE
        suffix = "" if saved is None or saved.step < step else "-final"
        pending = self.checkpoints.save(step, consumed, kind, suffix=suffix, more=more)
        return replace(result, checkpoint=await self.checkpoints.finish(pending))


@asynccontextmanager
async def recorded_policy_run(config: PolicyConfig, run: Run | None) -> AsyncGenerator[tuple[Run, Runner]]:
    """The run, in `config.log_path` unless one is given, and the runner's files.

    Args:
        config: The recipe's, checked.
        run: The run, if it is open already.

    Raises:
        UsageError: What the loss needs is not installed.
        RunDirectoryError: The directory cannot be used.

    **Cancellation:** what was logged is kept.
    """
    if not config.is_builtin(config.loss()):
        require_torch()
    async with recording(config, run) as (run, runner):
        for note in config.notes():
            run.message(note)
        yield run, runner


@asynccontextmanager
async def open_session(
    config: PolicyConfig, phase: str, where: Where, run: Run, rows: Sequence[PromptRow] | None
) -> AsyncGenerator[PolicySession]:
    """Bring everything up, for the time of the block.

    Args:
        config: The recipe's, checked.
        phase: Under which it logs.
        where: Where to train.
        run: Where it logs.
        rows: The rows of `config.dataset`, if they were read already.

    Raises:
        UsageError: The data cannot be trained on.
        FwasyncError: Something did not come up.

    **Cancellation:** what came up is removed again.
    """
    loss = config.loss()
    rows = await load_prompts(config.dataset, max_rows=config.max_rows) if rows is None else rows
    name = config.tokenizer_name
    rendered = await _rendered(config, rows, name) if name else None
    start = await find_start(config, where, run, phase)
    async with AsyncExitStack() as stack:
        path = start.path if start else None
        trainers = await stack.enter_async_context(
            where.open(config, start=path, reference=loss.kl_beta > 0, deploy=config.deployment, tell=run.message)
        )
        tokenizer, prompts = rendered or await _rendered(config, rows, await trainers.tokenizer_name(config))
        max_seq_len = await trainers.max_seq_len(config)
        prompts = prompts.limited(max_seq_len)
        if prompts.dropped:
            run.message(prompts.describe_dropped())
        checkpoints = Checkpoints(
            config,
            trainers,
            run,
            {DATA_KEY: prompts.digest()},
            timeout=config.checkpoint_timeout_s,
            prefix=f"{phase}-" if where.trainers else "",
        )
        await checkpoints.go_on(start, where, phase)
        served = await stack.enter_async_context(
            serve_policy(
                trainers,
                tokenizer=tokenizer,
                deploy=config.deployment,
                weight_sync=config.weight_sync,
                concurrency=config.concurrency,
            )
        )
        update = _update(config, trainers, loss, run)
        yield PolicySession(config, start, trainers, tokenizer, prompts, max_seq_len, checkpoints, served, update)


async def dry_policy_run(
    config: PolicyConfig, *, tokenizer: ChatTokenizer | None, max_seq_len: int | None
) -> list[str]:
    """Read and render the prompts, and count steps and completions; nothing is started.

    Args:
        config: The recipe's, checked.
        tokenizer: The model's, if it can be had; one that the configuration names goes before it.
        max_seq_len: The model's context length, if it is known.

    Returns:
        What was found, in lines.

    Raises:
        UsageError: The data cannot be trained on.

    **Cancellation:** nothing remains.
    """
    rows = await load_prompts(config.dataset, max_rows=config.max_rows)
    usable, limit = [True] * len(rows), config.longest(max_seq_len)
    found = [f"{source_name(config.dataset)}: {len(rows)} rows"]
    source = config.tokenizer_name or tokenizer
    if source is None:
        found.append("tokens: not known without the model's tokenizer")
    else:
        loaded, prompts = await _rendered(config, rows, source)
        prompts = prompts if limit is None else prompts.limited(limit)
        usable, lengths = prompts.usable, [len(prompt) for prompt in prompts.tokens if prompt is not None]
        none = "all of them can be sampled" if limit is None else f"each leaves room for an answer in {limit} tokens"
        found += [f"tokens: {sum(lengths):,}, at most {max(lengths, default=0):,} of a prompt"]
        found += [prompts.describe_dropped() or none]
        found += [
            await describe_parity(config.dataset, loaded, renderer_name=config.renderer_name, max_rows=config.max_rows)
        ]
    order, steps = _plan(config, usable)
    groups, size = config.prompt_groups_per_step, config.completions_per_prompt
    least, most = min(steps * groups, order.steps()) * size, order.steps() * size
    told = f"{most:,}" if least == most else f"{least:,} to {most:,}, the more prompts are dropped"
    return [
        *found,
        f"{steps:,} steps of {groups} prompts with {size} answers each, if no prompt is dropped",
        f"completions to be sampled: {told}; of {config.max_completion_tokens:,} tokens at most",
        f"{config.checkpoints(steps)} checkpoint(s)",
        *config.notes(),
    ]


def _plan(config: PolicyConfig, usable: Sequence[bool]) -> tuple[Batches, int]:
    order = Batches(usable, 1, epochs=config.epochs, seed=config.seed, shuffle=config.shuffle)
    steps = math.ceil(order.steps() / config.prompt_groups_per_step)
    return order, min(steps, config.max_steps or sys.maxsize)


async def _rendered(
    config: PolicyConfig, rows: Sequence[PromptRow], tokenizer: str | ChatTokenizer
) -> tuple[ChatTokenizer, Prompts]:
    def tokenized() -> tuple[ChatTokenizer, Prompts]:
        loaded = ChatTokenizer.load(tokenizer) if isinstance(tokenizer, str) else tokenizer
        renderer = resolve_renderer(config.renderer_name or None, loaded)
        return loaded, render_prompts(source_name(config.dataset), rows, renderer)

    return await anyio.to_thread.run_sync(tokenized, abandon_on_cancel=True)


def _update(config: PolicyConfig, trainers: Trainers, loss: PolicyLoss, run: Run) -> PolicyUpdate:
    builtin = config.is_builtin(loss)
    if builtin and trainers.pipeline_parallelism > 1:
        why = f"the trainer has a pipeline of {trainers.pipeline_parallelism} stages, and kernels need one of 1"
        if config.loss_path == "builtin":
            raise UsageError(f"loss_path is 'builtin': {why}; take another training shape, or 'custom'")
        require_torch()
        run.message(f"the loss is computed here, which takes a forward pass more: {why}")
        builtin = False
    return PolicyUpdate(
        trainers.policy,
        trainers.reference,
        loss,
        builtin=builtin,
        old_policy=config.asks_old_policy,
        timeout=config.step_timeout_s,
    )
