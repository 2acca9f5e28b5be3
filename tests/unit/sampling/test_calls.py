"""Calls in progress on an object that is closed under them."""

from __future__ import annotations

import anyio
import pytest

from fwasync.errors import ClosedError
from fwasync.sampling.calls import Calls
from fwasync.testing import virtual_time


@virtual_time
async def test_closing_ends_calls_and_waits_for_their_end() -> None:
    calls, ended = Calls("the thing"), list[float]()

    async def one() -> None:
        with pytest.raises(ClosedError, match="the thing was closed"), calls.call(timeout=60):
            try:
                await anyio.sleep_forever()
            finally:
                with anyio.CancelScope(shield=True):
                    await anyio.sleep(1)
                ended.append(anyio.current_time())

    async with anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(one)
        await anyio.sleep(5)
        await calls.end()
        assert ended == pytest.approx([6, 6, 6])
    await calls.end()  # there are none


@virtual_time
async def test_a_timeout_is_no_closing() -> None:
    calls = Calls("the thing")
    with calls.call(timeout=3):
        await anyio.sleep_forever()
    assert anyio.current_time() == pytest.approx(3)
    with anyio.move_on_after(2) as outer, calls.call(timeout=3):
        await anyio.sleep_forever()
    assert outer.cancelled_caught
    with calls.call(timeout=0):
        await anyio.sleep(1)
    assert anyio.current_time() == pytest.approx(5)


@virtual_time
async def test_a_call_that_is_done_as_it_is_closed_has_its_result() -> None:
    calls, done = Calls("the thing"), list[str]()

    async def one() -> None:
        with calls.call():
            with anyio.CancelScope(shield=True):
                await anyio.sleep(1)
            done.append("yes")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(one)
        await anyio.sleep(0.5)
        await calls.end()
        assert done == ["yes"]


@virtual_time
async def test_closing_is_asked_for_twice_at_a_time() -> None:
    calls = Calls("the thing")

    async def one() -> None:
        with pytest.raises(ClosedError), calls.call():
            await anyio.sleep_forever()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(one)
        await anyio.sleep(1)
        tasks.start_soon(calls.end)
        tasks.start_soon(calls.end)
    assert anyio.current_time() == pytest.approx(1)
