"""The results of operations, for as long as they are kept.

Invariants
    * Used on the event loop's thread only.
    * A future is resolved at most once; what was told first stays.
    * A waiter waits on an event and leaves nothing behind when it is cancelled.
    * Unresolved futures are always kept; of the resolved ones the newest, within two bounds.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import anyio

from fwasync.local.results import Result

__all__ = ("FutureStore", "Slot")

MAX_RESULTS = 10_000
MAX_BYTES = 512 * 2**20


class Slot:
    """One future: its result once there is one, and until then what holds it up.

    Who does not wait can set `on_wake`, which is called when those who wait are let go.
    """

    __slots__ = ("_changed", "on_wake", "result", "why")

    def __init__(self, why: Callable[[], str]) -> None:
        self.result: Result | None = None
        self.why = why
        self.on_wake: Callable[[], None] | None = None
        self._changed = anyio.Event()

    async def wait(self) -> None:
        """Wait until it is resolved or the store is closed."""
        await self._changed.wait()

    def wake(self) -> None:
        """Let go whoever waits, and call `on_wake`."""
        self._changed.set()
        if self.on_wake is not None:
            self.on_wake()


class FutureStore:
    """All futures by request id.

    Args:
        max_results: How many resolved futures are kept.
        max_bytes: How many bytes of results are kept (the newest result always is).
    """

    def __init__(self, *, max_results: int = MAX_RESULTS, max_bytes: int = MAX_BYTES) -> None:
        self._slots: dict[str, Slot] = {}
        self._resolved: OrderedDict[str, None] = OrderedDict()
        self._max_results = max_results
        self._max_bytes = max_bytes
        self._bytes = 0
        self._closed = False

    def open(self, request_id: str, why: Callable[[], str]) -> Slot:
        """Begin a future. `why` tells, whenever it is asked, what the operation waits for."""
        slot = self._slots[request_id] = Slot(why)
        return slot

    def forget(self, request_id: str) -> None:
        """Drop a future that nobody will ask for again."""
        slot = self._slots.pop(request_id, None)
        if slot is not None and slot.result is not None:
            del self._resolved[request_id]
            self._bytes -= len(slot.result.body)

    def get(self, request_id: str) -> Slot | None:
        """The future, or `None` if it was never there or is no longer kept."""
        return self._slots.get(request_id)

    def resolve(self, request_id: str, result: Result) -> bool:
        """Set the result. Returns whether it counted: not for an unknown or a resolved future."""
        slot = self._slots.get(request_id)
        if slot is None or slot.result is not None:
            return False
        slot.result = result
        slot.why = _done  # what it held on to (a batch, say) is free now
        slot.wake()
        self._resolved[request_id] = None
        self._bytes += len(result.body)
        while len(self._resolved) > 1 and (len(self._resolved) > self._max_results or self._bytes > self._max_bytes):
            old = self._slots.pop(self._resolved.popitem(last=False)[0])
            self._bytes -= len(old.result.body) if old.result else 0
        return True

    @property
    def closed(self) -> bool:
        """Whether the service is stopping: nobody should start to wait."""
        return self._closed

    def close(self) -> None:
        """Wake every waiter: the service stops."""
        self._closed = True
        for slot in self._slots.values():
            slot.wake()


def _done() -> str:
    return "done"
