"""A file from a URL: redirects are followed, and what breaks off is tried again.

Invariants
    * A URL's query may hold a secret (signed URLs): it is in no error.
    * What is asked for over https is never asked for over http.
"""

from __future__ import annotations

import random
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import anyio
import httpx

from fwasync._http.client import Unanswered
from fwasync._http.faults import fault_text, refusal
from fwasync._http.retry import RETRYABLE_STATUSES, RetryPolicy, retry_after
from fwasync._http.transport import Transport, default_transport
from fwasync._version import __version__
from fwasync.errors import RetryBudgetExhaustedError, ServiceError, TransportError, UsageError

__all__ = ("download", "without_query")

_TIMEOUT_S = 30.0
_REDIRECTS = 5


def without_query(url: str) -> str:
    """A URL as it may be shown."""
    return url.partition("?")[0].partition("#")[0]


async def download(
    url: str,
    path: Path,
    *,
    timeout: float = _TIMEOUT_S,
    retry: RetryPolicy | None = None,
    transport: Transport | None = None,
) -> None:
    """Get what is at a URL into a file, whole.

    Args:
        url: http or https.
        path: The file; it is written over.
        timeout: Seconds until the answer begins, and again for each piece of it.
        retry: How long it is tried.
        transport: Another httpx transport.

    Raises:
        UsageError: It is not such a URL.
        ServiceError: A refusal.
        RetryBudgetExhaustedError: No whole answer within the retry budget.

    **Cancellation:** the connection is closed; what was written stays in the file.
    """
    shown, retry = without_query(url), retry or RetryPolicy()
    try:
        asked = httpx.URL(url)
        is_good = asked.scheme in ("http", "https") and bool(asked.host) and not asked.userinfo
    except (httpx.InvalidURL, UnicodeError):  # the latter of a host that is no name
        asked, is_good = httpx.URL(), False
    if not is_good:
        raise UsageError("a URL of data must look like https://host/path, without user name and password")

    async def check(request: httpx.Request) -> None:
        if asked.scheme == "https" and request.url.scheme != "https":
            raise TransportError(f"{shown} redirects from https to http, which is not followed")

    async with httpx.AsyncClient(
        transport=transport or default_transport(url),
        timeout=None,  # time-outs are cancel scopes
        headers={"User-Agent": f"fwasync/{__version__}"},
        follow_redirects=True,
        max_redirects=_REDIRECTS,
        event_hooks={"request": [check]},
    ) as client:
        started, attempt = anyio.current_time(), 0
        while True:
            attempt += 1
            wanted: float | None = None
            try:
                await _attempt(client, asked, path, timeout)
                return
            except httpx.HTTPStatusError as error:
                failure: Exception = _refused(error.response, shown)
                if error.response.status_code not in RETRYABLE_STATUSES:
                    raise failure from None
                wanted = retry_after(error.response.headers, now=time.time())
            except Unanswered as error:
                failure = RetryBudgetExhaustedError(f"{shown}: {error}")
            elapsed = anyio.current_time() - started
            delay = retry.delay(attempt, elapsed_s=elapsed, jitter=random.random(), retry_after_s=wanted)
            if delay is None:
                failure.add_note(f"given up after {attempt} attempts in {elapsed:.1f} s")
                raise failure
            await anyio.sleep(delay)


async def _attempt(client: httpx.AsyncClient, url: httpx.URL, path: Path, timeout: float) -> None:
    shown = without_query(str(url))
    with _answered_within(timeout, url):
        try:
            response = await client.send(client.build_request("GET", url), stream=True)
        except httpx.TooManyRedirects:
            raise TransportError(f"{shown} redirects more than {_REDIRECTS} times") from None
    try:
        if not response.is_success:
            with _answered_within(timeout, url):
                await response.aread()
            response.raise_for_status()
        pieces = response.aiter_bytes()
        async with await anyio.open_file(path, "wb") as file:
            while True:
                with _answered_within(timeout, url):
                    piece = await anext(pieces, None)
                if piece is None:
                    return
                await file.write(piece)
    finally:
        with anyio.CancelScope(shield=True):  # closing a socket takes no waiting, and must happen
            await response.aclose()


@contextmanager
def _answered_within(timeout: float, url: httpx.URL) -> Generator[None]:
    try:
        with anyio.fail_after(timeout):
            yield
    except TimeoutError:
        raise Unanswered(f"no answer within {timeout:g} s", connected=True) from None
    except (httpx.HTTPError, OSError) as error:
        text = str(error) or type(error).__name__
        query = url.query.decode()
        raise Unanswered(text.replace(query, "…") if query else text, connected=True) from None


def _refused(response: httpx.Response, shown: str) -> ServiceError:
    return refusal(response.status_code, fault_text(response.content, secret=""), what="the data", url=shown)
