"""One service, one API key: requests with retries, and typed errors for all that can go wrong.

The transport under the httpx API is aiohttp's: httpx's own connection pool stays dead after requests that
were cancelled while they waited for a connection, and cancellation is what this library promises. There is no
limit on connections here; who sends many requests limits them before they get here.
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import aiohttp
import anyio
import httpx

from fwasync._http.faults import fault_text, refusal, request_id_of
from fwasync._http.retry import RETRYABLE_STATUSES, RetryPolicy, retry_after
from fwasync._http.transport import Transport, default_transport
from fwasync._version import __version__
from fwasync.errors import RetryBudgetExhaustedError, ServiceUnreachableError, TransportError, UsageError

__all__ = ("Answer", "Body", "Http", "Streamed", "Unanswered", "service_url")

Body = Sequence[bytes]
"""A request's body in pieces. It is kept whole until the request is answered, so that it can be sent
again."""

_WRITE_SIZE = 256 * 1024
_ATTEMPT_TIMEOUT_S = 60.0
_JSON = "application/json"
_SLOWEST_UPLOAD = 50_000  # bytes a second


@dataclass(frozen=True, slots=True)
class Answer:
    """Whatever the service answered, success or not."""

    status: int
    body: bytes
    content_type: str
    retry_after_s: float | None
    headers: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True)
class Streamed:
    """A successful answer whose body is read piece by piece.

    `pieces` raises `Unanswered` if the connection breaks, or a piece does not come in time.
    """

    headers: Mapping[str, str]
    pieces: AsyncIterator[bytes]


class Unanswered(TransportError):
    """One attempt got no answer. `connected` is false if it cannot have reached the service."""

    def __init__(self, message: str, *, connected: bool) -> None:
        super().__init__(message)
        self.connected = connected


def service_url(base_url: str) -> str:
    """A base URL as we use it: checked, without the API's own path and without a trailing slash.

    Raises:
        UsageError: It is not an http(s) URL. The text does not show it: a key in its place, or in it, stays secret.
    """
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL as error:
        raise UsageError(f"base_url is not a URL: {error}") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise UsageError(
            "base_url must look like https://host or http://127.0.0.1:8000, and what was given does not; was api_key "
            "given in its place?"
        )
    if url.userinfo:
        raise UsageError("base_url must not carry a user name or password; pass api_key instead")
    return base_url.rstrip("/").removesuffix("/api/v1").rstrip("/")


class Http:
    """A connection pool to one trainer service.

    Args:
        base_url: The service's URL, without `/api/v1`.
        api_key: Sent as `X-API-Key`; never shown.
        retry: How long requests that get no answer, or none that is final, are repeated.
        transport: Another httpx transport.
        prefix: What stands between the URL and each path; `""` reaches all of an origin.
        bearer: Send the key as `Authorization: Bearer` too.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str,
        *,
        retry: RetryPolicy | None = None,
        transport: Transport | None = None,
        prefix: str = "/api/v1",
        bearer: bool = False,
    ) -> None:
        self.base_url = service_url(base_url)
        self._root = self.base_url + prefix
        self.retry = retry or RetryPolicy()
        self._secret = api_key
        self._client = httpx.AsyncClient(
            transport=transport or default_transport(self.base_url),
            timeout=None,  # time-outs are cancel scopes, see `attempt`
            headers={
                "User-Agent": f"fwasync/{__version__}",
                "X-API-Key": api_key,
                "X-Tinker-Sampling-Backpressure": "1",
            }
            | ({"Authorization": f"Bearer {api_key}"} if bearer else {}),
        )

    def __repr__(self) -> str:
        return f"<Http {self.base_url}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        with anyio.CancelScope(shield=True):  # closing sockets takes no waiting, and must happen
            await self._client.aclose()

    def error_text(self, answer: Answer) -> str:
        """What the body of a refusal says, safe to show."""
        return fault_text(answer.body, secret=self._secret)

    async def attempt(
        self,
        method: str,
        path: str,
        body: Body = (),
        *,
        content_type: str = _JSON,
        accept: str = _JSON,
        idempotency_key: str | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = _ATTEMPT_TIMEOUT_S,
    ) -> Answer:
        """Send a request once.

        Args:
            method: HTTP method.
            path: Below the prefix, without a leading slash.
            body: Pieces of the body.
            content_type: What the body is.
            accept: What the answer may be.
            idempotency_key: The same for all attempts at one thing.
            headers: More of them, for services that route by headers.
            timeout: Seconds from the start to the last byte of the answer; a large body has more, as a slow line
                needs it.

        Returns:
            The answer, whatever its status.

        Raises:
            Unanswered: There was none.

        **Cancellation:** the connection is closed; whether the service acted is unknown.
        """
        request = self._request(method, path, body, {"Accept": accept, "Content-Type": content_type}, headers)
        if idempotency_key is not None:
            request.headers["X-Idempotency-Key"] = idempotency_key
        with self._answered_within(timeout + sum(map(len, body)) / _SLOWEST_UPLOAD):
            response = await self._client.send(request)
        return _answer(response, response.content)

    @asynccontextmanager
    async def stream(
        self, method: str, path: str, body: Body, *, accept: str, headers: Mapping[str, str], timeout: float
    ) -> AsyncGenerator[Answer | Streamed]:
        """Send a request once, and read the answer as it comes: `Streamed` if it is a success, else whole.

        `timeout` is for the headers, and again for each piece of the body; the rest is as for `attempt`. When the block
        is left, the request is closed, whether its answer was read or not.
        """
        request = self._request(method, path, body, {"Accept": accept, "Content-Type": _JSON}, headers)
        with self._answered_within(timeout):
            response = await self._client.send(request, stream=True)
        try:
            if response.is_success:
                yield Streamed(response.headers, self._pieces(response, timeout))
            else:
                with self._answered_within(timeout):
                    content = await response.aread()
                yield _answer(response, content)
        finally:
            with anyio.CancelScope(shield=True):  # closing a socket takes no waiting, and must happen
                await response.aclose()

    async def _pieces(self, response: httpx.Response, timeout: float) -> AsyncGenerator[bytes]:
        pieces = response.aiter_bytes()
        while True:
            try:
                with self._answered_within(timeout):
                    piece = await anext(pieces)
            except StopAsyncIteration:
                return
            yield piece

    def _request(
        self, method: str, path: str, body: Body, first: dict[str, str], more: Mapping[str, str] | None
    ) -> httpx.Request:
        size = sum(map(len, body))
        return self._client.build_request(
            method,
            f"{self._root}/{path}",
            content=b"".join(body) if size <= _WRITE_SIZE else _written(body),
            headers=first | ({"Content-Length": str(size)} if body else {}) | dict(more or {}),
        )

    @contextmanager
    def _answered_within(self, timeout: float) -> Generator[None]:
        try:
            with anyio.fail_after(timeout):
                yield
        except TimeoutError:
            raise Unanswered(f"no answer within {timeout:g} s", connected=True) from None
        except httpx.HTTPError as error:
            # The adapter reports a refused connection as a time-out; its cause tells.
            refused = isinstance(error, httpx.ConnectError) or isinstance(error.__cause__, aiohttp.ClientConnectorError)
            raise Unanswered(self._safe(error), connected=not refused) from error
        except OSError as error:  # what a socket says before aiohttp wraps it
            raise Unanswered(self._safe(error), connected=True) from error

    async def call(
        self,
        method: str,
        path: str,
        body: Body = (),
        *,
        content_type: str = _JSON,
        retry: RetryPolicy | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = _ATTEMPT_TIMEOUT_S,
        on_failure: Callable[[int | None, int], None] | None = None,
    ) -> bytes:
        """Send a request until it is answered for good: the body of a success, or an error.

        All attempts carry one idempotency key. `retry` is that of the object unless it is given. `on_failure` is told
        the status (`None` for no answer) of each attempt that is to be repeated, and how many there were before.

        Raises:
            ServiceError: A refusal; its class tells which.
            ServiceUnreachableError: Nothing ever accepted a connection within the retry budget.
            RetryBudgetExhaustedError: No final answer within the retry budget; whether the request had an
                effect is unknown.

        **Cancellation:** as for `attempt`.
        """
        retry = retry or self.retry
        key = f"fwasync-{uuid.uuid4()}"
        started = anyio.current_time()
        attempt = 0
        reached = False
        while True:
            attempt += 1
            failure: Answer | Unanswered
            try:
                failure = await self.attempt(
                    method,
                    path,
                    body,
                    content_type=content_type,
                    idempotency_key=key,
                    headers=headers,
                    timeout=timeout,
                )
            except Unanswered as error:
                failure, wanted = error, None
                reached = reached or error.connected
            else:
                if 200 <= failure.status < 300:
                    return failure.body
                if failure.status not in RETRYABLE_STATUSES:
                    raise self.refusal(failure, path)
                reached, wanted = True, failure.retry_after_s
            if on_failure is not None:
                on_failure(failure.status if isinstance(failure, Answer) else None, attempt - 1)
            delay = retry.delay(
                attempt,
                elapsed_s=anyio.current_time() - started,
                jitter=random.random(),
                retry_after_s=wanted,
            )
            if delay is None:
                raise self.given_up(failure, path, attempt, anyio.current_time() - started, reached=reached)
            await anyio.sleep(delay)

    def refusal(self, answer: Answer, path: str) -> Exception:
        """The typed error for an answer that is not a success."""
        request_id = request_id_of(answer.headers)
        return refusal(answer.status, self.error_text(answer), what=path, url=self.base_url, request_id=request_id)

    def given_up(
        self, failure: Answer | Unanswered, path: str, attempts: int, elapsed_s: float, *, reached: bool
    ) -> Exception:
        """The typed error for a request that was tried in vain; `reached` if any attempt got to the service."""
        tried = f"after {attempts} attempts in {elapsed_s:.1f} s"
        if isinstance(failure, Answer):
            error = self.refusal(failure, path)
            error.add_note(f"given up {tried}")
            return error
        if not reached:
            return ServiceUnreachableError(
                f"{path}: nothing answers at {self.base_url} ({failure}; {tried}). "
                "Check base_url, and that the service is running."
            )
        return RetryBudgetExhaustedError(f"{path}: no answer from {self.base_url} ({failure}; {tried})")

    def _safe(self, error: Exception) -> str:
        text = str(error) or type(error).__name__
        return text.replace(self._secret, "***") if self._secret else text


def _answer(response: httpx.Response, content: bytes) -> Answer:
    return Answer(
        response.status_code,
        content,
        response.headers.get("content-type", ""),
        retry_after(response.headers, now=time.time()),
        response.headers,
    )


async def _written(body: Body) -> AsyncIterator[bytes]:
    """The body in writes of moderate size: one huge write would copy it all at once, on the loop."""
    pending = bytearray()
    for piece in body:
        pending += piece
        if len(pending) >= _WRITE_SIZE:
            yield bytes(pending)
            pending.clear()
    if pending:
        yield bytes(pending)
