"""The configuration of async RL: that of RL, and how far sampling and training may be apart.

Names and defaults are the cookbook's where it has them; the scheduler's own names are those of `RolloutSettings`.
"""

from __future__ import annotations

import sys
from typing import Literal

from pydantic import Field

from fwasync import RolloutSettings
from fwasync.recipes.policy_config import PolicyConfig

__all__ = ("Config",)


class Config(PolicyConfig):
    """What determines a run."""

    rollout: str = Field(
        default="",
        description="Or, instead of a reward: your async rollout(prompt, ctx) -> Rollout, as module:function or "
        "file.py:function.",
    )
    max_head_offpolicy_versions: int = Field(
        default=0, ge=0, description="How many versions older than the weights that learn a token may be. 0: none."
    )
    pipeline_chunks_per_step: int = Field(
        default=1, ge=1, description="In how many parts a step is trained on; the first as soon as it is sampled."
    )
    max_concurrency_rollout_sample: int | None = Field(
        default=None, ge=1, description="The most rollouts at a time. Unset: as many as may be stale."
    )
    min_group_size: int = Field(default=1, ge=1, description="A group with fewer answers left is given up.")
    max_incomplete_group_retries: int = Field(default=0, ge=0, description="How often it is sampled anew then.")
    rollout_timeout: float = Field(default=1800, gt=0, allow_inf_nan=False, description="Seconds of a rollout.")
    reward_processes: int = Field(
        default=0, ge=0, description="Rewards run in so many processes, which are killed when they hang. 0: in threads."
    )
    reward_timeout: float = Field(default=10, gt=0, allow_inf_nan=False, description="Seconds of a reward there.")
    evaluation_interval: int = Field(default=1, ge=1, description="Steps between evaluations, if one is given.")
    stall_timeout: float | None = Field(
        default=3600, gt=0, allow_inf_nan=False, description="Seconds without any progress that are too many."
    )
    on_stall: Literal["stop", "warn"] = Field(
        default="stop", description="Then: 'stop' saves a checkpoint and ends the run, 'warn' tells what is stuck."
    )
    trainer_restarts: int = Field(
        default=2,
        ge=0,
        description="How often a run whose trainer is lost goes on by itself, from its last checkpoint.",
    )

    def rollouts(self) -> RolloutSettings:
        """The settings of the scheduler.

        Raises:
            UsageError: They contradict each other.
        """
        return RolloutSettings(
            groups_per_batch=self.prompt_groups_per_step,
            group_size=self.completions_per_prompt,
            max_staleness=self.max_head_offpolicy_versions,
            max_concurrency=self.max_concurrency_rollout_sample,
            chunks_per_batch=self.pipeline_chunks_per_step,
            min_group_size=self.min_group_size,
            max_group_retries=self.max_incomplete_group_retries,
            rollout_timeout=self.rollout_timeout,
            seed=self.seed,
            stall_timeout=self.stall_timeout,
        )

    def problems(self) -> list[str]:
        """What keeps the run from being started, as sentences."""
        found = super().problems()
        if self.reward and self.rollout:
            found.append("reward and rollout are set; a rollout rewards itself: set one of them.")
        if self.pipeline_chunks_per_step > self.prompt_groups_per_step:
            found.append("pipeline_chunks_per_step is above prompt_groups_per_step; no chunk can be empty.")
        if (self.max_concurrency_rollout_sample or sys.maxsize) < self.completions_per_prompt:
            found.append("max_concurrency_rollout_sample is below completions_per_prompt; a group starts as a whole.")
        if self.min_group_size > self.completions_per_prompt:
            found.append("min_group_size is above completions_per_prompt.")
        if self.weight_sync.weight_sync_interval != 1:
            found.append(
                "weight_sync.weight_sync_interval must be 1: each step is published, and max_head_offpolicy_versions "
                "says how far rollouts run ahead. For fewer publications, raise prompt_groups_per_step."
            )
        return found
