"""`RolloutSettings`: what the scheduler is to keep to."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from fwasync.errors import UsageError
from fwasync.rollout.breaker import BreakerSettings

__all__ = ("RolloutSettings",)


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutSettings:
    """How much is sampled, how far ahead of the trainer, and what is done where it fails.

    Attributes:
        groups_per_batch: Groups of one optimizer step.
        group_size: Rollouts of each row.
        max_staleness: How many versions older than the weights that are trained a sampled token may be. 0 is strictly
            on policy: nothing is sampled ahead of the batch that is being trained.
        max_concurrency: The most rollouts that run at a time; at least `group_size`. Unset: what staleness allows.
        chunks_per_batch: In how many parts a batch is handed over; training may begin when the first is full.
        min_group_size: A group that keeps fewer rollouts is given up. Unset: 2, since one alone has no advantage; 1
            where `group_size` is 1.
        max_group_retries: How often a group that was given up is sampled anew, all of it, before its row counts as
            failed.
        rollout_timeout: Seconds that a rollout may take; then it is cancelled and counts as failed.
        seed: Every rollout gets a seed of its own that depends on this, its row, its number and the retry.
        breaker: When so many failures are too many.
        stall_timeout: Seconds without any progress after which the watchdog reports; `None` never does. Give it more
            than `rollout_timeout`, and more than your trainer takes for a chunk.

    Raises:
        UsageError: A number is out of its range.
    """

    groups_per_batch: int
    group_size: int
    max_staleness: int = 0
    max_concurrency: int | None = None
    chunks_per_batch: int = 1
    min_group_size: int | None = None
    max_group_retries: int = 0
    rollout_timeout: float = 1800.0
    seed: int = 0
    breaker: BreakerSettings = field(default_factory=BreakerSettings)
    stall_timeout: float | None = 3600.0

    def __post_init__(self) -> None:
        least = {"groups_per_batch": 1, "group_size": 1, "max_staleness": 0, "max_group_retries": 0}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least {minimum}")
        if self.max_concurrency is not None and self.max_concurrency < self.group_size:
            raise UsageError(
                f"max_concurrency is {self.max_concurrency} and group_size {self.group_size}: the rollouts of a row "
                "start together, so max_concurrency must be at least group_size"
            )
        if not 1 <= self.chunks_per_batch <= self.groups_per_batch:
            raise UsageError(
                f"chunks_per_batch is {self.chunks_per_batch}; it must be from 1 to groups_per_batch "
                f"({self.groups_per_batch}), since no chunk is empty"
            )
        if not 1 <= self.least_group_size <= self.group_size:
            raise UsageError(
                f"min_group_size is {self.min_group_size}; it must be from 1 to group_size ({self.group_size})"
            )
        for name, seconds in (("rollout_timeout", self.rollout_timeout), ("stall_timeout", self.stall_timeout)):
            if seconds is not None and not 0 < seconds < math.inf:
                raise UsageError(f"{name} is {seconds}; it must be a finite number of seconds above 0")

    @property
    def least_group_size(self) -> int:
        """`min_group_size`, or what it is unless set."""
        return min(2, self.group_size) if self.min_group_size is None else self.min_group_size
