"""fwasync: train language models through remote trainer services, async all the way.

Names are looked up on first use, so that `import fwasync` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fwasync._version import __version__

if TYPE_CHECKING:
    from fwasync import errors as errors
    from fwasync import types as types
    from fwasync._http.retry import RetryPolicy as RetryPolicy
    from fwasync.checkpoints.resume import resolve_resume as resolve_resume
    from fwasync.checkpoints.saving import CheckpointKind as CheckpointKind
    from fwasync.checkpoints.saving import save_checkpoint as save_checkpoint
    from fwasync.config import ConcurrencyConfig as ConcurrencyConfig
    from fwasync.config import DeployConfig as DeployConfig
    from fwasync.config import DeploymentConfig as DeploymentConfig
    from fwasync.config import InfraConfig as InfraConfig
    from fwasync.config import TrainerJobConfig as TrainerJobConfig
    from fwasync.config import WandBConfig as WandBConfig
    from fwasync.config import WeightSyncConfig as WeightSyncConfig
    from fwasync.control.client import AsyncFireworksClient as AsyncFireworksClient
    from fwasync.control.deployments import AsyncDeploymentManager as AsyncDeploymentManager
    from fwasync.control.provisioning import provision as provision
    from fwasync.control.resources import TrainerServiceEndpoint as TrainerServiceEndpoint
    from fwasync.control.trainer_jobs import AsyncTrainerJobManager as AsyncTrainerJobManager
    from fwasync.errors import FwasyncError as FwasyncError
    from fwasync.errors import OperationTimeoutError as OperationTimeoutError
    from fwasync.rollout.context import RolloutContext as RolloutContext
    from fwasync.rollout.pass_at_k import compute_pass_at_k as compute_pass_at_k
    from fwasync.rollout.rewards import AsyncRewardPool as AsyncRewardPool
    from fwasync.rollout.scheduler import AsyncRolloutScheduler as AsyncRolloutScheduler
    from fwasync.rollout.settings import RolloutSettings as RolloutSettings
    from fwasync.rollout.trajectory import Rollout as Rollout
    from fwasync.rollout.trajectory import rollout_datums as rollout_datums
    from fwasync.sampling.aimd import AimdSettings as AimdSettings
    from fwasync.sampling.client import AsyncSamplingClient as AsyncSamplingClient
    from fwasync.sampling.completions import SampledCompletion as SampledCompletion
    from fwasync.sampling.concurrency import AdaptiveConcurrencyController as AdaptiveConcurrencyController
    from fwasync.sampling.concurrency import ConcurrencyController as ConcurrencyController
    from fwasync.sampling.concurrency import FixedConcurrencyController as FixedConcurrencyController
    from fwasync.sampling.concurrency import concurrency_controller as concurrency_controller
    from fwasync.sampling.deployment import AsyncDeploymentSampler as AsyncDeploymentSampler
    from fwasync.service import AsyncServiceClient as AsyncServiceClient
    from fwasync.sync.client import ReconnectableClient as ReconnectableClient
    from fwasync.sync.control import DeploymentManager as DeploymentManager
    from fwasync.sync.control import FireworksClient as FireworksClient
    from fwasync.sync.control import TrainerJobManager as TrainerJobManager
    from fwasync.sync.deployment import DeploymentSampler as DeploymentSampler
    from fwasync.sync.future import SyncFuture as SyncFuture
    from fwasync.sync.sampling import SamplingClient as SamplingClient
    from fwasync.sync.service import ServiceClient as ServiceClient
    from fwasync.sync.training import TrainingClient as TrainingClient
    from fwasync.sync.weights import WeightSyncer as WeightSyncer
    from fwasync.tracking.run import open_run as open_run
    from fwasync.tracking.timers import flush_timing as flush_timing
    from fwasync.tracking.timers import timer as timer
    from fwasync.training.client import AsyncTrainingClient as AsyncTrainingClient
    from fwasync.training.client import resolve_checkpoint_path as resolve_checkpoint_path
    from fwasync.training.future import APIFuture as APIFuture
    from fwasync.training.normalization import GradAccNormalization as GradAccNormalization
    from fwasync.weights.hot_load import AsyncHotLoadManager as AsyncHotLoadManager
    from fwasync.weights.syncer import AsyncWeightSyncer as AsyncWeightSyncer

__all__ = (
    "APIFuture",
    "AdaptiveConcurrencyController",
    "AimdSettings",
    "AsyncDeploymentManager",
    "AsyncDeploymentSampler",
    "AsyncFireworksClient",
    "AsyncHotLoadManager",
    "AsyncRewardPool",
    "AsyncRolloutScheduler",
    "AsyncSamplingClient",
    "AsyncServiceClient",
    "AsyncTrainerJobManager",
    "AsyncTrainingClient",
    "AsyncWeightSyncer",
    "CheckpointKind",
    "ConcurrencyConfig",
    "ConcurrencyController",
    "DeployConfig",
    "DeploymentConfig",
    "DeploymentManager",
    "DeploymentSampler",
    "FireworksClient",
    "FixedConcurrencyController",
    "FwasyncError",
    "GradAccNormalization",
    "InfraConfig",
    "OperationTimeoutError",
    "ReconnectableClient",
    "RetryPolicy",
    "Rollout",
    "RolloutContext",
    "RolloutSettings",
    "SampledCompletion",
    "SamplingClient",
    "ServiceClient",
    "SyncFuture",
    "TrainerJobConfig",
    "TrainerJobManager",
    "TrainerServiceEndpoint",
    "TrainingClient",
    "WandBConfig",
    "WeightSyncConfig",
    "WeightSyncer",
    "__version__",
    "compute_pass_at_k",
    "concurrency_controller",
    "errors",
    "flush_timing",
    "open_run",
    "provision",
    "resolve_checkpoint_path",
    "resolve_resume",
    "rollout_datums",
    "save_checkpoint",
    "timer",
    "types",
)

_HOMES = {
    "APIFuture": "fwasync.training.future",
    "AdaptiveConcurrencyController": "fwasync.sampling.concurrency",
    "AimdSettings": "fwasync.sampling.aimd",
    "AsyncDeploymentManager": "fwasync.control.deployments",
    "AsyncDeploymentSampler": "fwasync.sampling.deployment",
    "AsyncFireworksClient": "fwasync.control.client",
    "AsyncHotLoadManager": "fwasync.weights.hot_load",
    "AsyncRewardPool": "fwasync.rollout.rewards",
    "AsyncRolloutScheduler": "fwasync.rollout.scheduler",
    "AsyncSamplingClient": "fwasync.sampling.client",
    "AsyncServiceClient": "fwasync.service",
    "AsyncTrainerJobManager": "fwasync.control.trainer_jobs",
    "AsyncTrainingClient": "fwasync.training.client",
    "AsyncWeightSyncer": "fwasync.weights.syncer",
    "CheckpointKind": "fwasync.checkpoints.saving",
    "ConcurrencyConfig": "fwasync.config",
    "ConcurrencyController": "fwasync.sampling.concurrency",
    "DeployConfig": "fwasync.config",
    "DeploymentConfig": "fwasync.config",
    "DeploymentManager": "fwasync.sync.control",
    "DeploymentSampler": "fwasync.sync.deployment",
    "FireworksClient": "fwasync.sync.control",
    "FixedConcurrencyController": "fwasync.sampling.concurrency",
    "FwasyncError": "fwasync.errors",
    "GradAccNormalization": "fwasync.training.normalization",
    "InfraConfig": "fwasync.config",
    "OperationTimeoutError": "fwasync.errors",
    "ReconnectableClient": "fwasync.sync.client",
    "RetryPolicy": "fwasync._http.retry",
    "Rollout": "fwasync.rollout.trajectory",
    "RolloutContext": "fwasync.rollout.context",
    "RolloutSettings": "fwasync.rollout.settings",
    "SampledCompletion": "fwasync.sampling.completions",
    "SamplingClient": "fwasync.sync.sampling",
    "ServiceClient": "fwasync.sync.service",
    "SyncFuture": "fwasync.sync.future",
    "TrainerJobConfig": "fwasync.config",
    "TrainerJobManager": "fwasync.sync.control",
    "TrainerServiceEndpoint": "fwasync.control.resources",
    "TrainingClient": "fwasync.sync.training",
    "WandBConfig": "fwasync.config",
    "WeightSyncConfig": "fwasync.config",
    "WeightSyncer": "fwasync.sync.weights",
    "compute_pass_at_k": "fwasync.rollout.pass_at_k",
    "concurrency_controller": "fwasync.sampling.concurrency",
    "flush_timing": "fwasync.tracking.timers",
    "open_run": "fwasync.tracking.run",
    "provision": "fwasync.control.provisioning",
    "resolve_checkpoint_path": "fwasync.training.client",
    "resolve_resume": "fwasync.checkpoints.resume",
    "rollout_datums": "fwasync.rollout.trajectory",
    "save_checkpoint": "fwasync.checkpoints.saving",
    "timer": "fwasync.tracking.timers",
}


def __getattr__(name: str) -> Any:
    if name in ("errors", "types"):
        return importlib.import_module(f"fwasync.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'fwasync' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
