"""A server that speaks bytes: each test says what goes over a connection, right or wrong."""

from __future__ import annotations

import socket
import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
from anyio.abc import ByteStream, SocketAttribute
from anyio.streams.buffered import BufferedByteReceiveStream
from anyio.streams.tls import TLSListener

TLS = Path(__file__).parent / "tls"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Peer:
    """The server's end of one connection."""

    def __init__(self, stream: ByteStream, server: RawServer) -> None:
        self.stream = stream
        self._server = server
        self._buffered = BufferedByteReceiveStream(stream)

    async def head(self) -> bytes:
        head = await self._buffered.receive_until(b"\r\n\r\n", 1 << 20)
        self._server.heads.append(head)
        return head

    async def request(self) -> bytes:
        """The body of the next request."""
        fields = dict(line.lower().split(b": ", 1) for line in (await self.head()).split(b"\r\n")[1:])
        return await self._buffered.receive_exactly(int(fields.get(b"content-length", b"0")))

    async def receive(self, size: int) -> bytes:
        return await self._buffered.receive_exactly(size)

    async def send(self, data: bytes) -> None:
        await self.stream.send(data)

    async def until_gone(self) -> None:
        """Until the client has closed the connection."""
        while True:
            await self._buffered.receive()


class RawServer:
    """What a server has seen.

    Attributes:
        port: Where it listens, on 127.0.0.1.
        heads: The heads of all requests.
        accepted: How many connections there were.
        open: How many there are.
    """

    def __init__(self, port: int, scheme: str) -> None:
        self.port = port
        self.url = f"{scheme}://127.0.0.1:{port}"
        self.heads: list[bytes] = []
        self.accepted = self.open = 0

    async def all_gone(self) -> None:
        """Wait until no connection is open."""
        with anyio.fail_after(100):
            while self.open:
                await anyio.sleep(0.001)


async def answer_all(peer: Peer) -> None:
    """Answer every request with `ok`."""
    while True:
        await peer.request()
        await peer.send(OK)


def then_close(*answers: bytes) -> Callable[[Peer], Awaitable[None]]:
    """Answer one request with these bytes, in so many pieces, and close the connection."""

    async def handle(peer: Peer) -> None:
        await peer.request()
        for each in answers:
            await peer.send(each)
            await anyio.sleep(0.001)

    return handle


@asynccontextmanager
async def raw_server(
    handle: Callable[[Peer], Awaitable[None]] = answer_all, *, tls: bool = False, host: str = "127.0.0.1"
) -> AsyncIterator[RawServer]:
    """Run `handle` for each connection; the connection is closed when it returns."""
    plain = await anyio.create_tcp_listener(local_host=host, backlog=1024)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(TLS / "cert.pem", TLS / "key.pem")
    listener = TLSListener(plain, context, standard_compatible=False) if tls else plain
    server = RawServer(plain.extra(SocketAttribute.local_port), "https" if tls else "http")

    async def serve(stream: ByteStream) -> None:
        server.accepted += 1
        server.open += 1
        # An answer in pieces goes out piece by piece, whether or not the one before is acknowledged.
        stream.extra(SocketAttribute.raw_socket).setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            async with stream:
                await handle(Peer(stream, server))
        except (anyio.EndOfStream, anyio.IncompleteRead, anyio.BrokenResourceError, ssl.SSLError):
            pass
        finally:
            server.open -= 1

    async with listener, anyio.create_task_group() as group:
        group.start_soon(listener.serve, serve)
        yield server
        group.cancel_scope.cancel()


def open_sockets() -> int:
    """How many this process has, where the system tells."""
    if sys.platform != "linux":
        return 0
    count = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            count += str(entry.readlink()).startswith("socket:")
        except OSError:  # the one that lists them
            continue
    return count
