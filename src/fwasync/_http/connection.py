"""One HTTP/1.1 connection: bytes in and out, one exchange at a time.

A `Connection` is an asyncio protocol; what it gets belongs to the `Incoming` that it was lent to. When the answer is
whole they part, and the connection goes back to its keeper or is closed, whatever the reader does meanwhile.

Invariants
    * Only a connection whose exchange has ended on both sides is used again: all of the request is out, all of the
      answer is in, and nothing more.
    * Neither side buffers more than about a write or a read: a slow reader slows the sender down, here as there.
    * There is one place where a task waits; whatever ends the waiting early closes the connection.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from typing import Any, Final, Protocol, cast

import httptools

from fwasync._http.carrier import WRITE_SIZE, Body, Unanswered
from fwasync._http.inflate import Inflater, inflater

__all__ = ("Connection", "Incoming", "Keeper")

_READ_SIZE = 64 * 1024
_MOST_UNREAD = 256 * 1024
_LONGEST_HEAD = 256 * 1024
_KEEP_ALIVE_S = 30.0
_KEEP_ALIVE_HINT: Final = re.compile(r"timeout=(\d{1,6})", re.I).search


class Keeper(Protocol):
    """Who owns connections, and is told of them."""

    def idle(self, connection: Connection, for_s: float) -> None:
        """The connection may carry another exchange, if it comes within so many seconds."""
        ...

    def useless(self, connection: Connection) -> None:
        """The connection carries no other exchange. It may be told more than once."""
        ...

    def closed(self, connection: Connection) -> None:
        """The socket is closed."""
        ...


class Incoming:
    """The answer to one request, as it comes in; a `carrier.Reply` as soon as its head is there."""

    __slots__ = (
        "_connection",
        "_failure",
        "_inflated",
        "_inflater",
        "_pieces",
        "_unread",
        "_waiter",
        "ended",
        "headers",
        "status",
    )

    def __init__(self, connection: Connection) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.ended = False
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
            raise _malformed(error) from None
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
        pieces: list[bytes] = []
        while (piece := await self.piece(deadline)) is not None:
            pieces.append(piece)
        return b"".join(pieces)

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
            raise _malformed(error) from None
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
            loop = asyncio.get_running_loop()
            waiter = self._waiter = loop.create_future()
            timer = loop.call_at(deadline, self._late)
            try:
                await waiter
            finally:
                timer.cancel()
                self._waiter = None
        if self._failure is not None and not self.ended:
            raise self._failure

    def _late(self) -> None:
        self.fail(TimeoutError())

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


class Connection(asyncio.Protocol):
    """One connection, that is lent to one exchange after another.

    Attributes:
        is_sent: All of the request has been written.
        is_full: What is written waits for the other side to take it.
        expires: When it is not to be used any more, on the loop's clock; for its keeper.
    """

    def __init__(self, keeper: Keeper) -> None:
        self.is_sent = False
        self.is_full = False
        self.expires = 0.0
        self._keeper = keeper
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._incoming: Incoming | None = None
        self._answers_head = False  # to a HEAD, which has no body whatever it says
        self._is_interim = False
        self._is_whole = False
        self._is_reusable = False
        self._is_paused = False
        self._head_size = 0

    def lend(self, *, answers_head: bool) -> Incoming:
        """Begin an exchange."""
        self.is_sent = self._is_whole = self._is_reusable = False
        self._answers_head = answers_head
        self._head_size = 0
        self._incoming = Incoming(self)
        return self._incoming

    def write(self, data: bytes | memoryview) -> None:
        """Write a part of the request."""
        if self._transport is not None:
            self._transport.write(data)

    def go_on(self) -> None:
        """What had come was read."""
        if self._is_paused and self._transport is not None:
            self._is_paused = False
            self._transport.resume_reading()

    def abort(self) -> None:
        """Close the socket now, and tell who waits."""
        self._part(Unanswered("the connection was closed here", connected=True))
        if self._transport is not None:
            self._transport.abort()

    @property
    def fileno(self) -> int:
        """The socket's number, or -1."""
        held = None if self._transport is None else self._transport.get_extra_info("socket")
        return -1 if held is None else cast("int", held.fileno())

    def _part(self, failure: Exception) -> None:
        incoming, self._incoming = self._incoming, None
        self._keeper.useless(self)
        if incoming is not None:
            incoming.fail(failure)

    # -- what asyncio tells

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        if hasattr(transport, "max_size"):  # asyncio's reads of 256 KiB map memory each time, at five times the cost
            cast("Any", transport).max_size = _READ_SIZE

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost(exc)
        self._keeper.closed(self)
        self._transport = None
        del self._parser  # it holds us

    def eof_received(self) -> None:
        self._lost(None)
        if self._transport is not None:
            self._transport.abort()

    def pause_writing(self) -> None:
        self.is_full = True

    def resume_writing(self) -> None:
        self.is_full = False
        if self._incoming is not None:
            self._incoming.wake()

    def data_received(self, data: bytes) -> None:
        incoming = self._incoming
        if incoming is None:  # nobody asked
            self.abort()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._is_reusable = False
            if not self._is_whole:
                self._part(_malformed(error.__context__ or error))
                self.abort()
                return
        if self._is_whole:
            self._end(incoming)
        elif not incoming.status:
            self._head_size += len(data)
            if self._head_size > _LONGEST_HEAD:
                self._part(_malformed(ValueError("its head is too long")))
                self.abort()
            return
        incoming.wake()

    def _end(self, incoming: Incoming) -> None:
        """The answer is whole."""
        incoming.ended = True
        self._incoming = None
        transport = self._transport
        if self._is_reusable and self.is_sent and transport is not None and not transport.get_write_buffer_size():
            self.go_on()
            self._keeper.idle(self, _keep_alive(incoming.headers.get("keep-alive")))
        else:
            self.abort()

    def _lost(self, exc: Exception | None) -> None:
        incoming = self._incoming
        if incoming is not None and exc is None and self._ends_with_connection(incoming):
            self._is_reusable = False
            self._end(incoming)
            incoming.wake()
            return
        said = f" ({exc})" if exc is not None and str(exc) else ""
        where = "in the middle of" if incoming is not None and incoming.status else "without"
        self._part(Unanswered(f"the connection was closed {where} an answer{said}", connected=True))

    def _ends_with_connection(self, incoming: Incoming) -> bool:
        named = incoming.headers
        return incoming.status > 0 and "content-length" not in named and "transfer-encoding" not in named

    # -- what the parser finds

    def on_message_begin(self) -> None:
        """An answer begins; if that is another one, it was not asked for."""
        if self._is_whole:
            self._is_reusable = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header has come; after the body, it is none that matters."""
        incoming = self._incoming
        if incoming is None or incoming.status:
            return
        key, text = name.decode("latin-1").lower(), value.decode("latin-1").rstrip()
        held = incoming.headers.get(key)
        incoming.headers[key] = text if held is None else f"{held}, {text}"

    def on_headers_complete(self) -> None:
        """The head has come."""
        incoming = self._incoming
        if incoming is None or self._is_whole:
            return
        status = self._parser.get_status_code()
        if status < 200:
            if status < 100 or status == 101:
                raise ValueError(f"its status is {status}")
            incoming.headers.clear()
            self._is_interim = True
            return
        if incoming.headers.get("transfer-encoding", "chunked").lower() != "chunked":
            raise ValueError("its transfer-encoding is another one than chunked")
        incoming.status = status
        self._is_whole = self._answers_head

    def on_body(self, data: bytes) -> None:
        """A piece of the body has come."""
        incoming = self._incoming
        if incoming is None or self._is_whole:
            return
        if incoming.add(data) and not self._is_paused and self._transport is not None:
            self._is_paused = True
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        """An answer is whole."""
        if self._is_interim:
            self._is_interim = False
        elif not self._is_whole:
            self._is_whole = True
            self._is_reusable = self._parser.should_keep_alive()


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


def _keep_alive(hint: str | None) -> float:
    """How long a connection may be idle: a second less than the service says that it waits."""
    told = None if hint is None else _KEEP_ALIVE_HINT(hint)
    return _KEEP_ALIVE_S if told is None else min(_KEEP_ALIVE_S, int(told[1]) - 1.0)


def _malformed(error: BaseException) -> Unanswered:
    return Unanswered(f"the answer is malformed: {error or type(error).__name__}", connected=True)
