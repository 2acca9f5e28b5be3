"""A user's datums: checked, encoded in pieces, cut into chunks; and results put together again.

Everything is checked before anything is sent, so that a bad datum at the end of a batch leaves no half-sent
batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fwasync._http.checks import require_finite
from fwasync._http.client import Answer
from fwasync._http.slices import in_slices
from fwasync._wire.codec import Codec, decode_outputs
from fwasync._wire.tensors import Array
from fwasync.errors import DatumError, ProtocolError
from fwasync.training.merge import merge_metrics

if TYPE_CHECKING:
    from tinker.types import Datum, ForwardBackwardOutput, ModelInput

__all__ = ("encode_chunks", "merge_results", "plan_chunks", "read_result")

MAX_CHUNK_DATUMS = 1024
MAX_CHUNK_BYTES = 5_000_000


def _arrays(datum: Datum, where: str) -> dict[str, Array]:
    """The checked loss_fn_inputs of a datum: int64 or float32, finite, as long as its model input."""
    length = datum.model_input.length
    if length == 0:
        raise DatumError(f"{where}: model_input is empty")
    arrays: dict[str, Array] = {}
    for name, tensor in datum.loss_fn_inputs.items():
        array: Any = np.asarray(tensor.to_numpy())
        is_float = array.dtype.kind not in "iub"
        array = array.astype(np.float32 if is_float else np.int64, copy=False)
        if array.ndim == 0 or array.shape[0] != length:
            raise DatumError(
                f"{where}: loss_fn_inputs[{name!r}] has shape {list(array.shape)}, but model_input has "
                f"{length} tokens; there must be one entry for each token"
            )
        if is_float and not np.isfinite(array).all():
            position = int(np.argmin(np.isfinite(array).reshape(-1)))
            raise DatumError(
                f"{where}: loss_fn_inputs[{name!r}] is {array.reshape(-1)[position]} at position {position}; "
                "only finite numbers can be trained on"
            )
        arrays[name] = array
    return arrays


def _checked(data: Sequence[Datum]) -> Iterator[tuple[ModelInput, Mapping[str, Array]]]:
    for index, datum in enumerate(data):
        where = f"datum {index} of {len(data)}"
        try:
            yield datum.model_input, _arrays(datum, where)
        except DatumError:
            raise
        except (AttributeError, TypeError, ValueError) as error:
            raise DatumError(f"{where} cannot be encoded: {error}") from error


def plan_chunks(sizes: Sequence[int], *, max_datums: int, max_bytes: int) -> list[slice]:
    """Cut a batch into runs of at most `max_datums` datums and, where there are several, `max_bytes` bytes."""
    chunks: list[slice] = []
    start = 0
    held = 0
    for index, size in enumerate(sizes):
        if index > start and (index - start >= max_datums or held + size > max_bytes):
            chunks.append(slice(start, index))
            start, held = index, 0
        held += size
    chunks.append(slice(start, len(sizes)))
    return chunks


async def encode_chunks(
    data: Sequence[Datum],
    *,
    codec: Codec,
    backward: bool,
    loss_fn: str,
    loss_fn_config: Mapping[str, Any] | None,
) -> list[list[bytes]]:
    """The beginnings of the request bodies for a batch, one for each chunk (see `encode_batch`).

    Raises:
        DatumError: A datum cannot be sent; the text names its index and field.
    """
    if len(data) == 0:
        raise DatumError("the batch is empty: pass at least one datum")
    require_finite("loss_fn_config", loss_fn_config or {})

    checked = await in_slices(_checked(data))
    sizes = [10 * (tokens.length + sum(array.size for array in arrays.values())) for tokens, arrays in checked]
    chunks: list[list[bytes]] = []
    for chunk in plan_chunks(sizes, max_datums=MAX_CHUNK_DATUMS, max_bytes=MAX_CHUNK_BYTES):
        pieces = codec.encode_batch(checked[chunk], backward=backward, loss_fn=loss_fn, loss_fn_config=loss_fn_config)
        try:
            chunks.append(await in_slices(pieces))
        except (AttributeError, TypeError, ValueError) as error:
            raise DatumError(f"the batch cannot be encoded as {codec.name}: {error}") from error
    return chunks


async def read_result(answer: Answer) -> ForwardBackwardOutput:
    """The result of one chunk.

    Raises:
        ProtocolError: It is none.
    """
    from tinker.types import ForwardBackwardOutput, TensorData

    kind, metrics = "", dict[str, float]()

    def records() -> Iterator[dict[str, TensorData]]:
        nonlocal kind, metrics
        kind, metrics, decoded = decode_outputs(answer.content_type, answer.body)  # a millisecond for a megabyte
        for record in decoded:
            yield {name: TensorData.from_numpy(array) for name, array in record.items()}

    try:
        outputs = await in_slices(records())
    except ValueError as error:
        raise ProtocolError(f"a result of forward or forward_backward cannot be read: {error}") from error
    return ForwardBackwardOutput(loss_fn_output_type=kind, loss_fn_outputs=outputs, metrics=metrics)


def merge_results(parts: Sequence[ForwardBackwardOutput]) -> ForwardBackwardOutput:
    """The result of a batch from those of its chunks, in order."""
    from tinker.types import ForwardBackwardOutput

    if len(parts) == 1:
        return parts[0]
    return ForwardBackwardOutput(
        loss_fn_output_type=parts[0].loss_fn_output_type,
        loss_fn_outputs=[record for part in parts for record in part.loss_fn_outputs],
        metrics=merge_metrics([part.metrics for part in parts], weights=[len(part.loss_fn_outputs) for part in parts]),
    )
