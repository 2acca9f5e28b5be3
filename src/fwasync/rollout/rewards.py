"""`AsyncRewardPool`: reward functions in processes of their own, which are killed when they take too long.

Invariants
    * A call ends: with its result, with its error, or within its time.
    * Each process has pipes of its own and shares no lock with another, so that killing one at any instant leaves the
      rest as they were.
    * No process, nor any that a reward function started, is left after the `async with`, however it is left.

A process is not a sandbox: it keeps code that hangs, leaks or crashes away from the training loop, and lets it do
whatever its user may do, such as starting a daemon, which no longer belongs to it.

Why not `anyio.to_process`, which can kill a call too: its processes stay until the event loop ends, what they started
survives them, and a call that loops for ever survives the death of its parent.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar, TypeVarTuple

import anyio
from anyio.abc import Process
from anyio.streams.buffered import BufferedByteReceiveStream

from fwasync.errors import ClosedError, RewardCrashedError, RewardTimeoutError, UsageError
from fwasync.rollout.reward_worker import BEGUN, HEADER_BYTES, PROGRAM, Program, frame

__all__ = ("AsyncRewardPool", "RewardStatistics")

Ts = TypeVarTuple("Ts")
R = TypeVar("R")

_BEGIN_S = 120.0
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from fwasync.rollout.reward_worker import main; main()"
)


@dataclass(frozen=True, slots=True)
class RewardStatistics:
    """A pool at a moment.

    Attributes:
        processes: How many there are.
        running: How many calls run.
        waiting: How many calls wait for a process.
        calls: How many calls have ended, in whatever way.
        timed_out: How many of them were killed for their time.
        crashed: How many of them lost their process.
    """

    processes: int
    running: int
    waiting: int
    calls: int
    timed_out: int
    crashed: int


class AsyncRewardPool:
    """Runs functions in processes.

    ```python
    async with AsyncRewardPool(timeout=5.0) as rewards:
        ...
        reward = await rewards.run(grade, turn.text, row.truth)
    ```

    Processes start when they are needed, as fresh interpreters that import the function's module: nothing of the
    running program is copied into them. A program that is run as a script and defines the function itself is run in
    them too, under another name, so it needs `if __name__ == "__main__":` like any that starts processes.

    Args:
        processes: The most of them at a time; calls beyond that wait.
        timeout: Seconds that a call may take, from when it begins. What it takes to start a process does not count.
        calls_per_process: After so many a process is replaced, so that what leaks is bounded.

    Raises:
        UsageError: A number is out of its range.
    """

    def __init__(self, processes: int | None = None, *, timeout: float = 10.0, calls_per_process: int = 10_000) -> None:
        processes = max(1, (os.cpu_count() or 2) - 1) if processes is None else processes
        if processes < 1 or calls_per_process < 1:
            raise UsageError(f"processes is {processes} and calls_per_process {calls_per_process}; both are at least 1")
        self._timeout = _checked(timeout)
        self._calls_per_process = calls_per_process
        self._places = anyio.Semaphore(processes)
        self._idle: list[_Worker] = []
        self._workers: set[_Worker] = set()
        self._running = 0
        self._calls = 0
        self._timed_out = 0
        self._crashed = 0
        self._is_open = False

    def __repr__(self) -> str:
        return f"<AsyncRewardPool: {self._running} calls in {len(self._workers)} processes>"

    async def __aenter__(self) -> Self:
        self._is_open = True
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._is_open = False
        self._idle.clear()
        for worker in list(self._workers):
            await self._end(worker)

    def statistics(self) -> RewardStatistics:
        """The pool at this moment."""
        return RewardStatistics(
            processes=len(self._workers),
            running=self._running,
            waiting=self._places.statistics().tasks_waiting,
            calls=self._calls,
            timed_out=self._timed_out,
            crashed=self._crashed,
        )

    async def run(self, function: Callable[[*Ts], R], *args: *Ts, timeout: float | None = None) -> R:
        """Call a function in one of the processes.

        Args:
            function: One that can be imported: defined at the top of a module; no lambda.
            *args: Its arguments; like its result, they are pickled.
            timeout: Seconds that it may take; the pool's unless given.

        Raises:
            RewardTimeoutError: It had not returned in time and was killed. The rollout that this ends is lost, and the
                run goes on.
            RewardCrashedError: Its process ended.
            UsageError: The function or an argument cannot be sent to a process.
            Exception: What the function raised; its traceback is in a note.

        **Cancellation:** the process is killed, with all that it started.
        """
        limit = self._timeout if timeout is None else _checked(timeout)
        request = _request(function, args, limit)
        async with self._places:
            worker = await self._worker()
            self._running += 1
            try:
                ok, value = await worker.call(request, limit)
            except BaseException as error:
                self._timed_out += isinstance(error, RewardTimeoutError)
                self._crashed += isinstance(error, RewardCrashedError)
                await self._end(worker)
                raise
            finally:
                self._running -= 1
                self._calls += 1
            if worker.calls < self._calls_per_process and self._is_open:
                self._idle.append(worker)
            else:
                await self._end(worker)
        if not ok:
            raise value
        return value

    async def _worker(self) -> _Worker:
        if not self._is_open:
            raise ClosedError("the reward pool is not open: use it as `async with AsyncRewardPool(...) as rewards:`")
        if not self._idle:
            # A cancellation between the start of a process and its being known would leave it behind.
            with anyio.CancelScope(shield=True):
                worker = await _Worker.start()
                self._workers.add(worker)
                if not self._is_open:
                    await self._end(worker)
                    raise ClosedError("the reward pool was left while a process started")
                self._idle.append(worker)
        return self._idle.pop()

    async def _end(self, worker: _Worker) -> None:
        worker.kill()
        with anyio.CancelScope(shield=True):
            await worker.reap()
        self._workers.discard(worker)


class _Worker:
    """One process and its pipes."""

    def __init__(self, process: Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self._calls = process.stdin
        self._answers = BufferedByteReceiveStream(process.stdout)
        self.calls = 0

    @classmethod
    async def start(cls) -> _Worker:
        path = [entry or os.getcwd() for entry in sys.path]  # noqa: PTH109  # as the interpreter has it
        return cls(
            await anyio.open_process(
                [sys.executable, "-c", _START, json.dumps(path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=None,
                # A group of its own: Ctrl-C does not reach it, and a kill reaches all that it started.
                start_new_session=True,
            )
        )

    async def call(self, request: bytes, limit: float) -> tuple[bool, Any]:
        """How the function ended: whether it returned, and what it returned or raised."""
        self.calls += 1
        begun: Any = None
        with anyio.move_on_after(_BEGIN_S):
            begun = await self._begin(request)
        if begun is None:
            raise RewardTimeoutError(
                f"a process for reward functions could not begin a call within {_BEGIN_S:.0f} s; what does the module "
                "of the function import?"
            )
        if begun != BEGUN:
            return begun
        with anyio.move_on_after(limit):
            return await self._receive()
        raise RewardTimeoutError(f"a reward function had not returned after {limit} s and was killed")

    async def _begin(self, request: bytes) -> Any:
        try:
            await self._calls.send(request)
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            return await self._crashed()
        return await self._receive()

    async def _receive(self) -> Any:
        try:
            header = await self._answers.receive_exactly(HEADER_BYTES)
            return _Answer(await self._answers.receive_exactly(int.from_bytes(header, "big"))).load()
        except (anyio.IncompleteRead, anyio.BrokenResourceError, anyio.ClosedResourceError, anyio.EndOfStream):
            return await self._crashed()

    async def _crashed(self) -> Any:
        code = await self._process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        raise RewardCrashedError(f"the process of a reward function {how} in the middle of a call")

    def kill(self) -> None:
        """End the process and all that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):  # some systems refuse for one that has ended
            if sys.platform == "win32":
                self._process.kill()
            else:
                os.killpg(self._process.pid, signal.SIGKILL)

    async def reap(self) -> None:
        """Wait for its end and close the pipes."""
        await self._process.wait()
        await self._process.aclose()


class _Answer(pickle.Unpickler):
    """Finds what the program itself defines, which has another name there."""

    def __init__(self, body: bytes) -> None:
        super().__init__(io.BytesIO(body))

    def find_class(self, module: str, name: str, /) -> Any:
        return super().find_class("__main__" if module == PROGRAM else module, name)


def _program() -> Program | None:
    main = sys.modules["__main__"]
    if main.__spec__ is not None:
        return True, main.__spec__.name
    path: str = getattr(main, "__file__", "<none>")
    return None if path.startswith("<") else (False, path)


def _request(function: Callable[..., Any], args: tuple[Any, ...], limit: float) -> bytes:
    program = _program()
    if getattr(function, "__module__", None) == "__main__" and program is None:
        raise UsageError(
            f"{function!r} is defined in an interactive session, where no other process can import it: put it into a "
            "module"
        )
    try:
        body = pickle.dumps((function, args), pickle.HIGHEST_PROTOCOL)
    except Exception as error:  # pickle raises whatever the arguments raise
        raise UsageError(
            f"{function!r} or an argument of it cannot be sent to a process ({error}): define the function at the top "
            "of a module, and give it values that can be pickled"
        ) from error
    return frame((program, limit, body))


def _checked(timeout: float) -> float:
    if not 0 < timeout < float("inf"):
        raise UsageError(f"timeout is {timeout}; a reward function has a finite number of seconds above 0")
    return timeout
