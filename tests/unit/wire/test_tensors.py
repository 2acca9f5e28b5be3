"""Whatever one side encodes, the other decodes to the same bits."""

from __future__ import annotations

import json

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fwasync import types
from fwasync._wire.messages import decode
from fwasync._wire.tensors import (
    ForwardBackwardEnvelope,
    ForwardBackwardRequest,
    ForwardBackwardResult,
    decode_batch,
    decode_outputs,
    encode_batch,
    encode_batch_end,
    encode_outputs,
    model_input_json,
)

SHAPES = hnp.array_shapes(min_dims=1, max_dims=2, min_side=1, max_side=5)
FLOATS = hnp.arrays(np.float32, SHAPES, elements=st.floats(width=32, allow_nan=False, allow_infinity=False))
INTS = hnp.arrays(np.int64, SHAPES)
RECORDS = st.dictionaries(st.text(min_size=1, max_size=8), FLOATS | INTS, max_size=3)


def equal(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    return left.keys() == right.keys() and all(
        a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
        for a, b in ((left[name], right[name]) for name in left)
    )


@given(st.lists(RECORDS, max_size=4), st.dictionaries(st.text(max_size=5), st.floats(allow_nan=False), max_size=2))
def test_results_round_trip(outputs: list[dict[str, np.ndarray]], metrics: dict[str, float]) -> None:
    metrics = {name: value for name, value in metrics.items() if np.isfinite(value)}
    body = b"".join(encode_outputs(ForwardBackwardResult(outputs, metrics, "record")))  # type: ignore[arg-type]
    envelope = decode(body, ForwardBackwardEnvelope)
    decoded = list(decode_outputs(envelope))
    assert len(decoded) == len(outputs)
    assert all(equal(a, b) for a, b in zip(decoded, outputs, strict=True))
    assert envelope.metrics == metrics


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 300), max_size=5), RECORDS), min_size=1, max_size=4),
    st.booleans(),
    st.text(max_size=5),
    st.integers(1, 2**31),
)
def test_batches_round_trip(
    data: list[tuple[list[int], dict[str, np.ndarray]]], backward: bool, model_id: str, number: int
) -> None:
    pieces = encode_batch(
        ((types.ModelInput.from_ints(tokens), inputs) for tokens, inputs in data),  # type: ignore[misc]
        backward=backward,
        loss_fn="ppo",
        loss_fn_config={"clip_low_threshold": 0.8},
    )
    body = b"".join([*pieces, encode_batch_end(model_id, number)])
    request = decode(body, ForwardBackwardRequest)
    assert (request.model_id, request.seq_id) == (model_id, number)
    batch = request.forward_backward_input if backward else request.forward_input
    assert batch is not None
    assert (batch.loss_fn, batch.loss_fn_config) == ("ppo", {"clip_low_threshold": 0.8})
    for (tokens, inputs), (decoded_tokens, decoded_inputs) in zip(data, decode_batch(batch.data), strict=True):
        assert decoded_tokens.tolist() == tokens
        assert equal(decoded_inputs, inputs)  # type: ignore[arg-type]


def raw(datum: object) -> list[msgspec.Raw]:
    return [msgspec.Raw(json.dumps(datum).encode())]


def test_older_clients_leave_out_types_and_shapes() -> None:
    datum = {
        "model_input": {"chunks": [{"tokens": [1, 2]}, {"tokens": [3]}]},
        "loss_fn_inputs": {"target_tokens": {"data": [2, 3, 4]}, "weights": {"data": [1, 0.5, 0]}},
    }
    ((tokens, inputs),) = decode_batch(raw(datum))
    assert tokens.tolist() == [1, 2, 3]
    assert inputs["target_tokens"].dtype == np.int64
    assert inputs["weights"].dtype == np.float32


@pytest.mark.parametrize(
    ("datum", "message"),
    [
        ({}, r"datum 0: Object missing required field `model_input`"),
        ({"model_input": {"chunks": [{"location": "x", "type": "image"}]}, "loss_fn_inputs": {}}, r"chunk 0 \(image\)"),
        (
            {"model_input": {"chunks": []}, "loss_fn_inputs": {"weights": {"data": [1, "x"]}}},
            r"datum 0, loss_fn_inputs\['weights'\]: Expected `float`",
        ),
        (
            {"model_input": {"chunks": []}, "loss_fn_inputs": {"w": {"data": [1.0], "shape": [2]}}},
            r"shape \[2\] does not hold 1 values",
        ),
        (
            {"model_input": {"chunks": []}, "loss_fn_inputs": {"w": {"data": [1.0], "sparse_crow_indices": [0]}}},
            "needs both sparse_crow_indices and sparse_col_indices",
        ),
    ],
)
def test_unreadable_datums_are_named(datum: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(decode_batch(raw(datum)))


def sparse(rows: object, columns: object, shape: object, data: object = (1.0, 2.0)) -> list[msgspec.Raw]:
    tensor = {"data": data, "shape": shape, "sparse_crow_indices": rows, "sparse_col_indices": columns}
    return raw({"model_input": {"chunks": []}, "loss_fn_inputs": {"weights": tensor}})


def test_sparse_tensors_become_dense() -> None:
    [(_, inputs)] = decode_batch(sparse([0, 0, 2, 2], [1, 3], [3, 4]))
    assert inputs["weights"].tolist() == [[0] * 4, [0, 1, 0, 2], [0] * 4]
    assert inputs["weights"].dtype == np.float32


@pytest.mark.parametrize(
    ("rows", "columns", "shape", "message"),
    [
        ([0, 2], [1, 3], [1, 3], "do not place 2 values in 3 columns"),
        ([0, 2], [-1, 3], [1, 4], "do not place 2 values in 4 columns"),
        ([0, 2], [1], [1, 4], "do not place 2 values in 4 columns"),
        ([0, 2], [1, 1], [1, 4], "do not rise within each row"),
        ([0, 2], [3, 1], [1, 4], "do not rise within each row"),
        ([0, 1], [1, 3], [1, 4], "do not split 2 values into 1 rows"),
        ([1, 2], [1, 3], [1, 4], "do not split 2 values into 1 rows"),
        ([0, 2, 1, 2], [1, 3], [3, 4], "do not split 2 values into 3 rows"),
        ([0, 2], [1, 3], [2, 4], "do not split 2 values into 2 rows"),
        ([], [1, 3], [0, 4], "do not split 2 values into 0 rows"),
        ([0, 2], [1, 3], [4], r"two dimensions, but its shape is \[4\]"),
        ([0, 2], [1, 3], None, r"two dimensions, but its shape is \[\]"),
        ([0, 2], [1, 3], [-1, -4], r"two dimensions, but its shape is \[-1, -4\]"),
        ([0, 2], [1, 3], [1, 2**60], "too large"),
    ],
)
def test_impossible_sparse_tensors_are_named(rows: object, columns: object, shape: object, message: str) -> None:
    with pytest.raises(ValueError, match=r"datum 0, loss_fn_inputs\['weights'\]: .*" + message):
        list(decode_batch(sparse(rows, columns, shape)))


def result_of(tensor: object) -> ForwardBackwardEnvelope:
    return decode(json.dumps({"loss_fn_outputs": [{"x": tensor}]}).encode(), ForwardBackwardEnvelope)


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        ({"data": [1, 2.5]}, np.float32([1, 2.5])),
        ({"data": []}, np.float32([])),
        ({"data": [0.1, 1e39, -0.0]}, np.float32([0.1, np.inf, -0.0])),
        ({"data": [1, 2], "dtype": "float32", "shape": [2, 1]}, np.float32([[1], [2]])),
        ({"data": [2**53 + 1], "dtype": "int64"}, np.int64([2**53 + 1])),
        (
            {"data": [7], "shape": [1, 2], "sparse_crow_indices": [0, 1], "sparse_col_indices": [1]},
            np.float32([[0, 7]]),
        ),
    ],
)
def test_tensors_of_results(tensor: object, expected: np.ndarray) -> None:
    [record] = decode_outputs(result_of(tensor))
    assert equal(record, {"x": expected})  # type: ignore[arg-type]
    assert record["x"].flags.writeable, "torch warns of arrays that cannot be written"


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ({"data": [1, None]}, "Expected `float`"),
        ({"data": [1.5], "dtype": "int64"}, "Expected `int`"),
        ({"data": [1.0], "shape": [2]}, r"shape \[2\] does not hold 1 values"),
        ({"data": [1.0], "sparse_col_indices": [0]}, "needs both"),
    ],
)
def test_unreadable_results_are_named(tensor: object, message: str) -> None:
    with pytest.raises(ValueError, match=r"loss_fn_outputs\[0\]: .*" + message):
        list(decode_outputs(result_of(tensor)))


def test_images_are_sent_as_tinker_writes_them() -> None:
    from tinker.types import EncodedTextChunk, ImageChunk

    model_input = types.ModelInput(
        chunks=[EncodedTextChunk(tokens=[1]), ImageChunk(data=b"\x89PNG", format="png", expected_tokens=3)]
    )
    assert json.loads(model_input_json(model_input)) == {
        "chunks": [
            {"tokens": [1], "type": "encoded_text"},
            {"data": "iVBORw==", "format": "png", "expected_tokens": 3, "type": "image"},
        ]
    }
