"""Any httpx transport as what carries our requests: for who brings one, and for proxies."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Generator, Mapping
from contextlib import contextmanager

import aiohttp
import anyio
import httpx

from fwasync._http.carrier import WRITE_SIZE, Body, Unanswered, joined
from fwasync._http.heads import header_lines
from fwasync.errors import ClosedError

__all__ = ("HttpxCarrier",)


class HttpxCarrier:
    """A `carrier.Carrier` over an httpx transport.

    Args:
        root: What all URLs begin with, without a slash at its end.
        headers: Those of every request.
        transport: What sends them.
        safe: Makes the text of an error that may be shown.
    """

    def __init__(
        self,
        root: str,
        headers: Mapping[str, str],
        transport: httpx.AsyncBaseTransport,
        safe: Callable[[Exception], str],
    ) -> None:
        self._root = root
        self._safe = safe
        self._client = httpx.AsyncClient(
            transport=transport,
            timeout=None,  # time-outs are cancel scopes
            headers=headers,
        )

    async def send(self, method: str, path: str, headers: Mapping[str, str], body: Body, deadline: float) -> HttpxReply:
        """Send a request once, until the head of its answer has come; see `carrier.Carrier`."""
        if self._client.is_closed:
            raise ClosedError(f"the connections to {httpx.URL(self._root).host} are closed")
        header_lines(headers)
        size = sum(map(len, body))
        request = self._client.build_request(
            method,
            f"{self._root}/{path}",
            content=b"".join(body) if size <= WRITE_SIZE else _written(body),
            headers=dict(headers) | ({"content-length": str(size)} if body else {}),
        )
        with _answered_by(deadline, self._safe):
            return HttpxReply(await self._client.send(request, stream=True), self._safe)
        raise TimeoutError

    async def aclose(self) -> None:
        """Close all connections."""
        await self._client.aclose()


class HttpxReply:
    """A `carrier.Reply` of an httpx transport."""

    def __init__(self, response: httpx.Response, safe: Callable[[Exception], str]) -> None:
        self.status = response.status_code
        self.headers: Mapping[str, str] = dict(response.headers)
        self._response = response
        self._pieces = response.aiter_bytes()
        self._safe = safe

    async def read(self, deadline: float) -> bytes:
        """What is left of the body; see `carrier.Reply`."""
        return await joined(self, deadline)

    async def piece(self, deadline: float) -> bytes | None:
        """The next piece of the body, or `None` at its end; see `carrier.Reply`."""
        try:
            with _answered_by(deadline, self._safe):
                return await anext(self._pieces, None)
            raise TimeoutError
        except BaseException:
            await self.aclose()
            raise

    async def aclose(self) -> None:
        """Close the request."""
        with anyio.CancelScope(shield=True):  # closing a socket takes no waiting, and must happen
            await self._response.aclose()


@contextmanager
def _answered_by(deadline: float, safe: Callable[[Exception], str]) -> Generator[None]:
    """What httpx fails with becomes `Unanswered`; what is in the block is left at the deadline."""
    try:
        with anyio.CancelScope(deadline=deadline):
            yield
    except httpx.HTTPError as error:
        # The adapter of aiohttp reports a refused connection as a time-out; its cause tells.
        refused = isinstance(error, httpx.ConnectError) or isinstance(error.__cause__, aiohttp.ClientConnectorError)
        raise Unanswered(safe(error), connected=not refused) from error
    except OSError as error:  # what a socket says before aiohttp wraps it
        raise Unanswered(safe(error), connected=True) from error


async def _written(body: Body) -> AsyncIterator[bytes]:
    """The body in writes of moderate size."""
    pending = bytearray()
    for piece in body:
        pending += piece
        if len(pending) >= WRITE_SIZE:
            yield bytes(pending)
            pending.clear()
    if pending:
        yield bytes(pending)
