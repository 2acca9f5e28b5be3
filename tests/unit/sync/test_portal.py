"""The shared thread of the blocking clients: leases, interruptions, forks, and the interpreter's end."""

from __future__ import annotations

import asyncio
import contextvars
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext
from typing import Any

import anyio
import pytest

from fwasync import errors
from fwasync.sync.portal import Lease


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "fwasync-sync"]


@pytest.fixture
def lease():
    lease = Lease(nullcontext())
    yield lease
    lease.close()
    assert threads() == []


async def ident() -> int:
    return threading.get_ident()


def test_leases_share_one_thread_which_ends_with_the_last() -> None:
    leases = [Lease(nullcontext()) for _ in range(20)]
    assert len({lease.run(ident) for lease in leases}) == 1
    assert len(threads()) == 1
    for lease in leases[:-1]:
        lease.close()
        lease.close()
    assert leases[-1].run(ident) != threading.get_ident()
    leases[-1].close()
    assert threads() == []
    again = Lease(nullcontext())
    assert len(threads()) == 1
    again.close()


def test_leases_that_come_and_go_in_many_threads() -> None:
    failures: list[BaseException] = []

    def come_and_go() -> None:
        try:
            for _ in range(20):
                lease = Lease(nullcontext())
                assert lease.run(ident) != threading.get_ident()
                assert len(threads()) == 1
                lease.close()
        except BaseException as error:
            failures.append(error)

    users = [threading.Thread(target=come_and_go) for _ in range(8)]
    for user in users:
        user.start()
    for user in users:
        user.join()
    assert failures == []
    assert threads() == []


@pytest.mark.parametrize("left_by", [None, ValueError("x"), KeyboardInterrupt()])
def test_one_task_enters_and_leaves(left_by: BaseException | None) -> None:
    seen: list[Any] = []

    @asynccontextmanager
    async def manager() -> AsyncIterator[str]:
        task = asyncio.current_task()
        with anyio.CancelScope():  # which complains when it changes tasks
            try:
                yield "value"
            except BaseException as error:
                seen.append(isinstance(error, Exception))
                raise
            finally:
                assert asyncio.current_task() is task
                seen.append("left")

    lease = Lease(manager())
    assert lease.value == "value"
    lease.close(left_by)
    assert seen == (["left"] if left_by is None else [isinstance(left_by, Exception), "left"])
    assert threads() == []


@pytest.mark.parametrize("where", ["enter", "exit"])
def test_what_the_manager_raises_is_raised_here(where: str) -> None:
    @asynccontextmanager
    async def manager() -> AsyncIterator[None]:
        if where == "enter":
            raise LookupError("enter")
        yield
        raise LookupError("exit")

    with pytest.raises(LookupError, match=where):
        Lease(manager()).close()
    assert threads() == []


def test_context_variables_are_the_callers(lease: Lease[None]) -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")
    variable.set("mine")
    assert lease.call(variable.get) == "mine"


def test_a_caller_under_trio_gets_asyncio_there(lease: Lease[None]) -> None:
    sniffio = pytest.importorskip("sniffio")
    token = sniffio.current_async_library_cvar.set("trio")
    try:
        lease.run(anyio.sleep, 0)
        assert lease.call(sniffio.current_async_library) == "asyncio"
    finally:
        sniffio.current_async_library_cvar.reset(token)


def test_a_call_on_the_loops_own_thread_names_the_async_call(lease: Lease[None]) -> None:
    async def on_the_loop() -> None:
        with pytest.raises(errors.UsageError, match=r"await .*ident\(\.\.\.\)"):
            lease.run(Named.ident)
        with pytest.raises(errors.UsageError, match="on the loop of the blocking clients"):
            Lease(nullcontext())
        with pytest.raises(errors.UsageError, match="on the loop"):
            lease.close()

    class Named:
        @staticmethod
        async def ident() -> int:
            return 0

    lease.run(on_the_loop)


async def test_it_works_where_another_loop_runs() -> None:
    lease = Lease(nullcontext())
    assert lease.run(ident) != threading.get_ident()
    lease.close()


def test_a_closed_lease_says_so() -> None:
    lease = Lease(nullcontext())
    lease.close()
    with pytest.raises(errors.ClosedError, match="is closed"):
        lease.run(ident)


def test_closing_ends_the_calls_that_still_wait() -> None:
    lease = Lease(nullcontext())
    waiting, raised = threading.Event(), list[BaseException]()

    async def wait() -> None:
        waiting.set()
        await anyio.sleep_forever()

    def user() -> None:
        try:
            lease.run(wait)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=user)
    thread.start()
    waiting.wait()
    lease.close()
    thread.join()
    assert [type(error) for error in raised] == [errors.ClosedError]


def test_an_exit_on_the_loop_is_the_callers(lease: Lease[None]) -> None:
    async def leave() -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        lease.run(leave)
    assert lease.run(ident)


def test_a_loop_that_was_stopped_from_within_is_replaced() -> None:
    async def stop() -> None:
        asyncio.get_running_loop().stop()
        await anyio.sleep_forever()

    lease = Lease(nullcontext())
    with pytest.raises(errors.ClosedError):
        lease.run(stop)
    for thread in threading.enumerate():
        if thread.name == "fwasync-sync":
            thread.join()
    other = Lease(nullcontext())
    assert other.run(ident) != threading.get_ident()
    with pytest.raises(errors.ClosedError, match="has ended"):
        lease.run(ident)
    other.close()
    with pytest.raises(errors.ClosedError, match="loop ended"):
        lease.close()
    assert threads() == []


def interrupted(lease: Lease[None], function: Callable[[threading.Event], Awaitable[None]]) -> None:
    """Press Ctrl-C while this thread waits for the function."""
    waiting = threading.Event()

    def press() -> None:
        waiting.wait()
        os.kill(os.getpid(), signal.SIGINT)

    presser = threading.Thread(target=press)
    presser.start()
    with pytest.raises(KeyboardInterrupt):
        lease.run(function, waiting)
    presser.join()


def test_ctrl_c_cancels_what_was_waited_for(lease: Lease[None]) -> None:
    ended: list[str] = []

    async def wait(waiting: threading.Event) -> None:
        try:
            waiting.set()
            await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class():
            ended.append("cancelled")
            raise

    interrupted(lease, wait)
    assert ended == ["cancelled"]  # already: what an interrupted call leaves behind is settled when it raises
    assert lease.run(ident)


def test_ctrl_c_returns_also_while_the_loop_is_blocked(lease: Lease[None]) -> None:
    free = threading.Event()

    async def block(waiting: threading.Event) -> None:
        waiting.set()
        free.wait()

    interrupted(lease, block)
    free.set()
    assert lease.run(ident)


def python(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False, timeout=200
    )


HEAD = """
import os, sys, threading, anyio
from contextlib import asynccontextmanager, nullcontext
from fwasync import errors
from fwasync.sync.portal import Lease

@asynccontextmanager
async def manager(name):
    async with anyio.create_task_group() as group:
        group.start_soon(anyio.sleep_forever)
        try:
            yield name
        finally:
            print("left", name)
            group.cancel_scope.cancel()

async def nothing():
    pass
"""


@pytest.mark.parametrize("end", ["", "raise SystemExit(0)", "def f():\n  yield Lease(manager('c'))\ng = f(); next(g)"])
def test_an_interpreter_that_ends_leaves_in_order_and_says_nothing(end: str) -> None:
    done = python(HEAD + f"a = Lease(manager('a')); b = Lease(manager('b'))\n{end}")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-2:] == ["left b", "left a"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_child_begins_anew() -> None:
    done = python(
        HEAD
        + """
import warnings; warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
lease = Lease(manager("parent"))
child = os.fork()
if not child:
    try:
        lease.run(nothing)
    except errors.ClosedError as error:
        assert "forked" in str(error)
    else:
        os._exit(1)
    lease.close()
    own = Lease(manager("child"))
    own.run(nothing)
    own.close()
    assert threading.active_count() == 1
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
lease.run(nothing)
lease.close()
assert threading.active_count() == 1
"""
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.split()) == ["child", "left", "left", "parent"]
