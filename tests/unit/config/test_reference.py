"""The configurations: what they refuse, and what becomes of them. Their fields: see `tests/unit/reference`."""

from __future__ import annotations

from typing import Any

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

CONFIGS = [InfraConfig, DeployConfig, WeightSyncConfig, WandBConfig, ConcurrencyConfig]


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


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.__name__)
def test_configurations_do_not_change(config: type[Config]) -> None:
    made = config()
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        setattr(made, next(iter(config.model_fields)), None)


@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        (InfraConfig, {"trainig_shape_id": SHAPE}, r"no field 'trainig_shape_id'; did you mean 'training_shape_id'\?"),
        (InfraConfig, {"zzz": 1}, "no field 'zzz'; it has: training_shape_id, "),
        (WeightSyncConfig, {"dcp_timout": 1, "dcp_interval": 2}, r"(?s)'dcp_timeout'\?.*'dcp_save_interval'\?"),
        (InfraConfig, {"training_shape_id": "qwen3"}, "pass one like 'accounts/fireworks/trainingShapes/qwen3'"),
        (InfraConfig, {"training_shape_id": "a b"}, "pass one like 'accounts/fireworks/trainingShapes/<shape>'"),
        (
            InfraConfig,
            {"training_shape_id": SHAPE.replace("training", "deployment")},
            "not the full name of a training shape",
        ),
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
        (ConcurrencyConfig, {"mode": "adaptive", "max_concurrency": 8}, "max_window is the most"),
        (ConcurrencyConfig, {"min_window": 9, "max_window": 8}, "min_window 9 is more than max_window 8"),
        (ConcurrencyConfig, {"initial_window": 300}, "initial_window 300 is not between"),
    ],
)
def test_what_is_refused(config: type[Config], given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**given)


@pytest.mark.parametrize("given", [{"api_key": "fw-secret"}, {"entity": ["fw-secret"]}])
def test_a_key_in_the_wrong_place_is_not_shown(given: dict[str, Any]) -> None:
    with pytest.raises(pydantic.ValidationError) as caught:
        WandBConfig(**given)
    assert next(iter(given)) in str(caught.value)
    assert "fw-secret" not in f"{caught.value} {caught.value!r}"


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
