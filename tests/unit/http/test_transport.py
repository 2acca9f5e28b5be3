"""The transports that ship: they survive cancellation under load, and mind proxies and certificates."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import httpx
import pytest

from fwasync._http.client import Http, Unanswered
from fwasync._http.foreign import HttpxCarrier
from fwasync._http.pool import Pool
from fwasync._http.transport import default_transport, proxy_for
from fwasync.errors import ClosedError, UsageError
from support.raw_server import OK, TLS, Peer, open_sockets, raw_server


async def test_our_own_is_used_unless_there_is_another_or_a_proxy(no_proxy_environment: pytest.MonkeyPatch) -> None:
    def carrier(**options: Any) -> object:
        return Http("http://trainer.test", "key", **options)._carrier

    assert isinstance(carrier(), Pool)
    assert isinstance(carrier(transport=httpx.MockTransport(lambda _: httpx.Response(200))), HttpxCarrier)
    no_proxy_environment.setenv("HTTP_PROXY", "http://proxy.test")
    assert isinstance(carrier(), HttpxCarrier)


@pytest.mark.parametrize("transport", ["own", "own tls", "aiohttp", "aiohttp tls"])
async def test_rounds_of_cancelled_requests_leave_it_alive(transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(TLS / "cert.pem"))
    gc.collect()
    before = open_sockets()

    async def thoughtful(peer: Peer) -> None:
        while True:
            await peer.request()
            await anyio.sleep(0.05)
            await peer.send(OK)

    async with raw_server(thoughtful, tls=transport.endswith("tls")) as server:
        other = default_transport(server.url) if transport.startswith("aiohttp") else None
        async with Http(server.url, "key", transport=other) as http:
            for n in range(60):
                async with anyio.create_task_group() as group:
                    for _ in range(30):
                        group.start_soon(http.attempt, "GET", "x")
                    for _ in range(n):
                        await anyio.lowlevel.checkpoint()
                    group.cancel_scope.cancel()
            for _ in range(20):
                assert (await http.attempt("GET", "x", timeout=100)).body == b"ok"
            assert server.open <= 30
        await server.all_gone()
    assert open_sockets() == before


@pytest.fixture
def no_proxy_environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return monkeypatch


async def test_the_environments_proxy_is_used(no_proxy_environment: pytest.MonkeyPatch) -> None:
    async with raw_server() as server:
        no_proxy_environment.setenv("HTTP_PROXY", server.url)
        async with Http("http://trainer.test", "key") as http:
            assert (await http.attempt("GET", "healthz")).body == b"ok"
    [head] = server.heads
    assert head.startswith(b"GET http://trainer.test/api/v1/healthz HTTP/1.1\r\n")


@pytest.mark.parametrize(
    ("environment", "url", "proxy"),
    [
        ({}, "https://trainer.test", None),
        ({"HTTPS_PROXY": "http://p:1"}, "https://trainer.test", "http://p:1"),
        ({"HTTPS_PROXY": "http://p:1"}, "http://trainer.test", None),
        ({"ALL_PROXY": "p:1"}, "http://trainer.test", "http://p:1"),
        ({"HTTPS_PROXY": "http://p:1", "NO_PROXY": "trainer.test"}, "https://trainer.test", None),
        ({"HTTP_PROXY": "http://p:1"}, "http://127.0.0.1:8000", None),
        ({"HTTP_PROXY": "http://p:1"}, "http://localhost:8000", None),
        ({"HTTP_PROXY": "http://p:1"}, "http://[::1]:8000", None),
    ],
)
def test_which_proxy(
    no_proxy_environment: pytest.MonkeyPatch, environment: dict[str, str], url: str, proxy: str | None
) -> None:
    for name, value in environment.items():
        no_proxy_environment.setenv(name, value)
    assert proxy_for(httpx.URL(url)) == proxy


@pytest.mark.parametrize("proxy", ["socks5://user:secret@p:1", "ftp://p:1"])
def test_a_proxy_that_is_not_spoken_to(no_proxy_environment: pytest.MonkeyPatch, proxy: str) -> None:
    no_proxy_environment.setenv("ALL_PROXY", proxy)
    with pytest.raises(UsageError, match="NO_PROXY") as e:
        Http("http://trainer.test", "key")
    assert "secret" not in str(e.value)
    Http("http://trainer.test", "key", transport=httpx.MockTransport(lambda _: httpx.Response(200)))


@pytest.mark.parametrize("transport", [None, httpx.MockTransport(lambda _: httpx.Response(200))])
async def test_nothing_is_sent_by_what_is_closed(transport: httpx.AsyncBaseTransport | None) -> None:
    async with Http("http://127.0.0.1:1", "key", transport=transport) as http:
        pass
    with pytest.raises(ClosedError, match=r"127\.0\.0\.1 are closed"):
        await http.attempt("GET", "x")


async def test_certificates_are_checked_against_what_the_environment_trusts(monkeypatch: pytest.MonkeyPatch) -> None:
    async with raw_server(tls=True) as server:
        monkeypatch.delenv("SSL_CERT_FILE", raising=False)
        async with Http(server.url, "key") as http:
            with pytest.raises(Unanswered, match="certificate") as e:
                await http.attempt("GET", "x")
            assert not e.value.connected
        monkeypatch.setenv("SSL_CERT_FILE", str(TLS / "cert.pem"))
        async with Http(server.url, "key") as http:
            assert (await http.attempt("GET", "x")).body == b"ok"


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_certificates_that_cannot_be_read(
    no_proxy_environment: pytest.MonkeyPatch, tmp_path: Path, content: str | None
) -> None:
    path = tmp_path / "certificates.pem"
    if content is not None:
        path.write_text(content)
    no_proxy_environment.setenv("SSL_CERT_FILE", str(path))
    with pytest.raises(UsageError, match=r"SSL_CERT_FILE is .*certificates\.pem"):
        Http("https://trainer.test", "key")
    with pytest.raises(UsageError, match="SSL_CERT_FILE"):
        default_transport("https://trainer.test")
