"""`AsyncTrainingClient`: the verbs of one model under training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from fwasync._http.reading import read
from fwasync._http.session import Session
from fwasync._wire import messages
from fwasync._wire.messages import encode
from fwasync._wire.paths import cross_job_path, is_path
from fwasync._wire.runs import CheckpointList
from fwasync.errors import ClosedError, NotFoundError, UsageError
from fwasync.training.custom_loss import CustomLoss, require_torch
from fwasync.training.future import APIFuture
from fwasync.training.model import CHECKPOINT_TIMEOUT_S, Model, ModelSpec, Statistics
from fwasync.training.normalization import GradAccNormalization
from fwasync.training.requests import SavedSnapshot, load_adapter, load_weights, optim_step, save_snapshot, save_weights
from fwasync.training.verbs import Admit, batch, custom

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

__all__ = ("AsyncTrainingClient", "resolve_checkpoint_path")

_TIMEOUT_S = 600.0


def resolve_checkpoint_path(name: str, source_job_id: str | None = None) -> str:
    """What `load_state` takes for a checkpoint, possibly of another trainer job.

    Args:
        name: The checkpoint's name, or a path (`gs://…`, `tinker://…`, `/…`), which is returned as it is.
        source_job_id: The trainer job that saved it; `None` is this one.

    Raises:
        UsageError: The job's id is empty, or `name` is a path already and a job is given too.
    """
    if source_job_id is None:
        return name
    if not source_job_id:
        raise UsageError("source_job_id is empty; pass the id of the trainer job that saved the checkpoint, or None")
    if is_path(name):
        raise UsageError(f"{name!r} is a whole path already; pass it without source_job_id")
    return cross_job_path(source_job_id, name)


class AsyncTrainingClient:
    """One model under training. Made by `AsyncServiceClient.create_training_client`, entered with `async
    with`.

    Every verb takes its place in the order of the model at once and returns an `APIFuture`:

    ```python
    out = await client.forward_backward(batch, "cross_entropy")           # one at a time
    fb, opt = client.forward_backward(batch), client.optim_step(adam)     # pipelined: submitted in this order
    await fb
    await opt
    ```

    `timeout=` of a verb bounds each wait for its result, in seconds; `None` is without a limit. What an
    operation can raise is listed at `APIFuture.result`, what a cancelled wait leaves behind at `APIFuture`.

    Leaving the block normally waits for everything that was submitted, and raises the failure of an operation
    that nobody awaited (an `ExceptionGroup` if there are several). Leaving it by an exception or a
    cancellation withdraws what is queued, gives the request in flight a second to be acknowledged, and
    closes. A loss function that runs in a thread is waited for: nobody can end it from outside.
    """

    def __init__(self, session: Session, spec: ModelSpec) -> None:
        self._session = session
        self._model = Model(session, spec)
        self._snapshot_epoch = 0

    def __repr__(self) -> str:
        try:
            counts = self._model.statistics()
        except ClosedError:
            return f"<AsyncTrainingClient {self.base_model} not open>"
        return (
            f"<AsyncTrainingClient {self.model_id} of {self.base_model}: {counts.queued} queued, "
            f"{counts.admitting} being sent, {counts.unawaited} not awaited{', broken' if counts.broken else ''}>"
        )

    @property
    def base_model(self) -> str | None:
        """The base model; `None` until the client is entered, where it is that of a checkpoint."""
        return self._model.spec.base_model

    @property
    def lora_rank(self) -> int | None:
        """Rank of the LoRA adapter, 0 for all parameters; `None` as for `base_model`."""
        return self._model.spec.lora_rank

    @property
    def model_id(self) -> str:
        """The service's id of this model."""
        return self._model.lane.model_id

    @property
    def snapshot_epoch(self) -> int:
        """Grows each time that a snapshot is asked for, or a checkpoint to be loaded.

        From then on a delta is the difference to something else than before.
        """
        return self._snapshot_epoch

    def statistics(self) -> Statistics:
        """Counts of this client's operations, as of now."""
        return self._model.statistics()

    # -- verbs -----------------------------------------------------------------------------------

    def forward(
        self,
        data: Sequence[Datum],
        loss_fn: str = "cross_entropy",
        loss_fn_config: Mapping[str, Any] | None = None,
        *,
        timeout: float | None = _TIMEOUT_S,
    ) -> APIFuture[ForwardBackwardOutput]:
        """Compute the loss without a gradient.

        Args:
            data: The batch. Each of a datum's `loss_fn_inputs` has one entry for each token of its
                `model_input`, int64 or float32.
            loss_fn: Name of a loss of the service.
            loss_fn_config: Options of that loss.
            timeout: Seconds each wait may take.

        Returns:
            A future of one record for each datum, in order: `logprobs` float32 of the shape of
            `target_tokens`, in nats; and metrics such as `loss:sum`.

        Raises:
            DatumError: On awaiting: a datum cannot be sent. Nothing of the batch was.
        """
        return self._batch("forward", data, loss_fn, loss_fn_config, timeout)

    def forward_backward(
        self,
        data: Sequence[Datum],
        loss_fn: str = "cross_entropy",
        loss_fn_config: Mapping[str, Any] | None = None,
        *,
        timeout: float | None = _TIMEOUT_S,
    ) -> APIFuture[ForwardBackwardOutput]:
        """Compute the loss and add its gradient to what has been accumulated since the last `optim_step`.

        Losses are sums over the batch, so batches may be cut in any way. Arguments, result and errors are
        those of `forward`.
        """
        return self._batch("forward_backward", data, loss_fn, loss_fn_config, timeout)

    def forward_backward_custom(
        self, data: Sequence[Datum], loss_fn: CustomLoss, *, timeout: float | None = _TIMEOUT_S
    ) -> APIFuture[ForwardBackwardOutput]:
        """Accumulate the gradient of your own loss, a function of the logprobs in torch.

        It holds its place in the order from its forward to its backward: nothing slips in between.

        Args:
            data: The batch; each datum needs `target_tokens`. Other inputs stay here, for your function to use.
            loss_fn: `loss_fn(data, logprobs) -> (loss, metrics)`, where `logprobs` holds a float32 tensor for each
                datum, of the shape of its `target_tokens`. A sync function runs in a worker thread, so the event
                loop goes on; an async one is awaited on the loop.
            timeout: Seconds each wait may take.

        Returns:
            A future of the output of the backward pass. In its metrics, `loss:sum` is your loss, the
            surrogate's is `surrogate_loss:sum`, and your own metrics are added.

        Raises:
            UsageError: torch is not installed; on awaiting: the function returned something else.
            DatumError: On awaiting: loss or gradient are not finite, or a datum has no gradient. No gradient
                was sent.
        """
        require_torch()
        batch_ = tuple(data)
        return self._model.submit(
            "forward_backward_custom", lambda model_id: custom(model_id, batch_, loss_fn), timeout
        )

    def optim_step(
        self,
        adam_params: AdamParams,
        grad_accumulation_normalization: GradAccNormalization | str | None = None,
        *,
        timeout: float | None = _TIMEOUT_S,
    ) -> APIFuture[OptimStepResponse]:
        """Apply the accumulated gradient with AdamW, and clear it.

        Args:
            adam_params: Learning rate, betas, eps, decoupled weight decay, and the global norm to clip to.
            grad_accumulation_normalization: Divide the gradient first by the number of tokens or of sequences
                that contributed to it (Fireworks and the local service), as an enum or a string in any case. `None`
                leaves it to the service, which divides by nothing.
            timeout: Seconds each wait may take.

        Returns:
            A future of metrics such as `grad_norm`, before clipping.

        Raises:
            UsageError: A parameter is not finite, or the normalization is unknown.
        """
        return self._model.submit(
            "optim_step", lambda model_id: optim_step(model_id, adam_params, grad_accumulation_normalization), timeout
        )

    def save_state(self, name: str, *, timeout: float | None = CHECKPOINT_TIMEOUT_S) -> APIFuture[SaveWeightsResponse]:
        """Save a checkpoint: weights and optimizer state, to resume training from.

        Args:
            name: Its name within this model.
            timeout: Seconds each wait may take.

        Returns:
            A future whose `path` is what `load_state_with_optimizer` takes, also from another model.
        """
        return self._model.submit("save_state", lambda model_id: save_weights(model_id, name), timeout)

    def load_state(self, path: str, *, timeout: float | None = CHECKPOINT_TIMEOUT_S) -> APIFuture[LoadWeightsResponse]:
        """Load a checkpoint's weights; the optimizer starts anew, and accumulated gradients are cleared."""
        return self._load("load_state", path, optimizer=False, timeout=timeout)

    def load_state_with_optimizer(
        self, path: str, *, timeout: float | None = CHECKPOINT_TIMEOUT_S
    ) -> APIFuture[LoadWeightsResponse]:
        """Load a checkpoint's weights and optimizer state: training goes on as if it had not been interrupted."""
        return self._load("load_state_with_optimizer", path, optimizer=True, timeout=timeout)

    def load_adapter(self, adapter_path: str, *, timeout: float | None = CHECKPOINT_TIMEOUT_S) -> APIFuture[None]:
        """Load the weights of a LoRA adapter that was trained elsewhere; the optimizer starts anew.

        Fireworks and the local service offer it; other services refuse it.

        Args:
            adapter_path: A model resource (`accounts/…/models/…`), or what else the service reads: Fireworks a `gs://`
                path, the local service the path of a snapshot.
            timeout: Seconds each wait may take.
        """
        return self._model.submit("load_adapter", lambda model_id: load_adapter(model_id, adapter_path), timeout)

    def save_weights_for_sampler(
        self, name: str, *, timeout: float | None = CHECKPOINT_TIMEOUT_S
    ) -> APIFuture[SavedSnapshot]:
        """Export a snapshot: the weights as they are at this place in the order, for a sampler.

        Args:
            name: Its name within this model.
            timeout: Seconds each wait may take.

        Returns:
            A future whose `path` is what `create_sampling_client(model_path=...)` takes.
        """
        self._snapshot_epoch += 1
        return self._model.submit("save_weights_for_sampler", lambda model_id: save_snapshot(model_id, name), timeout)

    def save_weights_for_sampler_ext(
        self, name: str, checkpoint_type: str = "base", *, timeout: float | None = CHECKPOINT_TIMEOUT_S
    ) -> APIFuture[SavedSnapshot]:
        """Export a snapshot for hot-load or promotion, under a name that no other run can have used.

        Args:
            name: The beginning of its name; the client adds `-` and eight hexadecimal digits of its own.
            checkpoint_type: `"base"` for all weights, `"delta"` for the difference to the last snapshot.
            timeout: Seconds each wait may take.

        Returns:
            A future of the snapshot's `path` and its full `snapshot_name`.
        """
        full_name = f"{name}-{self._model.suffix}"
        self._snapshot_epoch += 1
        return self._model.submit(
            "save_weights_for_sampler_ext",
            lambda model_id: save_snapshot(model_id, full_name, checkpoint_type),
            timeout,
        )

    # -- questions, which take no place in the order ---------------------------------------------

    async def get_info(self) -> GetInfoResponse:
        """What the service knows of this model: base model, LoRA rank, tokenizer.

        **Cancellation:** nothing remains.
        """
        from tinker.types import GetInfoResponse, ModelData

        request = encode(messages.GetInfoRequest(model_id=self.model_id))
        body = await self._session.http.call("POST", "get_info", [request])
        info = read("get_info", body, messages.ModelInfo)
        return GetInfoResponse(
            model_id=info.model_id,
            model_data=ModelData(
                arch=info.model_data.arch,
                model_name=info.model_data.model_name,
                tokenizer_id=info.model_data.tokenizer_id,
            ),
            is_lora=info.is_lora,
            lora_rank=info.lora_rank,
            model_name=info.model_name,
        )

    async def list_checkpoints(self) -> list[str]:
        """The checkpoints that `load_state` can load: by name, as trainer jobs list them, or this model's by path, as
        other services do.

        **Cancellation:** nothing remains.
        """
        model_id = self.model_id  # raises if the client is not open
        try:
            body = await self._session.http.call("GET", "list_checkpoints")
        except NotFoundError:
            run = f"training_runs/{model_id}/checkpoints"
            listed = read(run, await self._session.http.call("GET", run), CheckpointList).checkpoints
            return [entry.tinker_path for entry in listed if entry.checkpoint_type == "training"]
        return read("list_checkpoints", body, messages.Checkpoints).checkpoints

    def resolve_checkpoint_path(self, name: str, source_job_id: str | None = None) -> str:
        """What `load_state` takes for a checkpoint, possibly of another trainer job (see the function of that name)."""
        return resolve_checkpoint_path(name, source_job_id)

    # -- life ------------------------------------------------------------------------------------

    async def unload(self) -> None:
        """Free the model on the service, after waiting for what was submitted; nothing can be submitted after it.

        **Cancellation:** the model may or may not have been freed; the client takes no more operations once it had
        begun to.
        """
        await self._model.unload()

    async def aclose(self) -> None:
        """Leave the client before its block ends, as the end of the block would."""
        await self._model.aclose(drain=True)

    async def __aenter__(self) -> Self:
        await self._model.open()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._model.aclose(drain=exc_type is None)

    def _batch(
        self,
        verb: Literal["forward", "forward_backward"],
        data: Sequence[Datum],
        loss_fn: str,
        loss_fn_config: Mapping[str, Any] | None,
        timeout: float | None,
    ) -> APIFuture[ForwardBackwardOutput]:
        datums, backward = tuple(data), verb == "forward_backward"

        def admit(model_id: str) -> Admit[ForwardBackwardOutput]:
            return batch(model_id, datums, backward=backward, loss_fn=loss_fn, loss_fn_config=loss_fn_config)

        return self._model.submit(verb, admit, timeout)

    def _load(self, verb: str, path: str, *, optimizer: bool, timeout: float | None) -> APIFuture[LoadWeightsResponse]:
        self._snapshot_epoch += 1
        return self._model.submit(verb, lambda model_id: load_weights(model_id, path, optimizer=optimizer), timeout)
