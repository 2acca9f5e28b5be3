"""Where a run begins: from nothing, from a checkpoint that was asked for, or where it was interrupted.

The order of decisions
    1. `init_from_checkpoint`, and no checkpoint that was saved since: begin there, with step and data at 0.
    2. Else the newest line of `checkpoints.jsonl` that has a `state_path`: go on there, with its step and data.
    3. Else from nothing.

So a run that began from a checkpoint and was interrupted goes on where it was, and does not begin again: each line
tells by `init_from_checkpoint` what its run had begun from.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fwasync._wire.paths import cross_job_path, is_path
from fwasync.checkpoints.ledger import CheckpointEntry, CheckpointLedger
from fwasync.errors import UsageError

__all__ = ("INIT_KEY", "Loads", "ResumeInfo", "checkpoint_path", "decide", "find_resume", "resolve_resume")

logger = logging.getLogger(__name__)

INIT_KEY = "init_from_checkpoint"
"""The key of a line that tells what its run began from."""


@dataclass(frozen=True, slots=True)
class ResumeInfo:
    """Where to go on.

    Attributes:
        path: The checkpoint to load.
        step: The optimizer steps that are done; 0 where only weights and optimizer are taken over.
        data_consumed: Rows of the data set that are consumed.
        source_job_id: The trainer job that saved it, or whatever the line says; `None` if that is unknown.
        entry: Its line, if the run goes on; `None` if it begins.
    """

    path: str
    step: int = 0
    data_consumed: int = 0
    source_job_id: str | None = None
    entry: CheckpointEntry | None = None


class Loads(Protocol):
    """What is needed of a training client to resume: an `AsyncTrainingClient`."""

    def load_state_with_optimizer(self, path: str) -> Awaitable[Any]:
        """Load a checkpoint."""
        ...


def checkpoint_path(text: str, entries: Sequence[CheckpointEntry] = ()) -> tuple[str, str | None]:
    """What `init_from_checkpoint` means: the path to load, and the trainer job if that is named.

    Args:
        text: A whole path (`gs://…`, `tinker://…`, `cross_job://…`, `/…`); `job:name`, a checkpoint of another job; or
            a bare name.
        entries: The lines of this run, in which a bare name is looked up first. One that is not there is handed to
            the trainer as it is.

    Raises:
        UsageError: It is empty, or one side of the colon is.
    """
    if is_path(text):
        return text, None
    job_id, colon, name = text.partition(":")
    if not text or (colon and not (job_id and name)):
        raise UsageError(
            f"init_from_checkpoint is {text!r}; "
            "give a path (gs://…, tinker://…, cross_job://…, /…), job:name, or a name"
        )
    if colon:
        return cross_job_path(job_id, name), job_id
    known = [entry for entry in entries if entry.name == text and entry.state_path]
    return (known[-1].state_path or text, known[-1].source_job_id) if known else (text, None)


def decide(entries: Sequence[CheckpointEntry], init_from_checkpoint: str | None = None) -> ResumeInfo | None:
    """Where to go on, from the lines of a run; `None` is from nothing. See the module for the order. Pure.

    Raises:
        UsageError: `init_from_checkpoint` cannot be one.
    """
    latest = next((entry for entry in reversed(entries) if entry.state_path), None)
    same_run = init_from_checkpoint is None or (
        latest is not None and latest.extra.get(INIT_KEY) == init_from_checkpoint
    )
    if latest is not None and latest.state_path and same_run:
        return ResumeInfo(latest.state_path, latest.step, latest.data_consumed, latest.source_job_id, latest)
    if init_from_checkpoint is None:
        return None
    path, job_id = checkpoint_path(init_from_checkpoint, entries)
    return ResumeInfo(path, source_job_id=job_id)


async def find_resume(log_path: str | Path, init_from_checkpoint: str | None = None) -> ResumeInfo | None:
    """Where the run in `log_path` goes on; `None` is from nothing.

    Raises:
        CheckpointLedgerError: `checkpoints.jsonl` cannot be read.
        UsageError: `init_from_checkpoint` cannot be one.

    **Cancellation:** leaves nothing behind.
    """
    return decide(await CheckpointLedger(log_path).entries(), init_from_checkpoint)


async def resolve_resume(
    client: Loads, log_path: str | Path, init_from_checkpoint: str | None = None
) -> ResumeInfo | None:
    """Find where the run in `log_path` goes on, and load that into an open client.

    Raises:
        CheckpointLedgerError: `checkpoints.jsonl` cannot be read.
        UsageError: `init_from_checkpoint` cannot be one.
        OperationFailedError: The service does not have the checkpoint any more.

    **Cancellation:** the checkpoint may or may not have been loaded.
    """
    found = await find_resume(log_path, init_from_checkpoint)
    if found is not None:
        await client.load_state_with_optimizer(found.path)
        logger.info("loaded %s: %d steps done, %d rows consumed", found.path, found.step, found.data_consumed)
    return found
