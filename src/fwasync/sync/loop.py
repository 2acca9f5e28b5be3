"""The thread with the event loop of the blocking clients, and what other threads may do with it.

Ctrl-C may strike the main thread between any two instructions; the loop's thread it never strikes. Therefore:

Invariants
    * The loop's thread keeps all the books: which tasks there are, and when the last holder is gone and it may end.
    * Another thread puts a task into the inbox, which is one instruction, and rings. To do so again does no harm, so
      whoever was struck in between makes up for it with `Task.stop`.
    * Another thread holds no lock and waits in C (`Latch`). The waits of `threading` and `concurrent.futures` are
      written in Python; struck between two lines, they let go of a lock that they do not hold, which is another error.
    * Every task is ended: by itself, by the end of its loop, or, put into the inbox after that, by who put it there.
"""

from __future__ import annotations

import _thread
import asyncio
import atexit
import contextlib
import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import anyio
import anyio.abc

from fwasync.errors import ClosedError

__all__ = ("LEAVING_S", "Latch", "Loop", "LoopEnded", "Task", "current", "enter")

logger = logging.getLogger("fwasync.sync")

R = TypeVar("R")

# How long an interrupted caller waits for what it stopped; leaving a client takes a second more at most.
_PATIENCE_S = 0.5
LEAVING_S = 2.0


class LoopEnded(ClosedError):
    """A task was not begun, because its loop had ended."""


class Latch:
    """Something that happens once, on the loop, and that one other thread may wait for."""

    def __init__(self) -> None:
        self.is_set = False
        self._lock = threading.Lock()
        self._lock.acquire()

    def set(self) -> None:
        """It has happened."""
        self.is_set = True
        with contextlib.suppress(RuntimeError):  # it was set before
            self._lock.release()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for it, at most so many seconds; says whether it has happened."""
        if not self.is_set and self._lock.acquire(timeout=-1 if timeout is None else timeout):
            self._lock.release()
        return self.is_set


class Task(Generic[R]):
    """A function that is awaited on the loop, for a caller in another thread.

    Args:
        function: What to call and await there, in the caller's context.
    """

    holds = False
    """Whether the loop goes on for its sake."""

    def __init__(self, function: Callable[[], Awaitable[R]]) -> None:
        self.ended = Latch()
        self.loop: Loop | None = None
        self._function = function
        self._context = copy_context()
        self._begun = False
        self._unwanted = False
        self._scope: anyio.CancelScope | None = None
        self._results: list[R] = []
        self._error: BaseException | None = None

    # -- in the caller's thread ------------------------------------------------------------------

    def result(self, timeout: float | None = None) -> R:
        """Wait for its end, and return or raise what it did.

        Raises:
            TimeoutError: The seconds are over.
            LoopEnded: It was not begun.
            ClosedError: It was cancelled, because its loop ended.
        """
        if not self.ended.wait(timeout):
            raise TimeoutError
        if self._error is not None:
            try:
                raise self._error
            finally:
                self._error = None  # which would hold us by its traceback
        if not self._begun:
            raise LoopEnded("the event loop of the blocking clients has ended")
        if not self._results:
            raise ClosedError("the blocking client was closed, or its event loop ended, while this waited")
        return self._results[0]

    def stop(self) -> None:
        """Cancel it, wherever it is, and wait a moment for its end."""
        self.forget()
        if self.loop is not None:
            self.ended.wait(_PATIENCE_S)

    def forget(self) -> None:
        """Cancel it, wherever it is."""
        self._unwanted = True
        if self.loop is not None and not self.ended.is_set:
            self.loop.put(self)

    def refuse(self, loop: Loop) -> None:
        """End it if it was not begun, for its loop is over."""
        if not self._begun:
            self.end(loop)

    # -- on the loop -----------------------------------------------------------------------------

    def look(self, loop: Loop) -> None:
        """Do what is to be done, as the caller's notes have it: begin, cancel, or nothing."""
        if self._begun:
            if self._unwanted and self._scope is not None:
                self._scope.cancel()
        elif self._unwanted:
            self.end(loop)
        else:
            self._begun = True
            if sniffio := sys.modules.get("sniffio"):  # by which anyio would take a caller's trio for ours
                self._context.run(sniffio.current_async_library_cvar.set, "asyncio")
            self._context.run(loop.add, self, self._run)

    def end(self, loop: Loop) -> None:
        """Strike it off, and let go who waits for it."""
        loop.remove(self)
        self.ended.set()

    async def _run(self, loop: Loop) -> None:
        try:
            with anyio.CancelScope() as self._scope:
                if not self._unwanted:
                    self._results.append(await self._function())
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self._error = error  # for the caller's thread: raised here, it would end the loop under all clients
        finally:
            self._scope = None
            self.end(loop)


@dataclass(frozen=True, slots=True)
class _Running:
    """What there is while the loop runs."""

    asyncio: asyncio.AbstractEventLoop
    group: anyio.abc.TaskGroup
    finished: anyio.Event


class Loop:
    """A thread with an event loop. It starts with the first task, and ends when no task holds it any more."""

    def __init__(self) -> None:
        self.over = False
        self.tasks: dict[Task[Any], None] = {}  # in the order in which they began
        self._inbox: deque[Task[Any]] = deque()
        self._running: _Running | None = None
        self._only_once = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="fwasync-sync", daemon=True)

    @property
    def is_here(self) -> bool:
        """Whether the caller is on its thread."""
        return self._thread.ident == _thread.get_ident()

    def put(self, task: Task[Any]) -> None:
        """Have a task looked at, soon. Where the loop has ended, a task that was not begun is ended too."""
        self._inbox.append(task)
        running = self._running
        if self.over:
            task.refuse(self)
        elif running is not None:
            with contextlib.suppress(RuntimeError):  # it is closed, and looks at the rest itself
                running.asyncio.call_soon_threadsafe(self._look)
        else:
            # `Thread.start` takes many steps. This is a single one, and nothing strikes the thread that it starts.
            _thread.start_new_thread(self._start, ())

    def join(self) -> None:
        """Wait for the thread, if the loop is over."""
        if self.over and self._thread.ident is not None:
            self._thread.join(LEAVING_S)
            if self._thread.is_alive():
                logger.warning("a function of yours is still running for a client that was closed; it is left behind")

    # -- on the loop -----------------------------------------------------------------------------

    def add(self, task: Task[Any], run: Callable[[Loop], Coroutine[Any, Any, None]]) -> None:
        """Begin a task."""
        assert self._running is not None, "nothing is looked at before it runs"
        self.tasks[task] = None
        self._running.group.start_soon(run, self)

    def remove(self, task: Task[Any]) -> None:
        """A task has ended; without one that holds the loop, so does the loop."""
        self.tasks.pop(task, None)
        self._end_if_idle()

    def _start(self) -> None:
        if self._only_once.acquire(blocking=False):
            try:
                self._thread.start()
            except RuntimeError as error:
                logger.warning("the thread of the blocking clients did not start: %s", error)
                self._end()

    def _run(self) -> None:
        before, _books.last = _books.last, self
        if before is not None:
            before.join()
        try:
            anyio.run(self._main, backend="asyncio")
        except BaseException as error:
            # Those who wait are told by their tasks; here it would only be printed.
            logger.debug("the event loop of the blocking clients ended with %r", error)
        finally:
            self._end()

    async def _main(self) -> None:
        async with anyio.create_task_group() as group:
            finished = anyio.Event()
            self._running = _Running(asyncio.get_running_loop(), group, finished)
            self._look()
            await finished.wait()
            group.cancel_scope.cancel()

    def _look(self) -> None:
        while self._inbox and not self.over:
            self._inbox.popleft().look(self)
        self._end_if_idle()

    def _end_if_idle(self) -> None:
        if not self.over and not self._inbox and not any(task.holds for task in self.tasks):
            self._retire()
            if self._running is not None:
                self._running.finished.set()

    def _retire(self) -> None:
        if _books.loops.get("now") is self:
            del _books.loops["now"]
        self.over = True

    def _end(self) -> None:
        self._retire()
        while self._inbox:
            self._inbox.popleft().end(self)
        for task in list(self.tasks):  # cancelled before their first step
            task.end(self)
        self._running = None  # the last reference to it goes here, and not in the main thread


class _Books:
    """The loop of this process, if it has one, and the one before it."""

    def __init__(self) -> None:
        self.loops: dict[str, Loop] = {}  # one at most; a dictionary can be asked and changed in one step
        self.last: Loop | None = None
        self.is_hooked = False

    def hook(self) -> None:
        """Be told of forks and of the interpreter's end, from the first loop on."""
        if not self.is_hooked:
            atexit.register(_at_exit)
            if hasattr(os, "register_at_fork"):
                os.register_at_fork(after_in_child=_after_fork)
            self.is_hooked = True


_books = _Books()


def current() -> Loop | None:
    """The loop of this process, if it has one."""
    return _books.loops.get("now")


def enter(task: Task[Any], loop: Loop | None = None) -> None:
    """Have a task begun on that loop, or on the one of this process, which is made if there is none."""
    _books.hook()
    task.loop = loop or current() or _books.loops.setdefault("now", Loop())
    task.loop.put(task)


def _after_fork() -> None:
    _books.loops.clear()  # the thread did not come along
    _books.last = None


def _at_exit() -> None:
    loop = current()
    if loop is not None:
        for task in reversed(list(loop.tasks)):
            if task.holds:
                task.stop()
        loop.join()
