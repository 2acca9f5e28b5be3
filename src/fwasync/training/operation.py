"""The life of one operation: `queued → admitting → admitted → done | failed`, or `queued → withdrawn`.

Admission (taking a number, sending until acknowledged) is done by the client's own task and is none of the
caller's business: nothing a caller does can interrupt it. Collecting the result is done by whoever waits: at
most one waiter polls, and if it is cancelled the next one takes over. So a wait can be given up and begun
again at every instant, and neither the order nor the result suffers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Generic, Literal, Protocol, TypeVar

from fwasync._http.client import Answer
from fwasync._wire.codec import Codec
from fwasync._wire.futures import NotReady
from fwasync.errors import (
    OperationFailedError,
    OperationWithdrawnError,
    ProtocolError,
    ResultLostError,
    SequenceBrokenError,
    ServiceUnavailableError,
    TransportError,
)

__all__ = ("EFFECT_UNKNOWN", "Admission", "Operation", "State")

T = TypeVar("T")

EFFECT_UNKNOWN = (TransportError, ServiceUnavailableError, ProtocolError, SequenceBrokenError)
"""What a request may end with after it took effect: no answer, a server's own failure, an unreadable answer, or a
refusal that says nothing of an earlier attempt."""

State = Literal["queued", "admitting", "admitted", "done", "failed", "withdrawn"]


class Admission(Protocol):
    """What an operation may do while it has its turn (see `Lane`)."""

    async def send(
        self,
        path: str,
        bodies: Sequence[Callable[[int], list[bytes]]],
        *,
        content_type: str = "application/json",
        on_sent: Callable[[str | int], None],
    ) -> list[str | int]:
        """Send consecutive numbered requests until they are acknowledged; returns their ids."""
        ...

    async def fetch(
        self,
        request_id: str | int,
        *,
        what: str,
        accept: str = "application/json",
        on_wait: Callable[[NotReady], None] | None = None,
    ) -> Answer:
        """The answer that is a request's result."""
        ...

    @property
    def codec(self) -> Codec:
        """How batches are sent."""
        ...

    def refuses_json(self) -> bool:
        """Go over to protobuf, where that was left open; says whether it was."""
        ...


class Operation(Generic[T]):
    """One operation of one model, from the call to the result.

    Args:
        verb: The name of the method that was called.
        admit: Sends the operation, and returns what collects its result: a function that may be called again
            after it was cancelled.
        timeout: Seconds that each wait for the result may take unless it says otherwise; `None` is for ever.
        on_observed: Told once, when somebody has learnt the outcome.
    """

    def __init__(
        self,
        verb: str,
        admit: Callable[[Operation[T], Admission], Awaitable[Callable[[], Awaitable[T]]]],
        *,
        timeout: float | None,
        on_observed: Callable[[Operation[Any]], None],
    ) -> None:
        self.verb = verb
        self.timeout = timeout
        self.created = asyncio.get_running_loop().time()
        self.state: State = "queued"
        self.request_ids: list[str] = []
        self.queue_state: str | None = None
        self.harmless = False
        """Set while nothing that was sent can have an effect."""
        self._admit: Callable[[Operation[T], Admission], Awaitable[Callable[[], Awaitable[T]]]] | None = admit
        self._on_observed = on_observed
        self._collect: Callable[[], Awaitable[T]] | None = None
        self._collecting: asyncio.Event | None = None  # set when who polls has stopped
        self._decided = asyncio.Event()
        self._waiters = 0
        self._value: T | None = None
        self._error: Exception | None = None
        self._took_effect: bool | None = None

    # -- the client's side ---------------------------------------------------------------------

    async def admit(self, admission: Admission) -> None:
        """Send the operation. Never raises on its own account: a failure is the operation's outcome."""
        admit, self._admit = self._admit, None  # it holds the batch, which nobody needs once it is sent
        assert admit is not None
        self.state = "admitting"
        try:
            self._collect = await admit(self, admission)
        except Exception as error:
            refused = not self.request_ids and not isinstance(error, EFFECT_UNKNOWN)
            self.fail(error, took_effect=False if refused or self.harmless else None)
        else:
            self.state = "admitted"
            self._decided.set()

    def fail(self, error: Exception, *, took_effect: bool | None) -> None:
        """Decide the outcome: it failed, and took effect, did not, or (`None`) nobody knows."""
        self._admit = None
        self.state = "failed"
        self._took_effect = took_effect
        self._error = error
        self._decided.set()

    def withdraw(self) -> bool:
        """Take it back, if nothing of it was sent; says whether it could."""
        if self.state != "queued":
            return False
        error = OperationWithdrawnError(f"{self.verb} was withdrawn before it was sent; the service never saw it")
        self.fail(error, took_effect=False)
        self.state = "withdrawn"
        self._on_observed(self)
        return True

    def note_sent(self, request_id: str | int) -> None:
        """Remember a request that was acknowledged."""
        self.request_ids.append(str(request_id))

    def note_wait(self, answer: NotReady) -> None:
        """Remember what the service says of an operation that is not ready."""
        self.queue_state = " ".join(filter(None, (answer.queue_state, answer.reason))) or None

    # -- the caller's side ---------------------------------------------------------------------

    async def wait(self) -> T:
        """The result, or the error that the operation ended with.

        **Cancellation:** if the operation was still queued and nobody else waits for it, it is withdrawn.
        Otherwise only this wait ends.
        """
        if not self.decided:
            await self._decide()
        self._on_observed(self)
        if self._error is not None:
            raise self._error.with_traceback(None)
        return self._value  # pyright: ignore[reportReturnType]  # T may be None itself; it is set when done

    async def _decide(self) -> None:
        self._waiters += 1
        try:
            await self._decided.wait()
            while self._collecting is not None:
                await self._collecting.wait()
            await self._settle()
        except BaseException:
            if self._waiters == 1:
                self.withdraw()
            raise
        finally:
            self._waiters -= 1

    async def _settle(self) -> None:
        if self.state != "admitted" or self._collect is None:
            return
        self._collecting = stopped = asyncio.Event()
        try:
            self._value = await self._collect()
        except ResultLostError as error:
            self.fail(error, took_effect=None)
        except ProtocolError as error:
            self.fail(error, took_effect=True)
        except OperationFailedError as error:
            self.fail(error, took_effect=False if len(self.request_ids) == 1 else None)
        else:
            self.state = "done"
            self._collect = None
        finally:
            self._collecting = None
            stopped.set()

    @property
    def decided(self) -> bool:
        """Whether its outcome is known."""
        return self.state in ("done", "failed", "withdrawn")

    @property
    def took_effect(self) -> bool | None:
        """Whether the service applied or will apply it; `None` while that is open or cannot be known."""
        return True if self.state in ("admitted", "done") else self._took_effect

    async def admitted(self) -> None:
        """Wait until its admission has ended, in whichever way."""
        await self._decided.wait()


AnyOperation = Operation[Any]
