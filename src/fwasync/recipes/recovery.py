"""Whether a trainer is lost: then a run goes on from its last checkpoint on another one, or says how it can."""

from __future__ import annotations

import anyio

from fwasync import AsyncTrainingClient
from fwasync.checkpoints.ledger import CheckpointEntry
from fwasync.errors import (
    NotFoundError,
    SequenceBrokenError,
    ServiceUnavailableError,
    SessionLostError,
    TransportError,
)

__all__ = ("TrainerLostError", "is_gone")

_ANSWERS_WITHIN_S = 60.0
_GONE = (NotFoundError, SequenceBrokenError, ServiceUnavailableError, SessionLostError, TransportError)


class TrainerLostError(Exception):
    """A run has ended because its trainer is not there any more.

    Attributes:
        error: What the run has ended with.
        checkpoint: The last one that was listed; `None` if there is none.
    """

    def __init__(self, error: Exception, checkpoint: CheckpointEntry | None) -> None:
        super().__init__(str(error))
        self.error = error
        self.checkpoint = checkpoint


async def is_gone(policy: AsyncTrainingClient, error: Exception) -> bool:
    """Whether this error came because the trainer was pre-empted, restarted or cut off: ask it.

    **Cancellation:** nothing remains.
    """
    if isinstance(error, SequenceBrokenError | SessionLostError):
        return True
    with anyio.move_on_after(_ANSWERS_WITHIN_S):
        try:
            await policy.get_info()
        except _GONE:
            return True
        return False
    return True
