"""Scripted faults on the wire: a layer of ASGI around the endpoints.

Nothing of this is loaded unless the service is started with `--faults`.

Invariants
    * Which fault happens is decided in `faults`; here it is carried out.
    * A request that meets no fault is answered as it would be without this layer; a completion, as it comes.
    * The layer lies inside the gatekeeper: a request that is turned away there meets no fault and counts for none. It
      lies inside the gateway too: what comes through that is a request of the trainer API.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace

import anyio
import msgspec
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from fwasync._wire.faults import (
    Action,
    CutStream,
    Delay,
    Drop,
    EvictSession,
    FailOperation,
    Kill,
    LoseFuture,
    NotReady,
    Preempt,
    Reject,
    Reset,
    SlowStream,
    Status,
    Truncate,
    routes_of,
)
from fwasync._wire.messages import Submitted, TryAgain
from fwasync.local.control.names import ACCOUNT
from fwasync.local.fault_desk import FaultDesk, kill
from fwasync.local.fault_exchange import PREFIX, CompleteAnswer, Exchange
from fwasync.local.faults import Held, Lost
from fwasync.local.refusal import Refused
from fwasync.local.results import failed
from fwasync.local.web import json_response, refusal_response, wait_or_gone

__all__ = ("FaultLayer",)

_STRUCK = (PREFIX, "/v1/", "/hot_load/", "/inference/")
_GATEWAY = "/training/"
_MAKE_FUTURES = frozenset(routes_of(LoseFuture()))


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
        if scope["type"] != "http" or not scope["path"].startswith(_STRUCK):
            await self._app(scope, receive, send)
            return
        body = await _read(receive)
        if body is None:
            return
        exchange = Exchange(scope, receive, send, body)
        script = self._desk.script
        action = script.fire("request", exchange.route, exchange.who)
        if await self._before(exchange, action) or await self._instead(exchange):
            return
        if action is None and exchange.is_stream:
            action = script.fire("stream", exchange.route, exchange.who)
        if exchange.route == "completions" and isinstance(action, CutStream | SlowStream | None):
            await exchange.relay(self._app, action)
            return
        answer = await exchange.ask(self._app)
        if answer is not None:
            request_id = _acknowledged(answer) if exchange.route in _MAKE_FUTURES else None
            self._desk.acknowledged(exchange.route, replace(exchange.who, request_id=request_id))
            await self._after(exchange, action, answer, request_id)

    async def _before(self, exchange: Exchange, action: Action | None) -> bool:
        """Faults that come before the work; says whether that was all."""
        match action:
            case Drop(after=False) | Reset(after=False):
                await exchange.cut(reset=isinstance(action, Reset))
            case Status(after=False):
                await exchange.respond(_status(action, exchange))
            case Reject(counted=False, status=status, message=message):
                await exchange.respond(refusal_response(status, f"{exchange.route}: {message}"))
            case NotReady():
                await anyio.sleep(action.delay_s)
                waiting = _try_again(exchange, action.queue_state, action.reason)
                await exchange.respond(json_response(waiting, action.status))
            case Delay(after=False, seconds=seconds):
                await anyio.sleep(seconds)
                return False
            case Preempt() if exchange.resource is not None:
                return await self._preempt(exchange, exchange.resource, action)
            case EvictSession():
                if exchange.session_id is not None:
                    self._desk.evict(exchange.session_id, action)
                return False
            case _:
                return False
        return True

    async def _preempt(self, exchange: Exchange, job_id: str, action: Preempt) -> bool:
        jobs = self._desk.service.control.jobs
        jobs.preempt(job_id, action.state, action.message)
        if exchange.route == "get_trainer_job":
            return False
        try:
            jobs.admit(ACCOUNT, job_id)
        except Refused as error:
            await exchange.respond(refusal_response(error.refusal.status, error.refusal.detail, _GATEWAY))
            return True
        return False

    async def _instead(self, exchange: Exchange) -> bool:
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

    async def _after(
        self, exchange: Exchange, action: Action | None, answer: CompleteAnswer, request_id: str | None
    ) -> None:
        """Faults that come when the work is done; or else the answer."""
        match action:
            case Drop(after=True) | Reset(after=True):
                await exchange.cut(reset=isinstance(action, Reset))
            case Status(after=True):
                await exchange.respond(_status(action, exchange))
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


def _acknowledged(answer: CompleteAnswer) -> str | None:
    """The future that an answer acknowledges, if it is such an answer."""
    if answer.start["status"] != 200:
        return None
    try:
        return str(msgspec.json.decode(answer.body, type=Submitted).request_id)
    except msgspec.MsgspecError:
        return None


def _status(action: Status, exchange: Exchange) -> Response:
    path = exchange.request.url.path
    response = refusal_response(action.status, f"{exchange.route}: a scripted fault", path)
    if action.retry_after_s is not None:
        response.headers["retry-after"] = str(math.ceil(action.retry_after_s))
        response.headers["retry-after-ms"] = str(action.retry_after_s * 1000.0)
    return response


def _try_again(exchange: Exchange, queue_state: str, reason: str | None) -> TryAgain:
    return TryAgain(request_id=exchange.who.request_id or "", queue_state=queue_state, queue_state_reason=reason)
