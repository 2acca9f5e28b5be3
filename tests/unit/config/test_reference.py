"""The reference page of the configurations, row by row, and what they refuse."""

from __future__ import annotations

import types
from typing import Annotated, Any, Union, get_args, get_origin

import pydantic
import pytest

from fwasync import errors
from fwasync.config import (
    ConcurrencyConfig,
    DeployConfig,
    DeploymentConfig,
    InfraConfig,
    TrainerJobConfig,
    WandBConfig,
    WeightSyncConfig,
)
from fwasync.config.base import Config
from fwasync.config.reference import derived_deployment_id

SHAPE = "accounts/fireworks/trainingShapes/qwen3-8b-128k-h200"
MODEL = "accounts/fireworks/models/qwen3-8b"

PAGE: dict[type[Config], str] = {
    InfraConfig: """
        training_shape_id | str | None | None
        ref_training_shape_id | str | None | None
        region | str | None | None
        trainer_timeout_s | float | 3600
        extra_args | list[str] | None | None
    """,
    DeployConfig: """
        deployment_id | str | None | None
        tokenizer_model | str | None | None
        deployment_shape | str | None | None
        deployment_region | str | None | None
        hot_load_bucket_type | str | "FW_HOSTED"
        deployment_timeout_s | float | 5400
        deployment_extra_args | list[str] | None | None
        sample_timeout | int | 600
        disable_speculative_decoding | bool | True
        extra_values | dict[str, str] | None | None
        replica_count | int | None | None
    """,
    WeightSyncConfig: """
        dcp_save_interval | int | 0
        weight_sync_interval | int | 1
        dcp_timeout | int | 2700
        first_checkpoint_type | str | "base"
        weight_sync_before_training | bool | False
        weight_sync_timeout | int | 600
    """,
    WandBConfig: """
        entity | str | None | None
        project | str | None | None
        run_name | str | None | None
    """,
}
INTERNAL = {
    InfraConfig: {"accelerator_type", "accelerator_count", "node_count", "custom_image_tag"},
    DeployConfig: {"deployment_accelerator_type"},
}


def rows(table: str) -> dict[str, tuple[str, Any]]:
    """Name → type and default of each row."""
    found: dict[str, tuple[str, Any]] = {}
    for line in table.strip().splitlines():
        name, *kind, default = (cell.strip() for cell in line.split(" | "))
        found[name] = (" | ".join(kind), eval(default))
    return found


def spelled(annotation: Any) -> str:
    """A type as the page writes it: without its checks."""
    if get_origin(annotation) is Annotated:
        return spelled(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return " | ".join(spelled(part) for part in get_args(annotation))
    if annotation is type(None):
        return "None"
    return annotation.__name__ if isinstance(annotation, type) and not get_args(annotation) else str(annotation)


@pytest.mark.parametrize("config", PAGE, ids=lambda c: c.__name__)
def test_the_fields_are_those_of_the_page(config: type[Config]) -> None:
    fields = config.model_fields
    given = {
        name: (spelled(field.annotation), field.default)
        for name, field in fields.items()
        if not (isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("internal"))
    }
    assert given == rows(PAGE[config])
    assert all(field.description for field in fields.values())
    assert set(fields) - set(given) == INTERNAL.get(config, set())
    defaults = config()
    assert all(getattr(defaults, name) == default for name, (_, default) in given.items())


def test_concurrency() -> None:
    assert ConcurrencyConfig().model_dump() == {
        "mode": None,
        "max_concurrency": None,
        "initial_window": None,
        "min_window": 1,
        "max_window": 256,
        "prefill_queue_target": 0.5,
        "rollout_adjustment_interval": 32,
    }
    assert ConcurrencyConfig(mode="fixed", max_concurrency=4).max_concurrency == 4


@pytest.mark.parametrize("config", [*PAGE, ConcurrencyConfig], ids=lambda c: c.__name__)
def test_configurations_do_not_change(config: type[Config]) -> None:
    made = config()
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        setattr(made, next(iter(config.model_fields)), None)


@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        (InfraConfig, {"trainig_shape_id": SHAPE}, r"no field 'trainig_shape_id'; did you mean 'training_shape_id'\?"),
        (InfraConfig, {"zzz": 1}, "no field 'zzz'; it has: training_shape_id, "),
        (InfraConfig, {"training_shape_id": "qwen3"}, "pass one like 'accounts/fireworks/trainingShapes/qwen3'"),
        (InfraConfig, {"training_shape_id": "a b"}, "pass one like 'accounts/fireworks/trainingShapes/<shape>'"),
        (InfraConfig, {"training_shape_id": SHAPE.replace("training", "deployment")}, "not the full name of a shape"),
        (InfraConfig, {"trainer_timeout_s": 0}, "greater than 0"),
        (InfraConfig, {"trainer_timeout_s": float("inf")}, "finite"),
        (InfraConfig, {"region": ""}, "it is empty"),
        (InfraConfig, {"training_shape_id": SHAPE, "node_count": 2}, "node_count cannot be set together"),
        (DeployConfig, {"replica_count": 0}, "greater than or equal to 1"),
        (DeployConfig, {"deployment_id": "My_Deployment"}, "'My_Deployment' is not an id: 1 to 63 lower-case"),
        (DeployConfig, {"sample_timeout": 0}, "greater than 0"),
        (DeployConfig, {"hot_load_bucket_type": " "}, "it is empty"),
        (DeployConfig, {"deployment_shape": SHAPE}, "accounts/fireworks/deploymentShapes/<shape>"),
        (WeightSyncConfig, {"first_checkpoint_type": "full"}, "it is 'full'; it must be 'base'"),
        (WeightSyncConfig, {"dcp_save_interval": -1}, "greater than or equal to 0"),
        (WeightSyncConfig, {"weight_sync_timeout": 0}, "greater than 0"),
        (ConcurrencyConfig, {"mode": "auto"}, "mode is 'auto'"),
        (ConcurrencyConfig, {"mode": "fixed"}, "needs max_concurrency"),
        (ConcurrencyConfig, {"min_window": 9, "max_window": 8}, "min_window 9 is more than max_window 8"),
        (ConcurrencyConfig, {"initial_window": 300}, "initial_window 300 is not between"),
    ],
)
def test_what_is_refused(config: type[Config], given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**given)


@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        (TrainerJobConfig, {"training_shape_ref": SHAPE, "accelerator_type": "X"}, "accelerator_type cannot be set"),
        (TrainerJobConfig, {"training_shape_ref": SHAPE, "auto_select_training_shape": True}, "not both"),
        (TrainerJobConfig, {"inactivity_timeout_s": 10_801}, "less than or equal to 10800"),
        (TrainerJobConfig, {"lora_rank": -1}, "greater than or equal to 0"),
        (DeploymentConfig, {"deployment_id": "d", "min_replica_count": 2}, "2 is more than max_replica_count 1"),
        (DeploymentConfig, {"deployment_id": "d", "hot_load_transition_type": "async"}, "must be 'ASYNC', 'SYNC'"),
        (
            DeploymentConfig,
            {
                "deployment_id": "d",
                "accept_shapeless_risk": True,
                "deployment_shape": SHAPE.replace("training", "deployment"),
            },
            "accept_shapeless_risk cannot be set",
        ),
    ],
)
def test_what_resources_refuse(config: type[Config], given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(base_model=MODEL, **given)


def test_the_trainer_job_of_a_configuration() -> None:
    infra = InfraConfig(
        training_shape_id=SHAPE, ref_training_shape_id=f"{SHAPE}-forward", region="US_OHIO_1", extra_args=["--a b"]
    )
    policy = infra.to_trainer_job_config(MODEL, 16, hot_load_deployment_id="dep1")
    assert (policy.training_shape_ref, policy.lora_rank, policy.forward_only) == (SHAPE, 16, False)
    assert (policy.region, policy.extra_args, policy.hot_load_deployment_id) == ("US_OHIO_1", ["--a b"], "dep1")
    reference = infra.to_trainer_job_config(MODEL, reference=True)
    assert (reference.training_shape_ref, reference.forward_only) == (f"{SHAPE}-forward", True)
    with pytest.raises(errors.UsageError, match="ref_training_shape_id"):
        InfraConfig(training_shape_id=SHAPE).to_trainer_job_config(MODEL, reference=True)
    by_hand = InfraConfig(accelerator_type="X", accelerator_count=8, node_count=2).to_trainer_job_config(MODEL)
    assert (by_hand.accelerator_type, by_hand.accelerator_count, by_hand.node_count) == ("X", 8, 2)


def test_the_deployment_of_a_configuration() -> None:
    shape = "accounts/fireworks/deploymentShapes/ds/versions/d1"
    made = DeployConfig(deployment_id="d", deployment_shape=shape, replica_count=3).to_deployment_config(
        MODEL, InfraConfig(region="US_OHIO_1", accelerator_type="X")
    )
    assert (made.min_replica_count, made.max_replica_count, made.deployment_shape) == (3, 3, shape)
    assert made.region is None, "it is never inferred from the trainer's"
    assert made.accelerator_type is None, "the shape owns it"
    assert made.disable_speculative_decoding is True
    derived = DeployConfig().to_deployment_config(MODEL, InfraConfig(accelerator_type="X"))
    assert derived.deployment_id.startswith("qwen3-8b-")
    assert derived.accelerator_type == "X"
    assert (derived.min_replica_count, derived.max_replica_count) == (1, 1)
    assert derived.deployment_id != DeployConfig().to_deployment_config(MODEL).deployment_id


@pytest.mark.parametrize(
    ("model", "derived"),
    [
        (MODEL, "qwen3-8b-1a2b"),
        ("Qwen/Qwen3_8B.Instruct", "qwen3-8b-instruct-1a2b"),
        ("accounts/a/models/" + "x" * 80, "x" * 58 + "-1a2b"),
        ("...", "deployment-1a2b"),
    ],
)
def test_ids_are_derived_from_the_models_name(model: str, derived: str) -> None:
    assert derived_deployment_id(model, "1a2b") == derived
