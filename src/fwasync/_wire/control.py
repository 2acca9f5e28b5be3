"""The JSON messages of the control plane, as typed structs for both directions.

Names are camelCase on the wire, but for promotion, whose request is snake_case. A field that is `None` is neither sent
nor expected; a flag that has to be sent even when it is false is set explicitly. Unknown fields are ignored, and states
are plain strings, so that a newer server stays readable. Large integers travel as strings.
"""

from __future__ import annotations

from typing import Any

import msgspec

from fwasync._wire.messages import Message, decode, encode

__all__ = (
    "Account",
    "AccountList",
    "BaseModelDetails",
    "ControlCheckpoint",
    "ControlCheckpointList",
    "ControlMessage",
    "Deployment",
    "DeploymentList",
    "DeploymentShapeSnapshot",
    "DeploymentShapeVersion",
    "DeploymentShapeVersionList",
    "LongOperation",
    "Model",
    "ModelList",
    "PeftDetails",
    "Placement",
    "PromoteRequest",
    "Promotion",
    "ShardingScheme",
    "Status",
    "TrainerJob",
    "TrainerJobList",
    "TrainingConfig",
    "TrainingShapeSnapshot",
    "TrainingShapeVersion",
    "TrainingShapeVersionList",
    "decode",
    "encode",
)


class ControlMessage(Message, rename="camel"):
    """Base: as `Message`, in camelCase."""


class Status(ControlMessage):
    """What a resource says of itself. `code` is the name or the number of a gRPC code; `"OK"` is good."""

    code: str | int | None = None
    message: str | None = None
    details: list[Any] | None = None


# -- accounts and models ---------------------------------------------------------------------------


class Account(ControlMessage):
    """An account; `name` is `accounts/{id}`."""

    name: str
    display_name: str | None = None
    state: str | None = None
    email: str | None = None
    suspend_state: str | None = None


class AccountList(ControlMessage):
    """Answer of `GET /v1/accounts`."""

    accounts: list[Account] | None = None
    next_page_token: str | None = None
    total_size: int | None = None


class BaseModelDetails(ControlMessage):
    """What a base model is."""

    moe: bool | None = None
    model_type: str | None = None
    parameter_count: str | int | None = None
    world_size: int | None = None


class PeftDetails(ControlMessage):
    """What an adapter is."""

    base_model: str | None = None
    r: int | None = None
    target_modules: list[str] | None = None


class Model(ControlMessage):
    """A model; `name` is `accounts/{account}/models/{id}`, `state` `UPLOADING` or `READY`."""

    name: str
    state: str | None = None
    kind: str | None = None
    display_name: str | None = None
    context_length: int | None = None
    supports_lora: bool | None = None
    base_model_details: BaseModelDetails | None = None
    peft_details: PeftDetails | None = None
    create_time: str | None = None


class ModelList(ControlMessage):
    """Answer of `GET /v1/accounts/{a}/models`."""

    models: list[Model] | None = None
    next_page_token: str | None = None
    total_size: int | None = None


# -- trainer jobs ----------------------------------------------------------------------------------


class TrainingConfig(ControlMessage):
    """`trainingConfig` of a trainer job."""

    base_model: str | None = None
    lora_rank: int | None = None
    learning_rate: float | None = None
    gradient_accumulation_steps: int | None = None
    max_context_length: int | None = None
    custom_image_tag: str | None = None
    accelerator_type: str | None = None
    accelerator_count: int | None = None
    region: str | None = None
    extra_args: list[str] | None = None


class TrainerJob(ControlMessage):
    """A trainer job: body of `POST /v1/accounts/{a}/rlorTrainerJobs`, and every answer about one.

    A request has no `name`; an answer always has it: `accounts/{account}/rlorTrainerJobs/{id}`.
    """

    name: str | None = None
    display_name: str | None = None
    create_time: str | None = None
    update_time: str | None = None
    state: str | None = None
    status: Status | None = None
    service_mode: bool | None = None
    keep_alive: bool | None = None
    dataset: str | None = None
    training_config: TrainingConfig | None = None
    training_shape: str | None = None
    node_count: int | None = None
    trainer_replica_count: int | None = None
    forward_only: bool | None = None
    hot_load_deployment_id: str | None = None
    direct_route_handle: str | None = None
    use_reservation: bool | None = None
    reservation_target: str | None = None
    purpose: str | None = None
    preemptible: bool | None = None
    managed_by: str | None = None
    inactivity_timeout: str | None = None
    disable_inactivity_cleanup: bool | None = None


class TrainerJobList(ControlMessage):
    """Answer of `GET /v1/accounts/{a}/rlorTrainerJobs`."""

    rlor_trainer_jobs: list[TrainerJob] | None = None
    next_page_token: str | None = None
    total_size: int | None = None


# -- deployments -----------------------------------------------------------------------------------


class Placement(ControlMessage):
    """Where a deployment goes."""

    region: str | None = None


class Deployment(ControlMessage):
    """A deployment: body of `POST` and `PATCH`, and every answer about one.

    A request has no `name`; an answer always has it: `accounts/{account}/deployments/{id}`.
    """

    name: str | None = None
    display_name: str | None = None
    description: str | None = None
    create_time: str | None = None
    state: str | None = None
    status: Status | None = None
    base_model: str | None = None
    min_replica_count: int | None = None
    max_replica_count: int | None = None
    replica_count: int | None = None
    enable_hot_load: bool | None = None
    for_training: bool | None = None
    placement: Placement | None = None
    region: str | None = None
    hot_load_bucket_type: str | None = None
    hot_load_bucket_url: str | None = None
    hot_load_trainer_job: str | None = None
    hot_load_transition_type: str | None = None
    deployment_shape: str | None = None
    accelerator_type: str | None = None
    extra_args: list[str] | None = None
    extra_values: dict[str, str] | None = None
    annotations: dict[str, str] | None = None
    preemptible: bool | None = None


class DeploymentList(ControlMessage):
    """Answer of `GET /v1/accounts/{a}/deployments`."""

    deployments: list[Deployment] | None = None
    next_page_token: str | None = None
    total_size: int | None = None


# -- shapes ----------------------------------------------------------------------------------------


class ShardingScheme(ControlMessage):
    """`trainerShardingScheme` of a training shape."""

    pipeline_parallelism: int | None = None


class TrainingShapeSnapshot(ControlMessage):
    """What a version of a training shape fixes. Older servers number `trainer_mode`."""

    base_model: str | None = None
    model_type: str | None = None
    parameter_count: str | int | None = None
    trainer_mode: str | int | None = None
    trainer_image_tag: str | None = None
    accelerator_type: str | None = None
    accelerator_count: int | None = None
    node_count: int | None = None
    max_supported_context_length: int | None = None
    base_model_weight_precision: str | None = None
    deployment_shape_version: str | None = None
    deployment_image_tag: str | None = None
    trainer_sharding_scheme: ShardingScheme | None = None


class TrainingShapeVersion(ControlMessage):
    """`accounts/{a}/trainingShapes/{s}/versions/{v}`."""

    name: str
    create_time: str | None = None
    validated: bool | None = None
    latest_validated: bool | None = None
    public: bool | None = None
    snapshot: TrainingShapeSnapshot | None = None


class TrainingShapeVersionList(ControlMessage):
    """Answer of `GET /v1/{training shape}/versions`."""

    training_shape_versions: list[TrainingShapeVersion] | None = None
    next_page_token: str | None = None


class DeploymentShapeSnapshot(ControlMessage):
    """What a version of a deployment shape fixes."""

    base_model: str | None = None
    accelerator_type: str | None = None
    accelerator_count: int | None = None


class DeploymentShapeVersion(ControlMessage):
    """`accounts/{a}/deploymentShapes/{s}/versions/{v}`."""

    name: str
    create_time: str | None = None
    validated: bool | None = None
    latest_validated: bool | None = None
    public: bool | None = None
    snapshot: DeploymentShapeSnapshot | None = None


class DeploymentShapeVersionList(ControlMessage):
    """Answer of `GET /v1/{deployment shape}/versions`."""

    deployment_shape_versions: list[DeploymentShapeVersion] | None = None
    next_page_token: str | None = None


# -- checkpoints and promotion ---------------------------------------------------------------------


class ControlCheckpoint(ControlMessage):
    """A row of `GET /v1/{trainer job}/checkpoints`; `name` is `{trainer job}/checkpoints/{id}`.

    `checkpoint_type` is `CHECKPOINT_TYPE_` with `INFERENCE_BASE`, `INFERENCE_LORA` (both promotable),
    `INFERENCE_ARC_V2`, `TRAINING` or `TRAINING_LORA`.
    """

    name: str
    create_time: str | None = None
    update_time: str | None = None
    checkpoint_type: str | None = None
    promotable: bool | None = None


class ControlCheckpointList(ControlMessage):
    """Answer of `GET /v1/{trainer job}/checkpoints`, oldest first. Some servers name the rows the second way."""

    checkpoints: list[ControlCheckpoint] | None = None
    rlor_trainer_job_checkpoints: list[ControlCheckpoint] | None = None
    next_page_token: str | None = None


class PromoteRequest(Message):
    """`POST /v1/accounts/{a}/checkpoints/{c}:promote`. Its names are snake_case, unlike all others.

    All but the ids are resource names: `output_model` is `accounts/{a}/models/{m}`, `trainer_job_id`
    `accounts/{a}/rlorTrainerJobs/{j}`.
    """

    output_model: str
    trainer_job_id: str | None = None
    base_model: str | None = None
    hot_load_deployment_id: str | None = None
    async_promotion: bool | None = None


class LongOperation(ControlMessage):
    """A long operation; polled at `GET /v1/{name}`. Its `response` is a `Model` when a promotion is done."""

    name: str
    done: bool | None = None
    metadata: dict[str, Any] | None = None
    error: Status | None = None
    response: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class Promotion(ControlMessage):
    """Answer of a promotion: the model, or the operation that makes it if `async_promotion` was accepted."""

    model: Model | None = None
    operation: LongOperation | None = None
