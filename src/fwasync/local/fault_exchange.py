"""One request with a fault: read whole, and the means to answer it well or badly.

Invariants
    * The connection of a request that is cut ends before anything else is said on it.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import sys
from dataclasses import dataclass
from typing import TypeGuard

import anyio
import anyio.lowlevel
import msgspec
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from fwasync._wire.completions import EVENT_STREAM
from fwasync._wire.faults import CutStream, SlowStream
from fwasync._wire.hot_load import DEPLOYMENT_HEADER
from fwasync._wire.protobuf.fields import ProtobufError, as_bool, as_signed, as_text, fields
from fwasync.local.faults import Who, control_route_of, route_of
from fwasync.local.refusal import Refused
from fwasync.local.sessions import OWNER
from fwasync.local.unpacking import unpacked
from fwasync.local.web import is_protobuf

__all__ = ("PREFIX", "CompleteAnswer", "CuttableProtocol", "Exchange")

PREFIX = "/api/v1/"
"""Where the trainer API is."""

_TRANSPORT = "fwasync.transport"
# On, with nothing to linger for: closing sends RST instead of FIN.
_LINGER_0 = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)
_END_OF_EVENT = b"\n\n"


class CuttableProtocol(HttpToolsProtocol):
    """uvicorn's protocol, which also tells the application its connection: ASGI has no word for cutting one."""

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self.scope.setdefault("state", {})[_TRANSPORT] = self.transport


class _Identity(msgspec.Struct):
    session_id: str | None = None
    model_id: str | None = None
    sampling_session_id: str | None = None
    seq_id: int | None = None
    request_id: str | int | None = None
    forward_only: bool = False
    model: str | None = None
    stream: bool | None = None

    @property
    def future(self) -> str | None:
        return None if self.request_id is None else str(self.request_id)

    @property
    def session(self) -> str | None:
        owner = self.session_id or self.model_id or self.sampling_session_id
        return owner and owner.partition(":")[0]


def _identify(request: Request, body: bytes) -> _Identity:
    """What a request is about; of one that cannot be read, nothing is known."""
    identity = _Identity()
    try:
        if request.headers.get("content-encoding") == "zstd":
            body = unpacked(body)
        if is_protobuf(request):
            for number, value in fields(body):
                if number == 1:
                    identity.model_id = as_text(value)
                elif number == 2:
                    identity.seq_id = as_signed(value)
                elif number == 6:
                    identity.forward_only = as_bool(value)
        else:
            identity = msgspec.json.decode(body or b"{}", type=_Identity)
    except (msgspec.MsgspecError, ProtobufError, Refused):
        return _Identity()
    return identity


@dataclass(frozen=True, slots=True)
class CompleteAnswer:
    """What the service answers: its head, and all of its body."""

    start: Message
    body: bytes


class Exchange:
    """One request, read whole, and the means to answer it well or badly."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, body: bytes) -> None:
        self.request = Request(scope, receive)
        identity = _identify(self.request, body)
        path: str = scope["path"]
        if path.startswith(PREFIX):
            # In protobuf, forward goes where forward_backward goes.
            self.route = "forward" if identity.forward_only else route_of(path.removeprefix(PREFIX))
            self.resource = OWNER.get()
        else:
            self.route, named = control_route_of(scope["method"], path)
            named = named or self.request.headers.get(DEPLOYMENT_HEADER) or identity.model
            self.resource = named and named.rpartition("/")[2]
        self.who = Who(identity.model_id, identity.seq_id, identity.future, self.resource)
        self.session_id = identity.session
        self.is_stream = self.route == "completions" and bool(identity.stream)
        self._scope, self._receive, self._send = scope, receive, send
        self._body = body

    async def ask(self, app: ASGIApp) -> CompleteAnswer | None:
        """What the service answers; `None` if the client has gone."""
        start: Message | None = None
        pieces: list[bytes] = []

        async def send(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                start = message
            else:
                pieces.append(message.get("body", b""))

        await app(self._scope, self._again(), send)
        return None if start is None else CompleteAnswer(start, b"".join(pieces))

    async def relay(self, app: ASGIApp, action: CutStream | SlowStream | None = None) -> None:
        """Pass on what the service answers as it comes; a stream of events slowed down, or cut."""
        if action is None:
            await app(self._scope, self._again(), self._send)
            return
        told, is_stream = 0, False

        async def send(message: Message) -> None:
            nonlocal told, is_stream
            if message["type"] == "http.response.start":
                is_stream = EVENT_STREAM in Headers(raw=message["headers"]).get("content-type", "")
            if message["type"] == "http.response.start" or not is_stream:
                await self._send(message)
                return
            events: bytes = message.get("body", b"")
            while events and not _is_over(action, told):
                event, end, events = events.partition(_END_OF_EVENT)
                if isinstance(action, SlowStream):
                    await anyio.sleep(action.seconds)
                await self._send({"type": "http.response.body", "body": event + end, "more_body": True})
                told += 1
            if _is_over(action, told):
                await self._end_early(clean=action.clean)
                scope.cancel()
                await anyio.lowlevel.checkpoint()
            elif not message.get("more_body", False):
                await self._send({"type": "http.response.body", "body": b"", "more_body": False})

        with anyio.CancelScope() as scope:
            await app(self._scope, self._again(), send)

    def _again(self) -> Receive:
        """The request once more, which has been read."""
        unread = [self._body]

        async def receive() -> Message:
            if unread:
                return {"type": "http.request", "body": unread.pop(), "more_body": False}
            return await self._receive()

        return receive

    async def _end_early(self, *, clean: bool) -> None:
        if clean:
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})
        else:
            self._transport.close()
            await self._gone()

    async def respond(self, response: Response) -> None:
        """Answer with something else."""
        await response(self._scope, self._receive, self._send)

    async def deliver(self, answer: CompleteAnswer, *, half: bool = False) -> None:
        """Hand over the service's answer; `half` of its body, and then the end of the connection."""
        await self._send(answer.start)
        if half:
            piece = answer.body[: len(answer.body) // 2]
            await self._send({"type": "http.response.body", "body": piece, "more_body": True})
            self._transport.close()
            await self._gone()
        else:
            await self._send({"type": "http.response.body", "body": answer.body, "more_body": False})

    async def cut(self, *, reset: bool = False) -> None:
        """End the connection without an answer."""
        if reset:
            connection: socket.socket = self._transport.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_0)
        self._transport.abort()
        await self._gone()

    @property
    def _transport(self) -> asyncio.Transport:
        return self._scope["state"][_TRANSPORT]

    async def _gone(self) -> None:
        # The server must have noticed, or it would take the missing answer for our mistake.
        while (await self._receive())["type"] != "http.disconnect":
            pass


def _is_over(action: CutStream | SlowStream, told: int) -> TypeGuard[CutStream]:
    return isinstance(action, CutStream) and told >= action.events
