"""DPO: learn which of two answers is preferred, from how far each is from a frozen reference.

The reference is the base model. Its logprobs are computed beside the first steps, and kept; it is released as soon as
all of them are known, and later passes do without it. A run that goes on computes those that it still needs.

The loss of a step is the mean over its pairs, so the optimizer is asked for no normalization. Every pass takes the
pairs in an order of its own, which depends on seed and pass alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

from pydantic import Field, model_validator

from fwasync.config import DeployConfig, WandBConfig, WeightSyncConfig
from fwasync.config.base import ResourceId
from fwasync.data.pairs import Pair
from fwasync.losses import Reduction, make_batch_dpo_loss_fn
from fwasync.recipes import pairs
from fwasync.recipes.batches import Batch
from fwasync.recipes.callbacks import EvalFn, StepCallback
from fwasync.recipes.loop import Hooks, Result, Submitted, open_loop
from fwasync.recipes.pairs import dry_run
from fwasync.recipes.references import ReferenceLogprobs
from fwasync.recipes.stopping import StopRequest
from fwasync.recipes.syncing import WeightSync
from fwasync.recipes.trainers import Where
from fwasync.tracking.run import Run

__all__ = ("PHASE", "Config", "Result", "dry_run", "train")

PHASE = "dpo"


class Config(pairs.PairsConfig):
    """What determines a run."""

    reduction: ClassVar[Reduction] = Reduction.MEAN_PAIRS
    has_reference: ClassVar[bool] = True

    beta: float = Field(
        default=0.1, gt=0, allow_inf_nan=False, description="How firmly the reference holds the policy; above 0."
    )
    ref_cache_concurrency: int = Field(default=16, ge=1, description="Requests at a time to the reference.")
    ref_cache_batch_size: int = Field(default=1, ge=1, description="Pairs of such a request.")
    reference_job_id: ResourceId | None = Field(
        default=None, description="The reference's trainer job, likewise. It is kept to the end of the run."
    )
    deployment: DeployConfig = Field(default=DeployConfig(), description="Gets the weights, if they are synced.")
    weight_sync: WeightSyncConfig = Field(
        default=WeightSyncConfig(weight_sync_interval=0), description="When the deployment gets the weights: never."
    )
    wandb: WandBConfig = Field(default=WandBConfig(project="dpo-tinker"), description="Weights & Biases.")

    @model_validator(mode="before")
    @classmethod
    def _checkpoints_as_before(cls, given: Any) -> Any:
        """`weight_sync` has an interval for checkpoints too, which counts where `dcp_save_interval` is not given.

        A section that does not say how often weights are synced means never, like no section at all.
        """
        if not isinstance(given, Mapping):
            return given
        values = dict(cast("Mapping[str, Any]", given))
        sync = values.get("weight_sync")
        if isinstance(sync, Mapping):
            sync = values["weight_sync"] = {"weight_sync_interval": 0, **cast("Mapping[str, Any]", sync)}
            interval = sync.get("dcp_save_interval")
        else:
            interval = getattr(sync, "dcp_save_interval", None)
        if interval:
            values.setdefault("dcp_save_interval", interval)
        return values

    @property
    def checkpoint_timeout_s(self) -> float | None:
        """Seconds that saving or loading a checkpoint may take."""
        return self.weight_sync.dcp_timeout

    @property
    def jobs(self) -> tuple[str | None, str | None]:
        """The trainer jobs to use that may be there already."""
        return self.job_id, self.reference_job_id

    @property
    def is_synced(self) -> bool:
        """Whether a deployment gets the weights."""
        return self.weight_sync.weight_sync_interval > 0 or self.weight_sync.weight_sync_before_training

    def problems(self) -> list[str]:
        """What keeps the run from being started, as sentences."""
        found, launched = super().problems(), self.infra.training_shape_id is not None
        if launched and self.lora_rank == 0 and self.infra.ref_training_shape_id is None:
            found.append(
                "infra.ref_training_shape_id is unset; where all parameters are trained, the reference needs a trainer "
                "of its own."
            )
        if self.is_synced and not launched:
            found.append("weight_sync is on; only a trainer job's weights are synced to a deployment: set infra too.")
        if self.deployment != DeployConfig() and not self.is_synced:
            found.append("deployment is set and would never get weights; set weight_sync.weight_sync_interval too.")
        if self.weight_sync.dcp_save_interval not in (0, self.dcp_save_interval):
            found.append("dcp_save_interval and weight_sync.dcp_save_interval differ; give one of them.")
        return found


async def train(
    config: Config,
    *,
    where: Where | None = None,
    run: Run | None = None,
    stop: StopRequest | None = None,
    on_step: StepCallback | None = None,
    evaluate: EvalFn | None = None,
) -> Result[Pair]:
    """Train on preferences; go on where the run in `config.log_path` was interrupted, if it was.

    Args:
        config: What to do.
        where: Where; by default on the service that the environment names.
        run: Where to log; by default in `config.log_path`. `train/dpo_loss`, `train/margin`, `train/accuracy`,
            `train/chosen_reward`, `train/rejected_reward` (means over pairs; see `make_batch_dpo_loss_fn`),
            `train/batch_pairs`, `train/step_tokens` (targets), `train/lr`, `train/epoch`, `train/step_time_sec`,
            `train/tokens_per_sec`, what the trainer tells as `train/<name>`, and `perf/weight_sync_time`.
        stop: Looked at between steps; if it is asked, the run saves a checkpoint and returns.
        on_step: Called after each step.
        evaluate: Called at the end of each pass.

    Raises:
        UsageError: The configuration or the data cannot be trained on; nothing was.
        FwasyncError: What the service's operations raise.

    **Cancellation:** the run keeps what was logged; checkpoints that were listed stay.
    """
    hooks = Hooks(where, run, stop, on_step, evaluate)
    deploy = config.deployment if config.is_synced else None
    async with open_loop(config, PHASE, pairs.read, pairs.limited, hooks, reference=True, deploy=deploy) as loop:
        references = ReferenceLogprobs(
            loop.rows,
            loop.plan,
            together=config.ref_cache_batch_size,
            concurrency=config.ref_cache_concurrency,
            timeout=config.step_timeout_s,
        )

        def released() -> None:
            loop.run.message(f"the reference's logprobs of {references.needed} pairs are known; it is released")

        async def submit(batch: Batch) -> Submitted:
            chosen, rejected = await references.of(batch.rows)
            rows = loop.rows.chosen(batch.rows)
            loss_fn = make_batch_dpo_loss_fn(chosen, rejected, [pair.response_start for pair in rows], config.beta)
            return await pairs.submit_pairs(config, loop.trainers.policy, rows, loss_fn)

        async with references.computed(loop.trainers.open_reference, released):
            sync = WeightSync(config, config.weight_sync, loop.trainers) if config.is_synced else None
            return await loop.go(submit, sync=sync)
