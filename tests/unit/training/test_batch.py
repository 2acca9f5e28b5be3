"""Large batches and results are worked on in steps, and other tasks have their turn between them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

import numpy as np
import pytest

from fwasync._http.client import Answer
from fwasync._http.slices import in_slices
from fwasync._wire import protobuf
from fwasync._wire.codec import JSON, PROTOBUF, Codec
from fwasync._wire.protobuf import results
from fwasync._wire.tensors import ForwardBackwardResult, encode_outputs
from fwasync.errors import ProtocolError
from fwasync.training.batch import encode_chunks, merge_results, read_result
from unit.training.test_client import datum

T = TypeVar("T")
DATUMS = 20


@pytest.fixture(autouse=True)
def _each_step_is_a_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fwasync._http.slices._SLICE_S", 0.0)


async def turns_of_others(work: Awaitable[T]) -> tuple[T, int]:
    """The result, and how often another task ran meanwhile."""
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    task = asyncio.ensure_future(other())
    result = await work
    task.cancel()
    return result, turns


async def test_others_run_between_slices() -> None:
    assert await turns_of_others(in_slices(iter(range(DATUMS)))) == (list(range(DATUMS)), DATUMS - 1)


@pytest.mark.parametrize("codec", [JSON, PROTOBUF], ids=lambda codec: codec.name)
async def test_a_batch_is_checked_and_encoded_datum_by_datum(codec: Codec) -> None:
    data = [datum()] * DATUMS
    work = encode_chunks(data, codec=codec, backward=True, loss_fn="cross_entropy", loss_fn_config=None)
    chunks, turns = await turns_of_others(work)
    assert len(chunks) == 1
    assert turns >= 2 * (DATUMS - 1)


def answer(content_type: str, rows: list[list[float]], **metrics: float) -> Answer:
    outputs = [{"logprobs": np.float32(row)} for row in rows]
    encode = results.encode_outputs if content_type == protobuf.CONTENT_TYPE else encode_outputs
    body = b"".join(encode(ForwardBackwardResult(outputs, metrics, "record")))  # type: ignore[arg-type]
    return Answer(200, body, {"content-type": content_type})


@pytest.mark.parametrize("content_type", ["application/json", protobuf.CONTENT_TYPE])
async def test_a_result_is_read_record_by_record(content_type: str) -> None:
    rows = [[float(i), 0.5] for i in range(DATUMS)]
    output, turns = await turns_of_others(read_result(answer(content_type, rows, loss=1.0)))
    assert turns >= DATUMS - 1
    assert [record["logprobs"].tolist() for record in output.loss_fn_outputs] == rows
    assert (output.loss_fn_output_type, output.metrics) == ("record", {"loss": 1.0})


async def test_results_of_chunks_are_put_together_in_order() -> None:
    first = await read_result(answer("application/json", [[1.0], [2.0]], **{"loss:sum": 1.0, "x:mean": 1.0}))
    second = await read_result(answer(protobuf.CONTENT_TYPE, [[3.0]], **{"loss:sum": 2.0, "x:mean": 4.0}))
    merged = merge_results([first, second])
    assert [record["logprobs"].tolist() for record in merged.loss_fn_outputs] == [[1.0], [2.0], [3.0]]
    assert merged.metrics == {"loss:sum": 3.0, "x:mean": 2.0}
    assert merge_results([first]) == first


@pytest.mark.parametrize("content_type", ["application/json", protobuf.CONTENT_TYPE])
async def test_a_result_that_cannot_be_read_is_told(content_type: str) -> None:
    with pytest.raises(ProtocolError, match="a result of forward or forward_backward cannot be read"):
        await read_result(Answer(200, b"\xff", {"content-type": content_type}))
