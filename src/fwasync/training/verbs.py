"""How each verb is sent and how its result is read: the admission functions of operations."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from fwasync._http.reading import read
from fwasync._wire.codec import Codec
from fwasync._wire.messages import Message, encode
from fwasync.errors import BadRequestError
from fwasync.training.batch import encode_chunks, merge_results, read_result
from fwasync.training.custom_loss import CustomLoss, forward_datums, run_loss, surrogate_datums
from fwasync.training.operation import Admission, Operation

if TYPE_CHECKING:
    from tinker.types import Datum, ForwardBackwardOutput

__all__ = ("Admit", "batch", "custom", "single")

T = TypeVar("T")
M = TypeVar("M", bound=Message)

_UNSUPPORTED_MEDIA_TYPE = 415

Collect = Callable[[], Awaitable[T]]
Admit = Callable[[Operation[T], Admission], Awaitable[Collect[T]]]


def single(path: str, request: Callable[[int], Message], answer: type[M], convert: Callable[[M], T]) -> Admit[T]:
    """A verb of one small request.

    Args:
        path: Below `/api/v1`.
        request: Gives the request for a number.
        answer: The message of its result.
        convert: Makes the caller's result of it.
    """

    async def admit(operation: Operation[T], admission: Admission) -> Collect[T]:
        (request_id,) = await admission.send(
            path, [lambda number: [encode(request(number))]], on_sent=operation.note_sent
        )

        async def collect() -> T:
            result = await admission.fetch(request_id, what=operation.verb, on_wait=operation.note_wait)
            return convert(read(operation.verb, result.body, answer))

        return collect

    return admit


def batch(
    model_id: str,
    data: Sequence[Datum],
    *,
    backward: bool,
    loss_fn: str,
    loss_fn_config: Mapping[str, Any] | None,
) -> Admit[ForwardBackwardOutput]:
    """`forward` or `forward_backward`: as many requests as the batch has chunks."""

    async def admit(
        operation: Operation[ForwardBackwardOutput], admission: Admission
    ) -> Collect[ForwardBackwardOutput]:
        request_ids: list[str | int] = []

        async def send(codec: Codec) -> None:
            chunks = await encode_chunks(
                data, codec=codec, backward=backward, loss_fn=loss_fn, loss_fn_config=loss_fn_config
            )
            request_ids[:] = await admission.send(
                codec.path(backward=backward),
                [lambda number, start=start: [*start, codec.encode_batch_end(model_id, number)] for start in chunks],
                content_type=codec.content_type,
                on_sent=operation.note_sent,
            )

        try:
            await send(admission.codec)
        except BadRequestError as error:
            if error.status != _UNSUPPORTED_MEDIA_TYPE or not admission.refuses_json():
                raise
            await send(admission.codec)
        accept = admission.codec.accept

        async def collect() -> ForwardBackwardOutput:
            # One after the other: the service works in this order too, and the first failure is the one to tell.
            # Each is read while the service works on the next.
            parts: list[ForwardBackwardOutput] = []
            for request_id in request_ids:
                answer = await admission.fetch(
                    request_id, what=operation.verb, accept=accept, on_wait=operation.note_wait
                )
                parts.append(await read_result(answer))
            return merge_results(parts)

        return collect

    return admit


def custom(model_id: str, data: Sequence[Datum], loss_fn: CustomLoss) -> Admit[ForwardBackwardOutput]:
    """`forward_backward_custom`: forward, the user's loss, and the backward of its linear surrogate, in one turn."""

    async def admit(
        operation: Operation[ForwardBackwardOutput], admission: Admission
    ) -> Collect[ForwardBackwardOutput]:
        def pass_(datums: Sequence[Datum], *, backward: bool) -> Awaitable[Collect[ForwardBackwardOutput]]:
            return batch(model_id, datums, backward=backward, loss_fn="cross_entropy", loss_fn_config=None)(
                operation, admission
            )

        operation.harmless = True
        collect_forward = await pass_(forward_datums(data), backward=False)
        gradient = await run_loss(list(data), await collect_forward(), loss_fn)
        operation.request_ids.clear()  # from here on, the backward's requests are those that count
        operation.harmless = False
        collect_backward = await pass_(surrogate_datums(data, gradient), backward=True)

        async def collect() -> ForwardBackwardOutput:
            output = await collect_backward()
            metrics = dict(output.metrics)
            if "loss:sum" in metrics:
                metrics["surrogate_loss:sum"] = metrics["loss:sum"]
            metrics["loss:sum"] = gradient.loss
            return replace(output, metrics=metrics | gradient.metrics)

        return collect

    return admit
