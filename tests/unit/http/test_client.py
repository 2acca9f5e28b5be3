"""Requests, retries and typed errors, on a transport that answers from a script."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator

import anyio
import httpx
import pytest

from fwasync import AsyncServiceClient, errors
from fwasync._http.client import Http, Unanswered, service_url
from fwasync._http.retrieve import retrieve
from fwasync.testing import virtual_time

KEY = "tml-very-secret"
Step = httpx.Response | Exception | Callable[[httpx.Request], httpx.Response]


def scripted(*steps: Step) -> tuple[Http, list[httpx.Request]]:
    seen: list[httpx.Request] = []
    script: Iterator[Step] = iter(steps)

    async def handle(request: httpx.Request) -> httpx.Response:
        await request.aread()
        seen.append(request)
        step = next(script)
        if isinstance(step, Exception):
            raise step
        return step if isinstance(step, httpx.Response) else step(request)

    return Http("http://service.test/base/", KEY, transport=httpx.MockTransport(handle)), seen


@virtual_time
async def test_a_call_is_repeated_with_the_same_body_and_key_until_it_is_answered(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "fwasync.http")
    http, seen = scripted(
        httpx.ReadError("reset"),
        httpx.Response(503),
        httpx.Response(429, headers={"retry-after": "7"}),
        httpx.Response(200, content=b"done"),
    )
    async with http:
        assert await http.call("POST", "optim_step", [b'{"a"', b":1}"]) == b"done"
    assert anyio.current_time() >= 7
    assert len({request.headers["x-idempotency-key"] for request in seen}) == 1
    assert {request.content for request in seen} == {b'{"a":1}'}
    assert {str(request.url) for request in seen} == {"http://service.test/base/api/v1/optim_step"}
    assert seen[0].headers["x-api-key"] == KEY
    assert seen[0].headers["content-type"] == "application/json"
    told = [record.getMessage().partition(";")[0] for record in caplog.records if record.name == "fwasync.http"]
    assert told == [
        "optim_step: attempt 1 failed (reset)",
        "optim_step: attempt 2 failed (status 503)",
        "optim_step: attempt 3 failed (status 429)",
    ]


@virtual_time
async def test_a_refusal_is_final() -> None:
    http, seen = scripted(httpx.Response(409, json={"detail": "no"}))
    async with http:
        with pytest.raises(errors.ConflictError, match="status 409: no"):
            await http.call("POST", "x")
    assert len(seen) == 1


@virtual_time
async def test_the_retry_budget_ends_it_and_the_error_tells_what_happened() -> None:
    http, seen = scripted(*[httpx.ConnectError("refused") for _ in range(10_000)])
    async with http:
        with pytest.raises(errors.ServiceUnreachableError, match=r"nothing answers at http://service\.test/base"):
            await http.call("POST", "x")
    assert 290 <= anyio.current_time() <= 300
    assert len(seen) < 150
    http, _ = scripted(*[httpx.Response(500, text=f"broken {KEY}") for _ in range(10_000)])
    async with http:
        with pytest.raises(errors.ServiceUnavailableError, match=r"broken \*\*\*"):
            await http.call("POST", "x")


@virtual_time
async def test_an_attempt_that_takes_too_long_is_unanswered() -> None:
    async def never(request: httpx.Request) -> httpx.Response:
        await anyio.sleep_forever()
        raise AssertionError

    async with Http("http://service.test", KEY, transport=httpx.MockTransport(never)) as http:
        with pytest.raises(Unanswered, match="within 5 s"):
            await http.attempt("POST", "x", timeout=5)


async def test_large_bodies_are_streamed_in_moderate_writes_of_known_length() -> None:
    writes: list[int] = []

    class Counting(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            assert request.headers["content-length"] == "3000000"
            assert "transfer-encoding" not in request.headers
            assert isinstance(request.stream, httpx.AsyncByteStream)
            writes.extend([len(piece) async for piece in request.stream])
            return httpx.Response(200)

    async with Http("http://service.test", KEY, transport=Counting()) as http:
        await http.call("POST", "x", [b"x" * 1000] * 3000)
    assert sum(writes) == 3_000_000
    assert max(writes) < 256 * 1024 + 1000


@virtual_time
async def test_polling_goes_on_until_there_is_a_result() -> None:
    waits: list[object] = []
    http, seen = scripted(
        httpx.Response(408, json={"type": "try_again", "queue_state": "active", "queue_state_reason": "busy"}),
        httpx.Response(200, json={"type": "try_again"}),
        httpx.Response(503),
        httpx.ReadError("reset"),
        httpx.Response(200, json={"status": "complete_metadata", "response_payload_size": 5}),
        httpx.Response(200, json={"metrics": {}}),
    )
    async with http:
        assert (await retrieve(http, "r", what="optim_step", on_wait=waits.append)).body == b'{"metrics":{}}'
    assert [w.queue_state for w in waits] == ["active", None]  # type: ignore[attr-defined]
    assert seen[-2].content == b'{"request_id":"r","allow_metadata_only":true}'
    assert seen[-1].content == b'{"request_id":"r","allow_metadata_only":false}'


@virtual_time
async def test_what_a_service_says_of_paused_work_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    paused = [{"queue_state": "paused_capacity"}] * 3 + [
        {"queue_state": "paused_rate_limit", "queue_state_reason": KEY}
    ]
    http, _ = scripted(
        *[httpx.Response(408, json={"type": "try_again", **state}) for state in paused],
        httpx.Response(408, json={"type": "try_again", "queue_state": "active"}),
        httpx.Response(200, json={"metrics": {}}),
    )
    async with http:
        await retrieve(http, "r", what="creating a model")
    assert [record.getMessage() for record in caplog.records] == [
        "creating a model waits: the service says paused_capacity",
        "creating a model waits: the service says paused_rate_limit ***",
    ]


@virtual_time
async def test_failing_polls_never_spin_and_end_within_the_budget() -> None:
    http, seen = scripted(*[httpx.Response(503) for _ in range(10_000)])
    async with http:
        with pytest.raises(errors.RetryBudgetExhaustedError, match="can be awaited again"):
            await retrieve(http, "r", what="optim_step")
    assert len(seen) < 150
    assert anyio.current_time() <= 300


@virtual_time
async def test_a_payload_that_never_comes_is_not_waited_for_without_end() -> None:
    http, seen = scripted(*[httpx.Response(200, json={"status": "complete_metadata"}) for _ in range(10_000)])
    async with http:
        with pytest.raises(errors.RetryBudgetExhaustedError, match="could not be asked for"):
            await retrieve(http, "r", what="optim_step")
    assert len(seen) < 150
    assert anyio.current_time() <= 300


@virtual_time
async def test_polls_that_are_answered_at_once_do_not_spin() -> None:
    http, seen = scripted(*[httpx.Response(408, json={"type": "try_again"}) for _ in range(1_000)])
    async with http:
        with anyio.move_on_after(10):
            await retrieve(http, "r", what="optim_step")
    assert len(seen) <= 501


@virtual_time
async def test_a_refused_poll_is_an_error() -> None:
    http, _ = scripted(httpx.Response(401, json={"detail": f"bad {KEY}"}))
    async with http:
        with pytest.raises(errors.AuthenticationError) as e:
            await retrieve(http, "r", what="optim_step")
    assert KEY not in str(e.value)


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000",
        "ftp://x",
        "http://",
        "",
        "http://user:pw@host",
        "http://host:pw",
        "http://host:65536",
        "http://host/?key=pw",
        "http://host/#pw",
        "http://xn--",
        "http://[::1",
    ],
)
def test_malformed_urls_are_refused(url: str) -> None:
    with pytest.raises(errors.UsageError, match="base_url") as e:
        service_url(url)
    assert "pw" not in str(e.value)


@pytest.mark.parametrize("url", ["http://h/api/v1", "http://h/api/v1/", "http://h/", "http://h"])
def test_urls_lose_what_the_api_adds(url: str) -> None:
    assert service_url(url) == "http://h"


class TestFirstContact:
    """What a newcomer meets first: no key, wrong address, wrong service."""

    @pytest.fixture(autouse=True)
    def _no_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("FWASYNC_API_KEY", "FWASYNC_BASE_URL", "TINKER_API_KEY", "TINKER_BASE_URL", "FIREWORKS_API_KEY"):
            monkeypatch.delenv(name, raising=False)

    def test_missing_url(self) -> None:
        with pytest.raises(errors.UsageError, match="FWASYNC_BASE_URL"):
            AsyncServiceClient()

    def test_what_is_no_url(self) -> None:
        with pytest.raises(errors.UsageError, match="base_url"):
            AsyncServiceClient("http://[::1", "key")

    def test_missing_key_names_where_it_may_stand(self) -> None:
        with pytest.raises(errors.UsageError, match=r"set FWASYNC_API_KEY$"):
            AsyncServiceClient("http://127.0.0.1:1")
        with pytest.raises(errors.UsageError, match="FWASYNC_API_KEY or FIREWORKS_API_KEY"):
            AsyncServiceClient("https://api.fireworks.ai/x")

    def test_a_vendors_key_goes_to_no_other_host(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FIREWORKS_API_KEY", "fw-key")
        AsyncServiceClient("https://api.fireworks.ai/x")
        for host in ("evil-fireworks.ai", "fireworks.ai.evil.test", "127.0.0.1"):
            with pytest.raises(errors.UsageError, match="no API key"):
                AsyncServiceClient(f"https://{host}")

    def test_a_cut_key(self) -> None:
        with pytest.raises(errors.UsageError, match="line break") as e:
            AsyncServiceClient("http://h", "secret\n")
        assert "secret" not in str(e.value)

    async def test_wrong_address(self) -> None:
        with socket.socket() as held:  # so that nobody else takes the port
            held.bind(("127.0.0.1", 0))
            with pytest.raises(errors.ServiceUnreachableError, match="nothing answers"):
                async with AsyncServiceClient(f"http://127.0.0.1:{held.getsockname()[1]}", KEY):
                    pass

    @pytest.mark.parametrize(
        "response",
        [
            httpx.Response(404, html="<html>not found</html>"),
            httpx.Response(405, html="<html>no POST here</html>"),
            httpx.Response(501),
            httpx.Response(200, html="<html>hello</html>"),
            httpx.Response(200, json={"hello": "world"}),
            httpx.Response(302, headers={"location": "http://elsewhere"}),
        ],
    )
    async def test_something_else_answers(self, response: httpx.Response) -> None:
        transport = httpx.MockTransport(lambda _: response)
        with pytest.raises(errors.ProtocolError, match="base_url"):
            async with AsyncServiceClient("http://service.test", KEY, transport=transport):
                pass

    async def test_wrong_key(self) -> None:
        transport = httpx.MockTransport(lambda r: httpx.Response(401, json={"detail": f"bad {r.headers['x-api-key']}"}))
        with pytest.raises(errors.AuthenticationError, match="check the API key") as e:
            async with AsyncServiceClient("http://service.test", KEY, transport=transport):
                pass
        assert KEY not in str(e.value)
        assert KEY not in repr(AsyncServiceClient("http://service.test", KEY))

    async def test_what_the_service_has_to_say_is_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        def handle(request: httpx.Request) -> httpx.Response:
            said = {"info_message": "hello", "warning_message": f"{KEY} ends soon", "error_message": None}
            return httpx.Response(200, json={"session_id": "s", **said})

        with caplog.at_level("INFO", "fwasync.session"):
            async with AsyncServiceClient("http://service.test", KEY, transport=httpx.MockTransport(handle)):
                pass
        records = [record for record in caplog.records if record.name == "fwasync.session"]
        assert [(record.levelname, record.getMessage()) for record in records] == [
            ("INFO", "the service says: hello"),
            ("WARNING", "the service says: *** ends soon"),
        ]
