"""Timers: where the time of a loop goes, as metrics `perf/<name>_time`.

```python
with timer("fwd_bwd"):
    output = await client.forward_backward(batch, "cross_entropy")
run.log("sft", step, {**metrics, **flush_timing()})
```

Times belong to a context, not to the process: everything that starts inside of a run (or of `collect_timings`), tasks
and worker threads included, adds to that run's times, and two loops side by side never mix theirs. Outside of both a
timer only measures.
"""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, Self, TypeVar, cast, overload

__all__ = ("Timer", "Timings", "collect_timings", "current_timings", "flush_timing", "timer")

F = TypeVar("F", bound=Callable[..., Any])


class Timings:
    """Seconds by name, added up since the last flush. May be used from any thread.

    Args:
        clock: Seconds since some moment.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    def add(self, name: str, seconds: float) -> None:
        """Add to the time of a name."""
        with self._lock:
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def flush(self) -> dict[str, float]:
        """The times as metrics, `perf/<name>_time` in seconds; they begin at nothing again."""
        with self._lock:
            seconds, self._seconds = self._seconds, {}
        return {f"perf/{name}_time": value for name, value in seconds.items()}


current_timings: ContextVar[Timings | None] = ContextVar("fwasync_timings", default=None)
"""Where the timers of a context add their times."""


class Timer:
    """A block that is timed: `with timer("x") as t: …`, then `t.seconds`. Each is used once.

    Blocks of one name that overlap, in concurrent tasks, count each for itself.

    Attributes:
        name: What is timed.
        seconds: How long it took; 0 until the block has ended.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.seconds = 0.0
        self._timings: Timings | None = None
        self._began = 0.0

    def __repr__(self) -> str:
        return f"<Timer {self.name}: {self.seconds:.3f} s>"

    def __enter__(self) -> Self:
        self._timings = current_timings.get()
        self._began = self._clock()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = self._clock() - self._began
        if self._timings is not None:
            self._timings.add(self.name, self.seconds)

    def __call__(self, function: F) -> F:
        """Time each call of a function, sync or async."""
        name = self.name
        if inspect.iscoroutinefunction(function):

            @wraps(function)
            async def timed_async(*args: Any, **kwargs: Any) -> Any:
                with Timer(name):
                    return await function(*args, **kwargs)

            return cast("F", timed_async)

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with Timer(name):
                return function(*args, **kwargs)

        return cast("F", timed)

    def _clock(self) -> float:
        return time.monotonic() if self._timings is None else self._timings.clock()


@overload
def timer(what: str) -> Timer: ...
@overload
def timer(what: F) -> F: ...
def timer(what: str | Callable[..., Any]) -> Any:
    """Time a block, or each call of a function.

    `with timer("x"):` times the block; `@timer("x")` and a bare `@timer` time a function, sync or async, the bare one
    under the function's own name. A block that raises, or is cancelled, counts as well.

    Args:
        what: The name; or the function.
    """
    return Timer(what) if isinstance(what, str) else Timer(what.__name__)(what)


def flush_timing() -> dict[str, float]:
    """The times since the last flush, as metrics `perf/<name>_time` in seconds; empty outside of a run."""
    timings = current_timings.get()
    return {} if timings is None else timings.flush()


@contextmanager
def collect_timings(timings: Timings | None = None) -> Generator[Timings]:
    """Collect the times of a block that is in no run, or apart from those of its run.

    Args:
        timings: Where to; new ones unless given.
    """
    own = Timings() if timings is None else timings
    token = current_timings.set(own)
    try:
        yield own
    finally:
        current_timings.reset(token)
