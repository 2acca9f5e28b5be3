"""Our protobuf against the protobuf library's: descriptors are built here from the schema's numbers and types."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fwasync import types
from fwasync._wire.messages import SampledSequenceMessage, SampleResult
from fwasync._wire.protobuf import arrays, batches, results, samples
from fwasync._wire.protobuf.fields import ProtobufError, as_signed, delimited, fields, integer, text
from fwasync._wire.tensors import ForwardBackwardResult

# name: [(number, name, type, label)]; `map<T` is a map with string keys, `*` is repeated, `?` is optional.
SCHEMA = {
    "Tokens": "1 bytes tokens",
    "Image": "1 bytes data, 2 string format, 3 ?int32 expected_tokens",
    "Chunk": "1 Tokens encoded_text, 2 Image image",
    "SparseCsr": "1 bytes values, 2 bytes crow_indices, 3 bytes col_indices",
    "Tensor": "1 bytes dense, 2 SparseCsr sparse_csr, 3 int32 dtype, 4 *int64 shape",
    "Datum": "1 *Chunk model_input, 2 map<Tensor loss_fn_inputs",
    "LossConfigValue": "1 ?double number, 2 ?string text",
    "Request": "1 string model_id, 2 int32 seq_id, 3 *Datum data, 4 string loss_fn, 5 map<double loss_fn_config, "
    "6 bool forward_only, 7 map<LossConfigValue loss_fn_config_v2",
    "BatchedTensor": "1 bytes data, 2 bytes offsets, 3 int32 dtype, 4 *int64 trailing_shape",
    "ArrayRecord": "1 string type_tag, 2 map<BatchedTensor fields, 3 int64 num_datums",
    "Output": "1 string loss_fn_output_type, 2 *ArrayRecord loss_fn_outputs, 3 map<double metrics",
    "Topk": "1 bytes token_ids, 2 bytes logprobs, 3 uint32 k, 4 uint32 length",
    "Sequence": "1 int32 stop_reason, 2 bytes tokens, 3 ?bytes logprobs",
    "Sample": "1 *Sequence sequences, 2 ?bytes prompt_logprobs, 3 Topk topk_prompt_logprobs",
}


def build() -> dict[str, Any]:
    field_type = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="schema.proto", package="t", syntax="proto3")

    def put(message: Any, number: int, kind: str, name: str) -> None:
        field = message.field.add(number=number, name=name, label=field_type.LABEL_OPTIONAL)
        if kind.startswith("map<"):
            entry = message.nested_type.add(name="".join(part.title() for part in name.split("_")) + "Entry")
            entry.options.map_entry = True
            put(entry, 1, "string", "key")
            put(entry, 2, kind[4:], "value")
            field.label, field.type = field_type.LABEL_REPEATED, field_type.TYPE_MESSAGE
            field.type_name = f".t.{message.name}.{entry.name}"
            return
        if kind.startswith("*"):
            field.label = field_type.LABEL_REPEATED
        if kind.startswith("?"):
            field.proto3_optional = True
            message.oneof_decl.add(name=f"_{name}")
            field.oneof_index = len(message.oneof_decl) - 1
        kind = kind.lstrip("*?")
        if kind in SCHEMA:
            field.type, field.type_name = field_type.TYPE_MESSAGE, f".t.{kind}"
        else:
            field.type = getattr(field_type, f"TYPE_{kind.upper()}")

    for name, spec in SCHEMA.items():
        message = file.message_type.add(name=name)
        for part in spec.split(", "):
            number, kind, field_name = part.split()
            put(message, int(number), kind, field_name)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"t.{name}")) for name in SCHEMA}


LIBRARY = build()
SHAPES = hnp.array_shapes(min_dims=1, max_dims=2, min_side=0, max_side=4)
FLOATS = hnp.arrays(np.float32, SHAPES, elements=st.floats(width=32))
INTS = hnp.arrays(np.int64, SHAPES)
RECORDS = st.dictionaries(st.text(max_size=5), FLOATS | INTS, max_size=3)
NAMES = st.text(max_size=5)


def same(left: np.ndarray, right: np.ndarray) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()


@given(
    st.lists(st.tuples(st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=4), max_size=3), RECORDS), max_size=3),
    st.booleans(),
    NAMES,
    st.dictionaries(NAMES, st.floats(allow_nan=False) | st.text(max_size=3) | st.integers(-5, 5), max_size=3),
    NAMES,
    st.integers(1, 2**31 - 1),
)
def test_requests(
    data: list[tuple[list[list[int]], dict[str, np.ndarray]]],
    backward: bool,
    loss_fn: str,
    config: dict[str, float | str],
    model_id: str,
    number: int,
) -> None:
    pieces = batches.encode_batch(
        (
            (types.ModelInput(chunks=[types.EncodedTextChunk(tokens=tokens) for tokens in chunks]), inputs)
            for chunks, inputs in data
        ),  # type: ignore[arg-type]
        backward=backward,
        loss_fn=loss_fn,
        loss_fn_config=config,
    )
    head = [] if data else [batches.encode_batch_end("", 0)]
    body = b"".join([*pieces, *head, batches.encode_batch_end(model_id, number)])
    if data:  # an empty batch has no head, and is never sent
        library = LIBRARY["Request"].FromString(body)
        assert (library.model_id, library.seq_id, library.loss_fn) == (model_id, number, loss_fn)
        assert library.forward_only is not backward
        assert dict(library.loss_fn_config) == {k: float(v) for k, v in config.items() if not isinstance(v, str)}
        for (chunks, inputs), datum in zip(data, library.data, strict=True):
            assert [np.frombuffer(c.encoded_text.tokens, "<i4").tolist() for c in datum.model_input] == chunks
            assert {name: list(t.shape) for name, t in datum.loss_fn_inputs.items()} == {
                name: list(array.shape) for name, array in inputs.items()
            }
        body = library.SerializeToString()  # as another encoder orders it
    decoded = batches.decode_request(body)
    assert (decoded.model_id, decoded.seq_id) == (model_id, number)
    if data:
        assert decoded.loss_fn_config == {k: v if isinstance(v, str) else float(v) for k, v in config.items()}
    for (chunks, inputs), (tokens, read) in zip(data, decoded.datums(), strict=True):
        assert tokens.tolist() == [token for chunk in chunks for token in chunk]
        assert inputs.keys() == read.keys()
        assert all(same(inputs[name], read[name]) for name in inputs)


@given(st.lists(RECORDS, max_size=4), st.dictionaries(NAMES, st.floats(allow_nan=False), max_size=3), NAMES)
def test_results(outputs: list[dict[str, np.ndarray]], metrics: dict[str, float], kind: str) -> None:
    outputs = [{name: a for name, a in record.items() if 0 not in a.shape[1:]} for record in outputs]
    body = b"".join(results.encode_outputs(ForwardBackwardResult(outputs, metrics, kind)))  # type: ignore[arg-type]
    library = LIBRARY["Output"].FromString(body)
    assert dict(library.metrics) == metrics
    assert sum(record.num_datums for record in library.loss_fn_outputs) == len(outputs)
    for reencoded in (body, library.SerializeToString()):
        read_kind, read_metrics, records = results.decode_outputs(reencoded)
        assert (read_kind, read_metrics) == (kind, metrics)
        for record, read in zip(outputs, records, strict=True):
            assert record.keys() == read.keys()
            assert all(same(record[name], read[name]) for name in record)


MATRICES = hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=5)
CELLS = st.integers(-2, 2)


@given(hnp.arrays(np.int64, MATRICES, elements=CELLS) | hnp.arrays(np.float32, MATRICES, elements=CELLS))
def test_sparse_tensors_become_dense(matrix: np.ndarray) -> None:
    rows, columns = np.nonzero(matrix)
    sparse = {
        "values": matrix[rows, columns].tobytes(),
        "crow_indices": np.searchsorted(rows, np.arange(len(matrix) + 1)).astype(np.int64).tobytes(),
        "col_indices": columns.astype(np.int64).tobytes(),
    }
    dtype = 1 if matrix.dtype == np.float32 else 2
    tensor = LIBRARY["Tensor"](sparse_csr=LIBRARY["SparseCsr"](**sparse), dtype=dtype, shape=matrix.shape)
    assert same(arrays.read_tensor(memoryview(tensor.SerializeToString())), matrix)


LOGPROBS = st.floats(-50, 0, width=32)
SEQUENCES = st.builds(
    SampledSequenceMessage,
    stop_reason=st.sampled_from(["stop", "length"]),
    tokens=st.lists(st.integers(0, 2**31 - 1), max_size=4),
    logprobs=st.none() | st.lists(LOGPROBS, max_size=4),
)
TOPK = st.lists(st.none() | st.lists(st.tuples(st.integers(0, 99), LOGPROBS), min_size=1, max_size=3), min_size=1)


@given(
    st.builds(
        SampleResult,
        sequences=st.lists(SEQUENCES, max_size=3),
        prompt_logprobs=st.none() | st.lists(st.none() | LOGPROBS, max_size=4),
        topk_prompt_logprobs=st.none() | TOPK,
    )
)
def test_samples(sample: SampleResult) -> None:
    body = samples.encode_sample(sample)
    library = LIBRARY["Sample"].FromString(body)
    assert [bool(s.stop_reason) for s in library.sequences] == [s.stop_reason == "length" for s in sample.sequences]
    for reencoded in (body, library.SerializeToString()):
        assert samples.decode_sample(reencoded) == sample


def test_an_option_of_zero_may_be_left_out_of_its_entry() -> None:
    # Fields of a map's entry that have their default need not be written.
    config = batches.decode_request(delimited(5, text(1, "beta")) + delimited(7, text(1, "tau"), delimited(2)))
    assert config.loss_fn_config == {"beta": 0.0}


def test_bfloat16_and_int32_widen() -> None:
    tensor = LIBRARY["BatchedTensor"](
        data=np.array([0x3F80, 0xC000], "<u2").tobytes(), offsets=np.array([0, 4], "<i8").tobytes(), dtype=4
    )
    ints = LIBRARY["BatchedTensor"](
        data=np.array([-7], "<i4").tobytes(), offsets=np.array([0, 4], "<i8").tobytes(), dtype=3
    )
    output = LIBRARY["Output"]()
    record = output.loss_fn_outputs.add(num_datums=1)
    record.fields["x"].CopyFrom(tensor)
    record.fields["y"].CopyFrom(ints)
    (read,) = results.decode_outputs(output.SerializeToString())[2]
    assert same(read["x"], np.float32([1, -2]))
    assert same(read["y"], np.int64([-7]))


@given(st.binary(max_size=60))
def test_garbage_is_a_clear_error_and_never_anything_else(garbage: bytes) -> None:
    for read in (
        lambda data: list(batches.decode_request(data).datums()),
        lambda data: list(results.decode_outputs(data)[2]),
        samples.decode_sample,
    ):
        with contextlib.suppress(ValueError):  # and no other
            read(garbage)


@given(st.integers(-(2**63), 2**63 - 1))
def test_integers(value: int) -> None:
    assert [(n, as_signed(v)) for n, v in fields(integer(3, value))] == ([(3, value)] if value else [])


@pytest.mark.parametrize("token", [2**31, 0.5])
def test_tokens_that_are_none_are_named(token: Any) -> None:
    chunk = types.EncodedTextChunk.model_construct(tokens=[1, token])
    datum = types.ModelInput.model_construct(chunks=[chunk]), {}
    with pytest.raises(ValueError, match="tokens of a model input must be 32-bit integers"):
        list(batches.encode_batch([datum], backward=True, loss_fn="ppo", loss_fn_config=None))


@pytest.mark.parametrize("data", [b"\x80", b"\x0a\x05ab", b"\x0b", b"\x09\x00", b"\xff" * 12])
def test_cut_or_unknown_fields(data: bytes) -> None:
    with pytest.raises(ProtobufError):
        list(fields(data))
