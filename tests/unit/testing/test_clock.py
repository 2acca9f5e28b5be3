"""The virtual clock."""

from __future__ import annotations

import asyncio
import inspect
import time
from pathlib import Path

import anyio
import pytest

from fwasync.testing import VirtualClockLoop, virtual_time


@virtual_time
async def test_hours_pass_in_no_time() -> None:
    started = time.monotonic()
    assert anyio.current_time() == 0.0
    await anyio.sleep(3 * 3600)
    assert anyio.current_time() == 3 * 3600
    assert time.monotonic() - started < 60


@virtual_time
async def test_timers_come_in_their_order() -> None:
    seen: list[tuple[float, str]] = []

    async def say(name: str, after: float) -> None:
        await anyio.sleep(after)
        seen.append((anyio.current_time(), name))

    async with anyio.create_task_group() as group:
        for name, after in (("c", 30.0), ("a", 0.5), ("b", 29.75)):
            group.start_soon(say, name, after)
    assert seen == [(0.5, "a"), (29.75, "b"), (30.0, "c")]


@virtual_time
async def test_time_outs_strike() -> None:
    with pytest.raises(TimeoutError):
        with anyio.fail_after(600):
            await anyio.sleep_forever()
    assert anyio.current_time() == 600
    with anyio.move_on_after(600) as scope:
        await anyio.sleep(599)
    assert not scope.cancelled_caught


@virtual_time
async def test_fixtures_are_passed_on(tmp_path: Path) -> None:
    assert tmp_path.name.startswith("test_fixtures_are_passed_on")
    assert isinstance(asyncio.get_running_loop(), VirtualClockLoop)


def test_each_test_begins_at_zero_and_fails_as_itself() -> None:
    seen: list[float] = []

    @virtual_time
    async def fails(by: float) -> None:
        seen.append(anyio.current_time())
        await anyio.sleep(by)
        raise ZeroDivisionError(str(anyio.current_time()))

    assert not inspect.iscoroutinefunction(fails)
    for by in (5.0, 7.0):
        with pytest.raises(ZeroDivisionError, match=str(by)):
            fails(by)
    assert seen == [0.0, 0.0]
