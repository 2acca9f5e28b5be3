"""`WeightSyncer`: the blocking twin of `AsyncWeightSyncer`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fwasync.errors import UsageError
from fwasync.sync.control import DeploymentManager
from fwasync.sync.training import SubmittingTrainingClient
from fwasync.weights.syncer import AsyncWeightSyncer

if TYPE_CHECKING:
    from fwasync.sync.client import ReconnectableClient
    from fwasync.sync.training import TrainingClient
    from fwasync.weights.hot_load import ReplicaState
    from fwasync.weights.syncer import SyncProgress

__all__ = ("WeightSyncer",)

_READY_S = 300.0
_POLL_S = 5.0


class WeightSyncer:
    """The blocking twin of `AsyncWeightSyncer`: the same names, parameters and defaults. It ends with its client.

    ```python
    syncer = WeightSyncer(client.inner, deploy_mgr, "my-deployment", base_model=BASE)
    snapshot = syncer.save_and_hotload("step-10")
    ```

    Args:
        policy_client: An open `ReconnectableClient` or `TrainingClient`, or the `inner` of one.
        deploy_mgr: An open `DeploymentManager`. Unset, or without `deployment_id`: snapshots are saved only.
        deployment_id: As for `AsyncWeightSyncer`, like all that follows but the last.
        base_model: See there.
        hotload_timeout: See there.
        first_checkpoint_type: See there.
        compression_format: See there.
        warmup_after_hotload: See there.
        warmup_max_retries: See there.
        reset_prompt_cache: See there.
        lora_rank: See there.
        on_progress: See there. It is called on the loop of the blocking clients.
        dcp_timeout: Taken for recipes of old, and not used: checkpoints are saved by the training client.

    Raises:
        UsageError: An argument cannot be.
    """

    def __init__(
        self,
        policy_client: ReconnectableClient | TrainingClient | SubmittingTrainingClient,
        deploy_mgr: DeploymentManager | None = None,
        deployment_id: str | None = None,
        *,
        base_model: str = "",
        hotload_timeout: float = 600.0,
        first_checkpoint_type: str = "base",
        compression_format: str = "arc_v2",
        warmup_after_hotload: bool = True,
        warmup_max_retries: int = 10,
        reset_prompt_cache: bool = True,
        lora_rank: int = 0,
        on_progress: Callable[[SyncProgress], None] | None = None,
        dcp_timeout: float | None = None,
    ) -> None:
        _ = dcp_timeout
        policy: Any = getattr(policy_client, "inner", policy_client)
        if not isinstance(policy, SubmittingTrainingClient):
            raise UsageError(
                f"policy_client is a {type(policy_client).__name__}; pass a ReconnectableClient or TrainingClient"
            )
        if not isinstance(deploy_mgr, DeploymentManager | None):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UsageError(f"deploy_mgr is a {type(deploy_mgr).__name__}; pass a DeploymentManager of fwasync")
        self._lease = policy._lease  # pyright: ignore[reportPrivateUsage]  # it lives and ends with that client
        self._syncer = AsyncWeightSyncer(
            policy._client,  # pyright: ignore[reportPrivateUsage]
            None if deploy_mgr is None else deploy_mgr._hot_loads,  # pyright: ignore[reportPrivateUsage]
            deployment_id,
            base_model=base_model,
            hotload_timeout=hotload_timeout,
            first_checkpoint_type=first_checkpoint_type,
            compression_format=compression_format,
            warmup_after_hotload=warmup_after_hotload,
            warmup_max_retries=warmup_max_retries,
            reset_prompt_cache=reset_prompt_cache,
            lora_rank=lora_rank,
            on_progress=on_progress,
        )
        self._deploy_mgr = deploy_mgr  # which would be closed if it were forgotten

    @property
    def base_identity(self) -> str | None:
        """See `AsyncWeightSyncer.base_identity`."""
        return self._syncer.base_identity

    @property
    def last_timing(self) -> dict[str, float]:
        """Seconds that the last call took: `save_time_s`, `hotload_time_s`, `warmup_time_s`, `total_time_s`."""
        return self._syncer.last_timing

    def reset_delta_chain(self) -> None:
        """See `AsyncWeightSyncer.reset_delta_chain`."""
        return self._lease.call(self._syncer.reset_delta_chain)

    def save_only(self, name: str, checkpoint_type: str | None = None) -> str:
        """See `AsyncWeightSyncer.save_only`."""
        return self._lease.run(self._syncer.save_only, name, checkpoint_type)

    def hotload(self, snapshot_name: str, checkpoint_type: str | None = None) -> str:
        """See `AsyncWeightSyncer.hotload`."""
        return self._lease.run(self._syncer.hotload, snapshot_name, checkpoint_type)

    def save_and_hotload(self, name: str, checkpoint_type: str | None = None) -> str:
        """See `AsyncWeightSyncer.save_and_hotload`."""
        return self._lease.run(self._syncer.save_and_hotload, name, checkpoint_type)

    def check_deployment_state(self) -> str | None:
        """See `AsyncWeightSyncer.check_deployment_state`."""
        return self._lease.run(self._syncer.check_deployment_state)

    def wait_for_hotload_ready(
        self, timeout_s: float = _READY_S, poll_interval_s: float = _POLL_S
    ) -> tuple[ReplicaState, ...]:
        """See `AsyncWeightSyncer.wait_for_hotload_ready`."""
        return self._lease.run(self._syncer.wait_for_hotload_ready, timeout_s, poll_interval_s)
