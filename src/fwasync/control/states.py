"""What the state of a trainer job or deployment means to one who waits for it. Pure.

A state that is not known is waited on: a newer service may have more of them, and the wait is bounded anyway.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ("GONE", "RESUMABLE", "Verdict", "is_under_way", "judge_deployment", "judge_job", "short_state")

RESUMABLE = frozenset({"FAILED", "CANCELLED", "PAUSED", "COMPLETED"})
"""States of a job that `:resume` leads out of."""

GONE = frozenset({"DELETED", "ARCHIVED"})
"""States of a job that is only remembered; its id is not given again."""

_ENDED = RESUMABLE | {"CANCELLING", "EARLY_STOPPED", "EXPIRED", "DELETING", "DELETING_CLEANING_UP"}
_QUEUED = frozenset({"PENDING", "RE_QUEUEING"})


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do next.

    Attributes:
        action: `"wait"` and look again; `"check"` whether it answers; it is `"ready"`; or it has `"failed"`.
        queued: It waits for machines, which counts against another deadline.
        reason: Why it has failed, and what to do.
    """

    action: Literal["wait", "check", "ready", "failed"]
    queued: bool = False
    reason: str = ""


def short_state(state: str | None) -> str:
    """`JOB_STATE_RUNNING` → `RUNNING`; a missing one is `UNSPECIFIED`."""
    return (state or "UNSPECIFIED").removeprefix("JOB_STATE_").removeprefix("STATE_")


def judge_job(state: str | None, *, settling: bool = False) -> Verdict:
    """What the state of a trainer job means.

    Args:
        state: As the service says it.
        settling: It was resumed a moment ago: a state that it is about to leave may still be seen.
    """
    short = short_state(state)
    if short == "RUNNING":
        return Verdict("check")
    if short in GONE:
        return Verdict("failed", reason="it is gone for good: create another")
    if short in _ENDED and not settling:
        way_out = (
            "resume it (`reconnect_and_wait`), or create another"
            if short in RESUMABLE
            else "create another, under another id"
        )
        return Verdict("failed", reason=f"it does not leave that state by itself: {way_out}")
    return Verdict("wait", queued=short in _QUEUED)


def is_under_way(state: str | None) -> bool:
    """Whether a trainer job runs, or comes up."""
    return judge_job(state).action != "failed"


def judge_deployment(state: str | None, *, most_replicas: int | None = None) -> Verdict:
    """What the state of a deployment means.

    While it is `CREATING` it may serve already: the state of a hot-load deployment can lag behind for long. One
    that was scaled to zero is `READY` and serves nothing.

    Args:
        state: As the service says it.
        most_replicas: How many replicas it may have; `None` if that is not told.
    """
    short = short_state(state)
    if short in ("FAILED", "DELETING", "DELETED"):
        return Verdict("failed", reason="it does not leave that state by itself: delete it, or choose another id")
    if most_replicas == 0:
        return Verdict("failed", reason="it is scaled to zero and serves nothing: raise its replica counts by `update`")
    if short == "READY":
        return Verdict("ready")
    if short == "CREATING":
        return Verdict("check")
    return Verdict("wait")
