"""`AsyncTrainingClient`: the verbs of one model under training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

import anyio
import msgspec

from fwasync._background import Background
from fwasync._http.checks import require_finite
from fwasync._http.reading import read
from fwasync._http.retrieve import retrieve
from fwasync._http.session import Session
from fwasync._wire import messages
from fwasync._wire.messages import Message, encode
from fwasync.errors import ClosedError, ProtocolError, UsageError
from fwasync.training.custom_loss import CustomLoss, require_torch
from fwasync.training.future import APIFuture
from fwasync.training.lane import Lane
from fwasync.training.operation import AnyOperation, Operation
from fwasync.training.verbs import Admit, batch, custom, single

if TYPE_CHECKING:
    from tinker.types import (
        AdamParams,
        Datum,
        ForwardBackwardOutput,
        GetInfoResponse,
        LoadWeightsResponse,
        OptimStepResponse,
        SaveWeightsForSamplerResponse,
        SaveWeightsResponse,
    )

__all__ = ("AsyncTrainingClient", "Normalization")

T = TypeVar("T")

Normalization = Literal["num_loss_tokens", "num_sequences", "none"]

_TIMEOUT_S = 600.0
_CHECKPOINT_TIMEOUT_S = 2700.0
_GRACE_S = 1.0


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
    closes.
    """

    def __init__(self, session: Session, *, base_model: str, lora_rank: int = 32, seed: int | None = None) -> None:
        if lora_rank < 0:
            raise UsageError(f"lora_rank is {lora_rank}; it must be at least 1, or 0 to train all parameters")
        self.base_model = base_model
        self.lora_rank = lora_rank
        self._seed = seed
        self._session = session
        self._background = Background()
        self._lane: Lane | None = None
        self._unobserved: set[AnyOperation] = set()

    def __repr__(self) -> str:
        if self._lane is None:
            return f"<AsyncTrainingClient {self.base_model} not open>"
        return (
            f"<AsyncTrainingClient {self._lane.model_id} of {self.base_model}: {self._lane.queued} queued, "
            f"{len(self._unobserved)} not awaited>"
        )

    @property
    def model_id(self) -> str:
        """The service's id of this model."""
        return self._open_lane().model_id

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
        lane = self._open_lane()
        admit = batch(lane.model_id, tuple(data), backward=False, loss_fn=loss_fn, loss_fn_config=loss_fn_config)
        return self._submit("forward", admit, timeout)

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
        lane = self._open_lane()
        admit = batch(lane.model_id, tuple(data), backward=True, loss_fn=loss_fn, loss_fn_config=loss_fn_config)
        return self._submit("forward_backward", admit, timeout)

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
        admit = custom(self._open_lane().model_id, tuple(data), loss_fn)
        return self._submit("forward_backward_custom", admit, timeout)

    def optim_step(
        self,
        adam_params: AdamParams,
        *,
        grad_accumulation_normalization: Normalization | None = None,
        timeout: float | None = _TIMEOUT_S,
    ) -> APIFuture[OptimStepResponse]:
        """Apply the accumulated gradient with AdamW, and clear it.

        Args:
            adam_params: Learning rate, betas, eps, decoupled weight decay, and the global norm to clip to.
            grad_accumulation_normalization: Divide the gradient first by the number of tokens or of sequences
                that contributed to it (Fireworks and the local service). `None` leaves the sum as it is.
            timeout: Seconds each wait may take.

        Returns:
            A future of metrics such as `grad_norm`, before clipping.

        Raises:
            UsageError: A parameter is not finite.
        """
        lane = self._open_lane()
        fields = adam_params.model_dump()
        require_finite("optim_step", fields)
        params = msgspec.convert(fields, messages.AdamParamsMessage)

        def request(number: int) -> Message:
            return messages.OptimStepRequest(
                model_id=lane.model_id,
                seq_id=number,
                adam_params=params,
                grad_accumulation_normalization=grad_accumulation_normalization,
            )

        def convert(result: messages.OptimStepResult) -> OptimStepResponse:
            from tinker.types import OptimStepResponse

            return OptimStepResponse(metrics=result.metrics)

        return self._submit("optim_step", single("optim_step", request, messages.OptimStepResult, convert), timeout)

    def save_state(self, name: str, *, timeout: float | None = _CHECKPOINT_TIMEOUT_S) -> APIFuture[SaveWeightsResponse]:
        """Save a checkpoint: weights and optimizer state, to resume training from.

        Args:
            name: Its name within this model.
            timeout: Seconds each wait may take.

        Returns:
            A future whose `path` is what `load_state_with_optimizer` takes, also from another model.
        """
        lane = self._open_lane()

        def request(number: int) -> Message:
            return messages.SaveWeightsRequest(model_id=lane.model_id, path=name, seq_id=number)

        def convert(result: messages.WeightsSaved) -> SaveWeightsResponse:
            from tinker.types import SaveWeightsResponse

            return SaveWeightsResponse(path=result.path)

        return self._submit("save_state", single("save_weights", request, messages.WeightsSaved, convert), timeout)

    def load_state(self, path: str, *, timeout: float | None = _CHECKPOINT_TIMEOUT_S) -> APIFuture[LoadWeightsResponse]:
        """Load a checkpoint's weights; the optimizer starts anew, and accumulated gradients are cleared."""
        return self._load("load_state", path, optimizer=False, timeout=timeout)

    def load_state_with_optimizer(
        self, path: str, *, timeout: float | None = _CHECKPOINT_TIMEOUT_S
    ) -> APIFuture[LoadWeightsResponse]:
        """Load a checkpoint's weights and optimizer state: training goes on as if it had not been interrupted."""
        return self._load("load_state_with_optimizer", path, optimizer=True, timeout=timeout)

    def save_weights_for_sampler(
        self, name: str, *, timeout: float | None = _CHECKPOINT_TIMEOUT_S
    ) -> APIFuture[SaveWeightsForSamplerResponse]:
        """Export a snapshot: the weights as they are at this place in the order, for a sampler.

        Args:
            name: Its name within this model.
            timeout: Seconds each wait may take.

        Returns:
            A future whose `path` is what `create_sampling_client(model_path=...)` takes.
        """
        lane = self._open_lane()

        def request(number: int) -> Message:
            return messages.SaveWeightsForSamplerRequest(model_id=lane.model_id, path=name, seq_id=number)

        def convert(result: messages.SamplerWeightsSaved) -> SaveWeightsForSamplerResponse:
            from tinker.types import SaveWeightsForSamplerResponse

            if result.path is None:
                raise ProtocolError("save_weights_for_sampler: the service gave no path for the snapshot")
            return SaveWeightsForSamplerResponse(path=result.path)

        admit = single("save_weights_for_sampler", request, messages.SamplerWeightsSaved, convert)
        return self._submit("save_weights_for_sampler", admit, timeout)

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
        """Names of the checkpoints that can be loaded, as the service lists them.

        **Cancellation:** nothing remains.
        """
        self._open_lane()
        body = await self._session.http.call("GET", "list_checkpoints")
        return read("list_checkpoints", body, messages.Checkpoints).checkpoints

    # -- life ------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        if self._lane is not None:
            raise UsageError("a training client is entered once; create another one")
        await self._background.open()
        try:
            self._lane = Lane(self._session, await self._create_model())
        except BaseException:
            await self._background.aclose()
            raise
        self._background.start(self._lane.run)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        try:
            if exc_type is None:
                await self._drain()
        finally:
            await self._open_lane().aclose(grace_s=_GRACE_S)
            await self._background.aclose()

    async def _create_model(self) -> str:
        http = self._session.http
        request = messages.CreateModelRequest(
            session_id=self._session.session_id,
            model_seq_id=self._session.next_model_number(),
            base_model=self.base_model,
            lora_config=messages.LoraConfigMessage(
                rank=self.lora_rank, seed=self._seed, train_unembed=True, train_mlp=True, train_attn=True
            ),
        )
        body = await http.call("POST", "create_model", [encode(request)])
        submitted = read("create_model", body, messages.Submitted)
        result = await retrieve(http, submitted.request_id, what=f"creating a model of {self.base_model}")
        return read("create_model", result.body, messages.ModelCreated).model_id

    async def _drain(self) -> None:
        """Wait for everything that was submitted and that nobody awaited; raise what failed."""
        errors: list[Exception] = []

        async def settle(operation: AnyOperation) -> None:
            try:
                await APIFuture(operation).result()
            except Exception as error:
                errors.append(error)

        while self._unobserved and not errors:
            async with anyio.create_task_group() as group:
                for operation in tuple(self._unobserved):
                    group.start_soon(settle, operation)
        if len(errors) == 1:
            raise errors[0]
        if errors:
            raise ExceptionGroup("operations failed that nobody had awaited", errors)

    def _load(self, verb: str, path: str, *, optimizer: bool, timeout: float | None) -> APIFuture[LoadWeightsResponse]:
        lane = self._open_lane()

        def request(number: int) -> Message:
            return messages.LoadWeightsRequest(model_id=lane.model_id, path=path, optimizer=optimizer, seq_id=number)

        def convert(result: messages.WeightsLoaded) -> LoadWeightsResponse:
            from tinker.types import LoadWeightsResponse

            return LoadWeightsResponse(path=result.path)

        return self._submit(verb, single("load_weights", request, messages.WeightsLoaded, convert), timeout)

    def _submit(self, verb: str, admit: Admit[T], timeout: float | None) -> APIFuture[T]:
        operation = Operation(verb, admit, timeout=timeout, on_observed=self._unobserved.discard)
        self._open_lane().append(operation)
        self._unobserved.add(operation)
        return APIFuture(operation)

    def _open_lane(self) -> Lane:
        if self._lane is None:
            raise ClosedError(
                "the training client is not open: use it as `async with service.create_training_client(...) as client:`"
            )
        return self._lane
