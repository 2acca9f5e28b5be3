"""One service, one API key: requests with retries, and typed errors for all that can go wrong.

What carries them is chosen in `transport`. There is no limit on connections here; who sends many requests limits them
before they get here.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import anyio
import httpx

from fwasync._http.carrier import Body, Reply, Unanswered
from fwasync._http.faults import fault_text, refusal, request_id_of
from fwasync._http.retry import RETRYABLE_STATUSES, RetryPolicy, retry_after
from fwasync._http.transport import Transport, carrier_for
from fwasync._version import __version__
from fwasync.errors import RetryBudgetExhaustedError, ServiceUnreachableError, UsageError

__all__ = ("Answer", "Body", "Http", "Streamed", "Unanswered", "service_url")

logger = logging.getLogger("fwasync.http")

_ATTEMPT_TIMEOUT_S = 60.0
_JSON = "application/json"
_LAST_PORT = 65_535  # the system's look-up takes a larger number for another port
_SLOWEST_UPLOAD = 50_000  # bytes a second


@dataclass(frozen=True, slots=True)
class Answer:
    """Whatever the service answered, success or not. The headers have lower-case names."""

    status: int
    body: bytes
    headers: Mapping[str, str]

    @property
    def content_type(self) -> str:
        """What the body is; `""` if that is not told."""
        return self.headers.get("content-type", "")

    @property
    def retry_after_s(self) -> float | None:
        """How long the service wants us to wait, if it does."""
        return retry_after(self.headers, now=time.time())


class Streamed:
    """A successful answer whose body is read piece by piece, in a block that closes the request at its end.

    Attributes:
        headers: The headers, with lower-case names.
    """

    __slots__ = ("_clock", "_reply", "_timeout", "headers")

    def __init__(self, reply: Reply, timeout: float) -> None:
        self.headers = reply.headers
        self._reply = reply
        self._timeout = timeout
        self._clock = asyncio.get_running_loop().time

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._reply.aclose()

    async def piece(self) -> bytes | None:
        """What has come since the last time, as soon as it is anything; `None` at the end.

        Raises:
            Unanswered: The connection broke, or nothing came in time.

        **Cancellation:** the request is closed.
        """
        try:
            return await self._reply.piece(self._clock() + self._timeout)
        except TimeoutError:
            raise _late(self._timeout) from None


def service_url(base_url: str) -> str:
    """A base URL as we use it: checked, without the API's own path and without a trailing slash.

    Raises:
        UsageError: It is not an http(s) URL. The text does not show it: a key in its place, or in it, stays secret.
    """
    try:
        url = httpx.URL(base_url)
        is_good = url.scheme in ("http", "https") and bool(url.host) and (url.port or 0) <= _LAST_PORT
    except (httpx.InvalidURL, UnicodeError):  # the latter of a host that is no name
        url, is_good = httpx.URL(), False
    if not is_good:
        raise UsageError(
            "base_url must look like https://host or http://127.0.0.1:8000, and what was given does not; was api_key "
            "given in its place?"
        )
    if url.userinfo:
        raise UsageError("base_url must not carry a user name or password; pass api_key instead")
    if url.query or url.fragment:
        raise UsageError("base_url must end with its path, without a query (?...) or a fragment (#...)")
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
        self.retry = retry or RetryPolicy()
        self._secret = api_key
        headers = {
            "user-agent": f"fwasync/{__version__}",
            "x-api-key": api_key,
            "x-tinker-sampling-backpressure": "1",
        }
        if bearer:
            headers["authorization"] = f"Bearer {api_key}"
        self._carrier = carrier_for(self.base_url + prefix, headers, transport, self.safe)

    def __repr__(self) -> str:
        return f"<Http {self.base_url}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        with anyio.CancelScope(shield=True):  # closing sockets takes no waiting, and must happen
            await self._carrier.aclose()

    def safe(self, said: object) -> str:
        """What an error or the service says, without the key."""
        text = str(said) or type(said).__name__
        return text.replace(self._secret, "***") if self._secret else text

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
        allowed = timeout + sum(map(len, body)) / _SLOWEST_UPLOAD
        deadline = asyncio.get_running_loop().time() + allowed
        own = _headers(accept, content_type, headers)
        if idempotency_key is not None:
            own["x-idempotency-key"] = idempotency_key
        try:
            reply = await self._carrier.send(method, path, own, body, deadline)
            return Answer(reply.status, await reply.read(deadline), reply.headers)
        except TimeoutError:
            raise _late(allowed) from None

    async def stream(
        self, method: str, path: str, body: Body, *, accept: str, headers: Mapping[str, str], timeout: float
    ) -> Answer | Streamed:
        """Send a request once; its answer is to be read as it comes if it is a success, and is there else.

        `timeout` is for the headers, and again for each piece of the body; the rest is as for `attempt`. Of what is
        streamed, enter the block at once.
        """
        clock = asyncio.get_running_loop().time
        own = _headers(accept, _JSON, headers)
        try:
            reply = await self._carrier.send(method, path, own, body, clock() + timeout)
            if 200 <= reply.status < 300:
                return Streamed(reply, timeout)
            return Answer(reply.status, await reply.read(clock() + timeout), reply.headers)
        except TimeoutError:
            raise _late(timeout) from None

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
        key = f"fwasync-{secrets.token_hex(16)}"
        clock = asyncio.get_running_loop().time
        started = clock()
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
                elapsed_s=clock() - started,
                jitter=random.random(),
                retry_after_s=wanted,
            )
            if delay is None:
                raise self.given_up(failure, path, attempt, clock() - started, reached=reached)
            said = f"status {failure.status}" if isinstance(failure, Answer) else failure
            logger.info("%s: attempt %d failed (%s); again in %.1f s", path, attempt, said, delay)
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


def _headers(accept: str, content_type: str, more: Mapping[str, str] | None) -> dict[str, str]:
    headers = {"accept": accept, "content-type": content_type}
    if more:
        headers |= {name.lower(): value for name, value in more.items()}
    return headers


def _late(timeout: float) -> Unanswered:
    return Unanswered(f"no answer within {timeout:g} s", connected=True)
