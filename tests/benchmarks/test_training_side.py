"""The benchmarks of the training side run: fwasync and the floor do what a cell asks for, in the smallest size."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
OURS = ("fwasync, JSON", "fwasync, protobuf", "floor, JSON", "floor, protobuf", "fwasync", "the loss alone")


@pytest.fixture(scope="module")
def harness() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        module = importlib.import_module("harness")

        def ended(measures: dict[str, Any]) -> NoReturn:
            raise AssertionError(f"it would have ended the process with {measures}")

        patch.setattr(module, "report", ended)
        yield module


@pytest.fixture(scope="module")
def url(harness: Any) -> Iterator[str]:
    with harness.server() as url:
        yield url


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


async def test_all_clients_send_the_same_batch(harness, url):
    trainers, floor_training = importlib.import_module("trainers"), importlib.import_module("floor_training")
    from fwasync._wire.protobuf.batches import decode_request
    from fwasync._wire.tensors import ForwardBackwardRequest, decode_batch
    from fwasync._wire.messages import decode

    class Face:
        datum = trainers.ByHand.datum

    data = trainers.make_data(Face(), 2, 5, *trainers.POLICY)
    by_protobuf = b"".join(floor_training.protobuf_batch("m", 300, data, "ppo"))
    by_json = b"".join(floor_training.json_batch("m", 300, data, "ppo"))
    print(decode_request(by_protobuf), decode(by_json, ForwardBackwardRequest), decode_batch)


def test_curves_are_drawn_of_what_was_measured(harness, tmp_path, monkeypatch):
    draw = importlib.import_module("draw_scale")
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(draw, "DOCS", tmp_path / "scale")
    monkeypatch.setattr("sys.argv", ["draw_scale.py"])
    rows = [
        {"cell": f"{size} datums of 4,096 tokens", "client": "fwasync, JSON", "cpu_ms": ms, "stall_ms": 3.0}
        for size, ms in ((8, 9.0), (32, 36.0), (32, 38.0), (128, 140.0))
    ]
    (tmp_path / "batches.json").write_text(json.dumps({"rows": rows}), encoding="utf-8")
    draw.main()
    (drawn,) = (tmp_path / "scale").iterdir()
    svg = drawn.read_text(encoding="utf-8")
    assert svg.count("<polyline") == 2
    assert svg.count("<circle") == 1 + 2 * 3
