"""`AsyncFireworksClient`: the door to the control plane, and what needs no trainer."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from types import TracebackType
from typing import Self

from fwasync._http.client import Http
from fwasync._http.credentials import find_key, find_url
from fwasync._http.retry import RetryPolicy
from fwasync._http.transport import Transport
from fwasync._wire.control import ControlCheckpointList, Model, ModelList, TrainerJob
from fwasync.control.names import check_id, path_of
from fwasync.control.plane import Plane
from fwasync.control.promotion import promote
from fwasync.control.resources import CheckpointInfo, DeploymentShapeProfile, ModelInfo, TrainingShapeProfile
from fwasync.control.shapes import resolve_deployment_profile, resolve_training_profile
from fwasync.errors import UsageError

__all__ = ("AsyncFireworksClient",)

_FIREWORKS = "https://api.fireworks.ai"

_PROMOTION_S = 7200.0


class AsyncFireworksClient:
    """A connection to the control plane with one key, shared by the managers that are made with it.

    ```python
    async with AsyncFireworksClient() as fireworks:
        jobs, deployments = AsyncTrainerJobManager(fireworks), AsyncDeploymentManager(fireworks)
    ```

    Every method raises `ServiceError` (`NotFoundError`, `AuthenticationError` …) for a refusal, `TransportError` if no
    answer was received, after the retries, and `ClosedError` outside of the block. A cancelled read leaves nothing.

    Args:
        base_url: The service. Unset: the environment's `FWASYNC_BASE_URL`, else `FIREWORKS_BASE_URL`, else
            https://api.fireworks.ai.
        api_key: Its key. Unset: the environment's `FWASYNC_API_KEY`, else `FIREWORKS_API_KEY` for hosts of
            fireworks.ai. It is never shown.
        retry: How long requests that get no answer, or none that is final, are repeated: five minutes unless set.
        transport: Another httpx transport.

    Raises:
        UsageError: URL or key are missing or malformed.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        retry: RetryPolicy | None = None,
        transport: Transport | None = None,
    ) -> None:
        url = find_url(base_url, os.environ, "FIREWORKS_BASE_URL") or _FIREWORKS
        key = find_key(url, api_key, os.environ)
        self._key = key
        self.plane = Plane(Http(url, key, retry=retry, transport=transport, prefix="", bearer=True))

    def __repr__(self) -> str:
        return f"<AsyncFireworksClient {self.base_url}>"

    @property
    def base_url(self) -> str:
        """The service's URL."""
        return self.plane.http.base_url

    def copy(self) -> AsyncFireworksClient:
        """Another client of the same service with the same key, not open yet: for another event loop."""
        another = AsyncFireworksClient(self.base_url, self._key, retry=self.plane.http.retry)
        another.plane.known_account = self.plane.known_account
        return another

    async def __aenter__(self) -> Self:
        self.plane.is_open = True
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.plane.is_open = False
        await self.plane.http.__aexit__(exc_type, exc, tb)

    async def account_id(self) -> str:
        """The id of the account that the key belongs to. The service is asked once."""
        return await self.plane.account()

    async def get_model(self, name: str) -> ModelInfo:
        """A model, by its full name."""
        return ModelInfo.read(await self.plane.get(f"reading model {name}", f"v1/{path_of(name)}", Model))

    async def list_models(self, *, account: str | None = None, page_size: int = 50) -> AsyncGenerator[ModelInfo]:
        """The models of an account, asked for page by page.

        Args:
            account: Such as `fireworks`, for the public ones. Unset: the key's own.
            page_size: Rows of a request, 1 to 200.
        """
        owner = check_id("account", account if account is not None else await self.plane.account())
        path = f"v1/accounts/{owner}/models"
        async for model in self.plane.pages(
            f"listing the models of {owner}", path, ModelList, lambda page: page.models, page_size=page_size
        ):
            yield ModelInfo.read(model)

    async def resolve_training_profile(self, name: str) -> TrainingShapeProfile:
        """What a training shape fixes: of its latest validated version, or of the version that is named.

        Args:
            name: `accounts/{account}/trainingShapes/{shape}`, possibly with `/versions/{version}`.
        """
        return await resolve_training_profile(self.plane, name)

    async def resolve_deployment_profile(self, name: str) -> DeploymentShapeProfile:
        """What a deployment shape fixes; as for `resolve_training_profile`."""
        return await resolve_deployment_profile(self.plane, name)

    async def list_checkpoints(self, job_id: str, *, page_size: int = 200) -> AsyncGenerator[CheckpointInfo]:
        """Checkpoints and snapshots of a trainer job, oldest first; also of one that was deleted a while ago."""
        path = f"{await self.plane.collection('rlorTrainerJobs')}/{check_id('job_id', job_id)}/checkpoints"
        async for row in self.plane.pages(
            f"listing the checkpoints of trainer job {job_id}",
            path,
            ControlCheckpointList,
            lambda page: page.checkpoints or page.rlor_trainer_job_checkpoints,
            page_size=page_size,
        ):
            yield CheckpointInfo.read(row)

    async def promote_checkpoint(
        self,
        job_id: str,
        checkpoint_id: str,
        output_model_id: str,
        base_model: str | None = None,
        *,
        timeout: float = _PROMOTION_S,
    ) -> ModelInfo:
        """Make a model of a trainer's snapshot, and wait for it.

        Args:
            job_id: The trainer job; a deleted one will do.
            checkpoint_id: A promotable snapshot of it, as `list_checkpoints` names it.
            output_model_id: The model's id: up to 63 lower-case letters, digits and hyphens.
            base_model: Full name of the base model. Unset: the trainer job is asked.
            timeout: Seconds it may take.

        Raises:
            UsageError: An id cannot be one, or the job does not say its base model.
            OperationFailedError: The service tried, and failed.
            OperationTimeoutError: It takes longer; it goes on at the service.

        **Cancellation:** a promotion that was begun goes on at the service.
        """
        if base_model is None:
            path = f"{await self.plane.collection('rlorTrainerJobs')}/{check_id('job_id', job_id)}"
            job = await self.plane.get(f"reading trainer job {job_id}", path, TrainerJob)
            base_model = job.training_config.base_model if job.training_config else None
            if not base_model:
                raise UsageError(f"trainer job {job_id} does not say what its base model is; pass base_model")
        return await promote(self.plane, job_id, checkpoint_id, output_model_id, base_model=base_model, timeout=timeout)
