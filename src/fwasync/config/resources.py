"""The two resources of the control plane, as they are asked for."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from fwasync.config.base import Config, DeploymentShapeName, NonEmpty, ResourceId, TrainingShapeName

__all__ = ("DeploymentConfig", "TrainerJobConfig")

_MODE_NAMES = ("ASYNC", "SYNC")


class TrainerJobConfig(Config):
    """A trainer job.

    With `training_shape_ref` the shape sets the hardware; with `auto_select_training_shape` the service picks a shape;
    with neither the hardware is asked for by hand, which services open to the public refuse.
    """

    base_model: NonEmpty = Field(description="Full name of the model, accounts/{account}/models/{model}.")
    lora_rank: int = Field(default=0, ge=0, description="Rank of the adapter; 0 trains all parameters.")
    max_context_length: int | None = Field(default=None, ge=1, description="Tokens. Not sent with a shape.")
    learning_rate: float = Field(default=1e-5, ge=0, allow_inf_nan=False, description="The job's label.")
    node_count: int | None = Field(default=None, ge=1, description="Nodes, without a shape.")
    display_name: str | None = Field(default=None, max_length=63, description="What consoles show.")
    hot_load_deployment_id: NonEmpty | None = Field(
        default=None, description="The deployment that takes this trainer's snapshots, if it was made first."
    )
    region: NonEmpty | None = Field(default=None, description="Region, instead of the service's choice.")
    custom_image_tag: NonEmpty | None = Field(default=None, description="Image of the trainer.")
    extra_args: list[str] | None = Field(
        default=None, description="Further arguments of the trainer; cut at spaces, without quoting."
    )
    accelerator_type: NonEmpty | None = Field(default=None, description="Type of accelerator, without a shape.")
    accelerator_count: int | None = Field(default=None, ge=1, description="Accelerators of a node, without a shape.")
    training_shape_ref: TrainingShapeName | None = Field(
        default=None, description="Full name of the shape, with or without its version."
    )
    auto_select_training_shape: bool = Field(default=False, description="Let the service pick a shape.")
    forward_only: bool = Field(default=False, description="A reference, which does not train.")
    skip_validations: bool = Field(default=False, description="Ask the service not to check the request.")
    trainer_replica_count: int | None = Field(default=None, ge=1, description="Replicas of the trainer.")
    inactivity_timeout_s: int | None = Field(
        default=None, ge=0, le=10_800, description="Seconds without work after which the service stops the job."
    )
    preemptible: bool = Field(default=False, description="The service may take the machines away.")
    use_reservation: bool = Field(default=True, description="Use reserved capacity.")
    reservation_target: NonEmpty | None = Field(default=None, description="A reservation to use instead.")
    requested_job_id: ResourceId | None = Field(
        default=None, description="The job's id. Unset: chosen when the job is created."
    )

    @model_validator(mode="after")
    def _hardware_is_the_shapes(self) -> Self:
        if self.training_shape_ref and self.auto_select_training_shape:
            raise ValueError("give either training_shape_ref or auto_select_training_shape, not both")
        given = [
            name for name in ("accelerator_type", "accelerator_count", "node_count") if getattr(self, name) is not None
        ]
        if given and (self.training_shape_ref or self.auto_select_training_shape):
            raise ValueError(f"{', '.join(given)} cannot be set together with a training shape, which sets them itself")
        return self


class DeploymentConfig(Config):
    """A deployment."""

    deployment_id: ResourceId = Field(description="The deployment's id.")
    base_model: NonEmpty = Field(description="Full name of the model.")
    deployment_shape: DeploymentShapeName | None = Field(
        default=None, description="Full name of the shape, best with its version."
    )
    region: NonEmpty | None = Field(default=None, description="Region, instead of the service's choice.")
    min_replica_count: int = Field(default=0, ge=0, description="The least number of replicas.")
    max_replica_count: int = Field(default=1, ge=0, description="The most.")
    accelerator_type: NonEmpty | None = Field(
        default="NVIDIA_H200_141GB", description="Type of accelerator; not sent with a shape."
    )
    hot_load_bucket_type: NonEmpty | None = Field(
        default="FW_HOSTED", description="Storage through which weights are synced."
    )
    hot_load_trainer_job: NonEmpty | None = Field(
        default=None, description="Full name of the trainer job whose snapshots it takes."
    )
    hot_load_transition_type: str | None = Field(
        default=None, description="Whether requests wait while weights are swapped, 'SYNC', or not, 'ASYNC'."
    )
    enable_hot_load: bool = Field(default=True, description="Take new weights while serving.")
    skip_shape_validation: bool = Field(default=False, description="Ask the service not to check the shape.")
    accept_shapeless_risk: bool = Field(default=False, description="Deploy without a shape, knowingly.")
    disable_speculative_decoding: bool = Field(default=False, description="Turn speculative decoding off.")
    extra_args: list[str] | None = Field(
        default=None, description="Further arguments of the server; cut at spaces, without quoting."
    )
    extra_values: dict[str, str] | None = Field(default=None, description="Further Helm values.")
    description: str | None = Field(default=None, description="What consoles show.")
    annotations: dict[str, str] | None = Field(default=None, description="Labels of your own.")
    for_training: bool = Field(default=False, description="It serves a training run.")
    preemptible: bool = Field(default=False, description="The service may take the machines away.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.min_replica_count > self.max_replica_count:
            raise ValueError(
                f"min_replica_count {self.min_replica_count} is more than max_replica_count {self.max_replica_count}"
            )
        if self.accept_shapeless_risk and self.deployment_shape:
            raise ValueError("accept_shapeless_risk cannot be set together with deployment_shape")
        if self.hot_load_transition_type not in (None, *_MODE_NAMES):
            raise ValueError(
                f"hot_load_transition_type is {self.hot_load_transition_type!r}; it must be 'ASYNC', 'SYNC' or None"
            )
        return self
