"""What every endpoint shares: the key, errors as JSON, bodies as messages, and waiting that leaves no trace.

Invariants
    * Every answer is JSON, but for large results that the client wants as protobuf; a refusal is
      `{"detail": text}`, and in the control plane `{"error": {"message": text}, ...}`.
    * Every answer carries the id of its request (`x-request-id`: the client's own, or a new one). A fault of ours tells
      no more than that; its traceback goes to the log, with the id.
"""

from __future__ import annotations

import hmac
import logging
import secrets
from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio
import anyio.to_thread
import msgspec
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fwasync._wire import messages as wire
from fwasync._wire.protobuf import CONTENT_TYPE as PROTOBUF
from fwasync.local.refusal import Refused
from fwasync.local.results import Result, json_of
from fwasync.local.unpacking import unpacked

__all__ = (
    "Gatekeeper",
    "is_protobuf",
    "json_response",
    "read_body",
    "read_message",
    "refusal_response",
    "result_response",
    "until_ready",
    "wait_or_gone",
)

_log = logging.getLogger(__name__)

T = TypeVar("T")

# Where clients read refusals in the way of the control plane.
_CONTROL = ("/v1/", "/training/", "/hot_load/", "/inference/")


def json_response(message: wire.Message | bytes, status: int = 200) -> Response:
    """An answer; `bytes` are JSON already."""
    body = message if isinstance(message, bytes) else wire.encode(message)
    return Response(body, status, media_type="application/json")


def refusal_response(status: int, detail: str, path: str = "") -> Response:
    """An answer that says no, in the words of what the path belongs to."""
    if path.startswith(_CONTROL):
        fault = wire.ServiceFault(error={"code": status, "message": detail}, message=detail)
    else:
        fault = wire.ServiceFault(detail=detail)
    response = json_response(fault, status)
    if status == 409:
        # Clients of this API repeat a 409 for minutes unless they are told not to.
        response.headers["x-should-retry"] = "false"
    return response


# Smaller results become JSON on the spot: a thread would take longer.
_SMALL = 4096


async def result_response(request: Request, result: Result) -> Response:
    """An answer with a result, in the encoding that the client asks for."""
    if result.form == "json":
        return json_response(result.body)
    if PROTOBUF in request.headers.get("accept", ""):
        return Response(result.body, media_type=PROTOBUF)
    if len(result.body) <= _SMALL:
        return json_response(json_of(result))
    return json_response(await anyio.to_thread.run_sync(json_of, result))


def is_protobuf(request: Request) -> bool:
    """Whether the request's body says that it is protobuf."""
    return PROTOBUF in request.headers.get("content-type", "")


async def read_body(request: Request, *, protobuf: bool = False) -> bytes:
    """The request's body, unpacked but undecoded.

    Args:
        request: The request.
        protobuf: Whether it may be protobuf as well as JSON.

    Raises:
        Refused: It is something else, or packed in a way that cannot be undone.
    """
    content_type = request.headers.get("content-type", "application/json")
    encoding = request.headers.get("content-encoding", "identity")
    if "json" not in content_type and not (protobuf and is_protobuf(request)):
        raise Refused(415, f"this service reads JSON{' or protobuf' if protobuf else ''} here, not {content_type}")
    if encoding not in ("identity", "zstd"):
        raise Refused(415, f"this service reads bodies that are plain or zstd, not {encoding}")
    body = await request.body()
    return await anyio.to_thread.run_sync(unpacked, body) if encoding == "zstd" else body


async def read_message(request: Request, type_: type[T]) -> T:
    """The request's body as a message.

    Raises:
        Refused: It is not such a message.
    """
    body = await read_body(request)
    try:
        return wire.decode(body or b"{}", type_)
    except msgspec.MsgspecError as error:
        raise Refused(422, f"{request.url.path.rpartition('/')[2]}: {error}") from None


async def wait_or_gone(request: Request, wait: Callable[[], Awaitable[None]], timeout_s: float) -> None:
    """Return when `wait` does, the time is up, or the client has gone. The body must have been read."""
    async with anyio.create_task_group() as tasks:

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            tasks.cancel_scope.cancel()

        tasks.start_soon(watch)
        with anyio.move_on_after(timeout_s):
            await wait()
        tasks.cancel_scope.cancel()


async def until_ready(request: Request, ready: anyio.CancelScope) -> None:
    """Return when `ready` is cancelled. It takes no other task, which would have to be ended when the client goes.

    The body must have been read.

    Raises:
        ClientDisconnect: The client has gone.
    """
    with ready:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        raise ClientDisconnect


class Gatekeeper:
    """ASGI middleware: asks for the API key, and turns what goes wrong inside into answers.

    Args:
        app: What lies inside.
        api_key: The key.
        open_paths: What may be asked without it.
    """

    def __init__(self, app: ASGIApp, api_key: str, open_paths: frozenset[str]) -> None:
        self._app = app
        self._api_key = api_key.encode()
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            return
        headers, started = Headers(scope=scope), False
        request_id = headers.get("x-request-id") or secrets.token_hex(8)

        async def answer(message: Message) -> None:
            nonlocal started
            started = True
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        if scope["path"] not in self._open_paths and not self._knows(headers):
            detail = "the API key is missing or wrong: send it as X-API-Key"
            await refusal_response(401, detail, scope["path"])(scope, receive, answer)
            return
        try:
            await self._app(scope, receive, answer)
        except ClientDisconnect:
            return
        except Exception:
            _log.exception("%s %s failed (%s)", scope["method"], scope["path"], request_id)
            if not started:
                detail = f"internal error {request_id} of the service; its log tells more"
                await refusal_response(500, detail, scope["path"])(scope, receive, answer)

    def _knows(self, headers: Headers) -> bool:
        given = headers.get("x-api-key")
        if given is None:
            scheme, _, value = headers.get("authorization", "").partition(" ")
            given = value if scheme.lower() == "bearer" else ""
        return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), self._api_key)
