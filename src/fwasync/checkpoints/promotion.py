"""Promotion of a run's snapshot to a model of the account."""

from __future__ import annotations

from typing import Any, Protocol

from fwasync.checkpoints.ledger import CheckpointEntry
from fwasync.checkpoints.saving import get_sampler_checkpoint_id
from fwasync.errors import UsageError

__all__ = ("Promoter", "promote")


class Promoter(Protocol):
    """What promotes: an `AsyncFireworksClient`."""

    async def promote_checkpoint(
        self, job_id: str, checkpoint_id: str, output_model_id: str, base_model: str | None = None
    ) -> Any:
        """Make a model of a trainer's snapshot, and wait for it."""
        ...


async def promote(
    promoter: Promoter, entry: CheckpointEntry, output_model_id: str, *, base_model: str | None = None
) -> Any:
    """Make a model of a checkpoint that was saved with a snapshot.

    Args:
        promoter: Does it.
        entry: The checkpoint's line.
        output_model_id: The model's id: up to 63 lower-case letters, digits and hyphens.
        base_model: Full name of the base model. Unset: the trainer job is asked.

    Returns:
        The model, as the promoter describes it.

    Raises:
        UsageError: The checkpoint has no snapshot, or is of no trainer job.

    **Cancellation:** a promotion that was begun goes on at the service.
    """
    if not entry.sampler_path:
        raise UsageError(
            f"checkpoint {entry.name!r} has no snapshot for samplers, so it cannot be promoted; "
            "save it with kind 'sampler' or 'both'"
        )
    if not entry.source_job_id:
        raise UsageError(f"checkpoint {entry.name!r} tells no trainer job, so it cannot be promoted")
    checkpoint_id = get_sampler_checkpoint_id(entry.sampler_path)
    return await promoter.promote_checkpoint(entry.source_job_id, checkpoint_id, output_model_id, base_model)
