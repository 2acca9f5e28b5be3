"""Run a command's coroutine: signals, errors and the exit status.

Invariants
    * The first Ctrl-C or SIGTERM cancels the command, which puts its things in order; the second ends the process at
      once. The local service ends in both cases: it notices that its parent is gone.
    * A command that can stop at a good place is asked to do so first, and is cancelled by the second.
    * Whatever happens, the user gets a line that says so, and the exit status tells it too.
    * A command that is over stays as it ended: a signal that comes while the interpreter ends is ignored.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Generator
from types import FrameType

import anyio

from fwasync.cli.failures import tell
from fwasync.cli.streams import write_now
from fwasync.recipes.stopping import StopRequest

__all__ = ("execute",)

_SHOW_CURSOR = b"\x1b[?25h\n"  # which a live view hides
_STOPPING = b"stopping after the steps in hand; once more to stop now\n"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _Interruption:
    """The signal that came, if one did."""

    def __init__(self, stop: StopRequest | None) -> None:
        self.number: int | None = None
        self._stop = stop
        self._cancel: Callable[[], object] | None = None
        self._is_over = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self._stop is not None and self._cancel is not None and not self._stop.requested:
            self._stop.request(_name(number))
            write_now(sys.stderr, _STOPPING)
            return
        if self.number is not None:
            if sys.stdout.isatty():
                write_now(sys.stdout, _SHOW_CURSOR)
            os._exit(128 + number)
        self.number = number
        if self._cancel is not None:
            self._cancel()
        elif not self._is_over:  # else the loop is being closed, which is not to be torn apart
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def cancels(self, scope: anyio.CancelScope) -> Generator[None, None, None]:
        """Meanwhile, a signal cancels the scope instead of raising."""
        loop = asyncio.get_running_loop()
        self._cancel = lambda: loop.call_soon_threadsafe(scope.cancel)  # wakes the loop, where it waits
        try:
            yield
        finally:
            self._cancel, self._is_over = None, True


def execute(command: Callable[[], Awaitable[None]], *, debug: bool, stop: StopRequest | None = None) -> None:
    """Run a command, and end the process unless it went well.

    Args:
        command: What to run.
        debug: Show tracebacks of errors.
        stop: What the command looks at to stop at a good place, if it can.
    """
    interruption = _Interruption(stop)
    before = {number: signal.signal(number, interruption.handle) for number in _SIGNALS}
    status = 0
    try:
        anyio.run(_supervise, command, interruption)
    except KeyboardInterrupt:
        interruption.number = interruption.number or signal.SIGINT
    except Exception as error:
        status = tell(error, debug=debug)
    finally:
        atexit.unregister(_ignore_signals)
        atexit.register(_ignore_signals)
        for number, handler in before.items():
            signal.signal(number, handler)
    if interruption.number is None and not status and stop is not None and stop.requested:
        interruption.number = signal.SIGINT if stop.reason == _name(signal.SIGINT) else signal.SIGTERM
    if interruption.number is not None:
        _end_at_once(interruption.number)
    if status:
        sys.exit(status)


async def _supervise(command: Callable[[], Awaitable[None]], interruption: _Interruption) -> None:
    with anyio.CancelScope() as scope, interruption.cancels(scope):
        await command()


def _ignore_signals() -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _end_at_once(number: int) -> None:
    """End the process after a signal, without waiting for threads that were left behind computing."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.write(f"{_name(number)}\n")
        sys.stderr.flush()
    os._exit(128 + number)


def _name(number: int) -> str:
    return "interrupted" if number == signal.SIGINT else "terminated"
