"""What to say of a run in which nothing moves: which rollouts run, since when, what they do, and where they wait."""

from __future__ import annotations

import asyncio
import io
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import anyio

from fwasync.rollout.telemetry import RolloutStatistics

__all__ = ("NAMED", "RunningRollout", "StallReport", "dump_tasks", "waiting_at")

NAMED = 8
"""How many rollouts a text names."""
_PLUMBING = tuple(str(Path(str(module.__file__)).parent) for module in (asyncio, anyio))


@dataclass(frozen=True, slots=True)
class RunningRollout:
    """One rollout in flight.

    Attributes:
        row_index: Its row.
        rollout_index: Which of the row's.
        attempt: How often the row was tried before.
        version: The version that it was admitted at.
        age_s: Seconds since it started.
        doing: What it says that it does.
        doing_s: Seconds since it said so.
        waiting_at: The innermost line of the coroutine that waits, where that is known.
    """

    row_index: int
    rollout_index: int
    attempt: int
    version: int
    age_s: float
    doing: str
    doing_s: float
    waiting_at: str

    def __str__(self) -> str:
        retry = f", retry {self.attempt}" if self.attempt else ""
        return (
            f"row {self.row_index}, rollout {self.rollout_index}{retry} (version {self.version}): {self.doing} for "
            f"{self.doing_s:.1f} s, running for {self.age_s:.1f} s, waits at {self.waiting_at or 'an unknown place'}"
        )


@dataclass(frozen=True, slots=True)
class StallReport:
    """Nothing moved for `stalled_s` seconds. As a string it is a text for people.

    Attributes:
        stalled_s: For how long.
        statistics: The run at this moment.
        rollouts: What is in flight, the longest silent first.
        source_s: For how long the source has been asked for its next row; `None` if it is not being asked.
        trainer_at: The innermost line of the caller's that waits, where that is known.
        tasks: The stacks of all tasks of the loop.
    """

    stalled_s: float
    statistics: RolloutStatistics
    rollouts: Sequence[RunningRollout]
    source_s: float | None
    trainer_at: str
    tasks: str = field(repr=False)

    def __str__(self) -> str:
        now = self.statistics
        concurrency = "unlimited" if now.capacity.concurrency is None else now.capacity.concurrency
        lines = [
            f"no rollout, row, batch or publication has moved for {self.stalled_s:.1f} s",
            f"the trainer is {now.trainer} since {now.trainer_s:.1f} s at {self.trainer_at or 'an unknown place'}, "
            f"version {now.version} is published",
            f"rows: {now.account.in_flight} in flight, {now.account.waiting} kept and not published; room for "
            f"{now.capacity.staleness} samples by staleness, {concurrency} by concurrency",
        ]
        if self.source_s is not None:
            lines.append(f"the source has been asked for its next row since {self.source_s:.1f} s")
        if now.worst_lag_s > 1:
            lines.append(f"the event loop stood still for up to {now.worst_lag_s:.1f} s: something blocks it")
        lines += [str(rollout) for rollout in self.rollouts[:NAMED]]
        if len(self.rollouts) > NAMED:
            lines.append(f"and {len(self.rollouts) - NAMED} more rollouts")
        return "\n  ".join(lines)


def waiting_at(task: asyncio.Task[Any] | None) -> str:
    """File, line and function of the innermost coroutine that a task waits in; empty if that is not known.

    Those of asyncio and anyio are left out: that somebody sleeps or waits for an event says nothing.
    """
    place = ""
    for frame in _frames(task):
        code = frame.f_code
        if not code.co_filename.startswith(_PLUMBING):
            place = f"{code.co_filename}:{frame.f_lineno} in {code.co_qualname}"
    return place


def dump_tasks() -> str:
    """The stack of every task of the running loop, and the innermost place that it waits at."""
    text = io.StringIO()
    for task in sorted(asyncio.all_tasks(), key=lambda task: task.get_name()):
        print(f"{task.get_name()}: {waiting_at(task)}", file=text)
        for frame in _frames(task):
            traceback.print_stack(frame, limit=1, file=text)
    return text.getvalue()


def _frames(task: asyncio.Task[Any] | None) -> Iterator[FrameType]:
    """The frames of the coroutines that a task waits in, from the outermost; asyncio itself tells of the first only."""
    inner: Any = None if task is None or task.done() else task.get_coro()
    while inner is not None:
        frame = getattr(inner, "cr_frame", None) or getattr(inner, "gi_frame", None) or getattr(inner, "ag_frame", None)
        if frame is None:
            break
        yield frame
        inner = (
            getattr(inner, "cr_await", None) or getattr(inner, "gi_yieldfrom", None) or getattr(inner, "ag_await", None)
        )
