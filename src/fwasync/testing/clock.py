"""Time that passes only when nothing else can happen: a test of minutes takes milliseconds, and always the same.

Invariants
    * The clock starts at zero and moves only when no callback is ready: then straight to the next timer.
    * Equal programs see equal times.
"""

from __future__ import annotations

import asyncio
import functools
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec

__all__ = ("VirtualClockLoop", "virtual_time")

P = ParamSpec("P")


class _JumpingSelector(selectors.DefaultSelector):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if ready or timeout is None or timeout <= 0:
            return ready or super().select(timeout)
        self.now += timeout
        return []


class VirtualClockLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer as soon as there is nothing else to do.

    Everything that asks the loop for the time sees it: `asyncio.sleep`, time-outs, anyio, and with them all delays of
    fwasync. Not for what happens outside of the loop: while a socket, a child process or a worker thread is waited for,
    the clock jumps ahead as if they took for ever, and time-outs strike. `time.monotonic` and `time.time` stay real.
    """

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        """Seconds since the loop was made, on the virtual clock."""
        return self._jumping.now


def virtual_time(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run an async test on a `VirtualClockLoop` of its own; what pytest sees is a plain function, fixtures included.

    ```python
    @virtual_time
    async def test_an_hour_passes() -> None:
        await anyio.sleep(3600)
    ```

    Its limits are those of the loop: no sockets, no child processes, no worker threads. Async fixtures run on another
    loop and cannot be used.
    """

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
            runner.run(test(*args, **kwargs))

    return run
