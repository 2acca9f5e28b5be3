"""The answer to one request over a connection, from the writing of the request on.

Invariants
    * Neither side buffers more than about a write or a read: a slow reader slows the sender down, here as there.
    * There is one place where a task waits for the network; whatever ends the waiting early closes the connection.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fwasync._http.carrier import WRITE_SIZE, Body, Unanswered, joined
from fwasync._http.inflate import Inflater, inflater

if TYPE_CHECKING:
    from fwasync._http.connection import Connection

__all__ = ("Incoming", "malformed")

_MOST_UNREAD = 256 * 1024


class Incoming:
    """The answer to one request, as it comes in; a `carrier.Reply` as soon as its head is there.

    Attributes:
        status: The HTTP status; 0 as long as the head has not come.
        headers: The headers, with lower-case names.
        ended: The answer is whole, and the connection not ours any more.
        deadline: Until when it is waited for at present, on the loop's clock.
    """

    __slots__ = (
        "_connection",
        "_failure",
        "_inflated",
        "_inflater",
        "_pieces",
        "_unread",
        "_waiter",
        "deadline",
        "ended",
        "headers",
        "status",
    )

    def __init__(self, connection: Connection) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.ended = False
        self.deadline = math.inf
        self._connection = connection
        self._failure: Exception | None = None
        self._pieces: list[bytes] = []
        self._unread = 0
        self._inflater: Inflater | None = None
        self._inflated: Iterator[bytes] | None = None
        self._waiter: asyncio.Future[None] | None = None

    # -- for who sent the request

    async def send(self, head: bytes, body: Body, size: int, deadline: float) -> None:
        """Write the request, and wait until the head of the answer has come; that may be before all is written."""
        try:
            if size <= WRITE_SIZE:
                self._connection.write(b"".join((head, *body)))
                self._connection.is_sent = True
            else:
                await self._send_large(head, body, deadline)
            while not self.status:
                await self._change(deadline)
            coding = self.headers.get("content-encoding")
            if coding is not None:
                self._inflater = inflater(coding)
        except ValueError as error:
            self.close()
            raise malformed(error) from None
        except BaseException:
            self.close()
            raise

    async def _send_large(self, head: bytes, body: Body, deadline: float) -> None:
        connection = self._connection
        connection.write(head)
        for piece in _writes(body):
            while connection.is_full and not self.status:
                await self._change(deadline)
            await asyncio.sleep(0)  # what has come is read, and others have their turn, before the next write
            if self.status or self._failure is not None:
                return
            connection.write(piece)
        connection.is_sent = True

    async def read(self, deadline: float) -> bytes:
        """What is left of the body; see `carrier.Reply`."""
        if self.ended and self._inflater is None and self._failure is None:
            return self._taken()
        return await joined(self, deadline)

    async def piece(self, deadline: float) -> bytes | None:
        """The next piece of the body, or `None` at its end; see `carrier.Reply`."""
        try:
            while True:
                if self._inflated is not None:
                    if (piece := next(self._inflated, None)) is not None:
                        return piece
                    self._inflated = None
                elif self._pieces:
                    if self._inflater is None:
                        return self._taken()
                    self._inflated = self._inflater.pieces(self._taken())
                    await asyncio.sleep(0)  # inflating takes its time, and others have their turn
                elif self.ended:
                    if self._inflater is not None:
                        self._inflater.end()
                    return None
                else:
                    await self._change(deadline)
        except ValueError as error:
            self.close()
            raise malformed(error) from None
        except BaseException:
            self.close()
            raise

    async def aclose(self) -> None:
        """Close the request, if its answer has not come to its end."""
        self.close()

    def close(self) -> None:
        """The same, for who cannot wait."""
        if not self.ended:
            self._connection.abort()

    async def _change(self, deadline: float) -> None:
        """Wait until something has happened; raise what makes it useless to wait on."""
        if self._failure is None:
            waiter = self._waiter = asyncio.get_running_loop().create_future()
            self.deadline = deadline
            self._connection.watch(deadline)
            try:
                await waiter
            finally:
                self.deadline = math.inf
                self._waiter = None
        if self._failure is not None and not self.ended:
            raise self._failure

    def _taken(self) -> bytes:
        pieces = self._pieces
        taken = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        self._unread = 0
        if not self.ended:
            self._connection.go_on()
        return taken

    # -- for the connection

    def add(self, data: bytes) -> bool:
        """A piece of the body has come; whether that is enough for now."""
        self._pieces.append(data)
        self._unread += len(data)
        return self._unread > _MOST_UNREAD

    def wake(self) -> None:
        """Something has happened."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def fail(self, failure: Exception) -> None:
        """Nothing more will come."""
        if self._failure is None and not self.ended:
            self._failure = failure
            self.wake()


def _writes(body: Body) -> Iterator[bytes | memoryview]:
    """A body in writes of moderate size; what is larger is cut, not copied."""
    pending: list[bytes] = []
    size = 0
    for piece in body:
        if size and size + len(piece) > WRITE_SIZE:
            yield b"".join(pending)
            pending.clear()
            size = 0
        if len(piece) > WRITE_SIZE:
            view = memoryview(piece)
            for start in range(0, len(piece), WRITE_SIZE):
                yield view[start : start + WRITE_SIZE]
        else:
            pending.append(piece)
            size += len(piece)
    if size:
        yield b"".join(pending)


def malformed(error: BaseException) -> Unanswered:
    """What is told of an answer that is none."""
    return Unanswered(f"the answer is malformed: {error or type(error).__name__}", connected=True)
