"""What is sent for a configuration: query and body. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from fwasync._wire.control import Deployment, Placement, TrainerJob, TrainingConfig
from fwasync.config.resources import DeploymentConfig, TrainerJobConfig

__all__ = ("Query", "deployment_request", "trainer_job_request")

Query = list[tuple[str, str]]
"""Parameters of a URL, in order."""


def trainer_job_request(config: TrainerJobConfig, job_id: str) -> tuple[Query, TrainerJob]:
    """Query and body that create a trainer job under an id of ours."""
    shape, auto = config.training_shape_ref, config.auto_select_training_shape
    by_hand = not shape and not auto
    query: Query = []
    if config.hot_load_deployment_id:
        query.append(("deploymentId", config.hot_load_deployment_id))
    if shape:
        query.append(("trainingShape", shape))
    # The service checks against a shape; without one there is nothing that it could check against.
    if by_hand or (config.skip_validations and not auto):
        query.append(("skipValidations", "true"))
    query.append(("rlorTrainerJobId", job_id))
    training = TrainingConfig(
        base_model=config.base_model,
        lora_rank=config.lora_rank,
        learning_rate=config.learning_rate,
        max_context_length=None if shape else config.max_context_length,
        custom_image_tag=config.custom_image_tag,
        accelerator_type=config.accelerator_type,
        accelerator_count=config.accelerator_count,
        region=config.region,
        extra_args=_flat(config.extra_args),
    )
    return query, TrainerJob(
        service_mode=True,
        keep_alive=False,
        dataset="",
        training_config=training,
        node_count=(config.node_count or 1) if by_hand else None,
        trainer_replica_count=config.trainer_replica_count,
        use_reservation=config.use_reservation and not config.reservation_target,
        reservation_target=config.reservation_target,
        display_name=config.display_name,
        hot_load_deployment_id=config.hot_load_deployment_id,
        forward_only=config.forward_only or None,
        preemptible=config.preemptible or None,
        inactivity_timeout=None if config.inactivity_timeout_s is None else f"{config.inactivity_timeout_s}s",
    )


def deployment_request(config: DeploymentConfig) -> tuple[Query, Deployment]:
    """Query and body that create a deployment."""
    query: Query = [("deploymentId", config.deployment_id)]
    flags = {
        "skipShapeValidation": config.skip_shape_validation,
        "acceptShapelessRisk": config.accept_shapeless_risk,
        "disableSpeculativeDecoding": config.disable_speculative_decoding,
    }
    query += [(name, "true") for name, on in flags.items() if on]
    hot = config.enable_hot_load
    return query, Deployment(
        base_model=config.base_model,
        min_replica_count=config.min_replica_count,
        max_replica_count=config.max_replica_count,
        enable_hot_load=hot,
        description=config.description,
        for_training=config.for_training or None,
        placement=Placement(region=config.region) if config.region else None,
        hot_load_bucket_type=config.hot_load_bucket_type if hot else None,
        hot_load_trainer_job=config.hot_load_trainer_job if hot else None,
        hot_load_transition_type=config.hot_load_transition_type if hot else None,
        deployment_shape=config.deployment_shape,
        accelerator_type=None if config.deployment_shape else config.accelerator_type,
        extra_args=_flat(config.extra_args),
        extra_values=config.extra_values,
        annotations=config.annotations,
        preemptible=config.preemptible or None,
    )


def _flat(arguments: Sequence[str] | None) -> list[str] | None:
    """`["--a b", "--c"]` → `["--a", "b", "--c"]`: the servers take one word for each argument."""
    return [word for argument in arguments for word in argument.split()] if arguments else None
