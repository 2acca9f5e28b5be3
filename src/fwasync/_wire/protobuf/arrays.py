"""Arrays as buffers and tensors."""

from __future__ import annotations

import functools
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from fwasync._wire.protobuf.fields import (
    ProtobufError,
    Value,
    as_bytes,
    as_integers,
    as_signed,
    as_text,
    enclosed,
    fields,
    integer,
    packed,
)
from fwasync._wire.tensors import Array, dense_of_csr

__all__ = ("FLOAT32", "INT32", "INT64", "array_of", "buffer", "entry", "read_tensor", "tensor")

FLOAT32, INT64, INT32, BFLOAT16 = 1, 2, 3, 4
_STORED: dict[int, np.dtype[Any]] = {
    FLOAT32: np.dtype("<f4"),
    INT64: np.dtype("<i8"),
    INT32: np.dtype("<i4"),
    BFLOAT16: np.dtype("<u2"),
}


def buffer(array: npt.NDArray[Any], dtype: str) -> memoryview:
    """The bytes of an array; a copy only where its type or layout need one."""
    return np.ascontiguousarray(array, dtype=dtype).reshape(-1).view(np.uint8).data


def array_of(data: memoryview, dtype: int) -> npt.NDArray[Any]:
    """A flat array of its own, float32 or int64."""
    stored = _STORED.get(dtype)
    if stored is None:
        raise ProtobufError(f"unknown dtype {dtype}")
    if len(data) % stored.itemsize:
        raise ProtobufError(f"{len(data)} bytes do not hold whole numbers of {stored.itemsize} bytes")
    values = np.frombuffer(data, dtype=stored)
    if dtype == BFLOAT16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32 if dtype == FLOAT32 else np.int64)


def tensor(array: Array) -> list[bytes | memoryview]:
    """The fields of a dense `Tensor`, in parts: the numbers are not copied."""
    is_float = array.dtype.kind == "f"
    numbers = enclosed(1, [buffer(array, "<f4" if is_float else "<i8")])
    return [*numbers, _form(FLOAT32 if is_float else INT64, array.shape)]


@functools.lru_cache  # most tensors of a batch have the same few shapes
def _form(dtype: int, shape: tuple[int, ...]) -> bytes:
    return integer(3, dtype) + packed(4, shape)


def read_tensor(data: memoryview) -> Array:
    """Read a `Tensor`; a sparse one becomes dense.

    Raises:
        ValueError: It is none.
    """
    dense = memoryview(b"")
    sparse: memoryview | None = None
    dtype = 0
    shape: list[int] = []
    for number, value in fields(data):
        match number:
            case 1:
                dense = as_bytes(value)
            case 2:
                sparse = as_bytes(value)
            case 3:
                dtype = as_signed(value)
            case 4:
                shape += as_integers(value)
            case _:
                pass
    if sparse is not None:
        return _read_csr(sparse, dtype, shape)
    flat = array_of(dense, dtype)
    if not shape:
        return cast("Array", flat)
    if int(np.prod(shape)) != flat.size or min(shape) < 0:
        raise ProtobufError(f"shape {shape} does not hold {flat.size} values")
    return cast("Array", flat.reshape(shape))


def _read_csr(data: memoryview, dtype: int, shape: list[int]) -> Array:
    found = {number: as_bytes(value) for number, value in fields(data)}
    empty = memoryview(b"")
    values = array_of(found.get(1, empty), dtype)
    return dense_of_csr(values, array_of(found.get(2, empty), INT64), array_of(found.get(3, empty), INT64), shape)


def entry(data: Value) -> tuple[str, Value]:
    """Key and value of a map's entry."""
    key, content = "", cast("Value", memoryview(b""))
    for number, value in fields(as_bytes(data)):
        if number == 1:
            key = as_text(value)
        elif number == 2:
            content = value
    return key, content
