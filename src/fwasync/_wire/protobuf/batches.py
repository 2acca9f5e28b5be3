"""Requests of forward and forward_backward."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fwasync._wire.protobuf.arrays import INT32, array_of, entry, read_tensor, tensor
from fwasync._wire.protobuf.fields import (
    ProtobufError,
    as_bool,
    as_bytes,
    as_double,
    as_signed,
    as_text,
    delimited,
    double,
    enclosed,
    fields,
    integer,
    map_entry,
    text,
)
from fwasync._wire.tensors import Array

if TYPE_CHECKING:
    from tinker.types import ModelInput

__all__ = ("BatchHead", "decode_request", "encode_batch", "encode_batch_end")


def _chunk(chunk: Any) -> bytes:
    kind = chunk.type
    if kind == "encoded_text":
        tokens = chunk.tokens
        try:
            packed = struct.pack(f"<{len(tokens)}i", *tokens)  # in half the time that numpy takes for a list
        except struct.error as error:
            raise ValueError(f"the tokens of a model input must be 32-bit integers: {error}") from error
        return delimited(1, delimited(1, packed))
    if kind == "image":
        expected = chunk.expected_tokens
        tokens = b"" if expected is None else integer(3, expected)
        return delimited(2, delimited(1, chunk.data), text(2, chunk.format), tokens)
    raise ValueError(f"a chunk of type {kind!r} cannot be sent in protobuf")


def encode_batch(
    data: Iterable[tuple[ModelInput, Mapping[str, Array]]],
    *,
    backward: bool,
    loss_fn: str,
    loss_fn_config: Mapping[str, Any] | None,
) -> Iterator[bytes]:
    """The start of a `ForwardBackwardRequest`, a piece for each datum (see `tensors.encode_batch`).

    Raises:
        ValueError: A chunk or an option has no form in protobuf.
    """
    head = text(4, loss_fn) + integer(6, int(not backward))
    for name, option in (loss_fn_config or {}).items():
        if isinstance(option, str):
            head += map_entry(7, name, delimited(2, delimited(2, option.encode())))
        elif isinstance(option, (int, float)):
            # Older services read the first map, newer ones the second.
            head += map_entry(5, name, double(2, float(option)))
            head += map_entry(7, name, delimited(2, double(1, float(option))))
        else:
            raise ValueError(f"loss_fn_config[{name!r}] is {option!r}; protobuf has numbers and texts only")
    for model_input, inputs in data:
        datum: list[bytes | memoryview] = [delimited(1, _chunk(chunk)) for chunk in model_input.chunks]
        for name, array in inputs.items():
            datum += enclosed(2, [text(1, name), *enclosed(2, tensor(array))])
        yield b"".join((head, *enclosed(3, datum)))
        head = b""


def encode_batch_end(model_id: str, seq_id: int) -> bytes:
    """The end of a request that `encode_batch` began."""
    return text(1, model_id) + integer(2, seq_id)


@dataclass(slots=True)
class BatchHead:
    """A `ForwardBackwardRequest` whose datums are still undecoded."""

    model_id: str = ""
    seq_id: int = 0
    loss_fn: str = ""
    forward_only: bool = False
    data: list[memoryview] = field(default_factory=list[memoryview])
    loss_fn_config: dict[str, float | str] = field(default_factory=dict[str, float | str])

    def datums(self) -> Iterator[tuple[npt.NDArray[np.int64], dict[str, Array]]]:
        """Each datum's tokens and loss_fn_inputs (see `tensors.decode_batch`).

        Raises:
            ValueError: A datum cannot be read; the text names its index.
        """
        for index, raw in enumerate(self.data):
            try:
                yield _read_datum(raw)
            except ValueError as error:
                raise ValueError(f"datum {index}: {error}") from error


def decode_request(body: bytes) -> BatchHead:
    """Read a `ForwardBackwardRequest` down to its datums.

    Raises:
        ProtobufError: It is not one.
    """
    head = BatchHead()
    for number, value in fields(body):
        match number:
            case 1:
                head.model_id = as_text(value)
            case 2:
                head.seq_id = as_signed(value)
            case 3:
                head.data.append(as_bytes(value))
            case 4:
                head.loss_fn = as_text(value)
            case 5:
                name, option = entry(value)
                head.loss_fn_config.setdefault(name, as_double(option) if len(as_bytes(option)) else 0.0)
            case 6:
                head.forward_only = as_bool(value)
            case 7:
                name, option = entry(value)
                for kind, content in fields(as_bytes(option)):
                    head.loss_fn_config[name] = as_double(content) if kind == 1 else as_text(content)
            case _:
                pass
    return head


def _read_datum(data: memoryview) -> tuple[npt.NDArray[np.int64], dict[str, Array]]:
    tokens: list[npt.NDArray[np.int64]] = []
    inputs: dict[str, Array] = {}
    for number, value in fields(data):
        if number == 1:
            for kind, content in fields(as_bytes(value)):
                if kind != 1:
                    raise ProtobufError(f"chunk {len(tokens)} is not text")
                stored = next((as_bytes(v) for n, v in fields(as_bytes(content)) if n == 1), memoryview(b""))
                tokens.append(array_of(stored, INT32))
        elif number == 2:
            name, content = entry(value)
            try:
                inputs[name] = read_tensor(as_bytes(content))
            except ValueError as error:
                raise ProtobufError(f"loss_fn_inputs[{name!r}]: {error}") from error
    return np.concatenate(tokens) if tokens else np.zeros(0, dtype=np.int64), inputs
