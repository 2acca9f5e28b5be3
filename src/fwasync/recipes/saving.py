"""Checkpoints of a recipe: saved in the order of the operations, listed in `checkpoints.jsonl` once they exist."""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Protocol

from fwasync import AsyncTrainingClient
from fwasync.checkpoints.ledger import CheckpointEntry, CheckpointLedger

__all__ = ("Saved", "Saving", "finish_saving", "submit_saving")


class Saved(Protocol):
    """Something that the service has saved."""

    @property
    def path(self) -> str:
        """Where it is."""
        ...


@dataclass(frozen=True, slots=True)
class Saving:
    """A checkpoint that was submitted, with a snapshot for samplers or without."""

    name: str
    model_id: str
    step: int
    data_consumed: int
    state: Awaitable[Saved]
    snapshot: Awaitable[Saved] | None


def submit_saving(client: AsyncTrainingClient, phase: str, step: int, data_consumed: int, *, snapshot: bool) -> Saving:
    """Submit a checkpoint named after phase and step; it holds the weights of this place in the order."""
    name = f"{phase}-{step:06d}"
    state = client.save_state(name)
    sampler = client.save_weights_for_sampler(name) if snapshot else None
    return Saving(name, client.model_id, step, data_consumed, state, sampler)


async def finish_saving(saving: Saving, ledger: CheckpointLedger) -> CheckpointEntry:
    """Wait until a checkpoint exists, and list it.

    **Cancellation:** the checkpoint may exist on the service and not be listed.
    """
    state_path = (await saving.state).path
    sampler_path = None if saving.snapshot is None else (await saving.snapshot).path
    entry = CheckpointEntry(
        saving.name,
        saving.step,
        data_consumed=saving.data_consumed,
        state_path=state_path,
        sampler_path=sampler_path,
        extra={"model_id": saving.model_id},
    )
    await ledger.append(entry)
    return entry
