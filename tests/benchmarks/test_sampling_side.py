"""The benchmarks of sampling run, and the server and the floor that they stand on do what they say."""

from __future__ import annotations

import asyncio
import importlib
import json
import subprocess
import sys
from typing import Any
from urllib.parse import urlsplit

import bench
import floor
import load_tool
import pytest

COMPLETION = {"model": "4-events", "prompt": [1, 2, 3], "max_tokens": 6, "logprobs": True}


async def until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def test_a_script_measures_fwasync_and_the_floor(harness):
    cell = "64 in flight, 64 tokens, streamed"
    command = [sys.executable, str(harness.HERE / "sampling.py"), "--short", "--tiny", "--cell", cell]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    start = lines.index(cell)
    assert [line.split()[0] for line in lines[start + 2 : start + 4]] == ["fwasync", "floor"]


@pytest.mark.parametrize("script", ["sampling", "tinker_sampling", "cancelling"])
async def test_fwasync_and_the_floor_do_what_is_measured(harness, url, script):
    case = importlib.import_module(script).CASE
    shown = {column.key for column in case.columns} - {"rss_mb"}
    for cell in case.cells:
        for name, client in case.clients.items():
            if cell.is_short and client.environment is None and name not in cell.without:
                before = harness.server_counts(url)["requests"]
                measures = await client.run(url, cell.settings | case.tiny)
                assert set(measures) >= shown, f"{cell.name}, {name}"
                assert harness.server_counts(url)["requests"] > before + 4


async def test_both_ways_of_asking_give_the_same_completion(url):
    async with floor.Floor(url) as client:
        whole = await floor.complete(client, COMPLETION | {"stream": False})
        streamed = await floor.stream(client, COMPLETION | {"stream": True})
        slow = await floor.stream(client, COMPLETION | {"stream": True, "model": "4-events-1-ms"})
    assert whole == streamed == slow
    assert len(whole[0]) == len(whole[1]) == 6


async def test_requests_that_are_sent_ahead_are_answered_in_order(url):
    slow = json.dumps(COMPLETION | {"model": "1-events-20-ms", "max_tokens": 2}).encode()
    quick = json.dumps(COMPLETION | {"max_tokens": 3}).encode()
    chunked = b"POST %b HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    path = b"/inference/v1/completions"
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    for body in (slow, quick):
        writer.write(chunked % path + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
    lengths: list[int] = []
    for _ in range(2):
        head = await reader.readuntil(b"\r\n\r\n")
        body = await reader.readexactly(int(head.partition(b"content-length: ")[2].split()[0]))
        lengths.append(len(json.loads(body)["choices"][0]["logprobs"]["content"]))
    writer.close()
    await writer.wait_closed()
    assert lengths == [2, 3]


async def test_an_answer_is_given_up_with_its_connection(harness, url):
    async with floor.Floor(url) as client:
        tasks = [
            asyncio.ensure_future(ask(client, COMPLETION | {"model": "100-events-600-ms", "stream": stream}))
            for ask, stream in ((floor.complete, False), (floor.stream, True))
        ]
        await until(lambda: harness.server_counts(url)["generating"] == 2)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        assert all(task.cancelled() for task in tasks)
        await until(lambda: harness.server_counts(url)["generating"] == 0)


async def test_a_sample_goes_on_without_its_connection_until_it_is_cancelled(harness, url):
    async with floor.Floor(url) as client:
        created = json.loads(await client.post("/api/v1/create_sampling_session", b'{"base_model": "30000-ms"}'))
        request = {"sampling_session_id": created["sampling_session_id"], "num_samples": 2}
        submitted = json.loads(await client.post("/api/v1/asample", json.dumps(request).encode()))
        assert len(submitted["sample_sequence_ids"]) == 2
        future = json.dumps({"request_id": submitted["request_id"]}).encode()
        poll = asyncio.ensure_future(client.post("/api/v1/retrieve_future", future))
        before = harness.server_counts(url)["requests"]
        await until(lambda: harness.server_counts(url)["requests"] > before + 3)
        poll.cancel()
        await asyncio.wait({poll})
        assert harness.server_counts(url)["generating"] == 1
        await client.post("/api/v1/cancel_future", future)
        assert harness.server_counts(url)["generating"] == 0


async def test_the_load_tool_counts_answers(harness, url):
    before = harness.server_counts(url)
    rate, of_cpu = await load_tool.served(url, load_tool.completion(64, stream=True), 2, 3, 0.05)
    after = harness.server_counts(url)
    assert rate > 0
    assert of_cpu > 0
    assert (
        after["completions"] >= before["completions"] + 2
    )  # one that tells the size, and one at least that is counted


async def test_what_is_too_slow_is_cut_off_and_counts_as_far_as_it_came(harness, url, monkeypatch):
    class Ended(BaseException):
        pass

    def report(measures: dict[str, Any]) -> None:
        raise Ended(measures)

    monkeypatch.setattr(harness, "report", report)
    calls = 0

    async def one() -> None:
        nonlocal calls
        calls += 1
        sum(range(20_000))
        if calls > 10:
            await asyncio.sleep(0)

    with pytest.raises(Ended) as ended:
        await harness.measure(one, url, 2, 10**9, limit_s=0.01)
    (measures,) = ended.value.args
    assert measures["cut_off"] == 1
    assert 0 < measures["done"] < 10**9


ROWS = [
    {"cell": "few", "client": client, "round": number, "cpu_ms": cpu, "per_s": 1e3 / cpu} | cut
    for client, cpus, cut in (("fwasync", (1.0, 3.0, 2.0), {}), ("other", (20.0,), {"cut_off": 1}))
    for number, cpu in enumerate(cpus)
]


def test_a_table_has_medians_spread_and_ratios(harness):
    columns = [harness.CPU, harness.Column("cpu_ms", "CPU", against="other"), harness.Column("none", "none")]
    assert harness.table(columns, ROWS) == [
        ["", "CPU ms each", "CPU ÷ other", "none"],
        ["fwasync", "2.000 (1.000–3.000)", "0.10x", "–"],
        ["other", "20.000*", "1.00x", "–"],
    ]


def test_the_page_shows_what_was_measured(harness, tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(bench, "DOCS", tmp_path)
    columns = [
        {"key": "cpu_ms", "title": "CPU ms each", "digits": 1, "against": None},
        {"key": "cpu_ms", "title": "CPU", "digits": 1, "against": "other"},
    ]
    result = {
        "name": "sampling",
        "title": "Sampling",
        "about": "First line.\n\nThe command.\n\nWhat it is.\n",
        "command": "python benchmarks/sampling.py --short",
        "machine": {"date": "2026-01-02", "python": "3.11.0", "cores": 2, "processor": "some", "load": 0.5},
        "load_after": 0.6,
        "versions": ["fwasync 1.0", "other 2.0"],
        "plot": "cpu_ms",
        "columns": columns,
        "rows": ROWS,
    }
    (tmp_path / "sampling.json").write_text(json.dumps(result), encoding="utf-8")
    bench.write_page()
    page = (tmp_path / "benchmarks.md").read_text(encoding="utf-8")
    assert "| Sampling: few | fwasync | 0.10 x CPU of other |" in page
    assert "What it is." in page
    assert "The command." not in page
    assert "| fwasync | 2.0 (1.0–3.0) | 0.10x |" in page
    assert "`python benchmarks/sampling.py --short`, 2026-01-02, Python 3.11.0, 2 cores (some)" in page
    assert "fwasync 1.0, other 2.0" in page
    plot = (tmp_path / "benchmarks" / "sampling.svg").read_text(encoding="utf-8")
    assert plot.count("<rect") == 2
