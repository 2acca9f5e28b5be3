"""How long results are kept, and waiting that leaves no trace."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from starlette.requests import Request

from fwasync.local.futures import FutureStore
from fwasync.local.results import Result
from fwasync.local.web import wait_or_gone

NOTHING = Result(b"")


def store_of(*bodies: bytes, **bounds: int) -> FutureStore:
    store = FutureStore(**bounds)
    for number, body in enumerate(bodies):
        store.open(str(number), lambda: "queued")
        assert store.resolve(str(number), Result(body))
    return store


def kept(store: FutureStore, count: int) -> list[str]:
    return [name for name in map(str, range(count)) if store.get(name) is not None]


async def test_the_first_result_stays():
    store = store_of(b"first")
    assert not store.resolve("0", Result(b"second"))
    assert not store.resolve("unknown", NOTHING)
    slot = store.get("0")
    assert slot is not None
    assert slot.result == Result(b"first")


async def test_the_newest_results_are_kept():
    assert kept(store_of(b"a", b"b", b"c", b"d", max_results=2), 4) == ["2", "3"]
    assert kept(store_of(b"aa", b"b", b"cc", b"d", max_bytes=3), 4) == ["2", "3"]


async def test_one_result_is_kept_however_large():
    assert kept(store_of(b"a", b"b" * 100, max_bytes=10), 2) == ["1"]


async def test_what_has_no_result_is_kept():
    store = FutureStore(max_results=1)
    store.open("0", lambda: "queued")
    for name in ("1", "2"):
        store.open(name, lambda: "queued")
        store.resolve(name, NOTHING)
    assert kept(store, 3) == ["0", "2"]


async def test_a_waiter_wakes_with_the_result_and_when_the_service_stops():
    store = FutureStore()
    for name in ("0", "1"):
        store.open(name, lambda: "queued")
    async with anyio.create_task_group() as tasks:
        for name in ("0", "1"):
            slot = store.get(name)
            assert slot is not None
            tasks.start_soon(slot.wait)
        await anyio.lowlevel.checkpoint()
        store.resolve("0", NOTHING)
        store.close()
    assert store.closed


async def test_a_result_frees_what_its_operation_held():
    store = FutureStore()
    store.open("0", lambda: "queued")
    slot = store.get("0")
    assert slot is not None
    before = slot.why
    store.resolve("0", NOTHING)
    assert slot.why is not before


def request_of(receive: Any) -> Request:
    return Request({"type": "http", "headers": []}, receive)


@pytest.mark.parametrize("end", ["result", "time", "client"])
async def test_a_wait_ends_in_three_ways_and_leaves_nothing(end):
    trace: list[str] = []

    async def wait() -> None:
        try:
            if end != "result":
                await anyio.sleep_forever()
        finally:
            trace.append("wait over")

    async def receive() -> dict[str, str]:
        try:
            if end != "client":
                await anyio.sleep_forever()
        finally:
            trace.append("receive over")
        return {"type": "http.disconnect"}

    with anyio.fail_after(60):
        await wait_or_gone(request_of(receive), wait, 0.01 if end == "time" else 1000)
    assert sorted(trace) == ["receive over", "wait over"]
