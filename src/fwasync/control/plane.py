"""The requests of one account: paths, pages, creations that may be repeated, and errors that say what to do.

Invariants
    * The account behind the key is looked up once, however many ask at a time.
    * A creation that was repeated because its answer was lost is told from one that met a resource of before.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Protocol, TypeVar
from urllib.parse import urlencode

import anyio

from fwasync._http.client import Answer, Http, Unanswered
from fwasync._http.reading import read
from fwasync._http.retry import RETRYABLE_STATUSES
from fwasync._wire.control import AccountList, encode
from fwasync._wire.messages import Message
from fwasync.control.names import last_part
from fwasync.control.requests import Query
from fwasync.errors import (
    AuthenticationError,
    ClosedError,
    ProtocolError,
    RetryBudgetExhaustedError,
    ServiceError,
    ServiceUnreachableError,
    UsageError,
)

__all__ = ("Page", "Plane", "with_query")

T = TypeVar("T")
R = TypeVar("R")

_LARGEST_PAGE = 200
_HINTS = {
    400: "check the configuration",
    404: "check the id, and that the API key is one of its account",
    409: "it exists already, or is just changing: try later, or choose another id",
    412: "the account may not use it: is the shape or feature enabled for it?",
}


class Page(Protocol):
    """One page of a list."""

    @property
    def next_page_token(self) -> str | None:
        """What to ask for the next with; empty on the last."""
        ...


PageT = TypeVar("PageT", bound=Page)


def with_query(path: str, query: Query) -> str:
    """A path with its parameters."""
    return f"{path}?{urlencode(query)}" if query else path


class Plane:
    """The control plane behind one key.

    Args:
        http: A connection to the origin, without a prefix.
    """

    def __init__(self, http: Http) -> None:
        self.http = http
        self.is_open = False
        self.known_account: str | None = None
        self._asking = anyio.Lock()

    async def account(self) -> str:
        """The id of the account that the key belongs to.

        Raises:
            AuthenticationError: It belongs to none, or to several.
        """
        async with self._asking:
            if self.known_account is None:
                what = "finding the account of the API key"
                body = await self.call(what, "GET", "v1/accounts", [("pageSize", "2")])
                ids = [last_part(row.name) for row in read(what, body, AccountList).accounts or []]
                if len(ids) != 1 or not ids[0]:
                    found = f"several ({', '.join(ids)})" if len(ids) > 1 else "none"
                    raise AuthenticationError(
                        f"{what}: it must belong to one account, and belongs to {found}; use a key of one account"
                    )
                self.known_account = ids[0]
        return self.known_account

    async def collection(self, kind: str) -> str:
        """The path of all resources of a kind, such as `v1/accounts/acme/deployments`."""
        return f"v1/accounts/{await self.account()}/{kind}"

    async def call(
        self,
        what: str,
        method: str,
        path: str,
        query: Query | None = None,
        body: Message | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        timeout: float = 60.0,
        on_failure: Callable[[int | None, int], None] | None = None,
    ) -> bytes:
        """A request that is repeated until it is answered for good.

        Args:
            what: What it does, for errors.
            method: HTTP method.
            path: From the origin, without a leading slash.
            query: Parameters.
            body: What is sent.
            headers: More of them, for what is routed by headers.
            timeout: Seconds of each attempt.
            on_failure: As for `Http.call`.

        Raises:
            ServiceError, TransportError: As `Http.call`, with what was done and what to do.
        """
        self.check_open()
        try:
            pieces = [encode(body)] if body is not None else ()
            return await self.http.call(
                method, with_query(path, query or []), pieces, headers=headers, timeout=timeout, on_failure=on_failure
            )
        except ServiceError as error:
            raise _told(what, error) from None

    async def get(self, what: str, path: str, type_: type[T], query: Query | None = None) -> T:
        """Get and read one message."""
        return read(what, await self.call(what, "GET", path, query, timeout=30.0), type_)

    async def create(self, what: str, path: str, query: Query, body: Message) -> tuple[bytes | None, bool]:
        """Create a resource under an id of ours; repeated until it is known to exist.

        Returns:
            The answer, `None` if it only said that the id is taken; and whether it was this call that created it. An id
            that is taken is ours if an earlier attempt may have arrived.

        Raises:
            ServiceError, TransportError: As for `call`.
        """
        self.check_open()
        key, data = f"fwasync-{uuid.uuid4()}", [encode(body)]
        started, attempt, arrived = anyio.current_time(), 0, False
        while True:
            attempt += 1
            wanted = None
            failure: Answer | Unanswered
            try:
                failure = await self.http.attempt("POST", with_query(path, query), data, idempotency_key=key)
            except Unanswered as error:
                failure = error
                arrived = arrived or error.connected
            else:
                if 200 <= failure.status < 300:
                    return failure.body, True
                if failure.status == 409:
                    return None, arrived
                if failure.status not in RETRYABLE_STATUSES:
                    raise self._refused(what, failure)
                arrived = arrived or failure.status == 408 or failure.status >= 500
                wanted = failure.retry_after_s
            elapsed = anyio.current_time() - started
            delay = self.http.retry.delay(attempt, elapsed_s=elapsed, jitter=random.random(), retry_after_s=wanted)
            if delay is None:
                if isinstance(failure, Answer):
                    raise self._refused(what, failure)
                kind = RetryBudgetExhaustedError if arrived else ServiceUnreachableError
                raise kind(
                    f"{what}: no answer from {self.http.base_url} ({failure}; after {attempt} attempts in "
                    f"{elapsed:.0f} s). Whether it was created is {'unknown' if arrived else 'known: it was not'}."
                )
            await anyio.sleep(delay)

    async def pages(
        self,
        what: str,
        path: str,
        type_: type[PageT],
        rows: Callable[[PageT], Sequence[R] | None],
        *,
        page_size: int,
        query: Query | None = None,
    ) -> AsyncGenerator[R]:
        """All rows of a list, page by page as they are wanted.

        Raises:
            UsageError: The size of a page is out of range.
            ProtocolError: The service leads in a circle.
        """
        if not 1 <= page_size <= _LARGEST_PAGE:
            raise UsageError(f"page_size is {page_size}; it must be from 1 to {_LARGEST_PAGE}")
        token, before = "", set[str]()
        while True:
            asked = [("pageSize", str(page_size)), *([("pageToken", token)] if token else []), *(query or [])]
            page = await self.get(what, path, type_, asked)
            for row in rows(page) or ():
                yield row
            token = page.next_page_token or ""
            if not token:
                return
            if token in before:
                raise ProtocolError(f"{what}: the service gave the page token {token!r} twice")
            before.add(token)

    def check_open(self) -> None:
        """Raise `ClosedError` outside of the client's block."""
        if not self.is_open:
            raise ClosedError("the client is not open: use it as `async with AsyncFireworksClient(...) as fireworks:`")

    def _refused(self, what: str, answer: Answer) -> Exception:
        error = self.http.refusal(answer, "the request")
        return _told(what, error) if isinstance(error, ServiceError) else error


def _told(what: str, error: ServiceError) -> ServiceError:
    hint = _HINTS.get(error.status)
    text = f"{what}: {error}{f'; {hint}' if hint else ''}"
    told = type(error)(text, status=error.status, request_id=error.request_id)
    for note in getattr(error, "__notes__", ()):
        told.add_note(note)
    return told
