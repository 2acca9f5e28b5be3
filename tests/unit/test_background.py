"""Background tasks end with their owner, and the owner's body never notices."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

import anyio
import anyio.lowlevel
import pytest

from fwasync._background import Background


class Owner:
    def __init__(self) -> None:
        self.background = Background()
        self.ended = 0

    async def work(self) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.lowlevel.checkpoint()
            self.ended += 1

    async def __aenter__(self) -> Self:
        await self.background.open()
        self.background.start(self.work)
        self.background.start(self.work)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.background.aclose()


async def test_tasks_end_with_the_owner() -> None:
    async with Owner() as owner:
        await anyio.lowlevel.checkpoint()
    assert owner.ended == 2


async def test_the_bodys_exception_passes_as_it_is() -> None:
    owner = Owner()
    with pytest.raises(KeyError):
        async with owner:
            await anyio.lowlevel.checkpoint()
            raise KeyError
    assert owner.ended == 2


@pytest.mark.parametrize("raises", [True, False])
async def test_a_body_may_answer_a_cancellation_in_its_own_way(raises: bool) -> None:
    owner = Owner()

    async def body() -> str:
        async with owner:
            try:
                await anyio.sleep_forever()
            except asyncio.CancelledError:
                if raises:
                    raise ValueError from None
        return "went on"

    task = asyncio.ensure_future(body())
    await anyio.lowlevel.checkpoint()
    await anyio.lowlevel.checkpoint()
    task.cancel()
    if raises:
        with pytest.raises(ValueError, match=r"^$"):
            await task
    else:
        assert await task == "went on"
    assert owner.ended == 2


async def test_a_surrounding_cancellation_stays_one() -> None:
    owner = Owner()
    with anyio.CancelScope() as scope:
        async with owner:
            await anyio.lowlevel.checkpoint()
            scope.cancel()
            await anyio.sleep_forever()
    assert scope.cancelled_caught
    assert owner.ended == 2


async def test_a_failing_task_is_told() -> None:
    async def fail() -> None:
        raise OSError("disk")

    owner = Owner()
    with pytest.raises(ExceptionGroup) as e:
        async with owner:
            owner.background.start(fail)
            await anyio.lowlevel.checkpoint()
    assert isinstance(e.value.exceptions[0], OSError)
