"""Results of forward and forward_backward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt

from fwasync._wire.protobuf.arrays import FLOAT32, INT64, array_of, buffer, entry
from fwasync._wire.protobuf.fields import (
    ProtobufError,
    as_bytes,
    as_double,
    as_integers,
    as_signed,
    as_text,
    delimited,
    double,
    fields,
    integer,
    map_entry,
    packed,
    text,
)
from fwasync._wire.tensors import Array, ForwardBackwardResult

__all__ = ("decode_outputs", "encode_outputs")


def encode_outputs(result: ForwardBackwardResult) -> Iterator[bytes]:
    """A `ForwardBackwardOutput`, a piece for each run of datums whose records are alike."""
    yield text(1, result.output_type) + b"".join(
        map_entry(3, name, double(2, value)) for name, value in result.metrics.items()
    )
    start = 0
    for end in range(1, len(result.outputs) + 1):
        if end == len(result.outputs) or _layout(result.outputs[end]) != _layout(result.outputs[start]):
            yield delimited(2, *_record(result.outputs[start:end], result.output_type))
            start = end


def _layout(record: Mapping[str, Array]) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(name, str(array.dtype), array.shape[1:]) for name, array in record.items()]


def _record(records: Sequence[Mapping[str, Array]], tag: str) -> Iterator[bytes]:
    yield text(1, tag)
    for name in records[0]:
        arrays = [record[name] for record in records]
        is_float = arrays[0].dtype == np.float32
        buffers = [buffer(array, "<f4" if is_float else "<i8") for array in arrays]
        offsets = np.concatenate([[0], np.cumsum([len(buffer) for buffer in buffers])])
        batched = (
            delimited(1, *buffers),
            delimited(2, buffer(offsets, "<i8")),
            integer(3, FLOAT32 if is_float else INT64),
            packed(4, arrays[0].shape[1:]),
        )
        yield map_entry(2, name, delimited(2, *batched))
    yield integer(3, len(records))


def decode_outputs(body: bytes) -> tuple[str, dict[str, float], Iterator[dict[str, Array]]]:
    """Type and metrics of a `ForwardBackwardOutput`, and its records, a datum a step.

    Raises:
        ProtobufError: It is not one; also while the records are read.
    """
    output_type = ""
    metrics: dict[str, float] = {}
    records: list[memoryview] = []
    for number, value in fields(body):
        match number:
            case 1:
                output_type = as_text(value)
            case 2:
                records.append(as_bytes(value))
            case 3:
                name, content = entry(value)
                metrics[name] = as_double(content) if len(as_bytes(content)) else 0.0
            case _:
                pass
    return output_type, metrics, (record for raw in records for record in _read_record(raw))


def _read_record(data: memoryview) -> Iterator[dict[str, Array]]:
    columns: dict[str, _Column] = {}
    count = 0
    for number, value in fields(data):
        if number == 2:
            name, content = entry(value)
            columns[name] = _Column.read(as_bytes(content))
        elif number == 3:
            count = as_signed(value)
    for name, column in columns.items():
        if len(column.offsets) != count + 1:
            raise ProtobufError(f"{name} has {len(column.offsets)} offsets for {count} datums")
    for index in range(count):
        yield {name: column.take(index) for name, column in columns.items()}


@dataclass(frozen=True, slots=True)
class _Column:
    data: memoryview
    offsets: npt.NDArray[np.int64]
    dtype: int
    trailing: tuple[int, ...]

    @classmethod
    def read(cls, message: memoryview) -> _Column:
        data = offsets = memoryview(b"")
        dtype = 0
        trailing: list[int] = []
        for number, value in fields(message):
            match number:
                case 1:
                    data = as_bytes(value)
                case 2:
                    offsets = as_bytes(value)
                case 3:
                    dtype = as_signed(value)
                case 4:
                    trailing += as_integers(value)
                case _:
                    pass
        return cls(data, array_of(offsets, INT64), dtype, tuple(trailing))

    def take(self, index: int) -> Array:
        start, end = int(self.offsets[index]), int(self.offsets[index + 1])
        if not 0 <= start <= end <= len(self.data):
            raise ProtobufError(f"offsets {start} to {end} are outside of {len(self.data)} bytes")
        flat = array_of(self.data[start:end], self.dtype)
        if not self.trailing:
            return cast("Array", flat)
        try:
            return cast("Array", flat.reshape(-1, *self.trailing))
        except ValueError as error:
            raise ProtobufError(f"{flat.size} values do not fill rows of {list(self.trailing)}") from error
