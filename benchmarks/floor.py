"""The practical floor: what a client for one purpose costs, written by hand over asyncio, httptools and msgspec.

It has no retries, no time-outs, no TLS and no errors to speak of. What a real client costs beyond it is the price of
those, or waste.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, Self, cast
from urllib.parse import urlsplit

import httptools
import msgspec

JSON = "application/json"
PROTOBUF = "application/x-protobuf"


class Connection(asyncio.Protocol):
    """One request at a time."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._pieces: list[bytes] = []
        self._is_complete = False
        self._waiter: asyncio.Future[None] | None = None
        self._drained: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        for waiter in (self._waiter, self._drained):
            if waiter is not None and not waiter.done():
                waiter.set_exception(exc or ConnectionError("closed"))

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def on_status(self, _status: bytes) -> None:
        if self._parser.get_status_code() != 200:
            raise ConnectionError(f"status {self._parser.get_status_code()}")

    def on_body(self, body: bytes) -> None:
        self._pieces.append(body)

    def on_message_complete(self) -> None:
        self._is_complete = True

    def pause_writing(self) -> None:
        self._drained = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        self._drained = None

    async def drain(self) -> None:
        if self._drained is not None:
            await self._drained

    async def read(self) -> bytes | None:
        """What has come of the answer's body; `None` at its end."""
        while not self._pieces:
            if self._is_complete:
                self._is_complete = False
                return None
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        data = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        return data

    async def read_all(self) -> bytes:
        while not self._is_complete:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        self._is_complete = False
        data = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        return data


class Floor:
    """As many connections as are in use at a time; the one used last is used next."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or 80
        self._idle: list[Connection] = []
        self._all: set[Connection] = set()
        self._heads: dict[tuple[str, str, str], bytes] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        for connection in self._all:
            connection.transport.close()
        await asyncio.sleep(0)

    async def post(self, path: str, body: bytes, kind: str = JSON, accept: str = JSON) -> bytes:
        """The body of the answer."""
        connection = await self.send(path, [body], len(body), kind, accept)
        return await self.finish(connection)

    async def send(
        self, path: str, pieces: Iterable[bytes], length: int, kind: str = JSON, accept: str = JSON
    ) -> Connection:
        """Send a request, of which the first piece goes out with the head; its answer is read from the connection."""
        connection = self._idle.pop() if self._idle else await self._connect()
        head = self._heads.get((path, kind, accept))
        if head is None:
            lines = f"POST {path} HTTP/1.1\r\nhost: {self._host}:{self._port}\r\nx-api-key: tml-bench\r\n"
            head = f"{lines}content-type: {kind}\r\naccept: {accept}\r\ncontent-length: ".encode()
            self._heads[path, kind, accept] = head
        waiting = head + b"%d\r\n\r\n" % length
        for piece in pieces:
            connection.transport.write(waiting + piece)
            waiting = b""
            await connection.drain()
        return connection

    async def finish(self, connection: Connection) -> bytes:
        """The whole answer; the connection may be used again."""
        try:
            body = await connection.read_all()
        except asyncio.CancelledError:
            self.discard(connection)
            raise
        self._idle.append(connection)
        return body

    def release(self, connection: Connection) -> None:
        self._idle.append(connection)

    def discard(self, connection: Connection) -> None:
        self._all.discard(connection)
        connection.transport.abort()

    async def _connect(self) -> Connection:
        _, connection = await asyncio.get_running_loop().create_connection(Connection, self._host, self._port)
        self._all.add(connection)
        return connection


# -- the answers -----------------------------------------------------------------------------------


class Row(msgspec.Struct):
    token_id: int
    logprob: float


class Logprobs(msgspec.Struct):
    content: list[Row]


class RawOutput(msgspec.Struct):
    completion_token_ids: list[int]


class Choice(msgspec.Struct):
    text: str
    logprobs: Logprobs
    finish_reason: str | None = None
    raw_output: RawOutput | None = None


class Completion(msgspec.Struct):
    choices: list[Choice]


class Submitted(msgspec.Struct):
    request_id: str


read_completion = msgspec.json.Decoder(Completion).decode
read_submitted = msgspec.json.Decoder(Submitted).decode
COMPLETIONS = "/inference/v1/completions"


def read_sample(body: bytes) -> tuple[Sequence[int], Sequence[float]]:
    """Tokens and logprobs of the only sequence of a `SampleResponse`, which has nothing else in it."""
    _, message = _delimited(memoryview(body), 0)
    at, found = 0, dict[int, memoryview]()
    while at < len(message):
        number, is_delimited = message[at] >> 3, message[at] & 7 == 2
        if is_delimited:
            at, found[number] = _delimited(message, at)
        else:
            at += 2  # the reason why it ended, a small number
    return found[2].cast("i"), found[3].cast("f")


def _delimited(message: memoryview, at: int) -> tuple[int, memoryview]:
    """A field that starts there with its tag: where it ends, and what it holds."""
    size = shift = 0
    while True:
        at += 1
        size |= (message[at] & 0x7F) << shift
        shift += 7
        if message[at] < 0x80:
            break
    return at + 1 + size, message[at + 1 : at + 1 + size]


async def complete(floor: Floor, request: dict[str, Any]) -> tuple[list[int], list[float]]:
    """Token ids and logprobs of a completion, asked for in one piece."""
    (choice,) = read_completion(await floor.post(COMPLETIONS, msgspec.json.encode(request))).choices
    assert choice.raw_output is not None
    return choice.raw_output.completion_token_ids, [row.logprob for row in choice.logprobs.content]


async def stream(floor: Floor, request: dict[str, Any]) -> tuple[list[int], list[float]]:
    """The same, event by event."""
    body = msgspec.json.encode(request)
    connection = await floor.send(COMPLETIONS, [body], len(body), accept="text/event-stream")
    rest, logprobs, ids = b"", list[float](), list[int]()
    try:
        while (data := await connection.read()) is not None:
            *events, rest = (rest + data).split(b"\n\n")
            for event in events:
                if event == b"data: [DONE]":
                    continue
                (choice,) = read_completion(memoryview(event)[6:]).choices
                logprobs += [row.logprob for row in choice.logprobs.content]
                if choice.raw_output is not None:
                    ids = choice.raw_output.completion_token_ids
    except asyncio.CancelledError:
        floor.discard(connection)
        raise
    floor.release(connection)
    return ids, logprobs


async def future(floor: Floor, path: str, body: bytes, kind: str = JSON, accept: str = JSON) -> bytes:
    """Submit an operation of the trainer API, and wait for its result."""
    request_id = read_submitted(await floor.post(f"/api/v1/{path}", body, kind)).request_id
    retrieve = msgspec.json.encode({"request_id": request_id})
    return await floor.post("/api/v1/retrieve_future", retrieve, JSON, accept)
