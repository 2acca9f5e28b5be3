"""One connection, without a socket: however the bytes come, the answer is the same; what is no answer is told."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import zlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fwasync._http.carrier import WRITE_SIZE, Body, Unanswered
from fwasync._http.connection import Connection
from fwasync._http.incoming import Incoming
from fwasync.testing import VirtualClockLoop

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Wire(asyncio.Transport):
    """The network as a test wants it, and what is done with it."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.is_aborted = self.is_paused = False
        self.stuck = 0
        self.on_write: Callable[[], None] = lambda: None

    def write(self, data: Any) -> None:
        assert not self.is_aborted
        self.writes.append(bytes(data))
        self.on_write()

    def get_write_buffer_size(self) -> int:
        return self.stuck

    def abort(self) -> None:
        self.is_aborted = True

    def pause_reading(self) -> None:
        assert not self.is_paused
        self.is_paused = True

    def resume_reading(self) -> None:
        assert self.is_paused
        self.is_paused = False


class Kept:
    """A keeper that notes what it is told."""

    def __init__(self) -> None:
        self.kept: list[float] = []
        self.is_useless = self.is_closed = False

    def idle(self, connection: Connection, for_s: float) -> None:
        self.kept.append(for_s)

    def useless(self, connection: Connection) -> None:
        self.is_useless = True

    def closed(self, connection: Connection) -> None:
        self.is_closed = True


class Line:
    """A connection between the two."""

    def __init__(self) -> None:
        self.wire, self.keeper = Wire(), Kept()
        self.connection = Connection(self.keeper)
        self.connection.connection_made(self.wire)

    async def exchange(
        self, incoming: Callable[[], None], body: Body = (), *, method: str = "POST", timeout: float = 5
    ) -> tuple[Incoming, bytes]:
        """Send a request; `incoming` is called as soon as it is out."""
        reply = self.connection.lend(answers_head=method == "HEAD")
        loop = asyncio.get_running_loop()
        loop.call_soon(incoming)
        deadline = loop.time() + timeout
        await reply.send(b"head", body, sum(map(len, body)), deadline)
        return reply, await reply.read(deadline)

    def gets(self, *pieces: bytes, eof: bool = False) -> Callable[[], None]:
        def incoming() -> None:
            for piece in pieces:
                if not self.wire.is_aborted:
                    self.connection.data_received(piece)
            if eof and not self.wire.is_aborted:
                self.connection.eof_received()

        return incoming


def run(test: Callable[[], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        return await test()

    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        return runner.run(main())


def answered(*pieces: bytes, eof: bool = False, method: str = "POST") -> tuple[Line, Incoming, bytes]:
    async def test() -> tuple[Line, Incoming, bytes]:
        line = Line()
        return line, *(await line.exchange(line.gets(*pieces, eof=eof), method=method))

    return run(test)


def cut(data: bytes, at: Sequence[int]) -> list[bytes]:
    edges = sorted({0, *(each % len(data) for each in at), len(data)})
    return [data[start:end] for start, end in itertools.pairwise(edges)]


CUTS = st.lists(st.integers(0, 10_000), max_size=8)
CODINGS: dict[str, Callable[[bytes], bytes]] = {"": bytes, "gzip": gzip.compress, "deflate": zlib.compress}


@st.composite
def answers(draw: st.DrawFn) -> tuple[bytes, bytes, bool]:
    """The bytes of an answer, its body, and whether its end is that of the connection."""
    body, coding = draw(st.binary(max_size=200)), draw(st.sampled_from(sorted(CODINGS)))
    framing = draw(st.sampled_from(["length", "chunks", "close"]))
    head = draw(
        st.sampled_from([b"", b"HTTP/1.1 100 Continue\r\nX-A: interim\r\n\r\n", b"HTTP/1.1 103 Early\r\n\r\n" * 2])
    )
    head += b"HTTP/1.1 200 OK\r\nx-a: 1\r\nX-A:  2 \r\n"
    if coding:
        head += b"Content-Encoding: " + coding.encode() + b"\r\n"
    sent = CODINGS[coding](body)
    if framing == "length":
        return head + b"Content-Length: %d\r\n\r\n" % len(sent) + sent, body, False
    if framing == "close":
        return head + b"\r\n" + sent, body, True
    chunks = (
        b"".join(b"%x;e=1\r\n%s\r\n" % (len(each), each) for each in cut(sent, draw(CUTS)) if each) if sent else b""
    )
    trailer = draw(st.sampled_from([b"", b"X-A: trailer\r\nX-B: 1\r\n"]))
    return head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n" + trailer + b"\r\n", body, False


@given(answers(), CUTS)
def test_any_cutting_of_the_bytes_gives_the_same_answer(answer: tuple[bytes, bytes, bool], at: list[int]) -> None:
    data, body, ends_by_closing = answer
    line, reply, content = answered(*cut(data, at), eof=ends_by_closing)
    assert (reply.status, content) == (200, body)
    assert reply.headers["x-a"] == "1, 2"
    assert "x-b" not in reply.headers
    assert line.keeper.kept == ([] if ends_by_closing else [30])
    assert line.wire.is_aborted == ends_by_closing


@given(answers(), CUTS, st.data())
def test_an_answer_that_breaks_off_is_none(
    answer: tuple[bytes, bytes, bool], at: list[int], data: st.DataObject
) -> None:
    whole, _, ends_by_closing = answer
    if ends_by_closing:
        whole = whole[: whole.rindex(b"\r\n\r\n") + 4]  # all before can be told from the end
    part = whole[: data.draw(st.integers(0, len(whole) - 1))]
    with pytest.raises(Unanswered, match=r"closed (without|in the middle of) an answer") as e:
        answered(*(cut(part, at) if part else []), eof=True)
    assert e.value.connected


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"SSH-2.0-OpenSSH\r\n", "Expected HTTP"),
        (b"HTTP/1.1 2\r\n\r\n", "status"),
        (b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n", "header"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", "Content-Length"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nab", "Content-Length"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "Content-Length"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "chunk"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", "transfer-encoding"),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: br\r\nContent-Length: 2\r\n\r\nab", "'br', which was not asked for"),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n\xff\xff", "decompress"),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n\x1f\x8b", "breaks off"),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", "status is 101"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"a" * 300_000, "head is too long"),
        (b"HTTP/1.1 102 Processing\r\n\r\n" * 20_000, "head is too long"),
    ],
)
def test_what_is_no_answer_is_told(data: bytes, said: str) -> None:
    pieces = [data[start : start + 65536] for start in range(0, len(data), 65536)]
    with pytest.raises(Unanswered, match=f"malformed: .*{said}") as e:
        answered(*pieces)
    assert e.value.connected


def test_what_an_interim_answer_says_is_not_of_the_answer() -> None:
    interim = b"HTTP/1.1 104 Upload Resumption Supported\r\nContent-Length: 3\r\nX-A: interim\r\n\r\nabc"
    line, reply, content = answered(interim + OK)
    assert (reply.status, content, line.keeper.kept) == (200, b"ok", [30])
    assert "x-a" not in reply.headers


@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
def test_answers_without_a_body(status: bytes) -> None:
    line, reply, content = answered(b"HTTP/1.1 " + status + b"\r\n\r\n")
    assert (reply.status, content, line.keeper.kept) == (int(status[:3]), b"", [30])


def test_an_answer_to_head_has_no_body_and_ends_the_connection() -> None:
    line, reply, content = answered(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\nX-A: 1\r\n\r\n", method="HEAD")
    assert (reply.headers["x-a"], content) == ("1", b"")
    assert line.wire.is_aborted


@pytest.mark.parametrize(
    ("head", "kept"),
    [
        (b"HTTP/1.1 200 OK\r\n", [30]),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\n", []),
        (b"HTTP/1.0 200 OK\r\n", []),
        (b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\n", [30]),
        (b"HTTP/1.1 200 OK\r\nKeep-Alive: timeout=5, max=100\r\n", [4]),
        (b"HTTP/1.1 200 OK\r\nKeep-Alive: timeout=500\r\n", [30]),
        (b"HTTP/1.1 200 OK\r\nKeep-Alive: what\r\n", [30]),
    ],
)
def test_how_long_a_connection_is_kept(head: bytes, kept: list[float]) -> None:
    line, _, content = answered(head + b"Content-Length: 2\r\n\r\nok")
    assert (content, line.keeper.kept, line.wire.is_aborted) == (b"ok", kept, not kept)


@pytest.mark.parametrize("more", [b"x", b"HTTP/1.1 200 OK\r\n", OK])
def test_more_than_an_answer_ends_the_connection_but_not_the_answer(more: bytes) -> None:
    line, _, content = answered(OK + more)
    assert (content, line.keeper.kept, line.wire.is_aborted) == (b"ok", [], True)


def test_what_nobody_asked_for_ends_the_connection() -> None:
    line, _, _ = answered(OK)
    line.connection.data_received(OK)
    assert line.wire.is_aborted and line.keeper.is_useless


@pytest.mark.parametrize("is_lost", [True, False])
def test_what_comes_before_it_is_asked_for_is_no_answer(is_lost: bool) -> None:
    async def test() -> None:
        line = Line()
        line.connection.data_received(OK)
        if is_lost:
            line.connection.connection_lost(None)
        line.wire.is_aborted = False  # a transport takes what is written, and drops it
        with pytest.raises(Unanswered, match="came before it was asked for"):
            await line.exchange(lambda: None)

    run(test)


def test_one_exchange_after_another() -> None:
    async def test() -> None:
        line = Line()
        for n in range(5):
            answer = b"HTTP/1.1 200 OK\r\nX-N: %d\r\nContent-Length: 1\r\n\r\n%d" % (n, n)
            reply, content = await line.exchange(line.gets(answer))
            assert (reply.headers, content) == ({"x-n": str(n), "content-length": "1"}, b"%d" % n)
        assert line.keeper.kept == [30] * 5

    run(test)


def test_head_and_small_body_go_out_in_one_write() -> None:
    async def test() -> None:
        line = Line()
        await line.exchange(line.gets(OK), [b"a", b"b" * 1000])
        assert line.wire.writes == [b"heada" + b"b" * 1000]

    run(test)


@given(st.lists(st.integers(0, 2 * WRITE_SIZE + 3), min_size=1, max_size=8))
def test_a_large_body_goes_out_in_moderate_writes(sizes: list[int]) -> None:
    async def test() -> None:
        line = Line()
        body = [bytes([n]) * size for n, size in enumerate(sizes)]

        def answer() -> None:
            if sum(map(len, line.wire.writes)) < 4 + sum(sizes):
                asyncio.get_running_loop().call_soon(answer)
            else:
                line.gets(OK)()

        await line.exchange(answer, body)
        assert b"".join(line.wire.writes) == b"head" + b"".join(body)
        assert max(map(len, line.wire.writes)) <= WRITE_SIZE + 4
        assert line.keeper.kept == [30]

    run(test)


def test_a_full_network_holds_the_writing_up() -> None:
    async def test() -> None:
        line, times = Line(), list[float]()
        loop = asyncio.get_running_loop()

        def written() -> None:
            times.append(loop.time())
            line.connection.pause_writing()
            loop.call_later(1, line.connection.resume_writing)
            if len(times) == 11:
                loop.call_later(1, line.gets(OK))

        line.wire.on_write = written
        await line.exchange(lambda: None, [bytes(WRITE_SIZE)] * 10, timeout=60)
        assert times == list(range(11))

    run(test)


@pytest.mark.parametrize("is_full", [True, False])
def test_an_answer_before_all_is_written_ends_the_writing(is_full: bool) -> None:
    async def test() -> None:
        line = Line()

        def incoming() -> None:
            if is_full:
                line.connection.pause_writing()
            asyncio.get_running_loop().call_soon(
                line.gets(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\n", b"no")
            )

        reply, content = await line.exchange(incoming, [bytes(WRITE_SIZE)] * 100)
        assert (reply.status, content) == (413, b"no")
        assert len(line.wire.writes) < 10
        assert line.wire.is_aborted and not line.keeper.kept

    run(test)


def test_an_answer_while_the_network_still_holds_the_request_ends_the_connection() -> None:
    async def test() -> None:
        line = Line()
        line.wire.stuck = 1
        assert (await line.exchange(line.gets(OK)))[1] == b"ok"
        assert line.wire.is_aborted and not line.keeper.kept

    run(test)


def test_who_reads_slowly_holds_the_service_up() -> None:
    async def test() -> None:
        line = Line()
        reply = line.connection.lend(answers_head=False)
        asyncio.get_running_loop().call_soon(line.gets(b"HTTP/1.1 200 OK\r\nContent-Length: 700000\r\n\r\n"))
        await reply.send(b"head", (), 0, 5)
        line.connection.data_received(bytes(200_000))
        assert not line.wire.is_paused
        line.connection.data_received(bytes(200_000))
        assert line.wire.is_paused
        assert len(await reply.piece(5) or b"") == 400_000
        assert not line.wire.is_paused
        line.connection.data_received(bytes(300_000))
        assert line.keeper.kept == [30], "the answer is whole, whoever reads it when"
        assert not line.wire.is_paused
        assert len(await reply.read(5)) == 300_000
        assert await reply.piece(5) is None

    run(test)


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200", OK[:-1]])
def test_what_comes_too_late_is_not_waited_for(sent: bytes) -> None:
    async def test() -> None:
        line = Line()
        with pytest.raises(TimeoutError):
            await line.exchange(line.gets(sent) if sent else lambda: None, timeout=7)
        assert asyncio.get_running_loop().time() == 7
        assert line.wire.is_aborted and line.keeper.is_useless

    run(test)


def test_each_exchange_has_its_own_deadline() -> None:
    """The next one has begun before who waited for the first has had its turn."""

    async def test() -> None:
        line, loop = Line(), asyncio.get_running_loop()
        tasks: list[asyncio.Task[None]] = []

        async def following() -> None:
            with pytest.raises(TimeoutError):
                await line.exchange(lambda: None, timeout=5)

        def incoming() -> None:
            tasks.append(loop.create_task(following()))
            line.gets(OK)()

        assert (await line.exchange(incoming, timeout=100))[1] == b"ok"
        assert line.connection._incoming is not None, "the next one has begun"
        await tasks[0]
        assert loop.time() == 5

    run(test)


@pytest.mark.parametrize("timeouts", [(3, 100, 7), (100, 3, 7), (50, 50, 50)])
def test_one_timer_serves_all_exchanges(timeouts: tuple[int, ...]) -> None:
    async def test() -> None:
        line, loop = Line(), asyncio.get_running_loop()
        for timeout in timeouts[:-1]:
            await line.exchange(line.gets(OK), timeout=timeout)
        with pytest.raises(TimeoutError):
            await line.exchange(lambda: None, timeout=timeouts[-1])
        assert loop.time() == timeouts[-1]
        line.connection.connection_lost(None)
        assert line.connection._timer is None

    run(test)


def test_a_full_network_is_not_waited_for_either() -> None:
    async def test() -> None:
        line = Line()
        line.connection.pause_writing()
        with pytest.raises(TimeoutError):
            await line.exchange(lambda: None, [bytes(WRITE_SIZE)] * 2, timeout=7)
        assert line.wire.is_aborted

    run(test)


def test_an_error_of_the_network_is_told() -> None:
    async def test() -> None:
        line = Line()
        with pytest.raises(Unanswered, match=r"closed without an answer .*reset"):
            await line.exchange(lambda: line.connection.connection_lost(ConnectionResetError("reset")))

    run(test)
