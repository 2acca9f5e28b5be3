"""The floor of the training side: batches to bytes and results to arrays by hand, over the connections of `floor`.

What is large is done datum by datum, and the loop gets its turn after each millisecond of work.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import floor
import msgspec
import numpy as np
import orjson
from floor import JSON, PROTOBUF, Floor, read_submitted

TURN_S = 0.001
WRITE = 256 * 1024

Arrays = Mapping[str, np.ndarray]
Logprobs = list[np.ndarray]


class Datum(NamedTuple):
    """Token ids, int32, and what the loss needs for each of them, int64 or float32."""

    tokens: np.ndarray
    inputs: Arrays


async def in_turns(pieces: Iterable[Any]) -> list[Any]:
    """All of them, made in turns of a millisecond."""
    made: list[Any] = []
    began = time.perf_counter()
    for piece in pieces:
        made.append(piece)
        if time.perf_counter() - began > TURN_S:
            await asyncio.sleep(0)
            began = time.perf_counter()
    return made


def writes(pieces: list[bytes]) -> Iterator[bytes]:
    """The same bytes in pieces that one write takes without a long copy."""
    waiting: list[bytes] = []
    size = 0
    for piece in pieces:
        for start in range(0, len(piece), WRITE):
            part = piece[start : start + WRITE] if len(piece) > WRITE else piece
            if size + len(part) > WRITE and waiting:
                yield b"".join(waiting)
                waiting, size = [], 0
            waiting.append(part)
            size += len(part)
    yield b"".join(waiting)


# -- JSON ------------------------------------------------------------------------------------------


def json_batch(model_id: str, seq_id: int, data: Sequence[Datum], loss_fn: str) -> Iterator[bytes]:
    yield b'{"forward_backward_input":{"data":['
    for index, datum in enumerate(data):
        inputs = {
            name: {"data": array, "dtype": str(array.dtype), "shape": array.shape}
            for name, array in datum.inputs.items()
        }
        chunks = [{"tokens": datum.tokens, "type": "encoded_text"}]
        value = {"model_input": {"chunks": chunks}, "loss_fn_inputs": inputs}
        yield b"," * (index > 0) + orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
    yield b'],"loss_fn":"%b"},"model_id":"%b","seq_id":%d}' % (loss_fn.encode(), model_id.encode(), seq_id)


def json_logprobs(body: bytes) -> Iterator[np.ndarray]:
    """Of each datum; `data` is the first field of a tensor, and logprobs are the only ones."""
    end = 0
    while (start := body.find(b'"data":[', end)) >= 0:
        end = body.index(b"]", start) + 1
        yield np.array(orjson.loads(memoryview(body)[start + 7 : end]), np.float32)


# -- protobuf --------------------------------------------------------------------------------------


def varint(value: int) -> bytes:
    *others, last = (value >> shift & 0x7F for shift in range(0, max(value.bit_length(), 1), 7))
    return bytes([*(group | 0x80 for group in others), last])


def field(number: int, *parts: bytes) -> bytes:
    return b"".join((varint(number << 3 | 2), varint(sum(map(len, parts))), *parts))


def protobuf_batch(model_id: str, seq_id: int, data: Sequence[Datum], loss_fn: str) -> Iterator[bytes]:
    yield field(1, model_id.encode()) + b"\x10" + varint(seq_id)
    for datum in data:
        inputs = [
            field(2, field(1, name.encode()), field(2, field(1, array.tobytes()), tensor_end(array)))
            for name, array in datum.inputs.items()
        ]
        yield field(3, field(1, field(1, field(1, datum.tokens.tobytes()))), *inputs)
    yield field(4, loss_fn.encode())


def tensor_end(array: np.ndarray) -> bytes:
    return b"\x18" + varint(1 if array.dtype == np.float32 else 2) + field(4, *map(varint, array.shape))


def fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The fields that are bytes; others are passed over."""
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    while at < len(data):
        key = number()
        if key & 7 == 0:
            number()
        elif key & 7 == 1:
            at += 8
        else:
            size = number()
            yield key >> 3, data[at : at + size]
            at += size


def protobuf_logprobs(body: bytes) -> Iterator[np.ndarray]:
    """Of each datum, as views of the body: an output is a record of named tensors, one after another."""
    for record in (value for number, value in fields(memoryview(body)) if number == 2):
        entry = next(dict(fields(value)) for number, value in fields(record) if number == 2)
        tensor = dict(fields(entry[2]))
        values, offsets = np.frombuffer(tensor[1], np.float32), np.frombuffer(tensor[2], np.int64) // 4
        for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
            yield values[start:end]


# -- operations ------------------------------------------------------------------------------------


class Operation:
    """A result that has been asked for, and comes on a connection of its own."""

    def __init__(self, floor_: Floor, connection: floor.Connection, read: Callable[[bytes], Iterable[Any]]) -> None:
        self._floor, self._connection, self._read = floor_, connection, read

    async def result(self) -> list[Any]:
        return await in_turns(self._read(await self._floor.finish(self._connection)))


class Trainer:
    """One model. Operations are sent one after the other, as the API wants it; results are waited for at once."""

    def __init__(self, floor_: Floor, model_id: str, wire: str) -> None:
        self._floor, self._model_id, self._seq_id = floor_, model_id, 0
        self._kind = PROTOBUF if wire == "protobuf" else JSON
        self._batch = protobuf_batch if wire == "protobuf" else json_batch
        self._read = protobuf_logprobs if wire == "protobuf" else json_logprobs

    @classmethod
    async def create(cls, floor_: Floor, base_model: str, wire: str) -> Trainer:
        session = orjson.loads(await floor_.post("/api/v1/create_session", b"{}"))["session_id"]
        asked = orjson.dumps({"session_id": session, "model_seq_id": 0, "base_model": base_model})
        created = orjson.loads(await floor.future(floor_, "create_model", asked))
        return cls(floor_, created["model_id"], wire)

    async def forward_backward(self, data: Sequence[Datum], loss_fn: str, verb: str = "forward_backward") -> Operation:
        self._seq_id += 1
        pieces = await in_turns(self._batch(self._model_id, self._seq_id, data, loss_fn))
        # The old API has a path for each of both, and a protobuf trainer one path: what is measured is the same.
        size = sum(map(len, pieces))
        connection = await self._floor.send(f"/api/v1/{verb}", writes(pieces), size, self._kind)
        return await self._asked(await self._floor.finish(connection), self._read)

    async def optim_step(self, learning_rate: float) -> Operation:
        self._seq_id += 1
        adam = {"learning_rate": learning_rate, "beta1": 0.9, "beta2": 0.95, "eps": 1e-12, "weight_decay": 0.0}
        request = {"model_id": self._model_id, "seq_id": self._seq_id, "adam_params": adam, "type": "optim_step"}
        return await self._asked(
            await self._floor.post("/api/v1/optim_step", orjson.dumps(request)),
            lambda body: [orjson.loads(body)["metrics"]],
        )

    async def forward_backward_custom(
        self, data: Sequence[Datum], loss_fn: Callable[[Any, list[Any]], tuple[Any, Mapping[str, float]]]
    ) -> Logprobs:
        """With a loss in torch, in a worker thread."""
        import torch

        def gradients(logprobs: Logprobs) -> list[np.ndarray]:
            leaves = [torch.from_numpy(row.copy()).requires_grad_() for row in logprobs]
            loss, _ = loss_fn(data, leaves)
            loss.backward()
            return [-leaf.grad.numpy() for leaf in leaves if leaf.grad is not None]

        targets = [datum.inputs["target_tokens"] for datum in data]
        zeros = [np.zeros(len(each), np.float32) for each in targets]
        logprobs = await (await self.forward_backward(weighted(data, zeros), "cross_entropy", "forward")).result()
        weights = await asyncio.to_thread(gradients, logprobs)
        return await (await self.forward_backward(weighted(data, weights), "cross_entropy")).result()

    async def _asked(self, submitted: bytes, read: Callable[[bytes], Iterable[Any]]) -> Operation:
        body = msgspec.json.encode({"request_id": read_submitted(submitted).request_id})
        connection = await self._floor.send("/api/v1/retrieve_future", [body], len(body), JSON, self._kind)
        return Operation(self._floor, connection, read)


def weighted(data: Sequence[Datum], weights: Iterable[np.ndarray]) -> list[Datum]:
    return [
        Datum(datum.tokens, {"target_tokens": datum.inputs["target_tokens"], "weights": each})
        for datum, each in zip(data, weights, strict=True)
    ]
