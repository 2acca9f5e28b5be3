"""One HTTP/1.1 connection: bytes in and out, one exchange at a time.

A `Connection` is an asyncio protocol; what it gets belongs to the `Incoming` that it was lent to. When the answer is
whole they part, and the connection goes back to its keeper or is closed, whatever the reader does meanwhile.

Invariants
    * Only a connection whose exchange has ended on both sides is used again: all of the request is out, all of the
      answer is in, and nothing more.
    * It has no task. Its one timer ends with it.
"""

from __future__ import annotations

import asyncio
import math
import re
from typing import Any, Final, Protocol, cast

import httptools

from fwasync._http.carrier import Unanswered
from fwasync._http.incoming import Incoming, malformed

__all__ = ("Connection", "Keeper")

_READ_SIZE = 64 * 1024
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


class Connection(asyncio.Protocol):
    """One connection, that is lent to one exchange after another.

    Attributes:
        is_sent: All of the request has been written.
        is_full: What is written waits for the other side to take it.
        expires: When it is not to be used any more, on the loop's clock; for its keeper.
    """

    __slots__ = (
        "_answers_head",
        "_head_size",
        "_incoming",
        "_is_interim",
        "_is_paused",
        "_is_reusable",
        "_is_whole",
        "_keeper",
        "_parser",
        "_spoilt",
        "_timer",
        "_transport",
        "expires",
        "is_full",
        "is_sent",
    )

    def __init__(self, keeper: Keeper) -> None:
        self.is_sent = False
        self.is_full = False
        self.expires = 0.0
        self._keeper = keeper
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._incoming: Incoming | None = None
        self._spoilt: Exception | None = None
        self._timer: asyncio.TimerHandle | None = None
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
        if self._spoilt is not None:
            self._incoming.fail(self._spoilt)
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

    def watch(self, deadline: float) -> None:
        """Look at the deadline of the exchange not later than this.

        One timer serves many exchanges: it is left to run, and set anew when it finds that it came too early. A timer
        for each would cost a tenth of all that a request costs.
        """
        if self._timer is not None:
            if self._timer.when() <= deadline:
                return
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(deadline, self._due, deadline)

    def _due(self, when: float) -> None:
        self._timer = None
        if self._incoming is None:
            return
        if self._incoming.deadline <= when:
            self._incoming.fail(TimeoutError())
        elif self._incoming.deadline < math.inf:
            self.watch(self._incoming.deadline)

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
        self._spoilt = self._spoilt or failure
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
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
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
        if incoming is None:
            self._part(malformed(ValueError("it came before it was asked for")))
            self.abort()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._is_reusable = False
            if not self._is_whole:
                self._part(malformed(error.__context__ or error))
                self.abort()
                return
        if self._is_whole:
            self._end(incoming)
        elif not incoming.status:
            self._head_size += len(data)
            if self._head_size > _LONGEST_HEAD:
                self._part(malformed(ValueError("its head is too long")))
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
        """A piece of the body has come; an interim answer has none that matters."""
        incoming = self._incoming
        if incoming is None or self._is_whole or self._is_interim:
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


def _keep_alive(hint: str | None) -> float:
    """How long a connection may be idle: a second less than the service says that it waits."""
    told = None if hint is None else _KEEP_ALIVE_HINT(hint)
    return _KEEP_ALIVE_S if told is None else min(_KEEP_ALIVE_S, int(told[1]) - 1.0)
