"""The benchmarks of the training side run: fwasync and the floor do what a cell asks for, in the smallest size."""

from __future__ import annotations

import importlib
import json
from typing import Any

import numpy as np
import pytest

from fwasync._wire import messages, tensors
from fwasync._wire.protobuf import batches, results

OURS = ("fwasync, JSON", "fwasync, protobuf", "floor, JSON", "floor, protobuf", "fwasync", "the loss alone")


@pytest.mark.parametrize("script", ["training", "batches", "custom_loss", "long_run"])
async def test_fwasync_and_the_floor_do_what_is_measured(harness, url, script):
    case = importlib.import_module(script).CASE
    shown = {column.key for column in case.columns} - {"rss_mb"}
    names = [name for name in case.clients if name in OURS]
    assert names
    for cell in case.cells:
        for name in names:
            before = harness.server_counts(url)["requests"]
            measures = await case.clients[name].run(url, cell.settings | case.tiny)
            assert set(measures) >= shown, f"{cell.name}, {name}"
            if name != "the loss alone":
                assert harness.server_counts(url)["requests"] > before + 2


async def test_an_import_of_fwasync_loads_nothing_heavy(harness, url):
    case = importlib.import_module("imports").CASE
    measures = await case.clients["import fwasync"].run(url, case.tiny)
    assert measures["heavy_names"] == []
    assert (await case.clients["import numpy"].run(url, case.tiny))["heavy_names"] == ["numpy"]


@pytest.fixture
def by_hand(harness: Any) -> Any:
    return importlib.import_module("floor_training")


@pytest.mark.parametrize("wire", ["json", "protobuf"])
def test_the_floor_sends_the_batch_that_is_meant(harness, by_hand, wire):
    trainers = importlib.import_module("trainers")
    data = trainers.policy_data(trainers.ByHand(None), 2, 200)
    if wire == "protobuf":
        head = batches.decode_request(b"".join(by_hand.protobuf_batch("m", 300, data, "ppo")))
        sent, named = list(head.datums()), (head.model_id, head.seq_id, head.loss_fn)
    else:
        body = b"".join(by_hand.json_batch("m", 300, data, "ppo"))
        request = messages.decode(body, tensors.ForwardBackwardRequest)
        batch = request.forward_backward_input
        assert batch is not None
        sent, named = list(tensors.decode_batch(batch.data)), (request.model_id, request.seq_id, batch.loss_fn)
    assert named == ("m", 300, "ppo")
    for (tokens, inputs), datum in zip(sent, data, strict=True):
        assert tokens.tolist() == datum.tokens.tolist()
        assert list(inputs) == ["target_tokens", "logprobs", "advantages", "weights"]
        for name, array in inputs.items():
            assert (array.dtype, array.tolist()) == (datum.inputs[name].dtype, datum.inputs[name].tolist())


@pytest.mark.parametrize("wire", ["json", "protobuf"])
def test_the_floor_reads_the_logprobs_that_were_sent(by_hand, wire):
    rows = [np.linspace(-3, 0, count, dtype=np.float32) for count in (200, 1, 7)]
    result = tensors.ForwardBackwardResult([{"logprobs": row} for row in rows], {"loss:sum": 1.0}, "x")
    encode = results.encode_outputs if wire == "protobuf" else tensors.encode_outputs
    read = by_hand.protobuf_logprobs if wire == "protobuf" else by_hand.json_logprobs
    assert [row.tolist() for row in read(b"".join(encode(result)))] == [row.tolist() for row in rows]


def test_what_is_written_at_a_time_is_no_more_than_a_write(by_hand):
    pieces = [bytes([number]) * size for number, size in enumerate((3, by_hand.WRITE, 1, 3 * by_hand.WRITE + 5, 0))]
    written = list(by_hand.writes(pieces))
    assert b"".join(written) == b"".join(pieces)
    assert max(map(len, written)) <= by_hand.WRITE


def test_curves_are_drawn_of_what_was_measured(harness, tmp_path, monkeypatch):
    draw = importlib.import_module("draw_scale")
    monkeypatch.setattr(draw, "RESULTS", tmp_path)
    monkeypatch.setattr(draw, "DOCS", tmp_path / "scale")
    monkeypatch.setattr("sys.argv", ["draw_scale.py"])
    rows = [
        {"cell": f"{size} datums of 4,096 tokens", "client": "fwasync, JSON", "cpu_ms": ms, "stall_cpu_ms": 3.0}
        for size, ms in ((8, 9.0), (32, 36.0), (32, 38.0), (128, 140.0))
    ]
    (tmp_path / "batches.json").write_text(json.dumps({"rows": rows}), encoding="utf-8")
    draw.main()
    (drawn,) = (tmp_path / "scale").iterdir()
    svg = drawn.read_text(encoding="utf-8")
    assert svg.count("<polyline") == 2
    assert svg.count("<circle") == 1 + 2 * 3
