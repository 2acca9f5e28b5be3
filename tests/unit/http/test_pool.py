"""Connections over real sockets: used again, dropped when they are of no use, and closed, all of them, in time."""

from __future__ import annotations

import asyncio
import gc
import gzip
import socket
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest

from fwasync import errors
from fwasync._http import dial
from fwasync._http.client import Http, Streamed, Unanswered
from fwasync._http.pool import Pool
from support.raw_server import OK, TLS, Peer, open_sockets, raw_server, then_close


def pool_of(http: Http) -> Pool:
    assert isinstance(http._carrier, Pool)
    return http._carrier


async def none_open(http: Http) -> None:
    """Wait until the client has closed all connections."""
    with anyio.fail_after(100):
        while pool_of(http)._open:
            await anyio.sleep(0.001)


@pytest.fixture(autouse=True)
async def _no_socket_is_left() -> AsyncIterator[None]:
    gc.collect()  # what other tests left is not ours
    before = open_sockets()
    yield
    assert open_sockets() == before


async def get(http: Http, **options: Any) -> bytes:
    return (await http.attempt("GET", "x", timeout=100, **options)).body


class TestReuse:
    async def test_one_after_another_go_over_one_connection(self) -> None:
        async with raw_server() as server, Http(server.url, "key") as http:
            for _ in range(10):
                assert await get(http) == b"ok"
        assert (server.accepted, len(server.heads)) == (1, 10)

    @pytest.mark.parametrize("tls", [False, True])
    async def test_what_is_written_goes_out_at_once(self, tls: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SSL_CERT_FILE", str(TLS / "cert.pem"))
        async with raw_server(tls=tls) as server, Http(server.url, "key") as http:
            await get(http)
            (connection,) = pool_of(http)._open
            with socket.socket(fileno=socket.dup(connection.fileno)) as ours:
                assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

    async def test_as_many_connections_as_requests_in_flight_and_no_more(self) -> None:
        async with raw_server() as server, Http(server.url, "key") as http:
            for _ in range(5):
                async with anyio.create_task_group() as group:
                    for _ in range(20):
                        group.start_soon(get, http)
            assert server.accepted == server.open == 20

    async def test_the_last_one_is_used_first(self) -> None:
        async def numbered(peer: Peer) -> None:
            number = b"%d" % server.accepted
            while True:
                await peer.request()
                await gate.wait()
                await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(number), number))

        gate = anyio.Event()
        async with raw_server(numbered) as server, Http(server.url, "key") as http:
            async with anyio.create_task_group() as group:
                for n in range(3):
                    group.start_soon(get, http)
                    while len(server.heads) == n:
                        await anyio.sleep(0.001)
                gate.set()
            assert len({await get(http) for _ in range(10)}) == 1

    async def test_what_the_service_closes_while_idle_is_dropped_at_once(self) -> None:
        async with raw_server(then_close(OK)) as server, Http(server.url, "key") as http:
            for n in range(5):
                assert await get(http) == b"ok"
                with anyio.fail_after(100):
                    while pool_of(http)._idle:
                        await anyio.sleep(0.001)
                await none_open(http)
                assert server.accepted == n + 1

    async def test_what_was_idle_for_a_while_is_looked_at_before_it_is_used(self) -> None:
        """The loop was busy, and has not heard yet that the service has closed the connection."""
        async with raw_server(then_close(OK)) as server, Http(server.url, "key") as http:
            assert await get(http) == b"ok"
            [connection] = pool_of(http)._idle
            pool_of(http)._idle[connection] -= 10  # idle for ten seconds
            connection._transport.pause_reading()  # type: ignore[union-attr]
            await server.all_gone()
            assert await get(http) == b"ok"
            assert server.accepted == 2

    async def test_close_is_obeyed(self) -> None:
        async def closing(peer: Peer) -> None:
            await peer.request()
            await peer.send(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok")
            await peer.until_gone()

        async with raw_server(closing) as server, Http(server.url, "key") as http:
            assert [await get(http), await get(http)] == [b"ok"] * 2
            assert server.accepted == 2
            await server.all_gone()

    async def test_idle_connections_are_closed_after_a_while(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async with raw_server() as server, Http(server.url, "key") as http:
            await get(http)
            assert pool_of(http)._sweeping is not None
            loop = asyncio.get_running_loop()
            now = loop.time()
            assert 29 < pool_of(http)._sweeping.when() - now <= 30
            monkeypatch.setattr(loop, "time", lambda: now + 31)
            pool_of(http)._sweep()
            monkeypatch.undo()
            await server.all_gone()
            assert pool_of(http)._sweeping is None
            assert await get(http) == b"ok"

    async def test_an_expired_one_is_not_used(self) -> None:
        async with raw_server() as server, Http(server.url, "key") as http:
            await get(http)
            [connection] = pool_of(http)._idle
            connection.expires = 0
            assert await get(http) == b"ok"
            assert server.accepted == 2


class TestConnecting:
    async def test_nobody_listens(self) -> None:
        with socket.socket() as held:  # so that nobody else takes the port
            held.bind(("127.0.0.1", 0))
            place = f"127.0.0.1:{held.getsockname()[1]}"
            async with Http(f"http://{place}", "key") as http:
                with pytest.raises(Unanswered, match=f"cannot connect to {place}") as e:
                    await get(http)
        assert not e.value.connected

    @pytest.mark.parametrize("host", ["nowhere.test", "a" * 64 + ".test"])
    async def test_a_name_that_is_none(self, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
        real = socket.getaddrinfo

        def unknown(name: Any, *args: Any, **options: Any) -> Any:
            if name == "nowhere.test":  # without asking a network that may be slow, or have an answer for everything
                raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
            return real(name, *args, **options)

        monkeypatch.setattr(socket, "getaddrinfo", unknown)
        async with Http(f"http://{host}", "key") as http:
            with pytest.raises(Unanswered, match="cannot connect") as e:
                await get(http)
        assert not e.value.connected

    async def test_a_name_is_asked_for_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[object] = []
        real = socket.getaddrinfo

        def counting(host: Any, port: Any, *args: Any, **options: Any) -> Any:
            if host == "trainer.test" and "flags" not in options:
                asked.append(host)
                host = "127.0.0.1"
            return real(host, port, *args, **options)

        monkeypatch.setattr(socket, "getaddrinfo", counting)
        async with raw_server() as server, Http(f"http://trainer.test:{server.port}", "key") as http:
            async with anyio.create_task_group() as group:
                for _ in range(50):
                    group.start_soon(get, http)
            assert server.accepted == 50
            assert server.heads[0].count(f"host: trainer.test:{server.port}".encode()) == 1
        assert asked == ["trainer.test"]

    async def test_who_asks_for_the_name_may_be_cancelled_and_others_have_it(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        known = anyio.Event()
        loop = asyncio.get_running_loop()
        real = loop.run_in_executor

        def slow(executor: Any, ask: Any, *args: Any) -> asyncio.Future[Any]:
            async def answer() -> Any:
                await known.wait()
                return socket.getaddrinfo("127.0.0.1", server.port, type=socket.SOCK_STREAM)

            return loop.create_task(answer()) if isinstance(ask, dial.partial) else real(executor, ask, *args)

        monkeypatch.setattr(loop, "run_in_executor", slow)
        async with raw_server() as server, Http(f"http://trainer.test:{server.port}", "key") as http:
            async with anyio.create_task_group() as others:
                first = anyio.CancelScope()

                async def cancelled() -> None:
                    with first:
                        await get(http)

                others.start_soon(cancelled)
                await anyio.wait_all_tasks_blocked()
                others.start_soon(get, http)
                await anyio.wait_all_tasks_blocked()
                first.cancel()
                await anyio.wait_all_tasks_blocked()
                known.set()
            assert server.accepted == 1

    async def test_who_never_answers_is_not_waited_for(self) -> None:
        with socket.socket() as mute:
            mute.bind(("127.0.0.1", 0))
            mute.listen(16)
            async with Http(f"https://127.0.0.1:{mute.getsockname()[1]}", "key") as http:
                with pytest.raises(Unanswered, match=r"no connection to .* in time") as e:
                    await http.attempt("GET", "x", timeout=0.05)
        assert not e.value.connected

    async def test_a_handshake_that_fails(self) -> None:
        async def no_tls(peer: Peer) -> None:
            await peer.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        async with raw_server(no_tls) as server, Http(f"https://127.0.0.1:{server.port}", "key") as http:
            with pytest.raises(Unanswered, match="cannot connect") as e:
                await get(http)
            assert not e.value.connected
            await none_open(http)
            await server.all_gone()

    async def test_a_handshake_that_is_hung_up(self) -> None:
        async def hang_up(peer: Peer) -> None:
            await peer.stream.receive()

        async with raw_server(hang_up) as server, Http(f"https://127.0.0.1:{server.port}", "key") as http:
            with pytest.raises(Unanswered, match="cannot connect") as e:
                await get(http)
            assert not e.value.connected
            await none_open(http)

    async def test_who_speaks_first_is_no_http_service(self) -> None:
        async def banner(peer: Peer) -> None:
            await peer.send(b"220 mail.test ESMTP\r\n")
            await peer.until_gone()

        async with raw_server(banner) as server, Http(server.url, "key") as http:
            for _ in range(5):
                with pytest.raises(Unanswered, match="malformed"):
                    await get(http)


class TestAnswers:
    @pytest.mark.parametrize(
        ("answers", "body"),
        [
            ([b"HTTP/1.1 200 OK\r\n\r\n", b"to the ", b"end"], b"to the end"),
            ([b"HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\nold"], b"old"),
            ([b"HTTP/1.1 100 Continue\r\n\r\n", OK], b"ok"),
            ([b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n", gzip.compress(b"a" * 9)], b"a" * 9),
        ],
    )
    async def test_of_several_kinds(self, answers: list[bytes], body: bytes) -> None:
        async with raw_server(then_close(*answers)) as server, Http(server.url, "key") as http:
            assert await get(http) == body
        assert b"accept-encoding: gzip, deflate" in server.heads[0]

    @pytest.mark.parametrize(
        "answers", [[b""], [OK[:-1]], [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabc"]]
    )
    async def test_that_break_off(self, answers: list[bytes]) -> None:
        async with raw_server(then_close(*answers)) as server, Http(server.url, "key") as http:
            with pytest.raises(Unanswered, match="connection was closed") as e:
                await get(http)
            assert e.value.connected

    async def test_before_the_whole_request_was_sent(self) -> None:
        async def refuse(peer: Peer) -> None:
            await peer.head()
            await peer.send(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
            await peer.until_gone()

        async with raw_server(refuse) as server, Http(server.url, "key") as http:
            answer = await http.attempt("POST", "x", [bytes(1 << 20)] * 64)
            assert (answer.status, answer.body) == (413, b"no")
            await server.all_gone()

    async def test_a_big_answer_is_had_whole(self) -> None:
        size = 5_000_000
        async with (
            raw_server(then_close(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size, bytes(size))) as server,
            Http(server.url, "key") as http,
        ):
            assert await get(http) == bytes(size)

    async def test_a_stream_that_is_read_slowly_holds_the_service_up(self) -> None:
        sent = 0

        async def endless(peer: Peer) -> None:
            nonlocal sent
            await peer.request()
            await peer.send(b"HTTP/1.1 200 OK\r\n\r\n")
            while True:
                await peer.send(bytes(100_000))
                sent += 100_000

        async with raw_server(endless) as server, Http(server.url, "key") as http:
            answer = await http.stream("GET", "x", [], accept="*/*", headers={}, timeout=100)
            assert isinstance(answer, Streamed)
            async with answer:
                before = -1
                while sent != before:  # until it is stuck
                    before = sent
                    await anyio.sleep(0.05)
                read = 0
                while read <= before:
                    read += len(await answer.piece() or b"")
            await server.all_gone()


async def test_a_big_request_is_not_buffered_for_a_slow_service() -> None:
    body, read, held = [bytes([n]) * (1 << 20) for n in range(64)], 0, 0

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal read, held
        await reader.readuntil(b"\r\n\r\n")
        [connection] = pool_of(http)._open
        while not connection.is_full:
            await anyio.sleep(0.001)
        assert connection._transport is not None
        held = connection._transport.get_write_buffer_size()
        for piece in body:
            assert await reader.readexactly(len(piece)) == piece
            read += len(piece)
        writer.write(OK)
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(slow, "127.0.0.1", 0) as server:  # a stream of asyncio reads no further
        async with Http(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "key") as http:
            assert (await http.attempt("POST", "x", body)).body == b"ok"
    assert read == 64 << 20
    assert 0 < held <= 512 * 1024


class TestTLS:
    @pytest.fixture(autouse=True)
    def _trust(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SSL_CERT_FILE", str(TLS / "cert.pem"))

    async def test_connections_are_used_again_and_closed_without_the_other_side(self) -> None:
        async def deaf(peer: Peer) -> None:
            await peer.request()
            await peer.send(OK)
            await anyio.sleep_forever()

        async with raw_server(tls=True) as server, raw_server(deaf, tls=True) as other:
            async with Http(server.url, "key") as http, Http(other.url, "key") as to_the_deaf:
                for _ in range(5):
                    assert await get(http) == b"ok"
                assert await get(to_the_deaf) == b"ok"
            assert not pool_of(to_the_deaf)._open
            assert server.accepted == 1

    @pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
    async def test_the_name_is_checked(self, host: str) -> None:
        async with raw_server(tls=True) as server, Http(f"https://{host}:{server.port}", "key") as http:
            assert await get(http) == b"ok"

    async def test_another_name_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async with raw_server(tls=True) as server, Http(f"https://other.test:{server.port}", "key") as http:
            pool_of(http)._dialer._addresses = [(socket.AF_INET, ("127.0.0.1", server.port))]
            pool_of(http)._dialer._stale_at = asyncio.get_running_loop().time() + 100
            with pytest.raises(Unanswered, match=r"other\.test") as e:
                await get(http)
            assert not e.value.connected

    async def test_big_bodies_both_ways(self) -> None:
        size = 3_000_000

        async def echo(peer: Peer) -> None:
            body = await peer.request()
            await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

        async with raw_server(echo, tls=True) as server, Http(server.url, "key") as http:
            answer = await http.attempt("POST", "x", [bytes(size), b"x" * 1000])
            assert answer.body == bytes(size) + b"x" * 1000


class TestClosing:
    @pytest.mark.parametrize("tls", [False, True])
    async def test_requests_in_flight_end(self, tls: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SSL_CERT_FILE", str(TLS / "cert.pem"))

        async def silent(peer: Peer) -> None:
            await peer.request()
            await anyio.sleep_forever()

        ended: list[str] = []

        async def one() -> None:
            try:
                await get(http)
            except Unanswered as error:
                ended.append(str(error))

        async with raw_server(silent, tls=tls) as server, anyio.create_task_group() as group:
            async with Http(server.url, "key") as http:
                assert not pool_of(http)._open
                for _ in range(10):
                    group.start_soon(one)
                while len(server.heads) < 10:
                    await anyio.sleep(0.001)
        assert ended == ["the connection was closed here"] * 10

    async def test_it_is_not_used_any_more(self) -> None:
        async with raw_server() as server:
            async with Http(server.url, "key") as http:
                await get(http)
            with pytest.raises(errors.ClosedError, match="make another one"):
                await get(http)
            assert server.accepted == 1

    async def test_it_belongs_to_the_loop_that_it_was_used_on_first(self) -> None:
        async with raw_server() as server, Http(server.url, "key") as http:
            await get(http)
            with pytest.raises(errors.UsageError, match="another event loop"):
                await anyio.to_thread.run_sync(asyncio.run, get(http))
            await get(http)
            assert server.accepted == 1

    async def test_a_cancelled_closing_closes_all_the_same(self) -> None:
        async with raw_server() as server:
            http = Http(server.url, "key")
            await get(http)
            with anyio.CancelScope() as scope:
                scope.cancel()
                await http.__aexit__(None, None, None)
            await server.all_gone()


async def test_hundreds_cancelled_at_once_leave_nothing() -> None:
    async def silent(peer: Peer) -> None:
        await peer.request()
        await peer.until_gone()

    async with raw_server(silent) as server, Http(server.url, "key") as http:
        async with anyio.create_task_group() as group:
            for _ in range(300):
                group.start_soon(get, http)
            while len(server.heads) < 300:
                await anyio.sleep(0.001)
            group.cancel_scope.cancel()
        await none_open(http)
        await server.all_gone()
