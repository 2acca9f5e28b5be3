"""The deployment sampler on a transport that answers from a script, on virtual time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import anyio.lowlevel
import httpx
import pytest

from fwasync import errors
from fwasync.sampling.aimd import AimdSettings, Observation
from fwasync.sampling.concurrency import AdaptiveConcurrencyController, FixedConcurrencyController
from fwasync.sampling.deployment import AsyncDeploymentSampler
from fwasync.testing import virtual_time
from support.raw_server import Peer, raw_server

KEY = "fw-very-secret"
MODEL = "accounts/acme/deployments/dep1"
PROMPT = [1, 2, 3, 4]
Handler = Callable[[httpx.Request], Awaitable[httpx.Response]]


def row(token: int, logprob: float | None = -0.1, **more: Any) -> dict[str, Any]:
    return {"token": "x", "token_id": token, "logprob": logprob, **more}


def body(ids: list[int], rows: list[dict[str, Any]] | None = None, **more: Any) -> dict[str, Any]:
    choice = {
        "index": 0,
        "text": "Hello",
        "finish_reason": "stop",
        "raw_output": {"prompt_token_ids": PROMPT, "completion_token_ids": ids},
        "logprobs": None if rows is None else {"content": rows},
    }
    usage = {"prompt_tokens": 4, "completion_tokens": 2, "total_tokens": 6}
    return {"id": "cmpl-1", "choices": [choice], "usage": usage, **more}


def good(ids: list[int] | None = None, rows: list[dict[str, Any]] | None = None, **more: Any) -> httpx.Response:
    return httpx.Response(200, json=body(ids or [5, 6], rows, **more))


def sampler(*steps: httpx.Response | Exception | Handler, **options: Any) -> tuple[AsyncDeploymentSampler, list[Any]]:
    """A sampler whose service answers with these in turn, and then always with the last."""
    seen: list[httpx.Request] = []

    async def handle(request: httpx.Request) -> httpx.Response:
        await request.aread()
        step = steps[min(len(seen), len(steps) - 1)]
        seen.append(request)
        if isinstance(step, Exception):
            raise step
        return step if isinstance(step, httpx.Response) else await step(request)

    transport = httpx.MockTransport(handle)
    return AsyncDeploymentSampler("http://service.test", MODEL, KEY, transport=transport, **options), seen


def endless() -> tuple[Handler, list[float]]:
    """A service that never answers, and when its requests were ended."""
    ended: list[float] = []

    async def stuck(_: httpx.Request) -> httpx.Response:
        try:
            await anyio.sleep_forever()
        finally:
            ended.append(anyio.current_time())
        raise AssertionError

    return stuck, ended


@virtual_time
async def test_what_is_sent_and_what_comes_back() -> None:
    client, seen = sampler(good(rows=[row(5, -0.1), row(6, -0.2, sampling_logprob=-0.3)]))
    async with client:
        [completion] = await client.sample_with_prompt_tokens(PROMPT, max_tokens=16, logprobs=True, stop="x", seed=3)
    assert json.loads(seen[0].content) == {
        "model": MODEL,
        "prompt": PROMPT,
        "n": 1,
        "max_tokens": 16,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "stop": ["x"],
        "seed": 3,
        "stream": False,
        "logprobs": True,
        "raw_output": True,
        "perf_metrics_in_response": True,
    }
    assert str(seen[0].url) == "http://service.test/inference/v1/completions"
    assert seen[0].headers["authorization"] == f"Bearer {KEY}"
    assert completion.full_tokens == [1, 2, 3, 4, 5, 6]
    assert (completion.prompt_len, completion.completion_len, completion.finish_reason) == (4, 2, "stop")
    assert completion.completion_tokens == [5, 6]
    assert completion.inference_logprobs == [-0.1, -0.2]
    assert completion.sampling_logprobs == [None, -0.3]
    assert not completion.logprobs_echoed
    assert not completion.truncated
    assert KEY not in repr(client)


@virtual_time
async def test_a_group_is_one_request_each_with_a_seed_of_its_own() -> None:
    async def of_its_seed(request: httpx.Request) -> httpx.Response:
        seed = json.loads(request.content)["seed"]
        await anyio.sleep(10 - seed)
        return good([seed])

    client, seen = sampler(of_its_seed)
    async with client:
        group = await client.sample_with_prompt_tokens(PROMPT, 4, seed=5)
    assert [each.completion_tokens for each in group] == [[5], [6], [7], [8]]
    assert len({request.headers["x-request-id"] for request in seen}) == 4


@virtual_time
async def test_one_failure_ends_the_group() -> None:
    ended: list[float] = []

    async def stuck(request: httpx.Request) -> httpx.Response:
        if json.loads(request.content)["seed"] == 2:
            await anyio.sleep(1)
            return httpx.Response(400, json={"error": {"message": "no such thing"}})
        try:
            await anyio.sleep_forever()
        finally:
            ended.append(anyio.current_time())
        raise AssertionError

    client, _ = sampler(stuck)
    async with client:
        with pytest.raises(errors.BadRequestError, match="no such thing"):
            await client.sample_with_prompt_tokens(PROMPT, 4, seed=0)
        assert ended == pytest.approx([1, 1, 1])
        assert client.concurrency.in_flight == 0


@virtual_time
async def test_a_group_is_cancelled_wherever_its_members_are() -> None:
    """A group is one call: whoever cancels it ends every request, waiting, running or in a pause."""
    seen_at: list[float] = []

    async def refuse(request: httpx.Request) -> httpx.Response:
        seen_at.append(anyio.current_time())
        if json.loads(request.content)["seed"] == 0:
            return httpx.Response(503)
        await anyio.sleep_forever()
        raise AssertionError

    client, _ = sampler(refuse, concurrency=FixedConcurrencyController(2))
    async with client, anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: client.sample_with_prompt_tokens(PROMPT, 5, seed=0))
        await anyio.sleep(0.5)
        assert (client.concurrency.in_flight, client.concurrency.waiting) == (2, 2)  # and one in its pause
        tasks.cancel_scope.cancel()
    await anyio.sleep(100)
    assert len(seen_at) == 3
    assert (client.concurrency.in_flight, client.concurrency.waiting) == (0, 0)


@virtual_time
async def test_a_cancellation_closes_all_requests_and_frees_their_slots() -> None:
    stuck, ended = endless()
    client, _ = sampler(stuck, concurrency=FixedConcurrencyController(3))
    async with client:
        with anyio.move_on_after(5):
            await client.sample_with_prompt_tokens(PROMPT, 8)
        assert ended == pytest.approx([5, 5, 5])
        assert (client.concurrency.in_flight, client.concurrency.waiting) == (0, 0)
        assert client.drain_metrics() == []


@virtual_time
async def test_one_completion_ends_as_a_group_does() -> None:
    """It runs in its caller's task; whatever ends it closes its request, and comes as it is."""
    stuck, ended = endless()
    client, _ = sampler(stuck)
    async with client:
        with anyio.move_on_after(5) as scope:
            await client.sample_with_prompt_tokens(PROMPT)
        assert scope.cancelled_caught
        assert ended == pytest.approx([5])
        assert (client.concurrency.in_flight, client.drain_metrics()) == (0, [])

    async def one() -> None:
        with pytest.raises(errors.ClosedError, match="the sampler was closed"):
            await client.sample_with_prompt_tokens(PROMPT)

    client, _ = sampler(stuck)
    async with anyio.create_task_group() as tasks:
        async with client:
            tasks.start_soon(one)
            await anyio.sleep(2)
        assert ended == pytest.approx([5, 7])

    async def broken(_: httpx.Request) -> httpx.Response:
        raise ZeroDivisionError

    for failing, expected in ((httpx.Response(400), errors.BadRequestError), (broken, ZeroDivisionError)):
        client, _ = sampler(failing)
        async with client:
            with pytest.raises(expected):
                await client.sample_with_prompt_tokens(PROMPT)
            assert client.concurrency.in_flight == 0


@virtual_time
async def test_samplers_share_a_controller() -> None:
    running, most = 0, 0

    async def count(_: httpx.Request) -> httpx.Response:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await anyio.sleep(1)
        running -= 1
        return good()

    controller = FixedConcurrencyController(5)
    first, _ = sampler(count, concurrency=controller)
    second, _ = sampler(count, concurrency=controller)
    async with first, second, anyio.create_task_group() as group:
        group.start_soon(first.sample_with_prompt_tokens, PROMPT, 10)
        group.start_soon(second.sample_with_prompt_tokens, PROMPT, 10)
    assert most == 5
    assert anyio.current_time() == pytest.approx(4)


# -- echo ------------------------------------------------------------------------------------------


@virtual_time
async def test_an_echo_is_taken_off_and_its_logprobs_align_with_the_next_tokens() -> None:
    rows = [row(1, 0.0), row(2, -2.0), row(3, -3.0), row(4, -4.0), row(5, -5.0), row(6, -6.0)]
    client, _ = sampler(good([1, 2, 3, 4, 5, 6], rows))
    async with client:
        [completion] = await client.sample_with_prompt_tokens(PROMPT, echo=True, logprobs=True)
    assert completion.full_tokens == [1, 2, 3, 4, 5, 6]
    assert completion.completion_len == 2
    assert completion.inference_logprobs == [-2.0, -3.0, -4.0, -5.0, -6.0]
    assert len(completion.inference_logprobs) == len(completion.full_tokens[1:])
    assert completion.logprobs_echoed
    assert completion.echoed_prompt_logprob_count == 3


@virtual_time
async def test_an_echo_of_the_last_tokens_drops_no_row() -> None:
    rows = [row(3, -3.0), row(4, -4.0), row(5, -5.0), row(6, -6.0)]
    client, _ = sampler(good([3, 4, 5, 6], rows))
    async with client:
        [completion] = await client.sample_with_prompt_tokens(PROMPT, echo_last=2, logprobs=True)
    assert completion.full_tokens == [1, 2, 3, 4, 5, 6]
    assert completion.inference_logprobs == [-3.0, -4.0, -5.0, -6.0]
    assert (completion.logprobs_echoed, completion.echoed_prompt_logprob_count) == (False, 2)


@pytest.mark.parametrize(
    ("answer", "options", "says"),
    [
        (body([9, 2, 3, 4, 5]), {"echo": True}, "first 4 token ids"),
        (body([5, 6], [row(5)]), {"logprobs": True}, "2 token ids and 1 rows"),
        ({"choices": []}, {}, "0 choices"),
        ({"choices": [{"text": "a"}]}, {}, "no token ids"),
        ({"choices": 3}, {}, r"choices"),
    ],
)
def test_an_answer_that_is_none(answer: dict[str, Any], options: dict[str, Any], says: str) -> None:
    @virtual_time
    async def scenario() -> None:
        client, seen = sampler(httpx.Response(200, json=answer))
        async with client:
            with pytest.raises(errors.ProtocolError, match=says):
                await client.sample_with_prompt_tokens(PROMPT, **options)
        assert len(seen) == 1

    scenario()


@virtual_time
async def test_logprobs_are_all_there_or_none() -> None:
    client, _ = sampler(good(rows=[row(5), row(6, None)]), good(rows=[row(5, -1.0), row(6, -2.0)]))
    async with client:
        [first] = await client.sample_with_prompt_tokens(PROMPT, logprobs=True)
        [second] = await client.sample_with_prompt_tokens(PROMPT, logprobs=True)
        [third] = await client.sample_with_prompt_tokens(PROMPT, logprobs=True, temperature=0.5)
    assert (first.inference_logprobs, first.sampling_logprobs) == (None, None)
    assert second.sampling_logprobs == second.inference_logprobs == [-1.0, -2.0]
    assert third.sampling_logprobs is None


ECHOED = [row(1, 0.0, routing_matrix="A"), row(2, -2.0), row(3, -3.0, routing_matrix="C"), row(4, -4.0)]
GROWN = [row(5, -5.0, routing_matrix="E"), row(6, -6.0)]


@pytest.mark.parametrize(
    ("options", "ids", "rows", "matrices"),
    [
        ({}, [5, 6], GROWN, ["E", ""]),
        ({"logprobs": True}, [5, 6], GROWN, ["E", ""]),
        ({"echo": True}, [1, 2, 3, 4, 5, 6], ECHOED + GROWN, ["", "C", "", "E", ""]),
        ({"echo_last": 2, "logprobs": True}, [3, 4, 5, 6], ECHOED[2:] + GROWN, ["C", "", "E", ""]),
        ({"echo_last": 9}, [1, 2, 3, 4, 5, 6], ECHOED + GROWN, ["", "C", "", "E", ""]),
        ({}, [5, 6], [row(5), row(6)], None),
        ({}, [5, 6], None, None),
    ],
)
def test_routing_matrices_are_in_the_places_of_the_logprobs(
    options: dict[str, Any], ids: list[int], rows: list[dict[str, Any]] | None, matrices: list[str] | None
) -> None:
    @virtual_time
    async def scenario() -> None:
        client, seen = sampler(good(ids, rows))
        async with client:
            [completion] = await client.sample_with_prompt_tokens(PROMPT, include_routing_matrix=True, **options)
            [without] = await client.sample_with_prompt_tokens(PROMPT, **options)
        assert completion.routing_matrices == matrices
        assert without.routing_matrices is None
        if completion.inference_logprobs is not None and matrices is not None:
            assert len(completion.inference_logprobs) == len(matrices)
        sent = json.loads(seen[0].content)
        assert (sent["include_routing_matrix"], sent.get("echo"), sent.get("echo_last")) == (
            True,
            options.get("echo"),
            options.get("echo_last"),
        )
        assert "include_routing_matrix" not in json.loads(seen[1].content)

    scenario()


@virtual_time
async def test_logprobs_of_the_old_format_are_none() -> None:
    answer = body([5, 6])
    answer["choices"][0]["logprobs"] = {"tokens": ["a", "b"], "token_logprobs": [-0.1, -0.2]}
    client, _ = sampler(httpx.Response(200, json=answer))
    async with client:
        [completion] = await client.sample_with_prompt_tokens(PROMPT, logprobs=True)
    assert (completion.inference_logprobs, completion.routing_matrices) == (None, None)


@virtual_time
async def test_a_prompt_that_was_expanded_is_the_one_that_was_read() -> None:
    expanded = body([5, 6])
    expanded["choices"][0]["raw_output"]["prompt_token_ids"] = [1, 2, 9, 9, 3, 4]
    untold = body([5, 6])
    del untold["choices"][0]["raw_output"]["prompt_token_ids"]
    client, _ = sampler(httpx.Response(200, json=expanded), httpx.Response(200, json=untold))
    async with client:
        [first] = await client.sample_with_prompt_tokens(PROMPT)
        [second] = await client.sample_with_prompt_tokens(PROMPT)
    assert (first.full_tokens, first.prompt_len) == ([1, 2, 9, 9, 3, 4, 5, 6], 6)
    assert (second.full_tokens, second.prompt_len) == ([1, 2, 3, 4, 5, 6], 4)


@virtual_time
async def test_while_a_long_answer_is_read_others_run() -> None:
    count = 30_000
    rows = [row(number, -number / 7, sampling_logprob=-number / 9) for number in range(count)]
    client, _ = sampler(good(), good(list(range(count)), rows))
    steps = 0

    async def tick() -> None:
        nonlocal steps
        while True:
            await anyio.lowlevel.checkpoint()
            steps += 1

    async with client, anyio.create_task_group() as tasks:
        tasks.start_soon(tick)
        await client.sample_with_prompt_tokens(PROMPT)
        of_a_short_one, steps = steps, 0
        [long] = await client.sample_with_prompt_tokens(PROMPT, logprobs=True)
        tasks.cancel_scope.cancel()
    assert steps > of_a_short_one
    assert long.inference_logprobs == pytest.approx([-number / 7 for number in range(count)])
    assert long.sampling_logprobs == pytest.approx([-number / 9 for number in range(count)])


# -- filters ---------------------------------------------------------------------------------------


@virtual_time
async def test_long_prompts_are_not_sent_and_long_completions_not_kept() -> None:
    client, seen = sampler(good())
    async with client:
        assert await client.sample_with_prompt_tokens(PROMPT, max_seq_len=4) == []
        assert seen == []
        assert await client.sample_with_prompt_tokens(PROMPT, max_seq_len=5) == []
        assert len(await client.sample_with_prompt_tokens(PROMPT, max_seq_len=6)) == 1


# -- retries ---------------------------------------------------------------------------------------


@virtual_time
async def test_a_busy_service_is_asked_again_without_holding_a_slot() -> None:
    client, seen = sampler(
        httpx.Response(429, headers={"retry-after": "20"}),
        httpx.ReadError("reset"),
        httpx.Response(503),
        good(perf_metrics={"prefill-queue-duration": "0.003", "cached-prompt-tokens": "1", "prompt-tokens": 4}),
        concurrency=AdaptiveConcurrencyController(AimdSettings(initial_window=16)),
    )
    async with client, anyio.create_task_group() as group:
        group.start_soon(client.sample_with_prompt_tokens, PROMPT)
        await anyio.sleep(1)
        assert client.concurrency.in_flight == 0
    assert 20 + 2 + 4 <= anyio.current_time() <= 20 + 6 + 12
    assert len({request.headers["x-request-id"] for request in seen}) == 1
    metrics = client.drain_metrics()
    assert [each.http_status_code for each in metrics] == [429, None, 503, 200]
    assert [each.retry_attempt for each in metrics] == [0, 1, 2, 3]
    assert metrics[1].error == "reset"
    assert (metrics[3].prefill_queue_duration, metrics[3].cached_prompt_tokens) == (0.003, 1)
    assert metrics[3].completion_tokens == 2
    assert client.concurrency.window_size == 2  # three refusals, each halves it
    assert client.drain_metrics() == []


@pytest.mark.parametrize("wanted", ["120", "Thu, 01 Jan 2099 00:00:00 GMT"])
def test_who_is_to_wait_for_long_waits_for_the_longest_pause(wanted: str) -> None:
    @virtual_time
    async def run() -> None:
        client, _ = sampler(httpx.Response(429, headers={"retry-after": wanted}), good())
        async with client:
            assert await client.sample_with_prompt_tokens(PROMPT)
        assert anyio.current_time() == pytest.approx(30)

    run()


@virtual_time
async def test_seven_attempts_and_no_more() -> None:
    client, seen = sampler(httpx.Response(503, text=f"down {KEY}"))
    async with client:
        with pytest.raises(errors.ServiceUnavailableError, match=r"down \*\*\*"):
            await client.sample_with_prompt_tokens(PROMPT)
    assert len(seen) == 7
    client, seen = sampler(httpx.ConnectError("refused"))
    async with client:
        with pytest.raises(errors.ServiceUnreachableError, match="after 7 attempts"):
            await client.sample_with_prompt_tokens(PROMPT)
    client, _ = sampler(httpx.Response(503), httpx.ConnectError("refused"))
    async with client:
        with pytest.raises(errors.RetryBudgetExhaustedError, match=r"no answer .* after 7 attempts"):
            await client.sample_with_prompt_tokens(PROMPT)


@virtual_time
async def test_an_attempt_that_takes_too_long_is_repeated() -> None:
    async def never(_: httpx.Request) -> httpx.Response:
        await anyio.sleep_forever()
        raise AssertionError

    client, seen = sampler(never, good())
    async with client:
        assert await client.sample_with_prompt_tokens(PROMPT, http_timeout=3)
    assert len(seen) == 2
    assert anyio.current_time() >= 4


@virtual_time
async def test_a_deployment_that_is_not_there_may_be_swapping() -> None:
    client, seen = sampler(httpx.Response(404), httpx.Response(425), good())
    async with client:
        assert await client.sample_with_prompt_tokens(PROMPT)
    assert anyio.current_time() == pytest.approx(10)
    client, seen = sampler(httpx.Response(404))
    async with client:
        with pytest.raises(errors.NotFoundError):
            await client.sample_with_prompt_tokens(PROMPT)
    assert len(seen) == 11


@virtual_time
async def test_a_refusal_is_final() -> None:
    client, seen = sampler(httpx.Response(401))
    async with client:
        with pytest.raises(errors.AuthenticationError):
            await client.sample_with_prompt_tokens(PROMPT)
    assert len(seen) == 1


@virtual_time
async def test_metrics_are_read_from_headers_too() -> None:
    headers = {"fireworks-prefill-queue-duration": "0.25", "num-concurrent-requests": "nonsense", "x-request-id": "r1"}
    client, _ = sampler(httpx.Response(200, json=body([5]), headers=headers))
    async with client:
        await client.sample_with_prompt_tokens(PROMPT)
    [metrics] = client.drain_metrics()
    assert (metrics.prefill_queue_duration, metrics.response_request_id) == (0.25, "r1")
    assert metrics.num_concurrent_requests is None


@virtual_time
async def test_a_controller_learns_the_latency_of_whole_answers_and_the_first_token_of_streams() -> None:
    async def slow(_: httpx.Request) -> httpx.Response:
        await anyio.sleep(3)
        return good()

    async def late() -> AsyncIterator[bytes]:
        await anyio.sleep(2)
        yield STREAM

    learned: list[Observation] = []

    class Learner(FixedConcurrencyController):
        def _learn(self, observation: Observation, began: float | None) -> None:
            learned.append(observation)

    streamed = httpx.Response(200, content=late())
    client, _ = sampler(slow, streamed, concurrency=Learner(1))
    async with client:
        await client.sample_with_prompt_tokens(PROMPT)
        async with client.stream_with_prompt_tokens(PROMPT) as stream:
            async for _ in stream:
                await anyio.sleep(10)  # the reader's own time
    whole, stream_told = learned
    assert (whole.ttft_s, whole.latency_s, whole.tokens) == (None, pytest.approx(3), 2)
    assert stream_told.ttft_s == pytest.approx(2)


# -- streams ---------------------------------------------------------------------------------------


def events(*messages: dict[str, Any], end: bytes = b"data: [DONE]\n\n") -> bytes:
    return b"".join(b"data: " + json.dumps(message).encode() + b"\n\n" for message in messages) + end


def piece(text: str, token: int) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text, "logprobs": {"content": [row(token, -0.1 * token)]}}]}


LAST = body([5, 6])
LAST["choices"][0] |= {"text": ""}
LAST["perf_metrics"] = {"prefill-queue-duration": "0.003"}
STREAM = events(piece("Hel", 5), piece("lo", 6), LAST)


@pytest.mark.parametrize("size", [1, 7, 100_000])
def test_a_stream_however_it_is_cut(size: int) -> None:
    async def cut() -> AsyncIterator[bytes]:
        for start in range(0, len(STREAM), size):
            yield STREAM[start : start + size]

    @virtual_time
    async def scenario() -> None:
        client, seen = sampler(httpx.Response(503), httpx.Response(200, content=cut()))
        async with client, client.stream_with_prompt_tokens(PROMPT, logprobs=True) as stream:
            with pytest.raises(errors.UsageError, match="to its end"):
                _ = stream.completion
            pieces = [each async for each in stream]
        assert [(each.text, each.token_ids) for each in pieces] == [("Hel", [5]), ("lo", [6]), ("", [])]
        assert pieces[-1].finish_reason == "stop"
        assert stream.completion.text == "Hello"
        assert stream.completion.full_tokens == [1, 2, 3, 4, 5, 6]
        assert stream.completion.inference_logprobs == pytest.approx([-0.5, -0.6])
        assert json.loads(seen[1].content)["stream"] is True
        assert seen[1].headers["accept"] == "text/event-stream"
        assert [each.prefill_queue_duration for each in client.drain_metrics()] == [None, 0.003]
        assert client.concurrency.in_flight == 0

    scenario()


@virtual_time
async def test_a_stream_that_breaks_off_is_an_error_and_is_not_repeated() -> None:
    client, seen = sampler(httpx.Response(200, content=events(piece("Hel", 5), end=b"")))
    async with client:
        texts: list[str] = []
        with pytest.raises(errors.StreamBrokenError, match="broke off"):
            async with client.stream_with_prompt_tokens(PROMPT) as stream:
                async for each in stream:
                    texts.append(each.text)
        assert texts == ["Hel"]
        assert len(seen) == 1
        assert client.concurrency.in_flight == 0


@virtual_time
async def test_what_goes_wrong_on_the_way_is_told_after_what_came_before() -> None:
    async def cut() -> AsyncIterator[bytes]:
        yield events(piece("Hel", 5), end=b"")
        raise httpx.ReadError("reset")

    fault = {"error": {"code": 503, "message": f"out of memory {KEY}"}}
    failing = httpx.Response(200, headers={"x-request-id": "r1"}, content=events(piece("Hel", 5), fault, end=b""))
    for answer, expected, says in (
        (httpx.Response(200, content=cut()), errors.StreamBrokenError, "reset"),
        (failing, errors.ServiceUnavailableError, r"out of memory \*\*\*"),
        (httpx.Response(200, content=b"data: {\n\n"), errors.ProtocolError, "no completion"),
    ):
        client, seen = sampler(answer)
        texts: list[str] = []
        async with client:
            with pytest.raises(expected, match=says) as caught:
                async with client.stream_with_prompt_tokens(PROMPT) as stream:
                    async for each in stream:
                        texts.append(each.text)
        assert getattr(caught.value, "request_id", None) == ("r1" if answer is failing else None)
        assert texts == ([] if expected is errors.ProtocolError else ["Hel"])
        assert len(seen) == 1


@virtual_time
async def test_closing_the_sampler_ends_what_is_in_progress() -> None:
    stuck, ended = endless()
    told: list[str] = []

    async def sample(options: dict[str, Any]) -> None:
        with pytest.raises(errors.ClosedError, match="the sampler was closed") as caught:
            await client.sample_with_prompt_tokens(PROMPT, 3, **options)
        told.append(str(caught.value))

    async def stream() -> None:
        with pytest.raises(errors.ClosedError, match="the sampler was closed") as caught:
            async with client.stream_with_prompt_tokens(PROMPT):
                raise AssertionError
        told.append(str(caught.value))

    client, seen = sampler(stuck, concurrency=FixedConcurrencyController(5))
    async with anyio.create_task_group() as tasks:
        async with client:
            tasks.start_soon(sample, {})
            tasks.start_soon(sample, {"seed": 1})  # some of it waits for a slot
            tasks.start_soon(stream)
            await anyio.sleep(2)
        assert ended == [2.0] * len(seen) == [2.0] * 5  # when the block has been left, all is over
    assert len(told) == 3
    assert (client.concurrency.in_flight, client.concurrency.waiting) == (0, 0)
    with pytest.raises(errors.ClosedError, match="not open"):
        await client.sample_with_prompt_tokens(PROMPT)


@virtual_time
async def test_closing_the_sampler_does_not_wait_for_a_block_that_goes_on() -> None:
    client, _ = sampler(httpx.Response(200, content=events(piece("Hel", 5), end=b"")))
    async with client:
        block = client.stream_with_prompt_tokens(PROMPT)
        await block.__aenter__()
        await client.aclose()
        with pytest.raises(anyio.get_cancelled_exc_class()) as cancelled:
            await anyio.sleep(1)
        with pytest.raises(errors.ClosedError):
            await block.__aexit__(cancelled.type, cancelled.value, cancelled.tb)


@pytest.mark.parametrize("how", ["cancel", "break", "raise"])
def test_leaving_a_stream_closes_the_request(how: str) -> None:
    class Endless(httpx.AsyncByteStream):
        closed = False

        async def __aiter__(self) -> AsyncIterator[bytes]:
            while True:
                yield events(piece("a", 5), end=b"")
                await anyio.sleep(1)

        async def aclose(self) -> None:
            self.closed = True

    @virtual_time
    async def scenario() -> None:
        endless = Endless()
        client, _ = sampler(httpx.Response(200, stream=endless))
        count = 0
        async with client:
            with pytest.raises(ZeroDivisionError) if how == "raise" else anyio.move_on_after(3.5):
                async with client.stream_with_prompt_tokens(PROMPT) as stream:
                    async for _ in stream:
                        count += 1
                        if count == 2 and how != "cancel":
                            if how == "raise":
                                raise ZeroDivisionError
                            break
            assert endless.closed
            assert count == (4 if how == "cancel" else 2)
            assert (client.concurrency.in_flight, client.concurrency.statistics().requests) == (0, 0)

    scenario()


# -- messages, stops, misuse -----------------------------------------------------------------------


class Tokenizer:
    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        assert options == {"tokenize": True, "add_generation_prompt": True, "return_dict": False}
        return [len(message["content"]) for message in conversation]

    def decode(self, token_ids: Any) -> Any:
        return f"<{token_ids[0]}>"


@virtual_time
async def test_messages_and_stops_by_token_id() -> None:
    client, seen = sampler(good(), tokenizer=Tokenizer())
    async with client:
        await client.sample_with_tokens([{"role": "user", "content": "hey"}], 1, stop=["x", 7])
    sent = json.loads(seen[0].content)
    assert (sent["prompt"], sent["stop"]) == ([3], ["x", "<7>"])


@virtual_time
async def test_misuse_sends_nothing() -> None:
    client, seen = sampler(good())
    with pytest.raises(errors.ClosedError, match="async with"):
        await client.sample_with_prompt_tokens(PROMPT)
    async with client:
        for says, prompt, n, options in (
            ("prompt_token_ids is empty", [], 1, {}),
            ("must be token ids", "123", 1, {}),
            ("must be token ids", [1.5], 1, {}),
            ("must be token ids", None, 1, {}),
            ("n is 0", PROMPT, 0, {}),
            ("temperature is nan", PROMPT, 1, {"temperature": float("nan")}),
            ("temperature is -1", PROMPT, 1, {"temperature": -1}),
            ("max_tokens is -1", PROMPT, 1, {"max_tokens": -1}),
            ("http_timeout is 0", PROMPT, 1, {"http_timeout": 0}),
            ("need a tokenizer", PROMPT, 1, {"stop": [7]}),
        ):
            with pytest.raises(errors.UsageError, match=says):
                await client.sample_with_prompt_tokens(prompt, n, **options)
        with pytest.raises(errors.UsageError, match="needs a tokenizer"):
            await client.sample_with_tokens([])
        with pytest.raises(TypeError, match="temprature"):
            await client.sample_with_prompt_tokens(PROMPT, temprature=1.0)
        with pytest.raises(errors.UsageError, match="max_seq_len"):
            async with client.stream_with_prompt_tokens(PROMPT, max_seq_len=9):
                pass
    assert seen == []
    with pytest.raises(errors.UsageError, match="model is empty"):
        AsyncDeploymentSampler("http://service.test", "", KEY)


async def test_a_stream_that_is_read_to_its_end_leaves_nothing_to_close() -> None:
    """Done is told before the body ends: what reads it is left in the middle, and must not need a task for that."""
    answer = body([5, 6])
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    stream = events(answer)
    chunked = head + b"%x\r\n%s\r\n0\r\n\r\n" % (len(stream), stream)
    made: list[object] = []

    def task(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        made.append(coroutine)
        return asyncio.Task(coroutine, loop=loop, **options)

    async def answering(peer: Peer) -> None:
        while True:
            await peer.request()
            await peer.send(chunked)

    async def read() -> None:
        async with client.stream_with_prompt_tokens(PROMPT) as stream:
            async for _ in stream:
                pass
            assert stream.completion.completion_tokens == [5, 6]

    async with raw_server(answering) as server, AsyncDeploymentSampler(server.url, "m", KEY) as client:
        await read()
        asyncio.get_running_loop().set_task_factory(task)
        await read()
        await anyio.sleep(0.01)
        asyncio.get_running_loop().set_task_factory(None)
        assert server.accepted == 1
    assert made == []
