"""Save checkpoints: submitted in the order of the operations, listed in `checkpoints.jsonl` once they exist.

Invariants
    * What is saved are the weights of the place in the order at which it was submitted, whatever is submitted after it.
    * A line is written after the service has saved everything that it names, so every line can be loaded.
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol, cast

from fwasync._wire.paths import cross_job_path
from fwasync.checkpoints.ledger import CheckpointEntry, CheckpointLedger
from fwasync.errors import UsageError

__all__ = (
    "CheckpointKind",
    "PendingCheckpoint",
    "Saves",
    "get_sampler_checkpoint_id",
    "save_checkpoint",
    "submit_checkpoint",
)


class CheckpointKind(StrEnum):
    """What is saved."""

    STATE = "state"
    """Weights and optimizer: training goes on from it. It cannot be promoted."""
    SAMPLER = "sampler"
    """Weights for samplers: it can be promoted. Training cannot go on from it."""
    BOTH = "both"
    """Both of them."""


class Saved(Protocol):
    """Something that the service has saved."""

    @property
    def path(self) -> str:
        """Where it is."""
        ...


class SavedSnapshot(Saved, Protocol):
    """A snapshot that the service has saved."""

    @property
    def snapshot_name(self) -> str:
        """Its full name."""
        ...


class Saves(Protocol):
    """What is needed of a training client: an `AsyncTrainingClient`."""

    @property
    def model_id(self) -> str:
        """The service's id of the model."""
        ...

    def save_state(self, name: str, *, timeout: float | None = ...) -> Awaitable[Saved]:
        """Save weights and optimizer, at this place in the order."""
        ...

    def save_weights_for_sampler(self, name: str, *, timeout: float | None = ...) -> Awaitable[Saved]:
        """Save weights for samplers, at this place in the order."""
        ...

    def save_weights_for_sampler_ext(
        self, name: str, checkpoint_type: str, *, timeout: float | None = ...
    ) -> Awaitable[SavedSnapshot]:
        """The same, under a name that no other run can have used."""
        ...


@dataclass(frozen=True, slots=True)
class PendingCheckpoint:
    """A checkpoint that was submitted. `finish` waits for it and lists it."""

    entry: CheckpointEntry
    job_id: str | None
    state: Awaitable[Saved] | None
    sampler: Awaitable[Saved | SavedSnapshot] | None

    async def finish(self, ledger: CheckpointLedger) -> CheckpointEntry:
        """Wait until everything is saved, and list it.

        Raises:
            CheckpointLedgerError: It is saved, and cannot be listed.
            FwasyncError: What saving raises.

        **Cancellation:** the checkpoint may exist on the service and not be listed.
        """
        state_path = sampler_path = None
        if self.state is not None:
            state_path = (await self.state).path
            if self.job_id is not None:
                state_path = cross_job_path(self.job_id, self.entry.name)
        if self.sampler is not None:
            snapshot = await self.sampler
            sampler_path = snapshot.path if self.job_id is None else cast("SavedSnapshot", snapshot).snapshot_name
        entry = replace(self.entry, state_path=state_path, sampler_path=sampler_path)
        await ledger.append(entry)
        return entry


def submit_checkpoint(
    client: Saves,
    name: str,
    *,
    step: int,
    data_consumed: int,
    kind: CheckpointKind | str = CheckpointKind.STATE,
    job_id: str | None = None,
    extra: Mapping[str, Any] | None = None,
    timeout: float | None = None,
) -> PendingCheckpoint:
    """Submit a checkpoint; nothing is awaited, so that training goes on behind it.

    Args:
        client: The model.
        name: Its name within this model, such as `"step-10"`.
        step: The optimizer steps that are done.
        data_consumed: Rows of the data set that are consumed.
        kind: What to save.
        job_id: The trainer job, if there is one. Then the state's path is one that any job of the account can load, and
            the snapshot's name is one to promote. Without it both are paths of the service itself.
        extra: Further keys of the line.
        timeout: Seconds that each part may take; unset, as the client has it.
    """
    kind = CheckpointKind(kind)
    source = job_id if job_id is not None else client.model_id
    options: dict[str, float] = {} if timeout is None else {"timeout": timeout}
    state = client.save_state(name, **options) if kind is not CheckpointKind.SAMPLER else None
    sampler = None
    if kind is not CheckpointKind.STATE:
        if job_id is not None:
            sampler = client.save_weights_for_sampler_ext(name, "base", **options)
        else:
            sampler = client.save_weights_for_sampler(name, **options)
    return PendingCheckpoint(
        CheckpointEntry(name, step, data_consumed, source, extra=dict(extra or {})), job_id, state, sampler
    )


async def save_checkpoint(
    client: Saves,
    name: str,
    log_path: str | Path,
    loop_state: Mapping[str, Any],
    kind: CheckpointKind | str = CheckpointKind.STATE,
) -> dict[str, str]:
    """Save a checkpoint, wait for it, and list it in `log_path`.

    Args:
        client: The model.
        name: Its name within this model.
        log_path: The directory of the run.
        loop_state: `step`, `data_consumed`, and `source_job_id` where there is a trainer job; other keys are listed as
            they are.
        kind: What to save.

    Returns:
        `state_path` and `sampler_path`, those of them that were saved.

    **Cancellation:** the checkpoint may exist on the service and not be listed.
    """
    own = {"step", "data_consumed", "source_job_id"}
    pending = submit_checkpoint(
        client,
        name,
        step=loop_state.get("step", 0),
        data_consumed=loop_state.get("data_consumed", 0),
        kind=kind,
        job_id=loop_state.get("source_job_id"),
        extra={key: value for key, value in loop_state.items() if key not in own},
    )
    entry = await pending.finish(CheckpointLedger(log_path))
    paths = {"state_path": entry.state_path, "sampler_path": entry.sampler_path}
    return {key: path for key, path in paths.items() if path is not None}


def get_sampler_checkpoint_id(saved: Saved | SavedSnapshot | str) -> str:
    """The id by which a snapshot is promoted: its full name, or the last part of its path.

    Raises:
        UsageError: It has neither.
    """
    name = saved if isinstance(saved, str) else str(getattr(saved, "snapshot_name", "") or saved.path)
    checkpoint_id = name.rstrip("/").rpartition("/")[2]
    if not checkpoint_id:
        raise UsageError(f"{saved!r} names no snapshot")
    return checkpoint_id
