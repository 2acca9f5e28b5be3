"""What a run is configured with: immutable models that check themselves, and know nothing of the network.

`reference` holds the configurations that users write, `resources` the two resources of the control plane as they are
asked for, and `launch` opens what a configuration describes on a manager that is handed in.
"""

from __future__ import annotations

from fwasync.config.reference import ConcurrencyConfig, DeployConfig, InfraConfig, WandBConfig, WeightSyncConfig
from fwasync.config.resources import DeploymentConfig, TrainerJobConfig

__all__ = (
    "ConcurrencyConfig",
    "DeployConfig",
    "DeploymentConfig",
    "InfraConfig",
    "TrainerJobConfig",
    "WandBConfig",
    "WeightSyncConfig",
)
