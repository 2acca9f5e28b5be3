"""Ctrl-C between any two lines, and any two instructions, of a blocking call: nothing is left behind, ever.

A trace function raises KeyboardInterrupt at the n-th step that the main thread makes for a blocking client, in our code
and in that of the standard library below it, for n = 0, 1, 2 … until the call comes through.
"""

from __future__ import annotations

import _weakrefset
import gc
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from fwasync.sync import portal
from fwasync.sync.portal import Lease
from fwasync.sync.training import SubmittingTrainingClient
from fwasync.sync.twin import OpenTwin, Twin

OURS = str(Path(portal.__file__).parent)


class Strike:
    """Raises KeyboardInterrupt at the n-th step of the thread."""

    def __init__(self, n: int, kind: str) -> None:
        self.left = n
        self.kind = kind
        self.where = ""

    def __call__(self, frame: FrameType, event: str, arg: object) -> Strike:
        file = frame.f_code.co_filename
        if file != __file__ and (self.kind == "line" or OURS in file):
            frame.f_trace_opcodes, frame.f_trace_lines = self.kind == "opcode", self.kind == "line"
            if event == self.kind and not is_finalizer(frame):
                self.left -= 1
                if self.left < 0:
                    sys.settrace(None)
                    self.where = f"{frame.f_code.co_qualname}, {file}:{frame.f_lineno}"
                    raise KeyboardInterrupt
        return self


def is_finalizer(frame: FrameType | None) -> bool:
    """Whether an object is dying there, such as a thread: of an exception that strikes then, Python only complains."""
    while frame is not None and frame.f_code.co_filename != __file__:
        if frame.f_code.co_name == "__del__" or frame.f_code.co_filename == _weakrefset.__file__:
            return True
        frame = frame.f_back
    return False


class Story:
    """What happened on the loop."""

    def __init__(self) -> None:
        self.told: list[str] = []

    @asynccontextmanager
    async def manager(self) -> AsyncIterator[Story]:
        self.told.append("entered")
        try:
            yield self
        finally:
            self.told.append("left")

    async def operation(self) -> None:
        self.told.append("begun")
        try:
            await anyio.sleep(0.0005)
        finally:
            self.told.append("ended")


def by_hand(story: Story) -> None:
    lease = Lease(story.manager())
    lease.run(story.operation)
    lease.close()


def in_a_block(story: Story) -> None:
    with Twin(story.manager()) as twin:
        twin._lease.run(story.operation)


def open_at_once(story: Story) -> None:
    twin = OpenTwin(story.manager())
    twin._lease.run(story.operation)
    twin.close()


@pytest.mark.parametrize(
    ("use", "kind"), [(by_hand, "line"), (in_a_block, "line"), (open_at_once, "line"), (in_a_block, "opcode")]
)
def test_ctrl_c_leaves_nothing_behind_wherever_it_strikes(use: Callable[[Story], None], kind: str) -> None:
    n = 0
    # What others left to the collector is not to be finalized under the tracer: it would count as steps, and be struck.
    gc.collect()
    gc.disable()
    try:
        while struck(use, Strike(n, kind)).where:
            n += 1
    finally:
        gc.enable()
    assert n > 100


def struck(use: Callable[[Story], None], strike: Strike) -> Strike:
    story = Story()
    raised: list[type] = []
    before = sys.gettrace()
    sys.settrace(strike)
    try:
        use(story)
    except BaseException as error:  # no other may take its place
        raised.append(type(error))
    finally:
        sys.settrace(before)
    assert raised == ([KeyboardInterrupt] if strike.where else []), strike.where
    assert story.told.count("begun") == story.told.count("ended"), f"it went on: {strike.where}"
    wait_for(lambda: not threads(), f"a thread is left: {strike.where}")
    assert story.told.count("entered") == story.told.count("left"), f"it was not left: {strike.where}"

    lease = Lease(nullcontext())
    lease.run(anyio.lowlevel.checkpoint)
    lease.close()
    return strike


@pytest.fixture(autouse=True)
def others() -> None:
    """What other tests have left in the process."""
    OTHERS.clear()
    OTHERS.update(threading.enumerate())


OTHERS: set[threading.Thread] = set()


def threads() -> set[threading.Thread]:
    return set(threading.enumerate()) - OTHERS


def wait_for(condition: Callable[[], Any], failure: str) -> None:
    """A thread that was told to end takes a moment for it."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, failure
        time.sleep(0.001)


def test_a_submission_that_is_interrupted_is_withdrawn() -> None:
    class Future:
        withdrawn = False

        def cancel(self) -> bool:
            self.withdrawn = True
            return True

    class Struck:
        """A lease whose first call is struck just after it did its work."""

        def __init__(self) -> None:
            self.calls = 0

        def call(self, function: Callable[[], Any]) -> Any:
            self.calls += 1
            result = function()
            if self.calls == 1:
                raise KeyboardInterrupt
            return result

    future = Future()

    class Client:
        def save_state(self, name: str, timeout: float | None) -> Future:
            return future

    submitting: Any = SubmittingTrainingClient(Client(), Struck())  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        submitting.save_state("x")
    assert future.withdrawn


def test_a_lease_that_is_forgotten_is_given_back() -> None:
    story = Story()
    lease = Lease(story.manager())
    lease.run(story.operation)
    del lease
    wait_for(lambda: not threads(), "a thread is left")
    assert story.told == ["entered", "begun", "ended", "left"]
