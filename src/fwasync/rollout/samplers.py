"""The samplers of a run: the newest, and those before it that rollouts still use.

Invariants
    * A sampler is entered and left by one task, which belongs to the run.
    * A sampler that another has followed is left as soon as no rollout uses it, and not before.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import anyio

from fwasync._background import Background
from fwasync.rollout.context import Policy

__all__ = ("Samplers", "UsedSamplers")

logger = logging.getLogger("fwasync.rollout")

_LEAVING_S = 30.0


@dataclass(slots=True, eq=False)
class _Held:
    policy: Policy
    users: int = 0
    followed: bool = False
    opened: anyio.Event = field(default_factory=anyio.Event)
    unused: anyio.Event = field(default_factory=anyio.Event)
    closed: anyio.Event = field(default_factory=anyio.Event)
    error: Exception | None = None

    def leave_if_unused(self) -> None:
        if self.followed and self.users == 0:
            self.unused.set()


class Samplers:
    """Opens samplers, hands out the newest, and closes them."""

    def __init__(self) -> None:
        self._background = Background()
        self._held: list[_Held] = []
        self._current: _Held | None = None

    async def open(self) -> None:
        """Make ready; by the task that closes."""
        await self._background.open()

    async def enter(self, sampler: Any) -> Any:
        """Enter a sampler, if it is an async context manager; it is not handed out yet.

        Returns:
            What `follow` takes.

        Raises:
            Exception: What entering it raises; it is forgotten then.

        **Cancellation:** it is left again.
        """
        held = _Held(Policy(sampler, 0))
        self._background.start(self._hold, held, sampler)
        try:
            await held.opened.wait()
        except BaseException:
            held.unused.set()
            raise
        if held.error is not None:
            raise held.error
        self._held.append(held)
        return held

    def follow(self, entered: Any, version: int) -> None:
        """Hand out what was entered from now on, as of this version."""
        before, self._current = self._current, entered
        entered.policy = Policy(entered.policy.sampler, version)
        if before is not None:
            before.followed = True
            before.leave_if_unused()

    def stay(self, version: int) -> None:
        """Hand out the same sampler from now on, as of this version."""
        assert self._current is not None
        self._current.policy = Policy(self._current.policy.sampler, version)

    def use(self) -> UsedSamplers:
        """What one rollout uses."""
        return UsedSamplers(self)

    @property
    def current(self) -> Any:
        """What is handed out."""
        assert self._current is not None, "a sampler is entered before rollouts start"
        return self._current

    async def aclose(self) -> None:
        """Leave all samplers, those in use included; by the task that opened."""
        for held in self._held:
            held.unused.set()
        with anyio.move_on_after(_LEAVING_S, shield=True):
            for held in list(self._held):
                await held.closed.wait()
        await self._background.aclose()

    async def _hold(self, held: _Held, sampler: Any) -> None:
        try:
            async with _entered(sampler) as entered:
                held.policy = Policy(entered, 0)
                held.opened.set()
                await held.unused.wait()
        except Exception as error:
            if held.opened.is_set():
                logger.warning("a sampler of version %d could not be left well: %r", held.policy.version, error)
            else:
                held.error = error
        finally:
            if held in self._held:
                self._held.remove(held)
            held.opened.set()
            held.closed.set()


class UsedSamplers:
    """Counts one rollout as a user of every sampler that it has seen."""

    def __init__(self, samplers: Samplers) -> None:
        self._samplers = samplers
        self._used: list[_Held] = []

    def policy(self) -> Policy:
        """The newest."""
        held: _Held = self._samplers.current
        if held not in self._used:
            held.users += 1
            self._used.append(held)
        return held.policy

    def release(self) -> None:
        """The rollout has ended."""
        for held in self._used:
            held.users -= 1
            held.leave_if_unused()
        self._used.clear()


@asynccontextmanager
async def _entered(sampler: Any) -> AsyncGenerator[Any]:
    if isinstance(sampler, AbstractAsyncContextManager):
        async with cast("AbstractAsyncContextManager[Any]", sampler) as entered:
            yield entered
    else:
        yield sampler
