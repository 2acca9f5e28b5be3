"""Scripted faults on the wire: a layer of ASGI around the endpoints, and a connection that can be cut.

Nothing of this is loaded unless the service is started with `--faults`.

Invariants
    * Which fault happens is decided in `faults`; here it is carried out.
    * A request that meets no fault is answered as it would be without this layer.
    * The layer lies inside the gatekeeper: a request that is turned away there meets no fault and counts for none.
"""

from __future__ import annotations

import asyncio
import math
import socket
import struct
import sys
import time
from dataclasses import dataclass, replace

import anyio
import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from fwasync._wire.faults import (
    Action,
    Delay,
    Drop,
    EvictSession,
    FailOperation,
    Kill,
    LoseFuture,
    NotReady,
    Reject,
    Reset,
    Status,
    Truncate,
    routes_of,
)
from fwasync._wire.messages import Submitted, TryAgain
from fwasync._wire.protobuf.fields import ProtobufError, as_bool, as_signed, as_text, fields
from fwasync.local.fault_desk import FaultDesk, kill
from fwasync.local.faults import Held, Lost, Who, route_of
from fwasync.local.refusal import Refused
from fwasync.local.results import failed
from fwasync.local.unpacking import unpacked
from fwasync.local.web import is_protobuf, json_response, refusal_response, wait_or_gone

__all__ = ("CuttableProtocol", "FaultLayer")

_PREFIX = "/api/v1/"
_MAKE_FUTURES = frozenset(routes_of(LoseFuture()))
_TRANSPORT = "fwasync.transport"
# On, with nothing to linger for: closing sends RST instead of FIN.
_LINGER_0 = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)


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

    @property
    def who(self) -> Who:
        request_id = None if self.request_id is None else str(self.request_id)
        return Who(self.model_id, self.seq_id, request_id)

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
class _Answer:
    start: Message
    body: bytes


class _Exchange:
    """One request, read whole, and the means to answer it well or badly."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, body: bytes) -> None:
        self.request = Request(scope, receive)
        identity = _identify(self.request, body)
        self.who, self.session_id = identity.who, identity.session
        # In protobuf, forward goes where forward_backward goes.
        self.route = "forward" if identity.forward_only else route_of(scope["path"].removeprefix(_PREFIX))
        self._scope, self._receive, self._send = scope, receive, send
        self._body = body

    async def ask(self, app: ASGIApp) -> _Answer | None:
        """What the service answers; `None` if the client has gone."""
        start: Message | None = None
        pieces: list[bytes] = []
        unread = [self._body]

        async def receive() -> Message:
            if unread:
                return {"type": "http.request", "body": unread.pop(), "more_body": False}
            return await self._receive()

        async def send(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                start = message
            else:
                pieces.append(message.get("body", b""))

        await app(self._scope, receive, send)
        return None if start is None else _Answer(start, b"".join(pieces))

    async def respond(self, response: Response) -> None:
        """Answer with something else."""
        await response(self._scope, self._receive, self._send)

    async def deliver(self, answer: _Answer, *, half: bool = False) -> None:
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


class FaultLayer:
    """ASGI middleware that lets faults happen.

    Args:
        app: What lies inside.
        desk: Where faults are decided.
    """

    def __init__(self, app: ASGIApp, desk: FaultDesk) -> None:
        self._app = app
        self._desk = desk

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or not scope["path"].startswith(_PREFIX):
            await self._app(scope, receive, send)
            return
        body = await _read(receive)
        if body is None:
            return
        exchange = _Exchange(scope, receive, send, body)
        action = self._desk.script.fire("request", exchange.route, exchange.who)
        if await self._before(exchange, action) or await self._instead(exchange):
            return
        answer = await exchange.ask(self._app)
        if answer is not None:
            request_id = _acknowledged(answer) if exchange.route in _MAKE_FUTURES else None
            self._desk.acknowledged(exchange.route, replace(exchange.who, request_id=request_id))
            await self._after(exchange, action, answer, request_id)

    async def _before(self, exchange: _Exchange, action: Action | None) -> bool:
        """Faults that come before the work; says whether that was all."""
        match action:
            case Drop(after=False) | Reset(after=False):
                await exchange.cut(reset=isinstance(action, Reset))
            case Status(after=False):
                await exchange.respond(_status(action, exchange.route))
            case Reject(counted=False, status=status, message=message):
                await exchange.respond(refusal_response(status, f"{exchange.route}: {message}"))
            case NotReady():
                await anyio.sleep(action.delay_s)
                waiting = _try_again(exchange, action.queue_state, action.reason)
                await exchange.respond(json_response(waiting, action.status))
            case Delay(after=False, seconds=seconds):
                await anyio.sleep(seconds)
                return False
            case EvictSession():
                if exchange.session_id is not None:
                    self._desk.evict(exchange.session_id, action)
                return False
            case _:
                return False
        return True

    async def _instead(self, exchange: _Exchange) -> bool:
        """What earlier faults have left: the session is gone, or the future is not what it was."""
        status = self._desk.status_of(exchange.session_id, exchange.route)
        if status is not None:
            gone = f"session {exchange.session_id} is not here: it was evicted by a scripted fault"
            await exchange.respond(refusal_response(status, gone))
            return True
        request_id = exchange.who.request_id
        if exchange.route != "retrieve_future" or request_id is None:
            return False
        fate = self._desk.futures.fate(request_id, now=time.monotonic())
        if isinstance(fate, Held):
            long_poll_s = self._desk.service.options.long_poll_s
            wait_s = long_poll_s if fate.seconds is None else min(fate.seconds, long_poll_s)
            await wait_or_gone(exchange.request, self._desk.released.wait, wait_s)
            fate = self._desk.futures.fate(request_id, now=time.monotonic())
        match fate:
            case Held():
                waiting = _try_again(exchange, "active", "withheld by a scripted fault")
                await exchange.respond(json_response(waiting, 408))
            case Lost():
                lost = f"{request_id!r} is not here: it was lost by a scripted fault"
                await exchange.respond(refusal_response(410, lost))
            case FailOperation(category=category, message=message):
                await exchange.respond(json_response(failed(message, category).body))
            case _:
                return False
        return True

    async def _after(self, exchange: _Exchange, action: Action | None, answer: _Answer, request_id: str | None) -> None:
        """Faults that come when the work is done; or else the answer."""
        match action:
            case Drop(after=True) | Reset(after=True):
                await exchange.cut(reset=isinstance(action, Reset))
            case Status(after=True):
                await exchange.respond(_status(action, exchange.route))
            case Truncate():
                await exchange.deliver(answer, half=True)
            case Delay(after=True, seconds=seconds):
                await anyio.sleep(seconds)
                await exchange.deliver(answer)
            case Kill():
                slot = None if request_id is None else self._desk.service.futures.get(request_id)
                if slot is not None:
                    await slot.wait()
                kill()
            case _:
                await exchange.deliver(answer)


async def _read(receive: Receive) -> bytes | None:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return bytes(body)


def _acknowledged(answer: _Answer) -> str | None:
    """The future that an answer acknowledges, if it is such an answer."""
    if answer.start["status"] != 200:
        return None
    try:
        return str(msgspec.json.decode(answer.body, type=Submitted).request_id)
    except msgspec.MsgspecError:
        return None


def _status(action: Status, route: str) -> Response:
    response = refusal_response(action.status, f"{route}: a scripted fault")
    if action.retry_after_s is not None:
        response.headers["retry-after"] = str(math.ceil(action.retry_after_s))
        response.headers["retry-after-ms"] = str(action.retry_after_s * 1000.0)
    return response


def _try_again(exchange: _Exchange, queue_state: str, reason: str | None) -> TryAgain:
    return TryAgain(request_id=exchange.who.request_id or "", queue_state=queue_state, queue_state_reason=reason)
