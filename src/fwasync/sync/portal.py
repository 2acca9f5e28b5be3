"""Leases: the blocking clients' shares in their one event loop, each with an async context manager that it holds open.

Invariants
    * One daemon thread, started by the first lease and joined by the last one's end; none before, none after.
    * An async context manager is entered, held open and left by one task, so that no cancel scope changes tasks.
    * Whatever interrupts a blocked caller (Ctrl-C above all), between any two instructions, stops what it waited for
      before it is raised; see `loop` for how.
    * A process that was forked begins without loop and leases; those of its parent can only be dropped there.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Generic, ParamSpec, TypeVar

import anyio

from fwasync.errors import ClosedError, UsageError
from fwasync.sync.loop import LEAVING_S, Latch, Loop, LoopEnded, Task, current, enter

__all__ = ("Lease",)

P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R")


class Lease(Generic[T]):
    """A share in the loop, which holds an async context manager open.

    One that is forgotten is left as by an interruption, when its last reference goes or when the interpreter ends.

    Args:
        manager: What to enter on the loop.

    Raises:
        UsageError: The caller is on the loop's own thread.
    """

    def __init__(self, manager: AbstractAsyncContextManager[T]) -> None:
        loop = current()
        if loop is not None:
            _refuse_here(loop, "a blocking client")
        self._process = os.getpid()
        self._closed = False
        while True:
            self._holding = _Holding(manager, self)
            try:
                enter(self._holding)
                self.value = self._holding.entered()
                return
            except LoopEnded:  # its last lease was closed just then
                continue
            except BaseException:
                self._abandon()
                raise

    @property
    def open(self) -> bool:
        """Whether it can be used, in this process."""
        return not self._closed and self._process == os.getpid()

    def run(self, function: Callable[P, Awaitable[R]], *args: P.args, **kwargs: P.kwargs) -> R:
        """Await what a function returns, on the loop; the function is called there too.

        Raises:
            UsageError: The caller is on the loop's own thread.
            ClosedError: The lease has ended, or belongs to the process that this one was forked from.
        """

        async def awaited() -> R:
            return await function(*args, **kwargs)

        return self._wait_for(awaited, function)

    def call(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call a function on the loop. Raises what `run` raises."""

        async def called() -> R:
            return function(*args, **kwargs)

        return self._wait_for(called, function)

    def close(self, left_by: BaseException | None = None) -> None:
        """Leave the context manager, and give the share back. May be called again, also where Ctrl-C struck.

        Args:
            left_by: The exception that the caller's block is left by.

        Raises:
            UsageError: The caller is on the loop's own thread.
        """
        if not self.open:
            return
        _refuse_here(self._loop, "close()")
        try:
            self._closed = True
            self._holding.owner = None
            self._holding.leave(left_by)
            self._holding.result(None if left_by is None else LEAVING_S)
        except (ClosedError, TimeoutError):
            self._abandon()
            if left_by is None:
                raise
        except BaseException:
            self._abandon()
            raise
        self._loop.join()

    @property
    def _loop(self) -> Loop:
        assert self._holding.loop is not None, "it was entered"
        return self._holding.loop

    def _abandon(self) -> None:
        """Leave the context manager as by a cancellation."""
        self._closed = True
        self._holding.owner = None
        self._holding.stop()
        if self._holding.loop is not None:
            self._holding.loop.join()

    def _wait_for(self, function: Callable[[], Awaitable[R]], named: Callable[..., object]) -> R:
        if self._process != os.getpid():
            raise ClosedError("this client was made before the process was forked; make another one after the fork")
        if self._closed:
            raise ClosedError("the blocking client is closed")
        _refuse_here(self._loop, getattr(named, "__qualname__", "this call"))
        task = Task(function)
        try:
            enter(task, self._loop)
            return task.result()
        except BaseException:
            task.stop()
            raise


class _Holding(Task[None], Generic[T]):
    """The task that enters an async context manager, and leaves it when it is told to."""

    holds = True

    def __init__(self, manager: AbstractAsyncContextManager[T], lease: Lease[T]) -> None:
        super().__init__(self._hold)
        process = os.getpid()

        def forgotten(_: object) -> None:
            if process == os.getpid():
                self.forget()

        # Not `__del__`: in that of a lease that was closed in order, Ctrl-C would be lost.
        self.owner: weakref.ref[Lease[T]] | None = weakref.ref(lease, forgotten)
        self._manager = manager
        self._is_entered = Latch()
        self._values: list[T] = []
        self._leaving: anyio.Event | None = None
        self._is_leaving = False
        self._left_by: BaseException | None = None

    def entered(self) -> T:
        """What the manager gave when it was entered. Raises what it raised."""
        self._is_entered.wait()
        if not self._values:
            self.result()
            raise AssertionError("unreachable: what was not entered has failed, or was closed")
        return self._values[0]

    def leave(self, left_by: BaseException | None) -> None:
        """Have the manager left, as by that exception."""
        self._left_by, self._is_leaving = left_by, True
        if self.loop is not None:
            self.loop.put(self)

    async def _hold(self) -> None:
        try:
            async with self._manager as value:
                self._leaving = anyio.Event()
                self._values.append(value)
                self._is_entered.set()
                await self._leaving.wait()
                if self._left_by is not None:
                    raise _Interruption if not isinstance(self._left_by, Exception) else _Failure
        except (_Failure, _Interruption):
            pass
        finally:
            self._leaving = None

    def look(self, loop: Loop) -> None:
        """As for every task; and leave, if that is to be done."""
        super().look(loop)
        if self._is_leaving and self._leaving is not None:
            self._leaving.set()

    def end(self, loop: Loop) -> None:
        """As for every task; and who waits for the entering is let go too."""
        super().end(loop)
        self._is_entered.set()


def _refuse_here(loop: Loop, what: str) -> None:
    if loop.is_here:
        raise UsageError(
            f"{what} would block the event loop that it waits for: this function runs on the loop of the blocking "
            f"clients. Use the async client here{f', `await {what}(...)`' if '.' in what else ''}."
        )


# What stands for the exception that a blocking block was left by: that one stays in its own thread.
class _Failure(Exception):
    """An error."""


class _Interruption(BaseException):
    """Ctrl-C and the like."""
