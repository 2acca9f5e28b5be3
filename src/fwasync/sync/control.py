"""The blocking twins of the control plane: `FireworksClient`, `TrainerJobManager` and `DeploymentManager`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Unpack

from fwasync.control.client import AsyncFireworksClient
from fwasync.control.deployments import AsyncDeploymentManager
from fwasync.control.trainer_jobs import AsyncTrainerJobManager, WaitOptions
from fwasync.errors import UsageError
from fwasync.sync.twin import OpenTwin, iterate
from fwasync.weights.hot_load import AsyncHotLoadManager

if TYPE_CHECKING:
    from fwasync._http.retry import RetryPolicy
    from fwasync._http.transport import Transport
    from fwasync.config.launch import OnProgress
    from fwasync.config.resources import DeploymentConfig, TrainerJobConfig
    from fwasync.control.resources import (
        CheckpointInfo,
        CreatedDeployment,
        CreatedTrainerJob,
        DeploymentInfo,
        DeploymentShapeProfile,
        ModelInfo,
        TrainerJobInfo,
        TrainerServiceEndpoint,
        TrainingShapeProfile,
    )
    from fwasync.weights.hot_load import ReplicaState

__all__ = ("DeploymentManager", "FireworksClient", "TrainerJobManager")

_LOAD_S = 400.0
_POLL_S = 5.0
_PROMOTION_S = 7200.0
_RESUMABLE_WITHIN_S = 120.0
_DEPLOYMENT_READY_S = 5400.0
_DEPLOYMENT_POLL_S = 10.0


class FireworksClient(OpenTwin[AsyncFireworksClient]):
    """The blocking twin of `AsyncFireworksClient`: the same names, parameters and defaults.

    ```python
    with FireworksClient() as fireworks:
        jobs, deployments = TrainerJobManager(fireworks), DeploymentManager(fireworks)
    ```
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        retry: RetryPolicy | None = None,
        transport: Transport | None = None,
    ) -> None:
        super().__init__(AsyncFireworksClient(base_url, api_key, retry=retry, transport=transport))

    @property
    def base_url(self) -> str:
        """See `AsyncFireworksClient.base_url`."""
        return self._client.base_url

    def account_id(self) -> str:
        """See `AsyncFireworksClient.account_id`."""
        return self._lease.run(self._client.account_id)

    def get_model(self, name: str) -> ModelInfo:
        """See `AsyncFireworksClient.get_model`."""
        return self._lease.run(self._client.get_model, name)

    def list_models(self, *, account: str | None = None, page_size: int = 50) -> Iterator[ModelInfo]:
        """See `AsyncFireworksClient.list_models`."""
        return iterate(self._lease, self._client.list_models, account=account, page_size=page_size)

    def resolve_training_profile(self, name: str) -> TrainingShapeProfile:
        """See `AsyncFireworksClient.resolve_training_profile`."""
        return self._lease.run(self._client.resolve_training_profile, name)

    def resolve_deployment_profile(self, name: str) -> DeploymentShapeProfile:
        """See `AsyncFireworksClient.resolve_deployment_profile`."""
        return self._lease.run(self._client.resolve_deployment_profile, name)

    def list_checkpoints(self, job_id: str, *, page_size: int = 200) -> Iterator[CheckpointInfo]:
        """See `AsyncFireworksClient.list_checkpoints`."""
        return iterate(self._lease, self._client.list_checkpoints, job_id, page_size=page_size)

    def promote_checkpoint(
        self,
        job_id: str,
        checkpoint_id: str,
        output_model_id: str,
        base_model: str | None = None,
        *,
        timeout: float = _PROMOTION_S,
    ) -> ModelInfo:
        """See `AsyncFireworksClient.promote_checkpoint`."""
        promote = self._client.promote_checkpoint
        return self._lease.run(promote, job_id, checkpoint_id, output_model_id, base_model, timeout=timeout)


class TrainerJobManager(FireworksClient):
    """The blocking twin of `AsyncTrainerJobManager`, with what a `FireworksClient` can do besides.

    ```python
    jobs = TrainerJobManager(fireworks)                          # shares the client
    jobs = TrainerJobManager(api_key=key, base_url=base_url)     # has one of its own
    ```

    Args:
        client: An open client.
        api_key: Or the key, as for `FireworksClient`.
        base_url: And the service, as for `FireworksClient`.
    """

    def __init__(
        self, client: FireworksClient | None = None, *, api_key: str | None = None, base_url: str | None = None
    ) -> None:
        super(FireworksClient, self).__init__(_connection(client, api_key, base_url))
        self._jobs = AsyncTrainerJobManager(self._client)

    def create(self, config: TrainerJobConfig) -> CreatedTrainerJob:
        """See `AsyncTrainerJobManager.create`."""
        return self._lease.run(self._jobs.create, config)

    def get(self, job_id: str) -> TrainerJobInfo:
        """See `AsyncTrainerJobManager.get`."""
        return self._lease.run(self._jobs.get, job_id)

    def name_of(self, job_id: str) -> str:
        """See `AsyncTrainerJobManager.name_of`."""
        return self._lease.run(self._jobs.name_of, job_id)

    def exists(self, job_id: str) -> bool:
        """See `AsyncTrainerJobManager.exists`."""
        return self._lease.run(self._jobs.exists, job_id)

    def list(
        self, *, filter: str | None = None, order_by: str | None = None, page_size: int = 50
    ) -> Iterator[TrainerJobInfo]:
        """See `AsyncTrainerJobManager.list`."""
        return iterate(self._lease, self._jobs.list, filter=filter, order_by=order_by, page_size=page_size)

    def delete(self, job_id: str) -> None:
        """See `AsyncTrainerJobManager.delete`."""
        return self._lease.run(self._jobs.delete, job_id)

    def resume(self, job_id: str) -> TrainerJobInfo:
        """See `AsyncTrainerJobManager.resume`."""
        return self._lease.run(self._jobs.resume, job_id)

    def create_and_wait(self, config: TrainerJobConfig, **options: Unpack[WaitOptions]) -> TrainerServiceEndpoint:
        """See `AsyncTrainerJobManager.create_and_wait`."""
        return self._lease.run(self._jobs.create_and_wait, config, **options)

    def wait_for_ready(
        self, job_id: str, job_name: str | None = None, **options: Unpack[WaitOptions]
    ) -> TrainerServiceEndpoint:
        """See `AsyncTrainerJobManager.wait_for_ready`."""
        return self._lease.run(self._jobs.wait_for_ready, job_id, job_name, **options)

    def wait_for_existing(self, job_id: str, **options: Unpack[WaitOptions]) -> TrainerServiceEndpoint:
        """See `AsyncTrainerJobManager.wait_for_existing`."""
        return self._lease.run(self._jobs.wait_for_existing, job_id, **options)

    def resume_and_wait(self, job_id: str, **options: Unpack[WaitOptions]) -> TrainerServiceEndpoint:
        """See `AsyncTrainerJobManager.resume_and_wait`."""
        return self._lease.run(self._jobs.resume_and_wait, job_id, **options)

    def reconnect_and_wait(
        self, job_id: str, *, max_wait_for_resumable_s: float = _RESUMABLE_WITHIN_S, **options: Unpack[WaitOptions]
    ) -> TrainerServiceEndpoint:
        """See `AsyncTrainerJobManager.reconnect_and_wait`."""
        reconnect = self._jobs.reconnect_and_wait
        return self._lease.run(reconnect, job_id, max_wait_for_resumable_s=max_wait_for_resumable_s, **options)


class DeploymentManager(OpenTwin[AsyncFireworksClient]):
    """The blocking twin of `AsyncDeploymentManager` and of `AsyncHotLoadManager` in one.

    Args:
        client: An open client, to share.
        api_key: Or the key, for a client of its own, as for `FireworksClient`.
        base_url: And the service, as for `FireworksClient`.
        inference_url: Taken for recipes that pass it; one origin serves all, so it cannot be another.
        hotload_api_url: The same.

    Raises:
        UsageError: The URLs differ, or both a client and how to make one are given.
    """

    def __init__(
        self,
        client: FireworksClient | None = None,
        *,
        api_key: str | None = None,
        base_url: str | None = None,
        inference_url: str | None = None,
        hotload_api_url: str | None = None,
    ) -> None:
        connection = _connection(client, api_key, base_url)
        for name, url in (("inference_url", inference_url), ("hotload_api_url", hotload_api_url)):
            if url and url.rstrip("/") != connection.base_url:
                raise UsageError(f"{name} is {url}, and base_url {connection.base_url}: one origin serves all of it")
        super().__init__(connection)
        self._deployments = AsyncDeploymentManager(self._client)
        self._hot_loads = AsyncHotLoadManager(self._client)

    @property
    def inference_url(self) -> str:
        """See `AsyncDeploymentManager.inference_url`."""
        return self._deployments.inference_url

    def create(self, config: DeploymentConfig) -> CreatedDeployment:
        """See `AsyncDeploymentManager.create`."""
        return self._lease.run(self._deployments.create, config)

    def create_or_get(self, config: DeploymentConfig) -> DeploymentInfo:
        """See `AsyncDeploymentManager.create_or_get`."""
        return self._lease.run(self._deployments.create_or_get, config)

    def get(self, deployment_id: str) -> DeploymentInfo:
        """See `AsyncDeploymentManager.get`."""
        return self._lease.run(self._deployments.get, deployment_id)

    def base_model_of(self, deployment_id: str) -> str | None:
        """See `AsyncDeploymentManager.base_model_of`."""
        return self._lease.run(self._deployments.base_model_of, deployment_id)

    def list(self, *, filter: str | None = None, page_size: int = 50) -> Iterator[DeploymentInfo]:
        """See `AsyncDeploymentManager.list`."""
        return iterate(self._lease, self._deployments.list, filter=filter, page_size=page_size)

    def update(
        self,
        deployment_id: str,
        *,
        min_replica_count: int | None = None,
        max_replica_count: int | None = None,
        hot_load_trainer_job: str | None = None,
        hot_load_transition_type: str | None = None,
    ) -> DeploymentInfo:
        """See `AsyncDeploymentManager.update`."""
        return self._lease.run(
            self._deployments.update,
            deployment_id,
            min_replica_count=min_replica_count,
            max_replica_count=max_replica_count,
            hot_load_trainer_job=hot_load_trainer_job,
            hot_load_transition_type=hot_load_transition_type,
        )

    def scale_to_zero(self, deployment_id: str) -> DeploymentInfo:
        """See `AsyncDeploymentManager.scale_to_zero`."""
        return self._lease.run(self._deployments.scale_to_zero, deployment_id)

    def delete(self, deployment_id: str) -> None:
        """See `AsyncDeploymentManager.delete`."""
        return self._lease.run(self._deployments.delete, deployment_id)

    def wait_for_ready(
        self,
        deployment_id: str,
        *,
        timeout_s: float = _DEPLOYMENT_READY_S,
        poll_interval_s: float = _DEPLOYMENT_POLL_S,
        on_progress: OnProgress | None = None,
    ) -> DeploymentInfo:
        """See `AsyncDeploymentManager.wait_for_ready`."""
        return self._lease.run(
            self._deployments.wait_for_ready,
            deployment_id,
            timeout_s=timeout_s,
            poll_interval_s=poll_interval_s,
            on_progress=on_progress,
        )

    def hotload(
        self,
        deployment_id: str,
        base_model: str,
        snapshot_identity: str,
        *,
        previous_snapshot_identity: str | None = None,
        compression_format: str = "arc_v2",
        reset_prompt_cache: bool = True,
    ) -> None:
        """See `AsyncHotLoadManager.hotload`."""
        return self._lease.run(
            self._hot_loads.hotload,
            deployment_id,
            base_model,
            snapshot_identity,
            previous_snapshot_identity=previous_snapshot_identity,
            compression_format=compression_format,
            reset_prompt_cache=reset_prompt_cache,
        )

    def hotload_check_status(self, deployment_id: str, base_model: str) -> Sequence[ReplicaState]:
        """See `AsyncHotLoadManager.hotload_check_status`."""
        return self._lease.run(self._hot_loads.hotload_check_status, deployment_id, base_model)

    def wait_for_hotload(
        self,
        deployment_id: str,
        base_model: str,
        expected_identity: str,
        *,
        timeout_seconds: float = _LOAD_S,
        poll_interval: float = _POLL_S,
    ) -> Sequence[ReplicaState]:
        """See `AsyncHotLoadManager.wait_for_hotload`."""
        return self._lease.run(
            self._hot_loads.wait_for_hotload,
            deployment_id,
            base_model,
            expected_identity,
            timeout_seconds=timeout_seconds,
            poll_interval=poll_interval,
        )

    def hotload_and_wait(
        self,
        deployment_id: str,
        base_model: str,
        snapshot_identity: str,
        *,
        previous_snapshot_identity: str | None = None,
        compression_format: str = "arc_v2",
        reset_prompt_cache: bool = True,
        timeout_seconds: float = _LOAD_S,
    ) -> Sequence[ReplicaState]:
        """See `AsyncHotLoadManager.hotload_and_wait`."""
        return self._lease.run(
            self._hot_loads.hotload_and_wait,
            deployment_id,
            base_model,
            snapshot_identity,
            previous_snapshot_identity=previous_snapshot_identity,
            compression_format=compression_format,
            reset_prompt_cache=reset_prompt_cache,
            timeout_seconds=timeout_seconds,
        )

    def warm_up(self, deployment_id: str) -> bool:
        """See `AsyncHotLoadManager.warm_up`."""
        return self._lease.run(self._hot_loads.warm_up, deployment_id)


def _connection(
    client: FireworksClient | None, api_key: str | None, base_url: str | None
) -> FireworksClient | AsyncFireworksClient:
    if client is None:
        return AsyncFireworksClient(base_url, api_key)
    if not isinstance(client, FireworksClient) or api_key or base_url:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UsageError("pass either an open FireworksClient, or api_key= and base_url=")
    return client
