"""The one event loop of the blocking clients, in a thread that their leases share.

Invariants
    * One daemon thread, started by the first lease and joined by the last one's end; none before, none after.
    * An async context manager is entered, held open and left by one task, so that no cancel scope changes tasks.
    * Whatever interrupts a blocked caller (Ctrl-C above all) stops what it waited for, before it is raised.
    * A process that was forked begins without loop and leases; those of its parent can only be dropped there.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import CancelledError, Future
from contextlib import AbstractAsyncContextManager
from typing import Any, Generic, ParamSpec, TypeVar

import anyio
from anyio.from_thread import BlockingPortal

from fwasync.errors import ClosedError, UsageError

__all__ = ("Lease",)

logger = logging.getLogger("fwasync.sync")

P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R")

# How long an interrupted caller waits for what it stopped; leaving a client takes a second more at most.
_PATIENCE_S = 0.5
_LEAVING_S = 2.0


class _Loop:
    """A thread with an event loop, and the leases on it."""

    def __init__(self) -> None:
        self.leases: list[Lease[Any]] = []
        self._started: Future[tuple[BlockingPortal, asyncio.AbstractEventLoop, anyio.Event]] = Future()
        self._thread = threading.Thread(target=self._run, name="fwasync-sync", daemon=True)
        self._thread.start()
        self.portal, self._loop, self._stopping = self._started.result()

    def _run(self) -> None:
        try:
            anyio.run(self._main, backend="asyncio")
        except BaseException as error:
            if not self._started.done():
                self._started.set_exception(error)
            # Those who wait are told by their futures; here it would only be printed.
            logger.debug("the event loop of the blocking clients ended with %r", error)

    async def _main(self) -> None:
        async with BlockingPortal() as portal:
            stopping = anyio.Event()
            self._started.set_result((portal, asyncio.get_running_loop(), stopping))
            await stopping.wait()
            await portal.stop(cancel_remaining=True)

    def call_soon(self, function: Callable[[], object]) -> None:
        """Call a function on the loop, without waiting for it; nothing happens where the loop has ended."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function)

    @property
    def alive(self) -> bool:
        """Whether it can still be used."""
        return self._thread.is_alive()

    @property
    def is_here(self) -> bool:
        """Whether the caller is on its thread."""
        return self._thread.ident == threading.get_ident()

    def end(self) -> None:
        """Cancel what still runs, and join the thread."""
        self.call_soon(self._stopping.set)
        self._thread.join(_LEAVING_S)
        if self._thread.is_alive():
            logger.warning("a function of yours is still running for a client that was closed; it is left behind")


class _State:
    """The loop of this process, if it has one."""

    def __init__(self) -> None:
        self.guard = threading.Lock()
        self.loop: _Loop | None = None
        self.hooked = False

    def hook(self) -> None:
        """Be told of forks and of the interpreter's end, from the first loop on."""
        if not self.hooked:
            self.hooked = True
            atexit.register(_at_exit)
            if hasattr(os, "register_at_fork"):
                os.register_at_fork(after_in_child=_after_fork)


_state = _State()


def _after_fork() -> None:
    # The thread did not come along, and the guard may have been held by another that did not either.
    _state.guard = threading.Lock()
    _state.loop = None


def _at_exit() -> None:
    loop = _state.loop
    if loop is not None and loop.alive:
        for lease in reversed(loop.leases.copy()):
            lease.abandon()
        loop.end()


def _acquire(lease: Lease[Any]) -> _Loop:
    current = _state.loop
    if current is not None:
        _refuse_here(current, "a blocking client")  # before the guard, which the one who ends the loop holds
    with _state.guard:
        if _state.loop is None or not _state.loop.alive:
            _state.hook()
            _state.loop = _Loop()
        _state.loop.leases.append(lease)
        return _state.loop


def _release(loop: _Loop, lease: Lease[Any]) -> None:
    with _state.guard:
        if lease in loop.leases:
            loop.leases.remove(lease)
        if not loop.leases:
            try:
                loop.end()
            finally:
                if _state.loop is loop:
                    _state.loop = None


def _refuse_here(loop: _Loop, what: str) -> None:
    if loop.is_here:
        raise UsageError(
            f"{what} would block the event loop that it waits for: this function runs on the loop of the blocking "
            f"clients. Use the async client here{f', `await {what}(...)`' if '.' in what else ''}."
        )


class _Call(Generic[R]):
    """A task on the loop, and the handle to stop it from another thread."""

    def __init__(self, loop: _Loop, function: Callable[[], Awaitable[R]]) -> None:
        self._loop = loop
        self._function = function
        self._scope: anyio.CancelScope | None = None
        self._unwanted = False
        self._ended = threading.Event()
        self._future: Future[R] | None = None
        self._exit: BaseException | None = None

    def start(self) -> Future[R]:
        """Start it; the future is that of its result."""
        try:
            self._future = self._loop.portal.start_task_soon(self._run)
        except RuntimeError as error:
            self._ended.set()
            raise ClosedError("the event loop of the blocking clients has ended") from error
        return self._future

    def wait(self, timeout: float | None = None) -> R:
        """Its result. Whatever interrupts the wait stops the task."""
        assert self._future is not None
        try:
            return self._future.result(timeout)
        except CancelledError:
            if self._exit is not None:
                raise self._exit from None
            raise ClosedError("the blocking client was closed, or its event loop ended, while this waited") from None

    def stop(self) -> None:
        """Cancel the task, wherever it is, and wait a moment for its end."""
        self._unwanted = True
        if not self._ended.is_set() and self._loop.alive:
            self._loop.call_soon(self._cancel)
            self._ended.wait(_PATIENCE_S)

    def _cancel(self) -> None:
        if self._scope is not None:
            self._scope.cancel()

    async def _run(self) -> R:
        try:
            with anyio.CancelScope() as self._scope:
                if not self._unwanted:
                    return await self._function()
        except (KeyboardInterrupt, SystemExit) as error:
            self._exit = error  # for the caller's thread: raised here, it would end the loop under all clients
        finally:
            self._scope = None
            self._ended.set()
        raise CancelledError


class Lease(Generic[T]):
    """A share in the loop, which holds an async context manager open.

    Args:
        manager: What to enter on the loop.

    Raises:
        UsageError: The caller is on the loop's own thread.
    """

    def __init__(self, manager: AbstractAsyncContextManager[T]) -> None:
        self._manager = manager
        self._process = os.getpid()
        self._entered: Future[T] = Future()
        self._leaving: anyio.Event | None = None
        self._left_by: BaseException | None = None
        self._closed = False
        self._loop = _acquire(self)
        self._holding = _Call(self._loop, self._hold)
        try:
            self._holding.start().add_done_callback(self._tell_failure)
            self.value = self._entered.result()
        except BaseException:
            self._closed = True
            self._holding.stop()
            _release(self._loop, self)
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
        """Leave the context manager, and give the share back. May be called again.

        Args:
            left_by: The exception that the caller's block is left by.

        Raises:
            UsageError: The caller is on the loop's own thread.
        """
        if not self.open:
            return
        _refuse_here(self._loop, "close()")
        self._closed = True
        self._left_by = left_by
        try:
            self._leave()
        finally:
            _release(self._loop, self)

    def abandon(self) -> None:
        """Leave the context manager as by a cancellation, when the interpreter ends."""
        self._closed = True
        self._holding.stop()

    def _wait_for(self, function: Callable[[], Awaitable[R]], named: Callable[..., object]) -> R:
        if self._process != os.getpid():
            raise ClosedError("this client was made before the process was forked; make another one after the fork")
        if self._closed:
            raise ClosedError("the blocking client is closed")
        _refuse_here(self._loop, getattr(named, "__qualname__", "this call"))
        call = _Call(self._loop, function)
        try:
            call.start()
            return call.wait()
        except BaseException:
            call.stop()
            raise

    def _leave(self) -> None:
        assert self._leaving is not None
        try:
            self._loop.call_soon(self._leaving.set)
            self._holding.wait(None if self._left_by is None else _LEAVING_S)
        except (ClosedError, TimeoutError):
            self._holding.stop()
            if self._left_by is None:
                raise
        except BaseException:
            self._holding.stop()
            raise

    async def _hold(self) -> None:
        try:
            async with self._manager as value:
                self._leaving = anyio.Event()
                self._entered.set_result(value)
                await self._leaving.wait()
                if self._left_by is not None:
                    raise _Interruption if not isinstance(self._left_by, Exception) else _Failure
        except (_Failure, _Interruption):
            pass

    def _tell_failure(self, holding: Future[None]) -> None:
        if not self._entered.done():
            error = None if holding.cancelled() else holding.exception()
            self._entered.set_exception(error or ClosedError("the blocking client was closed while it was opened"))


# What stands for the exception that a blocking block was left by: that one stays in its own thread.
class _Failure(Exception):
    """An error."""


class _Interruption(BaseException):
    """Ctrl-C and the like."""
