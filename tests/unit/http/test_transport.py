"""The transport that ships: it survives cancellation under load, and minds proxies and certificates."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.lowlevel
import httpx
import pytest
from anyio.abc import ByteStream, SocketAttribute
from anyio.streams.buffered import BufferedByteReceiveStream
from anyio.streams.tls import TLSListener

from fwasync import errors
from fwasync._http.client import Http, Unanswered
from fwasync._http.transport import proxy_for

TLS = Path(__file__).parents[2] / "support" / "tls"
Answers = Callable[[bytes], bytes]


@asynccontextmanager
async def http_server(*, tls: bool = False, think_s: float = 0.0) -> AsyncIterator[tuple[int, list[bytes]]]:
    """A server that answers everything with `ok`; its port, and the request lines that it got."""
    lines: list[bytes] = []

    async def serve(stream: ByteStream) -> None:
        buffered = BufferedByteReceiveStream(stream)
        try:
            async with stream:
                while True:
                    head = await buffered.receive_until(b"\r\n\r\n", 65536)
                    lines.append(head.split(b"\r\n")[0])
                    await anyio.sleep(think_s)
                    await stream.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        except (anyio.EndOfStream, anyio.IncompleteRead, anyio.BrokenResourceError, ssl.SSLError):
            return

    plain = await anyio.create_tcp_listener(local_host="127.0.0.1")
    port = plain.extra(SocketAttribute.local_port)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(TLS / "cert.pem", TLS / "key.pem")
    listener = TLSListener(plain, context, standard_compatible=False) if tls else plain
    async with listener, anyio.create_task_group() as group:
        group.start_soon(listener.serve, serve)
        yield port, lines
        group.cancel_scope.cancel()


async def test_rounds_of_cancelled_requests_leave_it_alive() -> None:
    async with http_server(think_s=0.05) as (port, _), Http(f"http://127.0.0.1:{port}", "key") as http:
        for n in range(60):
            async with anyio.create_task_group() as group:
                for _ in range(30):
                    group.start_soon(http.attempt, "GET", "x")
                for _ in range(n):
                    await anyio.lowlevel.checkpoint()
                group.cancel_scope.cancel()
        for _ in range(20):
            assert (await http.attempt("GET", "x", timeout=5)).body == b"ok"


@pytest.fixture
def no_proxy_environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return monkeypatch


async def test_the_environments_proxy_is_used(no_proxy_environment: pytest.MonkeyPatch) -> None:
    async with http_server() as (port, lines):
        no_proxy_environment.setenv("HTTP_PROXY", f"http://127.0.0.1:{port}")
        async with Http("http://trainer.test", "key") as http:
            assert (await http.attempt("GET", "healthz")).body == b"ok"
    assert lines == [b"GET http://trainer.test/api/v1/healthz HTTP/1.1"]


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


async def test_certificates_are_checked_against_what_the_environment_trusts(monkeypatch: pytest.MonkeyPatch) -> None:
    async with http_server(tls=True) as (port, _):
        monkeypatch.delenv("SSL_CERT_FILE", raising=False)
        async with Http(f"https://127.0.0.1:{port}", "key") as http:
            with pytest.raises(Unanswered, match="certificate") as e:
                await http.attempt("GET", "x")
            assert isinstance(e.value, errors.TransportError)
        monkeypatch.setenv("SSL_CERT_FILE", str(TLS / "cert.pem"))
        async with Http(f"https://127.0.0.1:{port}", "key") as http:
            assert (await http.attempt("GET", "x")).body == b"ok"
