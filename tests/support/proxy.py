"""A proxy that loses things: it forwards HTTP requests to a service and, by a test's rule, drops the answer.

The service has then done its work, and the client cannot know.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import anyio
from anyio.abc import ByteStream, SocketAttribute, SocketStream
from anyio.streams.buffered import BufferedByteReceiveStream

Rule = Callable[[str, int], bool]


async def _message(stream: BufferedByteReceiveStream) -> tuple[bytes, bytes]:
    """Head and body of the next request or response (all have a Content-Length here)."""
    head = await stream.receive_until(b"\r\n\r\n", 65536)
    fields = dict(line.lower().split(b":", 1) for line in head.split(b"\r\n")[1:])
    return head + b"\r\n\r\n", await stream.receive_exactly(int(fields.get(b"content-length", b"0")))


class LossyProxy:
    def __init__(self, target: str, loses: Rule) -> None:
        self._host, self._port = urlsplit(target).hostname or "", urlsplit(target).port or 0
        self._loses = loses
        self.base_url = ""
        self.seen: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()

    async def _serve(self, client: ByteStream) -> None:
        requests = BufferedByteReceiveStream(client)
        try:
            async with client:
                while True:
                    head, body = await _message(requests)
                    path = head.split(b" ", 2)[1].decode().rpartition("/")[2]
                    upstream: SocketStream = await anyio.connect_tcp(self._host, self._port)
                    async with upstream:
                        await upstream.send(head + body)
                        answer = await _message(BufferedByteReceiveStream(upstream))
                    self.seen[path] += 1
                    if self._loses(path, self.seen[path]):
                        self.lost[path] += 1
                        return
                    await client.send(b"".join(answer))
        except (anyio.EndOfStream, anyio.IncompleteRead, anyio.BrokenResourceError, anyio.ClosedResourceError):
            return


@asynccontextmanager
async def lossy_proxy(target: str, loses: Rule) -> AsyncIterator[LossyProxy]:
    """A proxy to `target`. `loses(path, n)` says whether the answer to the n-th request of a path is dropped."""
    proxy = LossyProxy(target, loses)
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    proxy.base_url = f"http://127.0.0.1:{listener.extra(SocketAttribute.local_port)}"
    async with listener, anyio.create_task_group() as group:
        group.start_soon(listener.serve, proxy._serve)
        yield proxy
        group.cancel_scope.cancel()
