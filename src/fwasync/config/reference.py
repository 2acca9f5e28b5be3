"""The configurations of a recipe: where it trains, where it samples, when weights travel, where it logs.

Names, types and defaults are those of the cookbook's reference. Hardware belongs to the shapes: the fields that name it
are marked internal, and are for development against services without shapes.
"""

from __future__ import annotations

import re
import secrets
from contextlib import AbstractAsyncContextManager
from typing import Any, Self, TypeVar

from pydantic import Field, field_validator, model_validator

from fwasync.config.base import (
    Config,
    DeploymentShapeName,
    NonEmpty,
    ResourceId,
    Seconds,
    TrainingShapeName,
    WholeSeconds,
)
from fwasync.config.launch import Deployments, OnProgress, TrainerJobs, launch_deployment, launch_trainer
from fwasync.config.resources import DeploymentConfig, TrainerJobConfig
from fwasync.errors import UsageError

__all__ = (
    "ConcurrencyConfig",
    "DeployConfig",
    "InfraConfig",
    "WandBConfig",
    "WeightSyncConfig",
    "derived_deployment_id",
)

E = TypeVar("E")
D = TypeVar("D")

_LONGEST_ID = 63


def _internal(what: str, **limits: Any) -> Any:
    return Field(
        default=None,
        description=f"Internal, for development: {what}. The shape sets it; not for users.",
        json_schema_extra={"internal": True},
        **limits,
    )


def derived_deployment_id(base_model: str, unique: str) -> str:
    """A deployment's id made of the last part of a model's name, and of something unique."""
    stem = re.sub(r"[^a-z0-9]+", "-", base_model.rpartition("/")[2].lower()).strip("-") or "deployment"
    return f"{stem[: _LONGEST_ID - 1 - len(unique)].rstrip('-')}-{unique}"


class InfraConfig(Config):
    """GPUs, region and training shapes of the trainers."""

    training_shape_id: TrainingShapeName | None = Field(
        default=None,
        description="Full name of the policy trainer's shape, typically accounts/fireworks/trainingShapes/<shape>. "
        "Everything about hardware follows from it.",
    )
    ref_training_shape_id: TrainingShapeName | None = Field(
        default=None,
        description="Full name of the reference trainer's shape. Unset: no reference is brought up.",
    )
    region: NonEmpty | None = Field(
        default=None, description="Region of the trainers, instead of the service's choice."
    )
    trainer_timeout_s: Seconds = Field(
        default=3600.0, description="Seconds that a trainer may take to become ready, once it has its machines."
    )
    extra_args: list[str] | None = Field(default=None, description="Further arguments of the trainer.")
    accelerator_type: NonEmpty | None = _internal("type of accelerator, such as NVIDIA_H200_141GB")
    accelerator_count: int | None = _internal("accelerators of a node", ge=1)
    node_count: int | None = _internal("nodes", ge=1)
    custom_image_tag: NonEmpty | None = _internal("image of the trainer")

    @model_validator(mode="after")
    def _hardware_is_the_shapes(self) -> Self:
        names = ("accelerator_type", "accelerator_count", "node_count", "custom_image_tag")
        given = [name for name in names if getattr(self, name) is not None]
        if given and (self.training_shape_id or self.ref_training_shape_id):
            raise ValueError(f"{', '.join(given)} cannot be set together with a training shape, which sets them itself")
        return self

    def to_trainer_job_config(
        self,
        base_model: str,
        lora_rank: int = 0,
        *,
        reference: bool = False,
        learning_rate: float = 1e-5,
        max_context_length: int | None = None,
        display_name: str | None = None,
        hot_load_deployment_id: str | None = None,
        job_id: str | None = None,
    ) -> TrainerJobConfig:
        """The trainer job to ask for.

        Args:
            base_model: Full name of the model, `accounts/{account}/models/{model}`.
            lora_rank: Rank of the adapter; 0 trains all parameters.
            reference: The forward-only reference on `ref_training_shape_id`, instead of the policy.
            learning_rate: What the job is labelled with; each optimizer step brings its own.
            max_context_length: Tokens; a shape sets it itself.
            display_name: What consoles show.
            hot_load_deployment_id: The deployment that takes this trainer's snapshots, if it was made first.
            job_id: The job's id. Unset: chosen when the job is created.

        Raises:
            ValueError: One of the arguments is out of its range, or the policy has a shape and the reference has not.
        """
        if reference and self.training_shape_id and not self.ref_training_shape_id:
            raise UsageError(
                "a reference trainer needs ref_training_shape_id, as the policy trainer has training_shape_id"
            )
        return TrainerJobConfig(
            base_model=base_model,
            lora_rank=lora_rank,
            learning_rate=learning_rate,
            max_context_length=max_context_length,
            display_name=display_name,
            hot_load_deployment_id=hot_load_deployment_id,
            region=self.region,
            extra_args=self.extra_args,
            training_shape_ref=self.ref_training_shape_id if reference else self.training_shape_id,
            forward_only=reference,
            accelerator_type=self.accelerator_type,
            accelerator_count=self.accelerator_count,
            node_count=self.node_count,
            custom_image_tag=self.custom_image_tag,
            requested_job_id=job_id,
        )

    def launch(
        self,
        jobs: TrainerJobs[E],
        *,
        base_model: str,
        lora_rank: int = 0,
        reference: bool = False,
        display_name: str | None = None,
        hot_load_deployment_id: str | None = None,
        job_id: str | None = None,
        on_progress: OnProgress | None = None,
    ) -> AbstractAsyncContextManager[E]:
        """A trainer that is up inside of the block and removed after it.

        ```python
        async with infra.launch(jobs, base_model=model, lora_rank=16) as endpoint:
            ...
        ```

        A job that exists already under `job_id` is used, resumed if need be, and left in place.

        Args:
            jobs: An `AsyncTrainerJobManager`.
            base_model: As for `to_trainer_job_config`, like all that follow.
            lora_rank: Rank of the adapter.
            reference: The reference instead of the policy.
            display_name: What consoles show.
            hot_load_deployment_id: The deployment that takes its snapshots.
            job_id: The job's id.
            on_progress: Called with each state that is seen.

        Raises:
            ProvisioningError: On entering: the job failed, or was not ready in time.
            ServiceError, TransportError: On entering: as for any request.

        **Cancellation:** what this call created is removed before the cancellation goes on, within a minute.
        """
        config = self.to_trainer_job_config(
            base_model,
            lora_rank,
            reference=reference,
            display_name=display_name,
            hot_load_deployment_id=hot_load_deployment_id,
            job_id=job_id,
        )
        return launch_trainer(jobs, config, timeout=self.trainer_timeout_s, on_progress=on_progress)


class DeployConfig(Config):
    """The deployment that samples, and takes the weights that are synced."""

    deployment_id: ResourceId | None = Field(
        default=None, description="The deployment's id. Unset: derived from the base model's name."
    )
    tokenizer_model: NonEmpty | None = Field(
        default=None, description="Hugging Face model whose tokenizer the client uses. RL sampling needs it."
    )
    deployment_shape: DeploymentShapeName | None = Field(
        default=None, description="Full name of the deployment's shape, which sets hardware and serving."
    )
    deployment_region: NonEmpty | None = Field(
        default=None, description="Region of the deployment; never taken from the trainer's."
    )
    hot_load_bucket_type: NonEmpty = Field(default="FW_HOSTED", description="Storage through which weights are synced.")
    deployment_timeout_s: Seconds = Field(
        default=5400.0, description="Seconds that the deployment may take to become ready."
    )
    deployment_extra_args: list[str] | None = Field(default=None, description="Further arguments of the server.")
    sample_timeout: WholeSeconds = Field(default=600, description="Seconds that one completion may take.")
    disable_speculative_decoding: bool = Field(
        default=True, description="Turn speculative decoding off, for hot-loading's sake."
    )
    extra_values: dict[str, str] | None = Field(default=None, description="Further Helm values of the deployment.")
    replica_count: int | None = Field(
        default=None, ge=1, description="Pins the number of replicas: least and most. Unset: one."
    )
    deployment_accelerator_type: NonEmpty | None = _internal("type of accelerator")

    @model_validator(mode="after")
    def _hardware_is_the_shapes(self) -> Self:
        if self.deployment_shape and self.deployment_accelerator_type:
            raise ValueError(
                "deployment_accelerator_type cannot be set together with deployment_shape, which sets it itself"
            )
        return self

    def to_deployment_config(
        self, base_model: str, infra: InfraConfig | None = None, *, hot_load_trainer_job: str | None = None
    ) -> DeploymentConfig:
        """The deployment to ask for.

        Args:
            base_model: Full name of the model.
            infra: Where the type of accelerator is taken from, if there is no shape and none is set here.
            hot_load_trainer_job: Full name of the trainer job whose snapshots it takes, if that was made first.
        """
        accelerator = self.deployment_accelerator_type or (infra.accelerator_type if infra else None)
        return DeploymentConfig(
            deployment_id=self.deployment_id or derived_deployment_id(base_model, secrets.token_hex(4)),
            base_model=base_model,
            deployment_shape=self.deployment_shape,
            region=self.deployment_region,
            min_replica_count=self.replica_count or 1,
            max_replica_count=self.replica_count or 1,
            accelerator_type=None if self.deployment_shape else accelerator,
            hot_load_bucket_type=self.hot_load_bucket_type,
            hot_load_trainer_job=hot_load_trainer_job,
            disable_speculative_decoding=self.disable_speculative_decoding,
            extra_args=self.deployment_extra_args,
            extra_values=self.extra_values,
            for_training=True,
        )

    def launch(
        self,
        deployments: Deployments[D],
        *,
        base_model: str,
        infra: InfraConfig | None = None,
        hot_load_trainer_job: str | None = None,
        on_progress: OnProgress | None = None,
    ) -> AbstractAsyncContextManager[D]:
        """A deployment that is serving inside of the block and removed after it.

        One that exists already under `deployment_id` is used, and left in place.

        Args:
            deployments: An `AsyncDeploymentManager`.
            base_model: As for `to_deployment_config`, like all that follow.
            infra: The trainers' configuration.
            hot_load_trainer_job: The trainer job whose snapshots it takes.
            on_progress: Called with each state that is seen.

        Raises:
            ProvisioningError: On entering: the deployment failed, or was not ready in time.
            UsageError: On entering: the existing one serves another base model.
            ServiceError, TransportError: On entering: as for any request.

        **Cancellation:** what this call created is removed before the cancellation goes on, within a minute.
        """
        config = self.to_deployment_config(base_model, infra, hot_load_trainer_job=hot_load_trainer_job)
        return launch_deployment(deployments, config, timeout=self.deployment_timeout_s, on_progress=on_progress)


class WeightSyncConfig(Config):
    """When checkpoints are saved, and when the sampler gets new weights."""

    dcp_save_interval: int = Field(
        default=0, ge=0, description="Save a resumable checkpoint every N steps. 0: never, and no run can be resumed."
    )
    weight_sync_interval: int = Field(
        default=1, ge=0, description="Save and sync the sampler's weights every N optimizer steps. 0: never."
    )
    dcp_timeout: WholeSeconds = Field(default=2700, description="Seconds that saving or loading a checkpoint may take.")
    first_checkpoint_type: str = Field(
        default="base",
        description="Kind of the first snapshot. A 'delta' is taken, and saved as a 'base' all the same: nothing is "
        "served yet that it could be loaded onto.",
    )
    weight_sync_before_training: bool = Field(
        default=False, description="Save a base snapshot and hot-load it before the first step."
    )
    weight_sync_timeout: WholeSeconds = Field(default=600, description="Seconds that one hot-load may take.")

    @field_validator("first_checkpoint_type")
    @classmethod
    def _base_or_delta(cls, value: str) -> str:
        if value not in ("base", "delta"):
            raise ValueError(f"it is {value!r}; it must be 'base' (all weights) or 'delta' (what has changed)")
        return value


class WandBConfig(Config):
    """Weights & Biases; it is logged to if `entity` is set."""

    entity: str | None = Field(default=None, description="Team or user.")
    project: str | None = Field(default=None, description="Project.")
    run_name: str | None = Field(default=None, description="Name of the run. Unset: made by W&B.")


class ConcurrencyConfig(Config):
    """How many samples are in flight at a time."""

    mode: str | None = Field(
        default=None,
        description="'adaptive' follows the server's load, 'fixed' is one number. Unset: no limit but max_concurrency.",
    )
    max_concurrency: int | None = Field(
        default=None, ge=1, description="The number of mode 'fixed'. The most of 'adaptive' is max_window."
    )
    initial_window: int | None = Field(
        default=None, ge=1, description="Where 'adaptive' begins. Unset: eight for each replica."
    )
    min_window: int = Field(default=1, ge=1, description="The least of 'adaptive'.")
    max_window: int = Field(default=256, ge=1, description="The most of 'adaptive'.")
    prefill_queue_target: float = Field(
        default=0.5, gt=0, allow_inf_nan=False, description="Seconds of queueing on the server that 'adaptive' aims at."
    )
    rollout_adjustment_interval: int = Field(
        default=32, ge=1, description="Completed rollouts between adjustments of 'adaptive'."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.mode not in (None, "adaptive", "fixed"):
            raise ValueError(f"mode is {self.mode!r}; it must be 'adaptive', 'fixed' or None")
        if self.mode == "fixed" and self.max_concurrency is None:
            raise ValueError("mode 'fixed' needs max_concurrency, the number of samples in flight")
        if self.mode == "adaptive" and self.max_concurrency is not None:
            raise ValueError("max_concurrency is not for mode 'adaptive'; max_window is the most that it lets run")
        if self.min_window > self.max_window:
            raise ValueError(f"min_window {self.min_window} is more than max_window {self.max_window}")
        if self.initial_window is not None and not self.min_window <= self.initial_window <= self.max_window:
            raise ValueError(
                f"initial_window {self.initial_window} is not between min_window {self.min_window} "
                f"and max_window {self.max_window}"
            )
        return self
