"""What the neutral server can serve, so that one can tell that it is not what a benchmark measures.

python benchmarks/load_tool.py [--seconds 2]

Raw connections send the same bytes again and again, and count those that come back: nothing is parsed. `depth` is how
many requests a connection sends before the first is answered.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import time
from collections.abc import Mapping
from typing import cast
from urllib.parse import urlsplit

import harness
import msgspec

PROMPT = list(range(64))


def request(path: str, body: Mapping[str, object]) -> bytes:
    data = msgspec.json.encode(body)
    head = f"POST {path} HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n"
    return head.encode() + b"\r\n" + data


def completion(tokens: int, *, stream: bool) -> bytes:
    body = {"model": "16-events", "prompt": PROMPT, "max_tokens": tokens, "stream": stream, "logprobs": True}
    return request("/inference/v1/completions", body)


REQUESTS = {
    "completion, 64 tokens, streamed": completion(64, stream=True),
    "completion, 64 tokens": completion(64, stream=False),
    "completion, 512 tokens, streamed": completion(512, stream=True),
    "optim_step": request("/api/v1/optim_step", {"model_id": "model", "seq_id": 1}),
    "retrieve_future": request("/api/v1/retrieve_future", {"request_id": "step/00000000"}),
}


class Raw(asyncio.Protocol):
    """Keeps requests under way, and counts what comes back."""

    transport: asyncio.Transport

    def __init__(self, sent: bytes, size: int, depth: int) -> None:
        self._sent, self._size, self._depth = sent, size, depth
        self._received = 0
        self.answers = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def begin(self) -> None:
        self.transport.write(self._sent * self._depth)

    def data_received(self, data: bytes) -> None:
        answers, self._received = divmod(self._received + len(data), self._size)
        if answers:
            self.answers += answers
            self.transport.write(self._sent * answers)


def place(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    return parts.hostname, parts.port


def size_of_answer(url: str, sent: bytes) -> int:
    """Bytes of an answer, which are always as many."""
    answer = b""
    with socket.create_connection(place(url)) as connection:
        connection.sendall(sent)
        while not is_whole(answer):
            answer += connection.recv(2**16)
    return len(answer)


def is_whole(answer: bytes) -> bool:
    head, end, body = answer.lower().partition(b"\r\n\r\n")
    _, told, length = head.partition(b"content-length: ")
    return len(body) == int(length.split()[0]) if told else bool(end) and body.endswith(b"0\r\n\r\n")


async def served(url: str, sent: bytes, connections: int, depth: int, seconds: float) -> tuple[float, float]:
    """Answers a second, and in a second of the server's CPU time."""
    loop, size = asyncio.get_running_loop(), size_of_answer(url, sent)
    opened: list[Raw] = []
    for _ in range(connections):
        _, raw = await loop.create_connection(lambda: Raw(sent, size, depth), *place(url))
        opened.append(raw)
    for raw in opened:
        raw.begin()
    await asyncio.sleep(0.2)
    before, cpu, started = sum(raw.answers for raw in opened), cpu_of(url), time.perf_counter()
    answers = 0
    while not answers:  # longer than asked for only where the server has had no turn
        await asyncio.sleep(seconds)
        answers = sum(raw.answers for raw in opened) - before
    cpu, seconds = cpu_of(url) - cpu, time.perf_counter() - started
    for raw in opened:
        raw.transport.abort()
    return answers / seconds, answers / cpu


def cpu_of(url: str) -> float:
    return harness.server_counts(url)["cpu_s"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=2.0)
    seconds = parser.parse_args().seconds
    print(harness.machine().line())
    with harness.server() as url:
        harness.pin(harness.CLIENT)
        ways = {"64 connections": (64, 1), "1,024": (1024, 1), "64, depth 16": (64, 16)}
        lines = [["answers a second (and in a second of the server's CPU)", *ways]]
        for name, sent in REQUESTS.items():
            rates = [asyncio.run(served(url, sent, *way, seconds)) for way in ways.values()]
            lines.append([name, *(f"{rate:,.0f} ({of_cpu:,.0f})" for rate, of_cpu in rates)])
    harness.show("What the neutral server serves", lines)


if __name__ == "__main__":
    main()
