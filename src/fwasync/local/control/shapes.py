"""The catalogue that the service brings along: base models, and a training and a deployment shape of each.

For a base model `{m}` there are the training shapes `{m}` (full), `{m}-lora` and `{m}-forward`, and the deployment
shape `{m}`, with one version each, `v1`. Accelerators are given because clients show them; there are none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from fwasync._wire.control import (
    BaseModelDetails,
    DeploymentShapeSnapshot,
    DeploymentShapeVersion,
    Model,
    ShardingScheme,
    TrainingShapeSnapshot,
    TrainingShapeVersion,
)
from fwasync.local.control.names import BUILT_IN, model_name, resource
from fwasync.local.engine.api import BaseModel
from fwasync.local.refusal import Refused

__all__ = ("Shapes", "base_model_resource")

_BUILT_AT = "2026-01-01T00:00:00Z"
_MODES = {"": "POLICY_TRAINER", "-lora": "LORA_TRAINER", "-forward": "FORWARD_ONLY"}
_VERSION = "v1"
_ACCELERATOR = "LOCAL_CPU"

V = TypeVar("V", TrainingShapeVersion, DeploymentShapeVersion)


def base_model_resource(model: BaseModel) -> Model:
    """A base model as the control plane shows it."""
    return Model(
        name=model_name(model.name),
        state="READY",
        kind="HF_BASE_MODEL",
        context_length=model.max_context_length,
        supports_lora=True,
        base_model_details=BaseModelDetails(
            moe=False, model_type="qwen3", parameter_count=str(model.parameters), world_size=1
        ),
        create_time=_BUILT_AT,
    )


class Shapes:
    """The shapes of some base models."""

    def __init__(self, models: Mapping[str, BaseModel]) -> None:
        self.training: list[TrainingShapeVersion] = []
        self.deployment: list[DeploymentShapeVersion] = []
        for model in models.values():
            deployment = _deployment_shape(model)
            self.deployment.append(deployment)
            self.training += [_training_shape(model, deployment, suffix, mode) for suffix, mode in _MODES.items()]

    def training_shape(self, name: str) -> TrainingShapeVersion:
        """A training shape's version, by the name of the version or of the shape (then its latest).

        Raises:
            Refused: There is none of that name.
        """
        return _find(self.training, name)

    def deployment_shape(self, name: str) -> DeploymentShapeVersion:
        """A deployment shape's version; otherwise as `training_shape`."""
        return _find(self.deployment, name)


def _find(versions: list[V], name: str) -> V:
    shape, _, version = name.partition("/versions/")
    for entry in versions:
        if entry.name == f"{shape}/versions/{_VERSION}" and version in ("", "latest", _VERSION):
            return entry
    known = ", ".join(entry.name.partition("/versions/")[0] for entry in versions)
    raise Refused(404, f"there is no shape {name!r}; this service has: {known}")


def _training_shape(
    model: BaseModel, deployment: DeploymentShapeVersion, suffix: str, mode: str
) -> TrainingShapeVersion:
    name = model.name.rpartition("/")[2] + suffix
    return TrainingShapeVersion(
        name=f"{resource('trainingShapes', name, BUILT_IN)}/versions/{_VERSION}",
        create_time=_BUILT_AT,
        validated=True,
        latest_validated=True,
        public=True,
        snapshot=TrainingShapeSnapshot(
            base_model=model_name(model.name),
            model_type="qwen3",
            parameter_count=str(model.parameters),
            trainer_mode=mode,
            trainer_image_tag="local",
            accelerator_type=_ACCELERATOR,
            accelerator_count=1,
            node_count=1,
            max_supported_context_length=model.max_context_length,
            base_model_weight_precision="FP32",
            deployment_shape_version=deployment.name,
            deployment_image_tag="local",
            trainer_sharding_scheme=ShardingScheme(pipeline_parallelism=1),
        ),
    )


def _deployment_shape(model: BaseModel) -> DeploymentShapeVersion:
    name = model.name.rpartition("/")[2]
    return DeploymentShapeVersion(
        name=f"{resource('deploymentShapes', name, BUILT_IN)}/versions/{_VERSION}",
        create_time=_BUILT_AT,
        validated=True,
        latest_validated=True,
        public=True,
        snapshot=DeploymentShapeSnapshot(
            base_model=model_name(model.name), accelerator_type=_ACCELERATOR, accelerator_count=1
        ),
    )
