"""What the control plane answers, as plain values."""

from __future__ import annotations

from dataclasses import dataclass

from fwasync._wire import control
from fwasync.control.names import last_part, parent_shape
from fwasync.control.states import short_state

__all__ = (
    "CheckpointInfo",
    "CreatedDeployment",
    "CreatedTrainerJob",
    "DeploymentInfo",
    "DeploymentShapeProfile",
    "ModelInfo",
    "TrainerJobInfo",
    "TrainerServiceEndpoint",
    "TrainingShapeProfile",
)


@dataclass(frozen=True, slots=True)
class CreatedTrainerJob:
    """A trainer job that was asked for.

    Attributes:
        job_name: `accounts/{account}/rlorTrainerJobs/{job}`.
        job_id: Its last part.
        created: False if the job existed before.
    """

    job_name: str
    job_id: str
    created: bool = True


@dataclass(frozen=True, slots=True)
class TrainerServiceEndpoint:
    """A trainer that answers.

    Attributes:
        job_name: `accounts/{account}/rlorTrainerJobs/{job}`.
        job_id: Its last part.
        base_url: Where an `AsyncServiceClient` finds it.
        max_context_length: In tokens, if the service says so.
    """

    job_name: str
    job_id: str
    base_url: str
    max_context_length: int | None = None


@dataclass(frozen=True, slots=True)
class TrainerJobInfo:
    """A trainer job as it was when it was asked about.

    Attributes:
        job_name: `accounts/{account}/rlorTrainerJobs/{job}`.
        job_id: Its last part.
        state: `RUNNING`, `PENDING`, `FAILED` …, without the service's prefix.
        message: What it says of its state.
        display_name: What consoles show.
        base_model: Full name of the model.
        lora_rank: Rank of the adapter; 0 trains all parameters.
        max_context_length: In tokens, if the service says so.
        forward_only: It is a reference.
        hot_load_deployment_id: The deployment that takes its snapshots.
        create_time: RFC 3339.
    """

    job_name: str
    job_id: str
    state: str
    message: str = ""
    display_name: str = ""
    base_model: str = ""
    lora_rank: int = 0
    max_context_length: int | None = None
    forward_only: bool = False
    hot_load_deployment_id: str = ""
    create_time: str = ""

    @classmethod
    def read(cls, job: control.TrainerJob) -> TrainerJobInfo:
        """From the wire."""
        name, training = job.name or "", job.training_config or control.TrainingConfig()
        length = training.max_context_length
        return cls(
            job_name=name,
            job_id=last_part(name),
            state=short_state(job.state),
            message=_said(job.status),
            display_name=job.display_name or "",
            base_model=training.base_model or "",
            lora_rank=training.lora_rank or 0,
            max_context_length=length if length and length > 0 else None,
            forward_only=bool(job.forward_only),
            hot_load_deployment_id=job.hot_load_deployment_id or "",
            create_time=job.create_time or "",
        )


@dataclass(frozen=True, slots=True)
class CreatedDeployment:
    """A deployment that was asked for.

    Attributes:
        name: `accounts/{account}/deployments/{deployment}`.
        deployment_id: Its last part.
        created: False if the deployment existed before.
    """

    name: str
    deployment_id: str
    created: bool = True


@dataclass(frozen=True, slots=True)
class DeploymentInfo:
    """A deployment as it was when it was asked about.

    Attributes:
        deployment_id: The last part of its name.
        name: `accounts/{account}/deployments/{deployment}`.
        state: `READY`, `CREATING`, `FAILED` …
        message: What it says of its state.
        base_model: Full name of the model.
        hot_load_bucket_url: Where its snapshots are.
        hot_load_trainer_job: Full name of the trainer job whose snapshots it takes.
        deployment_shape_version: Full name of its shape's version.
        replica_count: Replicas that run.
        create_time: RFC 3339.
        max_replica_count: The most that may run.
    """

    deployment_id: str
    name: str
    state: str
    message: str = ""
    base_model: str = ""
    hot_load_bucket_url: str | None = None
    hot_load_trainer_job: str | None = None
    deployment_shape_version: str | None = None
    replica_count: int | None = None
    create_time: str = ""
    max_replica_count: int | None = None

    @property
    def inference_model(self) -> str:
        """What completions call it: its full name."""
        return self.name

    @classmethod
    def read(cls, deployment: control.Deployment) -> DeploymentInfo:
        """From the wire."""
        name = deployment.name or ""
        return cls(
            deployment_id=last_part(name),
            name=name,
            state=short_state(deployment.state),
            message=_said(deployment.status),
            base_model=deployment.base_model or "",
            hot_load_bucket_url=deployment.hot_load_bucket_url or None,
            hot_load_trainer_job=deployment.hot_load_trainer_job or None,
            deployment_shape_version=deployment.deployment_shape or None,
            replica_count=deployment.replica_count,
            create_time=deployment.create_time or "",
            max_replica_count=deployment.max_replica_count,
        )


@dataclass(frozen=True, slots=True)
class TrainingShapeProfile:
    """A training shape, resolved to one version.

    Attributes:
        training_shape_version: Full name, with the version.
        trainer_mode: `POLICY_TRAINER`, `LORA_TRAINER` or `FORWARD_ONLY`.
        base_model: Full name of the model that it is for.
        max_supported_context_length: In tokens; 0 if unknown.
        deployment_shape_version: Full name of the deployment shape that goes with it; empty if there is none.
        accelerator_type: Of the trainer.
        accelerator_count: Of a node.
        node_count: Nodes.
        pipeline_parallelism: Stages of the pipeline.
        trainer_image_tag: Image of the trainer.
        deployment_image_tag: Image of the deployment.
        base_model_weight_precision: Such as `BF16`.
    """

    training_shape_version: str
    trainer_mode: str = ""
    base_model: str = ""
    max_supported_context_length: int = 0
    deployment_shape_version: str = ""
    accelerator_type: str = ""
    accelerator_count: int = 0
    node_count: int = 1
    pipeline_parallelism: int = 1
    trainer_image_tag: str = ""
    deployment_image_tag: str = ""
    base_model_weight_precision: str = ""

    @property
    def training_shape(self) -> str:
        """Full name, without the version."""
        return parent_shape(self.training_shape_version)

    @property
    def deployment_shape(self) -> str:
        """What `DeployConfig.deployment_shape` takes: with the version."""
        return self.deployment_shape_version

    @property
    def supports_lora(self) -> bool:
        """Whether it trains adapters."""
        return self.trainer_mode == "LORA_TRAINER"

    @classmethod
    def read(cls, version: control.TrainingShapeVersion) -> TrainingShapeProfile:
        """From the wire."""
        snapshot = version.snapshot or control.TrainingShapeSnapshot()
        sharding = snapshot.trainer_sharding_scheme or control.ShardingScheme()
        return cls(
            training_shape_version=version.name,
            trainer_mode=_MODES.get(snapshot.trainer_mode or "", str(snapshot.trainer_mode or "")),
            base_model=snapshot.base_model or "",
            max_supported_context_length=snapshot.max_supported_context_length or 0,
            deployment_shape_version=snapshot.deployment_shape_version or "",
            accelerator_type=snapshot.accelerator_type or "",
            accelerator_count=snapshot.accelerator_count or 0,
            node_count=snapshot.node_count or 1,
            pipeline_parallelism=sharding.pipeline_parallelism or 1,
            trainer_image_tag=snapshot.trainer_image_tag or "",
            deployment_image_tag=snapshot.deployment_image_tag or "",
            base_model_weight_precision=snapshot.base_model_weight_precision or "",
        )


@dataclass(frozen=True, slots=True)
class DeploymentShapeProfile:
    """A deployment shape, resolved to one version.

    Attributes:
        deployment_shape_version: Full name, with the version.
        accelerator_type: Of a replica.
        accelerator_count: Of a replica.
    """

    deployment_shape_version: str
    accelerator_type: str = ""
    accelerator_count: int = 0

    @classmethod
    def read(cls, version: control.DeploymentShapeVersion) -> DeploymentShapeProfile:
        """From the wire."""
        snapshot = version.snapshot or control.DeploymentShapeSnapshot()
        return cls(version.name, snapshot.accelerator_type or "", snapshot.accelerator_count or 0)


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model.

    Attributes:
        name: `accounts/{account}/models/{model}`.
        state: `READY` or `UPLOADING`.
        kind: `HF_BASE_MODEL`, `HF_PEFT_ADDON` …
        context_length: In tokens, if the service says so.
        supports_lora: Whether adapters of it can be served.
        peft_base_model: For an adapter, the model that it is of.
    """

    name: str
    state: str = ""
    kind: str = ""
    context_length: int | None = None
    supports_lora: bool = False
    peft_base_model: str | None = None

    @classmethod
    def read(cls, model: control.Model) -> ModelInfo:
        """From the wire."""
        return cls(
            name=model.name,
            state=model.state or "",
            kind=model.kind or "",
            context_length=model.context_length,
            supports_lora=bool(model.supports_lora),
            peft_base_model=model.peft_details.base_model if model.peft_details else None,
        )


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """A checkpoint or snapshot of a trainer job.

    Attributes:
        name: `{trainer job}/checkpoints/{checkpoint}`.
        checkpoint_id: Its last part.
        checkpoint_type: `INFERENCE_BASE`, `INFERENCE_LORA`, `INFERENCE_ARC_V2`, `TRAINING`, `TRAINING_LORA`.
        promotable: Whether it can become a model.
        create_time: RFC 3339.
    """

    name: str
    checkpoint_id: str
    checkpoint_type: str = ""
    promotable: bool = False
    create_time: str = ""

    @classmethod
    def read(cls, row: control.ControlCheckpoint) -> CheckpointInfo:
        """From the wire."""
        return cls(
            name=row.name,
            checkpoint_id=last_part(row.name),
            checkpoint_type=(row.checkpoint_type or "").removeprefix("CHECKPOINT_TYPE_"),
            promotable=bool(row.promotable),
            create_time=row.create_time or "",
        )


_MODES: dict[str | int, str] = {1: "POLICY_TRAINER", 3: "FORWARD_ONLY"}


def _said(status: control.Status | None) -> str:
    return (status.message or "") if status else ""
