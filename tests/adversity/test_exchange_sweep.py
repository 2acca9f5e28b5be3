"""One exchange over a real socket, cancelled at every step of the loop, on every transport that ships.

After each hit no half-used connection is used again, no socket is left on either side, and the same client goes on.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import anyio
import pytest

from adversity.test_interruption_sweep import steps, sweep
from fwasync._http.client import Http, Streamed, Unanswered
from fwasync._http.pool import Pool
from fwasync._http.transport import default_transport
from fwasync.errors import ClosedError
from support.raw_server import TLS, Peer, RawServer, open_sockets, raw_server

Exchange = Callable[[Http], Awaitable[object]]


async def numbered(peer: Peer) -> None:
    """Answer with the request's own body and its size, in three pieces: what is mixed up is noticed."""
    while True:
        body = await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        await peer.send(b"%x\r\n%s\r\n" % (len(body[:100]), body[:100]))
        size = b"%d" % len(body)
        await peer.send(b"%x\r\n%s\r\n0\r\n\r\n" % (len(size), size))


async def asked(http: Http, word: bytes) -> None:
    answer = await http.attempt("POST", "x", [word], timeout=100)
    assert answer.body == word + b"%d" % len(word)


async def small(http: Http) -> None:
    await asked(http, b"small")


async def large(http: Http) -> None:
    answer = await http.attempt("POST", "x", [b"large" * 20, bytes(300_000), bytes(300_000)], timeout=100)
    assert answer.body.endswith(b"%d" % 600_100)


async def streamed(http: Http) -> None:
    answer = await http.stream("POST", "x", [b"stream"], accept="*/*", headers={}, timeout=100)
    assert isinstance(answer, Streamed)
    async with answer:
        pieces: list[bytes] = []
        while (piece := await answer.piece()) is not None:
            pieces.append(piece)
    assert b"".join(pieces) == b"stream6"


EXCHANGES: dict[str, Exchange] = {"small": small, "large": large, "streamed": streamed}
TRANSPORTS = ["own", "own tls", "aiohttp"]


@pytest.fixture(autouse=True)
def _no_garbage_of_others() -> None:
    gc.collect()


@asynccontextmanager
async def connected(transport: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Http, RawServer]]:
    monkeypatch.setenv("SSL_CERT_FILE", str(TLS / "cert.pem"))
    sockets = open_sockets()
    async with raw_server(numbered, tls=transport == "own tls") as server:
        async with Http(
            server.url, "key", transport=default_transport(server.url) if transport == "aiohttp" else None
        ) as http:
            yield http, server
        await server.all_gone()
    assert open_sockets() == sockets


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize("native", [True, False])
async def test_cancelled_at_every_step(
    transport: str, exchange: str, warm: bool, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connected(transport, monkeypatch) as (http, _):

        async def hit(n: int) -> bool:
            if warm:
                await asked(http, b"before")
            scope = anyio.CancelScope()

            async def run() -> None:
                with scope:
                    await EXCHANGES[exchange](http)

            task = asyncio.ensure_future(run())
            await steps(n)
            struck = not task.done()
            if native:
                task.cancel()
            else:
                scope.cancel()
            with suppress(asyncio.CancelledError):
                await task
            assert not (struck and native) or task.cancelled(), "the cancellation is lost"
            if isinstance(http._carrier, Pool):
                assert all(each._incoming is None for each in http._carrier._open), "the request goes on"
            async with anyio.create_task_group() as group:
                for n in range(3):
                    group.start_soon(asked, http, b"after%d" % n)
            return struck

        assert await sweep(hit) >= 3


@pytest.mark.parametrize("transport", ["own", "own tls"])
@pytest.mark.parametrize("exchange", EXCHANGES)
async def test_the_client_is_closed_at_every_step(
    transport: str, exchange: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hit(n: int) -> bool:
        async with connected(transport, monkeypatch) as (http, _):

            async def run() -> None:
                with suppress(Unanswered, ClosedError):
                    await EXCHANGES[exchange](http)

            task = asyncio.ensure_future(run())
            await steps(n)
            struck = not task.done()
        await task
        return struck

    assert await sweep(hit) >= 3
