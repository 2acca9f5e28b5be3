"""What a run of rollouts looks like in numbers: of each step for the log, and of the moment for a live view.

Times are integrals over states, updated whenever a state changes: how long the trainer waited, how long no rollout ran,
and how long both sides were at work at once. Time comes in as an argument.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from fwasync.rollout.capacity import Capacity
from fwasync.rollout.cursor import RowAccount
from fwasync.rollout.trajectory import RolloutGroup

__all__ = ("RolloutStatistics", "RunTelemetry", "Times", "TrainerState", "step_metrics")

TrainerState = Literal["elsewhere", "waiting for a batch", "waiting for a chunk", "training"]
"""`training` is all that the caller does with a batch in hand, weight sync included; `elsewhere` is what it does
without one, and without asking for one."""


@dataclass(frozen=True, slots=True)
class RolloutStatistics:
    """A run at a moment.

    Attributes:
        version: The published version.
        account: Where every row is.
        capacity: Samples that may be admitted.
        in_flight: Rollouts that run.
        oldest_s: For how long the oldest of them has.
        batches_ready: Batches of which a chunk could be taken, the one in hand included.
        trainer: What the caller does.
        trainer_s: For how long.
        drops: Rollouts that were lost, by cause: the name of an error (of a group, that of its first), `None` (the
            rollout said so) or `sibling` (its group was given up).
        elapsed_s: Seconds since the run began.
        trainer_idle_s: How many of them the caller waited.
        sampler_idle_s: How many of them no rollout ran.
        overlap_s: How many of them rollouts ran while the caller trained.
        worst_lag_s: The latest that the event loop has been for an appointment.
        source_exhausted: Whether the source has no more rows.
    """

    version: int
    account: RowAccount
    capacity: Capacity
    in_flight: int
    oldest_s: float
    batches_ready: int
    trainer: TrainerState
    trainer_s: float
    drops: dict[str, int]
    elapsed_s: float
    trainer_idle_s: float
    sampler_idle_s: float
    overlap_s: float
    worst_lag_s: float
    source_exhausted: bool

    def metrics(self) -> dict[str, float]:
        """The totals of the producer, for a log."""
        account = self.account
        dropped = sum(self.drops.values())
        return {
            "producer/elapsed_time_s": self.elapsed_s,
            "producer/in_flight_samples": float(self.in_flight),
            **{f"producer/{name}_capacity_samples": float(value) for name, value in self.capacity.limits().items()},
            "producer/published_version": float(self.version),
            "producer/rows_submitted_total": float(account.submitted),
            "producer/rows_completed_total": float(account.kept + account.waiting),
            "producer/rows_rejected_total": float(account.filtered + account.failed),
            "producer/rows_filtered_total": float(account.filtered),
            "producer/rows_failed_total": float(account.failed),
            "producer/trajectory_drops_total": float(dropped),
            "producer/recoverable_errors_total": float(
                dropped - self.drops.get("None", 0) - self.drops.get("sibling", 0)
            ),
            **{f"producer/drops/{cause}": float(count) for cause, count in sorted(self.drops.items())},
            "producer/incomplete_group_retries_total": float(account.retried),
            "producer/completion_refill_rows_submitted_total": float(account.refilled),
            "producer/source_exhausted": float(self.source_exhausted),
            "producer/event_loop_lag_max_s": self.worst_lag_s,
        }


@dataclass(slots=True)
class Times:
    """Seconds, and integrals over them.

    Attributes:
        elapsed: All.
        wait: The caller waited for a batch or a chunk.
        chunk_wait: It waited for a chunk.
        training: It had a batch in hand and did not wait.
        sampler_idle: No rollout ran.
        overlap: It trained, and rollouts ran.
        in_flight: Integral of the rollouts in flight.
        capacity: Integrals of the samples that might have been admitted.
    """

    elapsed: float = 0.0
    wait: float = 0.0
    chunk_wait: float = 0.0
    training: float = 0.0
    sampler_idle: float = 0.0
    overlap: float = 0.0
    in_flight: float = 0.0
    capacity: dict[str, float] = field(default_factory=dict[str, float])

    def add(self, seconds: float, trainer: TrainerState, in_flight: int, capacity: Capacity) -> None:
        """So many seconds passed in these states."""
        self.elapsed += seconds
        self.in_flight += seconds * in_flight
        if trainer == "training":
            self.training += seconds
            self.overlap += seconds * (in_flight > 0)
        elif trainer != "elsewhere":
            self.wait += seconds
            self.chunk_wait += seconds * (trainer == "waiting for a chunk")
        self.sampler_idle += seconds * (in_flight == 0)
        for name, value in capacity.limits().items():
            self.capacity[name] = self.capacity.get(name, 0.0) + seconds * value


class RunTelemetry:
    """Follows the states of a run.

    Args:
        now: The time.
        capacity: Samples that may be admitted.
    """

    def __init__(self, now: float, capacity: Capacity) -> None:
        self._now = now
        self._trainer: TrainerState = "elsewhere"
        self._trainer_since = now
        self._in_flight = 0
        self._capacity = capacity
        self._run = Times()
        self._step = Times()
        self.raw_rewards: list[float] = []
        self.step_filtered = 0
        self.drops: Counter[str] = Counter()

    @property
    def trainer(self) -> TrainerState:
        """What the caller does."""
        return self._trainer

    @property
    def trainer_since(self) -> float:
        """Since when."""
        return self._trainer_since

    @property
    def run(self) -> Times:
        """The times of the run."""
        return self._run

    def changed(self, now: float, in_flight: int, capacity: Capacity) -> None:
        """These are the states from now on."""
        self._pass(now)
        self._in_flight, self._capacity = in_flight, capacity

    def trainer_is(self, now: float, state: TrainerState) -> None:
        """The caller does this from now on."""
        self._pass(now)
        self._trainer, self._trainer_since = state, now

    def close_step(self, now: float) -> dict[str, float]:
        """The times of the step that ends now, for a log; the next begins."""
        self._pass(now)
        step, self._step = self._step, Times()
        raw, self.raw_rewards = self.raw_rewards, []
        filtered, self.step_filtered = self.step_filtered, 0
        seconds = step.elapsed or float("inf")
        means = {f"async/{name}_capacity_samples_mean": total / seconds for name, total in step.capacity.items()}
        return {
            **means,
            "async/in_flight_samples_mean": step.in_flight / seconds,
            "perf/step_time": step.elapsed,
            "perf/train_time": step.training,
            "perf/train_wait_time": step.wait,
            "perf/train_chunk_wait_time": step.chunk_wait,
            "perf/wait_time_ratio": step.wait / seconds,
            "perf/overlap_ratio": step.overlap / seconds,
            "perf/sampler_idle_time": step.sampler_idle,
            "rollout/raw_samples": float(len(raw)),
            **({"rollout/raw_reward": float(np.mean(raw))} if raw else {}),
            "rollout/filter_drops": float(filtered),
        }

    def _pass(self, now: float) -> None:
        seconds = now - self._now
        for times in (self._run, self._step):
            times.add(seconds, self._trainer, self._in_flight, self._capacity)
        self._now = now


def step_metrics(
    version: int, groups: Sequence[RolloutGroup[object]], queued_s: Sequence[float], chunks: int, step_time: float
) -> dict[str, float]:
    """What a batch was like.

    Args:
        version: The version that it was trained with.
        groups: Its groups.
        queued_s: How long each lay ready before it was taken.
        chunks: In how many chunks.
        step_time: Seconds of the step.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    rewards = [rollout.reward for rollout in rollouts]
    tokens = [rollout.sampled_tokens for rollout in rollouts]
    offsets = [version - group.version for group in groups]
    seconds = step_time or float("inf")
    return {
        "async/trained_against_version": float(version),
        "async/realized_training_chunks": float(chunks),
        **_spread("async/version_offset", offsets),
        **_spread("rollout/trainable_tokens", tokens),
        "rollout/reward": float(np.mean(rewards)),
        "rollout/samples_completed": float(len(rollouts)),
        "rollout/valid_prompt_groups": float(len(groups)),
        "rollout/truncated_ratio": float(np.mean([rollout.truncated for rollout in rollouts])),
        "rollout/queue_time_mean": float(np.mean(queued_s)),
        "rollout/queue_time_max": float(np.max(queued_s)),
        "perf/step_samples_per_s": len(rollouts) / seconds,
        "perf/step_tokens_per_s": sum(tokens) / seconds,
    }


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    return {
        f"{name}_min": float(min(values)),
        f"{name}_mean": float(np.mean(values)),
        f"{name}_max": float(max(values)),
    }
