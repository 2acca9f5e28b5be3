"""The checkpoints of a recipe: when they are due, what they are called, and what becomes of the last one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fwasync.checkpoints.ledger import CheckpointEntry, CheckpointLedger
from fwasync.checkpoints.promotion import promote
from fwasync.checkpoints.resume import INIT_KEY, ResumeInfo, find_resume
from fwasync.checkpoints.saving import CheckpointKind, PendingCheckpoint, submit_checkpoint
from fwasync.data.loading import source_name
from fwasync.errors import UsageError
from fwasync.recipes.config import RecipeConfig
from fwasync.recipes.runner import Runner
from fwasync.recipes.trainers import Trainers, Where
from fwasync.tracking.run import Run

__all__ = ("DATA_KEY", "Checkpoints", "describe_start", "find_start")

DATA_KEY = "data_digest"
"""The key of a line that stands for the rows which its cursor counts."""


async def find_start(config: RecipeConfig, where: Where, run: Run, phase: str) -> ResumeInfo | None:
    """Where a run goes on, which is told; `None` is from the beginning.

    Trainers that are up already (`where.trainers`) go on as they are: nothing is found.

    Raises:
        CheckpointLedgerError: `checkpoints.jsonl` cannot be read.
        UsageError: `init_from_checkpoint` cannot be one, or the run is of another recipe.

    **Cancellation:** leaves nothing behind.
    """
    if where.trainers is not None:
        return None
    start = await find_resume(run.log_path, config.init_from_checkpoint)
    others = dict.fromkeys(record.phase for record in run.records if record.phase != phase)
    if start is not None and start.entry is not None and others:
        raise UsageError(
            f"the run in {run.log_path} is one of {', '.join(others)}, with which {phase} cannot go on; to begin from "
            f"its weights, give another log_path, and {start.path} as init_from_checkpoint"
        )
    if start is not None:
        run.message(describe_start(start))
    return start


def describe_start(start: ResumeInfo) -> str:
    """A sentence on where a run goes on."""
    done = f"{start.step} steps and {start.data_consumed} rows are done" if start.entry else "a new run on its weights"
    return f"going on from {start.path}: {done}"


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """Saves the checkpoints of one run.

    Attributes:
        config: The recipe's configuration.
        trainers: What trains.
        run: Where it is logged.
        marks: Further keys of each line.
        timeout: Seconds that a checkpoint may take; unset, as the client has it.
        prefix: Of their names, where a model is trained by several recipes.
    """

    config: RecipeConfig
    trainers: Trainers
    run: Run
    marks: Mapping[str, Any]
    timeout: float | None = None
    prefix: str = ""

    def submit(
        self, step: int, data_consumed: int, *, last: bool, more: Mapping[str, Any] | None = None
    ) -> PendingCheckpoint | None:
        """Submit the checkpoint that is due after a step, if one is: at each interval, and at the end."""
        interval = self.config.checkpoint_interval
        if last and self.config.save_final_checkpoint:
            return self.save(step, data_consumed, CheckpointKind.BOTH, more=more)
        return self.save(step, data_consumed, more=more) if interval and step % interval == 0 else None

    def save(
        self,
        step: int,
        data_consumed: int,
        kind: CheckpointKind = CheckpointKind.STATE,
        *,
        suffix: str = "",
        more: Mapping[str, Any] | None = None,
    ) -> PendingCheckpoint:
        """Submit a checkpoint of this place in the order, due or not.

        Args:
            step: The optimizer steps that are done.
            data_consumed: Rows that are consumed.
            kind: What to save.
            suffix: Of its name, where the step has a checkpoint already.
            more: Further keys of its line, beside `marks`.
        """
        init = self.config.init_from_checkpoint
        return submit_checkpoint(
            self.trainers.policy,
            f"{self.prefix}step-{step}{suffix}",
            step=step,
            data_consumed=data_consumed,
            kind=kind,
            job_id=self.trainers.job_id,
            extra={**self.marks, **(more or {}), **({INIT_KEY: init} if init else {})},
            timeout=self.timeout,
        )

    async def finish(self, pending: PendingCheckpoint) -> CheckpointEntry:
        """Wait for a checkpoint, and list it: after what was logged up to it is on the disk, so that nothing is missing
        there if the run goes on from it.

        **Cancellation:** it may exist on the service and not be listed.
        """
        await self.run.flush()
        return await pending.finish(CheckpointLedger(self.run.log_path))

    async def end(self, entry: CheckpointEntry | None, runner: Runner, *, stopped: str | None) -> None:
        """End a run: make a model of its last checkpoint, if one is wanted, and tell its runner.

        Args:
            entry: The last checkpoint; `None` if there is none.
            runner: Is told.
            stopped: Why it was stopped before its end; then nothing is promoted.

        **Cancellation:** a promotion that was begun goes on at the service.
        """
        if stopped is not None:
            await runner.stopped(stopped)
            return
        await self._promote(entry, runner)
        await runner.completed()

    async def _promote(self, entry: CheckpointEntry | None, runner: Runner) -> None:
        model_id, promoter = self.config.output_model_id, self.trainers.promoter
        if model_id is None:
            return
        if promoter is None or entry is None:
            raise UsageError("output_model_id is set; only a trainer job's snapshot becomes a model: set infra too")
        await promote(promoter, entry, model_id, base_model=self.config.base_model)
        await runner.output_model(model_id, checkpoint=entry.name, job_id=entry.source_job_id)

    async def go_on(self, start: ResumeInfo | None, where: Where, phase: str) -> None:
        """See to it that a run which goes on has the rows that it had, and forget what was logged behind its start.

        Args:
            start: Where it goes on; `None` is from the beginning.
            where: Trainers that are up already go on as they are: then nothing is forgotten.
            phase: The recipe's name in what is logged.

        Raises:
            UsageError: It has other rows, so that its cursor has no meaning; nothing is forgotten.
            RunDirectoryError: `metrics.jsonl` cannot be written.

        **Cancellation:** what was logged is forgotten, or not, as a whole.
        """
        self._check_data(start)
        if where.trainers is not None:
            return
        forgotten = await self.run.rewind(phase, start.step if start else 0)
        if forgotten and start is None:
            self.run.message(f"{self.run.log_path} has no checkpoint to go on from: starting from the beginning")

    def _check_data(self, start: ResumeInfo | None) -> None:
        before = start.entry.extra.get(DATA_KEY) if start is not None and start.entry is not None else None
        if before is not None and before != self.marks.get(DATA_KEY):
            raise UsageError(
                f"{source_name(self.config.dataset)} is not what it was when {self.run.log_path} was begun (its rows, "
                "the tokenizer or max_seq_len have changed), so it is not known which rows are done. To train on the "
                f"new rows, give another log_path, and {start.path if start else ''} as init_from_checkpoint."
            )
