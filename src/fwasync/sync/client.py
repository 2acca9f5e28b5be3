"""`ReconnectableClient`: the training client of the Fireworks cookbook's recipes, with its names and defaults."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from functools import partial
from inspect import isawaitable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from fwasync.control.trainer_jobs import AsyncTrainerJobManager
from fwasync.errors import UsageError
from fwasync.service import AsyncServiceClient
from fwasync.sync.portal import Lease
from fwasync.sync.training import SubmittingTrainingClient, wait_for
from fwasync.sync.twin import OpenTwin
from fwasync.training.client import AsyncTrainingClient, resolve_checkpoint_path

if TYPE_CHECKING:
    from tinker.types import (
        AdamParams,
        Datum,
        ForwardBackwardOutput,
        LoadWeightsResponse,
        OptimStepResponse,
        SaveWeightsResponse,
    )

    from fwasync.training.custom_loss import CustomLoss
    from fwasync.training.normalization import GradAccNormalization
    from fwasync.training.requests import SavedSnapshot

__all__ = ("ReconnectableClient", "TrainerEndpoint", "TrainerManager")

R = TypeVar("R")

_CHECKPOINT_TIMEOUT_S = 2700


class TrainerEndpoint(Protocol):
    """Where a trainer job answers."""

    @property
    def base_url(self) -> str:
        """The URL of its trainer API."""
        ...

    @property
    def job_id(self) -> str:
        """The job."""
        ...

    @property
    def job_name(self) -> str:
        """The job's full resource name."""
        ...


class TrainerManager(Protocol):
    """What knows trainer jobs: a `TrainerJobManager` or `AsyncTrainerJobManager`, or that of the Fireworks SDK."""

    def wait_for_existing(self, job_id: str) -> TrainerEndpoint | Awaitable[TrainerEndpoint]:
        """Wait until a job is ready. It may block, or be async."""
        ...


class ReconnectableClient(OpenTwin[AsyncTrainingClient]):
    """A training client whose verbs block until the result is there, or raise.

    ```python
    client = ReconnectableClient(rlor_mgr, endpoint.job_id, base_model, endpoint=endpoint)
    client.forward_backward_custom(datums, loss_fn)
    client.optim_step(adam_params)
    ```

    Failures are raised, so that a training loop can end and resume from its last checkpoint; broken connections are
    bridged before it comes to that. Use it in a `with` block, or `close()` it; one that is left open is closed when its
    last reference goes, or when the interpreter ends.

    Args:
        rlor_mgr: Asked for the trainer's endpoint by `wait_for_existing(job_id)`; not used if `endpoint` is given.
        job_id: The trainer job.
        base_model: The base model that the trainer has.
        lora_rank: Rank of the LoRA adapter, or 0 to train all parameters.
        fw_api_key: The key. Unset: the environment's `FIREWORKS_API_KEY`, else `FWASYNC_API_KEY`.
        default_timeout: Seconds that `forward`, `forward_backward`, `forward_backward_custom` and `optim_step` may
            take.
        endpoint: The trainer's endpoint, if it is known already.

    Raises:
        UsageError: There is neither endpoint nor manager, or no key; or this is the blocking clients' own event loop.
        FwasyncError: The trainer cannot be reached, or refuses; see `AsyncServiceClient`.
    """

    def __init__(
        self,
        rlor_mgr: TrainerManager | None,
        job_id: str,
        base_model: str,
        lora_rank: int = 0,
        fw_api_key: str | None = None,
        default_timeout: float | None = 600,
        endpoint: TrainerEndpoint | None = None,
    ) -> None:
        self._job_id = job_id
        self._default_timeout = default_timeout
        api_key = _api_key(fw_api_key)
        self._endpoint = endpoint if endpoint is not None else _resolve(rlor_mgr, job_id)
        super().__init__(_connect(self._endpoint.base_url, api_key, base_model, lora_rank))

    def __repr__(self) -> str:
        return f"<ReconnectableClient {self._job_id} at {self._endpoint.base_url}>"

    @property
    def inner(self) -> SubmittingTrainingClient:
        """The same client, whose verbs return at once with a future."""
        return SubmittingTrainingClient(self._client, self._lease)

    @property
    def endpoint(self) -> TrainerEndpoint:
        """The trainer's endpoint: `base_url`, `job_id`, `job_name`."""
        return self._endpoint

    @property
    def job_id(self) -> str:
        """The trainer job."""
        return self._job_id

    def forward(self, data: Sequence[Datum], loss_fn: str) -> ForwardBackwardOutput:
        """See `AsyncTrainingClient.forward`."""
        return wait_for(self._lease, self._client.forward, data, loss_fn, timeout=self._default_timeout)

    def forward_backward(
        self,
        data: Sequence[Datum],
        loss_fn: str = "cross_entropy",
        loss_fn_config: Mapping[str, Any] | None = None,
    ) -> ForwardBackwardOutput:
        """See `AsyncTrainingClient.forward_backward`."""
        timeout = self._default_timeout
        return wait_for(self._lease, self._client.forward_backward, data, loss_fn, loss_fn_config, timeout=timeout)

    def forward_backward_custom(self, data: Sequence[Datum], loss_fn: CustomLoss) -> ForwardBackwardOutput:
        """See `AsyncTrainingClient.forward_backward_custom`. A sync `loss_fn` runs in a thread of its own."""
        return wait_for(self._lease, self._client.forward_backward_custom, data, loss_fn, timeout=self._default_timeout)

    def optim_step(
        self, params: AdamParams, grad_accumulation_normalization: GradAccNormalization | str | None = None
    ) -> OptimStepResponse:
        """See `AsyncTrainingClient.optim_step`."""
        return wait_for(
            self._lease,
            self._client.optim_step,
            params,
            grad_accumulation_normalization=grad_accumulation_normalization,
            timeout=self._default_timeout,
        )

    def save_state(self, name: str, timeout: float | None = _CHECKPOINT_TIMEOUT_S) -> SaveWeightsResponse:
        """See `AsyncTrainingClient.save_state`."""
        return wait_for(self._lease, self._client.save_state, name, timeout=timeout)

    def load_state_with_optimizer(
        self, path: str, timeout: float | None = _CHECKPOINT_TIMEOUT_S
    ) -> LoadWeightsResponse:
        """See `AsyncTrainingClient.load_state_with_optimizer`."""
        return wait_for(self._lease, self._client.load_state_with_optimizer, path, timeout=timeout)

    def save_weights_for_sampler_ext(
        self, name: str, checkpoint_type: str = "base", timeout: float | None = _CHECKPOINT_TIMEOUT_S
    ) -> SavedSnapshot:
        """See `AsyncTrainingClient.save_weights_for_sampler_ext`."""
        verb = self._client.save_weights_for_sampler_ext
        return wait_for(self._lease, verb, name, checkpoint_type, timeout=timeout)

    def resolve_checkpoint_path(self, name: str, source_job_id: str | None = None) -> str:
        """What `load_state_with_optimizer` takes for a checkpoint of another job; see the function of that name."""
        return resolve_checkpoint_path(name, source_job_id)

    def list_checkpoints(self) -> list[str]:
        """See `AsyncTrainingClient.list_checkpoints`."""
        return self._lease.run(self._client.list_checkpoints)


@asynccontextmanager
async def _connect(
    base_url: str, api_key: str, base_model: str, lora_rank: int
) -> AsyncGenerator[AsyncTrainingClient, None]:
    async with (
        AsyncServiceClient(base_url, api_key) as service,
        service.create_training_client(base_model, lora_rank) as client,
    ):
        yield client


def _api_key(given: str | None) -> str:
    key = given or os.environ.get("FIREWORKS_API_KEY") or os.environ.get("FWASYNC_API_KEY")
    if not key:
        raise UsageError("no API key: pass fw_api_key, or set FIREWORKS_API_KEY")
    return key


def _resolve(manager: TrainerManager | None, job_id: str) -> TrainerEndpoint:
    if manager is None:
        raise UsageError("pass rlor_mgr, which is asked for the trainer's endpoint, or the endpoint itself")
    if isinstance(manager, AsyncTrainerJobManager):
        return _on_the_loop(partial(_ask, manager, job_id))
    # A method that blocks does so here, in the caller's own thread, where Ctrl-C reaches it.
    endpoint = manager.wait_for_existing(job_id)
    if not isawaitable(endpoint):
        return endpoint
    awaitable = endpoint

    async def wait() -> TrainerEndpoint:
        return await awaitable

    return _on_the_loop(wait)


async def _ask(manager: AsyncTrainerJobManager, job_id: str) -> TrainerEndpoint:
    # Its own connections belong to the event loop that it is used on, which may be waiting for us now.
    async with manager.client.copy() as client:
        return await AsyncTrainerJobManager(client).wait_for_existing(job_id)


def _on_the_loop(function: Callable[[], Awaitable[R]]) -> R:
    lease = Lease(nullcontext())
    try:
        return lease.run(function)
    finally:
        lease.close()
