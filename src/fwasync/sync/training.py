"""The blocking twins of `AsyncTrainingClient`: one whose verbs wait, and one whose verbs return futures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from fwasync.errors import OperationTimeoutError
from fwasync.sync.future import SyncFuture, for_threads
from fwasync.sync.portal import Lease
from fwasync.sync.twin import Twin
from fwasync.training.client import AsyncTrainingClient

if TYPE_CHECKING:
    from tinker.types import (
        AdamParams,
        Datum,
        ForwardBackwardOutput,
        GetInfoResponse,
        LoadWeightsResponse,
        OptimStepResponse,
        SaveWeightsResponse,
    )

    from fwasync.training.custom_loss import CustomLoss
    from fwasync.training.future import APIFuture
    from fwasync.training.model import Statistics
    from fwasync.training.normalization import GradAccNormalization
    from fwasync.training.requests import SavedSnapshot

__all__ = ("SubmittingTrainingClient", "TrainingClient", "wait_for")

P = ParamSpec("P")
T = TypeVar("T")

_TIMEOUT_S = 600.0
_CHECKPOINT_TIMEOUT_S = 2700.0


def wait_for(lease: Lease[Any], verb: Callable[P, APIFuture[T]], *args: P.args, **kwargs: P.kwargs) -> T:
    """Submit an operation and wait for its result, in one call on the loop.

    Raises:
        OperationTimeoutError: It carries a `SyncFuture`.
    """
    try:
        return lease.run(verb, *args, **kwargs)
    except OperationTimeoutError as error:
        if error.future is None:
            raise
        raise for_threads(error, SyncFuture(error.future, lease)) from None


class SubmittingTrainingClient:
    """A training client of futures: every verb takes its place in the order of the model and returns a `SyncFuture`.

    It is the `inner` of a blocking client, and lives as long as that.

    ```python
    fb = client.inner.forward_backward(batch)   # submitted, in this order
    opt = client.inner.optim_step(adam)
    fb.result()
    opt.result()
    ```
    """

    def __init__(self, client: AsyncTrainingClient, lease: Lease[Any]) -> None:
        self._client = client
        self._lease = lease

    def __repr__(self) -> str:
        return repr(self._client).replace("<Async", "<Submitting", 1)

    def _submit(self, verb: Callable[P, APIFuture[T]], *args: P.args, **kwargs: P.kwargs) -> SyncFuture[T]:
        submitted: list[APIFuture[T]] = []

        def submit() -> None:
            submitted.append(verb(*args, **kwargs))

        submit.__qualname__ = verb.__qualname__
        try:
            self._lease.call(submit)
            return SyncFuture(submitted[0], self._lease)
        except (KeyboardInterrupt, SystemExit):
            for future in submitted:  # which nobody will ever hold
                self._lease.call(future.cancel)
            raise

    def forward(
        self,
        data: Sequence[Datum],
        loss_fn: str = "cross_entropy",
        loss_fn_config: Mapping[str, Any] | None = None,
        *,
        timeout: float | None = _TIMEOUT_S,
    ) -> SyncFuture[ForwardBackwardOutput]:
        """See `AsyncTrainingClient.forward`."""
        return self._submit(self._client.forward, data, loss_fn, loss_fn_config, timeout=timeout)

    def forward_backward(
        self,
        data: Sequence[Datum],
        loss_fn: str = "cross_entropy",
        loss_fn_config: Mapping[str, Any] | None = None,
        *,
        timeout: float | None = _TIMEOUT_S,
    ) -> SyncFuture[ForwardBackwardOutput]:
        """See `AsyncTrainingClient.forward_backward`."""
        return self._submit(self._client.forward_backward, data, loss_fn, loss_fn_config, timeout=timeout)

    def forward_backward_custom(
        self, data: Sequence[Datum], loss_fn: CustomLoss, *, timeout: float | None = _TIMEOUT_S
    ) -> SyncFuture[ForwardBackwardOutput]:
        """See `AsyncTrainingClient.forward_backward_custom`."""
        return self._submit(self._client.forward_backward_custom, data, loss_fn, timeout=timeout)

    def optim_step(
        self,
        adam_params: AdamParams,
        grad_accumulation_normalization: GradAccNormalization | str | None = None,
        *,
        timeout: float | None = _TIMEOUT_S,
    ) -> SyncFuture[OptimStepResponse]:
        """See `AsyncTrainingClient.optim_step`."""
        return self._submit(
            self._client.optim_step,
            adam_params,
            grad_accumulation_normalization=grad_accumulation_normalization,
            timeout=timeout,
        )

    def save_state(
        self, name: str, *, timeout: float | None = _CHECKPOINT_TIMEOUT_S
    ) -> SyncFuture[SaveWeightsResponse]:
        """See `AsyncTrainingClient.save_state`."""
        return self._submit(self._client.save_state, name, timeout=timeout)

    def load_state(
        self, path: str, *, timeout: float | None = _CHECKPOINT_TIMEOUT_S
    ) -> SyncFuture[LoadWeightsResponse]:
        """See `AsyncTrainingClient.load_state`."""
        return self._submit(self._client.load_state, path, timeout=timeout)

    def load_state_with_optimizer(
        self, path: str, *, timeout: float | None = _CHECKPOINT_TIMEOUT_S
    ) -> SyncFuture[LoadWeightsResponse]:
        """See `AsyncTrainingClient.load_state_with_optimizer`."""
        return self._submit(self._client.load_state_with_optimizer, path, timeout=timeout)

    def load_adapter(self, adapter_path: str, *, timeout: float | None = _CHECKPOINT_TIMEOUT_S) -> SyncFuture[None]:
        """See `AsyncTrainingClient.load_adapter`."""
        return self._submit(self._client.load_adapter, adapter_path, timeout=timeout)

    def save_weights_for_sampler(
        self, name: str, *, timeout: float | None = _CHECKPOINT_TIMEOUT_S
    ) -> SyncFuture[SavedSnapshot]:
        """See `AsyncTrainingClient.save_weights_for_sampler`."""
        return self._submit(self._client.save_weights_for_sampler, name, timeout=timeout)

    def save_weights_for_sampler_ext(
        self, name: str, checkpoint_type: str = "base", *, timeout: float | None = _CHECKPOINT_TIMEOUT_S
    ) -> SyncFuture[SavedSnapshot]:
        """See `AsyncTrainingClient.save_weights_for_sampler_ext`."""
        return self._submit(self._client.save_weights_for_sampler_ext, name, checkpoint_type, timeout=timeout)

    def list_checkpoints(self) -> list[str]:
        """See `AsyncTrainingClient.list_checkpoints`. It is no operation: it waits, and returns the names."""
        return self._lease.run(self._client.list_checkpoints)

    def resolve_checkpoint_path(self, name: str, source_job_id: str | None = None) -> str:
        """See `AsyncTrainingClient.resolve_checkpoint_path`."""
        return self._client.resolve_checkpoint_path(name, source_job_id)


class TrainingClient(Twin[AsyncTrainingClient]):
    """The blocking twin of `AsyncTrainingClient`: the same names, parameters and defaults. Verbs return results.

    Made by `ServiceClient.create_training_client`, entered with `with`. Any thread may use it; operations are carried
    out in the order of the calls. Several at a time: see `inner`.
    """

    @property
    def inner(self) -> SubmittingTrainingClient:
        """The same client, whose verbs return at once with a `SyncFuture`."""
        return SubmittingTrainingClient(self._client, self._lease)

    @property
    def base_model(self) -> str | None:
        """See `AsyncTrainingClient.base_model`."""
        return self._client.base_model

    @property
    def lora_rank(self) -> int | None:
        """See `AsyncTrainingClient.lora_rank`."""
        return self._client.lora_rank

    @property
    def model_id(self) -> str:
        """See `AsyncTrainingClient.model_id`."""
        _ = self._lease  # raises if the client is not open
        return self._client.model_id

    @property
    def snapshot_epoch(self) -> int:
        """See `AsyncTrainingClient.snapshot_epoch`."""
        return self._client.snapshot_epoch

    def statistics(self) -> Statistics:
        """See `AsyncTrainingClient.statistics`."""
        return self._lease.call(self._client.statistics)

    def _wait(self, verb: Callable[P, APIFuture[T]], *args: P.args, **kwargs: P.kwargs) -> T:
        return wait_for(self._lease, verb, *args, **kwargs)

    def forward(
        self,
        data: Sequence[Datum],
        loss_fn: str = "cross_entropy",
        loss_fn_config: Mapping[str, Any] | None = None,
        *,
        timeout: float | None = _TIMEOUT_S,
    ) -> ForwardBackwardOutput:
        """See `AsyncTrainingClient.forward`."""
        return self._wait(self._client.forward, data, loss_fn, loss_fn_config, timeout=timeout)

    def forward_backward(
        self,
        data: Sequence[Datum],
        loss_fn: str = "cross_entropy",
        loss_fn_config: Mapping[str, Any] | None = None,
        *,
        timeout: float | None = _TIMEOUT_S,
    ) -> ForwardBackwardOutput:
        """See `AsyncTrainingClient.forward_backward`."""
        return self._wait(self._client.forward_backward, data, loss_fn, loss_fn_config, timeout=timeout)

    def forward_backward_custom(
        self, data: Sequence[Datum], loss_fn: CustomLoss, *, timeout: float | None = _TIMEOUT_S
    ) -> ForwardBackwardOutput:
        """See `AsyncTrainingClient.forward_backward_custom`."""
        return self._wait(self._client.forward_backward_custom, data, loss_fn, timeout=timeout)

    def optim_step(
        self,
        adam_params: AdamParams,
        grad_accumulation_normalization: GradAccNormalization | str | None = None,
        *,
        timeout: float | None = _TIMEOUT_S,
    ) -> OptimStepResponse:
        """See `AsyncTrainingClient.optim_step`."""
        return self._wait(
            self._client.optim_step,
            adam_params,
            grad_accumulation_normalization=grad_accumulation_normalization,
            timeout=timeout,
        )

    def save_state(self, name: str, *, timeout: float | None = _CHECKPOINT_TIMEOUT_S) -> SaveWeightsResponse:
        """See `AsyncTrainingClient.save_state`."""
        return self._wait(self._client.save_state, name, timeout=timeout)

    def load_state(self, path: str, *, timeout: float | None = _CHECKPOINT_TIMEOUT_S) -> LoadWeightsResponse:
        """See `AsyncTrainingClient.load_state`."""
        return self._wait(self._client.load_state, path, timeout=timeout)

    def load_state_with_optimizer(
        self, path: str, *, timeout: float | None = _CHECKPOINT_TIMEOUT_S
    ) -> LoadWeightsResponse:
        """See `AsyncTrainingClient.load_state_with_optimizer`."""
        return self._wait(self._client.load_state_with_optimizer, path, timeout=timeout)

    def load_adapter(self, adapter_path: str, *, timeout: float | None = _CHECKPOINT_TIMEOUT_S) -> None:
        """See `AsyncTrainingClient.load_adapter`."""
        return self._wait(self._client.load_adapter, adapter_path, timeout=timeout)

    def save_weights_for_sampler(self, name: str, *, timeout: float | None = _CHECKPOINT_TIMEOUT_S) -> SavedSnapshot:
        """See `AsyncTrainingClient.save_weights_for_sampler`."""
        return self._wait(self._client.save_weights_for_sampler, name, timeout=timeout)

    def save_weights_for_sampler_ext(
        self, name: str, checkpoint_type: str = "base", *, timeout: float | None = _CHECKPOINT_TIMEOUT_S
    ) -> SavedSnapshot:
        """See `AsyncTrainingClient.save_weights_for_sampler_ext`."""
        return self._wait(self._client.save_weights_for_sampler_ext, name, checkpoint_type, timeout=timeout)

    def get_info(self) -> GetInfoResponse:
        """See `AsyncTrainingClient.get_info`."""
        return self._lease.run(self._client.get_info)

    def list_checkpoints(self) -> list[str]:
        """See `AsyncTrainingClient.list_checkpoints`."""
        return self._lease.run(self._client.list_checkpoints)

    def resolve_checkpoint_path(self, name: str, source_job_id: str | None = None) -> str:
        """See `AsyncTrainingClient.resolve_checkpoint_path`."""
        return self._client.resolve_checkpoint_path(name, source_job_id)

    def unload(self) -> None:
        """See `AsyncTrainingClient.unload`."""
        return self._lease.run(self._client.unload)
