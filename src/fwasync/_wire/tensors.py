"""Tensors and batches of datums as JSON, in pieces small enough for an event loop.

Everything large goes through iterators that do a datum's worth of work a step (a fraction of a millisecond
for some thousand tokens), so that their user decides when to yield. Numbers are written from numpy buffers:
float32 in its shortest text that reads back to the same bits.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import msgspec
import numpy as np
import numpy.typing as npt
import orjson

from fwasync._wire.messages import Message

if TYPE_CHECKING:
    from tinker.types import ModelInput

__all__ = (
    "Array",
    "ForwardBackwardEnvelope",
    "ForwardBackwardRequest",
    "ForwardBackwardResult",
    "ModelInputMessage",
    "TensorMessage",
    "decode_batch",
    "decode_outputs",
    "dense_of_csr",
    "encode_batch",
    "encode_batch_end",
    "encode_outputs",
    "encode_record",
    "encode_tensor",
    "model_input_json",
    "model_input_tokens",
)

Array = npt.NDArray[np.int64] | npt.NDArray[np.float32]
DType = Literal["int64", "float32"]

_NUMPY = orjson.OPT_SERIALIZE_NUMPY


class TensorMessage(Message):
    """A tensor: flat row-major numbers. No `shape` means one dimension.

    With both lists of indices it is a sparse matrix (see `dense_of_csr`), and `data` are the values listed.
    """

    data: msgspec.Raw
    dtype: DType | None = None
    shape: list[int] | None = None
    sparse_crow_indices: list[int] | None = None
    sparse_col_indices: list[int] | None = None


class _RecordTensor(Message):
    # A tensor of a result, its numbers read as what they nearly always are: a step less than by way of `Raw`.
    data: list[float]
    dtype: DType | None = None
    shape: list[int] | None = None
    sparse_crow_indices: list[int] | None = None
    sparse_col_indices: list[int] | None = None

    @property
    def is_plain(self) -> bool:
        return self.dtype != "int64" and self.sparse_crow_indices is None and self.sparse_col_indices is None


class ChunkMessage(Message):
    """One chunk of a model input. Only text chunks carry `tokens`."""

    tokens: list[int] | None = None
    type: str | None = None


class ModelInputMessage(Message):
    """A model input: its length is the sum of its chunks' lengths."""

    chunks: list[ChunkMessage]


class DatumMessage(Message):
    """One datum."""

    model_input: ModelInputMessage
    loss_fn_inputs: dict[str, TensorMessage]


class BatchMessage(Message):
    """`forward_input` and `forward_backward_input`; each datum is still undecoded."""

    data: list[msgspec.Raw]
    loss_fn: str
    loss_fn_config: dict[str, Any] | None = None


class ForwardBackwardRequest(Message):
    """`POST /forward` and `POST /forward_backward`; answered by a future of `ForwardBackwardResult`."""

    model_id: str
    seq_id: int | None = None
    forward_input: BatchMessage | None = None
    forward_backward_input: BatchMessage | None = None


class ForwardBackwardEnvelope(Message):
    """The result of forward and forward_backward, each record still undecoded."""

    loss_fn_outputs: list[msgspec.Raw]
    loss_fn_output_type: str | None = None
    metrics: dict[str, float] | None = None


class ForwardBackwardResult(msgspec.Struct, frozen=True):
    """A decoded result: one record of named arrays for each datum, in the order of the request."""

    outputs: list[dict[str, Array]]
    metrics: dict[str, float]
    output_type: str


# -- writing ---------------------------------------------------------------------------------------


def model_input_json(model_input: ModelInput) -> bytes:
    """The JSON of a model input: text as token ids, other chunks as tinker writes them."""
    chunks: list[dict[str, Any]] = []
    for chunk in model_input.chunks:
        tokens = getattr(chunk, "tokens", None)
        if tokens is None:
            chunks.append(chunk.model_dump(mode="json", exclude_none=True))
        else:
            chunks.append({"tokens": list(tokens), "type": "encoded_text"})
    return orjson.dumps({"chunks": chunks})


def encode_tensor(array: Array) -> bytes:
    """A tensor's JSON. `array` is int64 or float32, of any shape, and finite."""
    return orjson.dumps(
        {
            "data": np.ascontiguousarray(array).reshape(-1),
            "dtype": "float32" if array.dtype.kind == "f" else "int64",
            "shape": array.shape,
        },
        option=_NUMPY,
    )


def encode_record(record: Mapping[str, Array]) -> Iterator[bytes]:
    """The JSON of named tensors, a piece for each: joining them would copy all that is large."""
    separator = b"{"
    for name, array in record.items():
        yield separator + orjson.dumps(name) + b":"
        yield encode_tensor(array)
        separator = b","
    yield b"}" if record else b"{}"


def encode_batch(
    data: Iterable[tuple[ModelInput, Mapping[str, Array]]],
    *,
    backward: bool,
    loss_fn: str,
    loss_fn_config: Mapping[str, Any] | None,
) -> Iterator[bytes]:
    """The start of a forward or forward_backward body, a piece for each model input and tensor.

    The body lacks its end, which names model and number: they are known only when it is sent
    (see `encode_batch_end`).

    Args:
        data: For each datum its model input and its loss_fn_inputs.
        backward: Which of the two requests it is.
        loss_fn: Name of the server's loss.
        loss_fn_config: Its options, if any.
    """
    config = b"" if loss_fn_config is None else b',"loss_fn_config":' + orjson.dumps(loss_fn_config)
    head = b'{"loss_fn":' + orjson.dumps(loss_fn) + config + b',"data":['
    separator = (b'{"forward_backward_input":' if backward else b'{"forward_input":') + head
    for model_input, loss_fn_inputs in data:
        yield separator + b'{"model_input":' + model_input_json(model_input) + b',"loss_fn_inputs":'
        yield from encode_record(loss_fn_inputs)
        yield b"}"
        separator = b","


def encode_batch_end(model_id: str, seq_id: int) -> bytes:
    """The end of a body that `encode_batch` began."""
    return b']},"model_id":' + orjson.dumps(model_id) + b',"seq_id":' + orjson.dumps(seq_id) + b"}"


def encode_outputs(result: ForwardBackwardResult) -> Iterator[bytes]:
    """The JSON of a result, a piece for each tensor."""
    separator = (
        b'{"loss_fn_output_type":'
        + orjson.dumps(result.output_type)
        + b',"metrics":'
        + orjson.dumps(result.metrics)
        + b',"loss_fn_outputs":['
    )
    for record in result.outputs:
        yield separator
        yield from encode_record(record)
        separator = b","
    yield b"]}" if result.outputs else separator + b"]}"


# -- reading ---------------------------------------------------------------------------------------


def _floats(values: list[float]) -> Array:
    """float32 of Python's numbers; `struct` needs a third of the time that numpy does."""
    array = np.empty(len(values), dtype=np.float32)
    struct.pack_into(f"{len(values)}f", array.data, 0, *values)
    return array


def _decode_tensor(message: TensorMessage, default_dtype: DType) -> Array:
    dtype = message.dtype or default_dtype
    if dtype == "float32":
        flat = _floats(msgspec.json.decode(message.data, type=list[float]))
    else:
        flat = np.asarray(msgspec.json.decode(message.data, type=list[int]), dtype=np.int64)
    rows, columns = message.sparse_crow_indices, message.sparse_col_indices
    if rows is not None and columns is not None:
        indices = (np.asarray(rows, dtype=np.int64), np.asarray(columns, dtype=np.int64))
        return dense_of_csr(flat, *indices, message.shape or ())
    if rows is not None or columns is not None:
        raise ValueError("a sparse (CSR) tensor needs both sparse_crow_indices and sparse_col_indices")
    return _shaped(flat, message.shape)


def _shaped(flat: Array, shape: list[int] | None) -> Array:
    if shape is None or shape == [flat.size]:
        return flat
    if math.prod(shape) != flat.size:
        raise ValueError(f"shape {shape} does not hold {flat.size} values")
    return flat.reshape(shape)


_MOST_CELLS = 2**26  # a few bytes must not claim all memory


def dense_of_csr(
    values: Array, row_starts: npt.NDArray[np.int64], columns: npt.NDArray[np.int64], shape: Sequence[int]
) -> Array:
    """A matrix from its compressed sparse rows; the cells that are not listed are 0.

    Args:
        values: The values listed, row by row.
        row_starts: int64 `[rows + 1]`: row i has the values from `row_starts[i]` up to `row_starts[i + 1]`.
        columns: int64, the column of each value; they rise within a row.
        shape: `(rows, columns)`.

    Raises:
        ValueError: These do not make a matrix, or it is beyond all measure.
    """
    if len(shape) != 2 or min(shape) < 0:
        raise ValueError(f"a sparse (CSR) tensor has two dimensions, but its shape is {list(shape)}")
    height, width = shape
    if height * width > _MOST_CELLS:
        raise ValueError(f"a sparse (CSR) tensor of the shape {list(shape)} is too large: at most {_MOST_CELLS} cells")
    counts = np.diff(row_starts)
    if len(row_starts) != height + 1 or row_starts[0] != 0 or row_starts[-1] != values.size or (counts < 0).any():
        raise ValueError(f"sparse_crow_indices do not split {values.size} values into {height} rows")
    if columns.size != values.size or ((columns < 0) | (columns >= width)).any():
        raise ValueError(f"sparse_col_indices do not place {values.size} values in {width} columns")
    cells = np.repeat(np.arange(height), counts) * width + columns
    if (np.diff(cells) <= 0).any():
        raise ValueError("sparse_col_indices do not rise within each row")
    dense = np.zeros(height * width, dtype=values.dtype)
    dense[cells] = values
    return cast("Array", dense.reshape(height, width))


def model_input_tokens(message: ModelInputMessage) -> npt.NDArray[np.int64]:
    """The tokens of a text-only model input, int64 of shape [N].

    Raises:
        ValueError: A chunk is not text.
    """
    tokens: list[int] = []
    for index, chunk in enumerate(message.chunks):
        if chunk.tokens is None:
            raise ValueError(f"chunk {index} ({chunk.type or 'unknown type'}) is not text")
        tokens += chunk.tokens
    return np.asarray(tokens, dtype=np.int64)


# What older clients leave untyped.
_DEFAULT_DTYPES: dict[str, DType] = {"target_tokens": "int64"}


def decode_batch(
    data: Iterable[msgspec.Raw],
) -> Iterator[tuple[npt.NDArray[np.int64], dict[str, Array]]]:
    """Each datum's tokens and loss_fn_inputs.

    Raises:
        ValueError: A datum cannot be read; the text names its index and field.
    """
    for index, raw in enumerate(data):
        try:
            datum = msgspec.json.decode(raw, type=DatumMessage)
            tokens = model_input_tokens(datum.model_input)
        except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError) as error:
            raise ValueError(f"datum {index}: {error}") from error
        inputs: dict[str, Array] = {}
        for name, tensor in datum.loss_fn_inputs.items():
            try:
                inputs[name] = _decode_tensor(tensor, _DEFAULT_DTYPES.get(name, "float32"))
            except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError) as error:
                raise ValueError(f"datum {index}, loss_fn_inputs[{name!r}]: {error}") from error
        yield tokens, inputs


def decode_outputs(envelope: ForwardBackwardEnvelope) -> Iterator[dict[str, Array]]:
    """Each record of a result as named arrays, a record a step.

    Raises:
        ValueError: A record cannot be read.
    """
    for index, raw in enumerate(envelope.loss_fn_outputs):
        try:
            yield _decode_record(raw)
        except (msgspec.MsgspecError, ValueError, OverflowError) as error:
            raise ValueError(f"loss_fn_outputs[{index}]: {error}") from error


_record_decoder = msgspec.json.Decoder(dict[str, _RecordTensor])


def _decode_record(raw: msgspec.Raw) -> dict[str, Array]:
    record = _record_decoder.decode(raw)
    if all(tensor.is_plain for tensor in record.values()):
        return {name: _shaped(_floats(tensor.data), tensor.shape) for name, tensor in record.items()}
    tensors = msgspec.json.decode(raw, type=dict[str, TensorMessage])  # anew: as floats, large integers lose digits
    return {name: _decode_tensor(tensor, "float32") for name, tensor in tensors.items()}
