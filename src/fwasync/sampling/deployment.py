"""`AsyncDeploymentSampler`: completions of token ids from a deployment, thousands at a time.

Invariants
    * Each attempt holds a slot of the concurrency controller while it is on the wire, and never while it pauses.
    * The completions of a group succeed together; the first failure, or a cancellation, ends the others.
    * Whatever ends a request here closes it on the wire.
    * Closing the sampler ends what is in progress on it.
"""

from __future__ import annotations

import itertools
import operator
import random
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Protocol, Self, TypedDict, Unpack

import anyio

from fwasync._http.client import Answer, Http, Streamed, Unanswered
from fwasync._http.reading import read
from fwasync._http.slices import in_slices
from fwasync._http.transport import Transport
from fwasync._wire.completions import EVENT_STREAM, PATH, Completion, LongCompletion, encode_group
from fwasync._wire.messages import encode
from fwasync.errors import ClosedError, FwasyncError, UsageError
from fwasync.sampling.attempts import AttemptPolicy, Attempts
from fwasync.sampling.calls import Calls
from fwasync.sampling.completions import (
    CompletionOptions,
    CompletionReader,
    SampledCompletion,
    completion_request,
    only_choice,
)
from fwasync.sampling.concurrency import AdaptiveConcurrencyController, ConcurrencyController
from fwasync.sampling.server_metrics import ServerMetrics, read_metrics
from fwasync.sampling.stream import CompletionStream

__all__ = ("AsyncDeploymentSampler", "ChatTokenizer", "SamplingOptions")

_MOST_METRICS = 65_536
_LONG = 128 * 1024  # bytes of an answer that are read in one go
_PATH = PATH.removeprefix("/")


class ChatTokenizer(Protocol):
    """What is needed of a tokenizer; those of `transformers` have it."""

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """The token ids of a conversation."""
        ...

    def decode(self, token_ids: Any) -> Any:
        """The text of token ids."""
        ...


class SamplingOptions(TypedDict, total=False):
    """The keyword arguments of sampling; `CompletionOptions` tells their meanings and defaults."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    stop: str | Sequence[str | int] | None
    seed: int | None
    logprobs: bool
    echo: bool
    echo_last: int | None
    include_routing_matrix: bool
    prompt_cache_key: str | None
    max_seq_len: int | None
    http_timeout: float


class AsyncDeploymentSampler:
    """Samples from a deployment. Use it inside `async with`; any number of tasks may sample at the same time.

    ```python
    async with AsyncDeploymentSampler(url, "accounts/acme/deployments/dep1", key) as sampler:
        group = await sampler.sample_with_prompt_tokens(prompt, n=8, max_tokens=256, logprobs=True)
    ```

    Args:
        inference_url: The service's origin, such as https://api.fireworks.ai.
        model: Full name of the deployment or model.
        api_key: Its key; it is never shown.
        tokenizer: For messages, and for stops that are token ids.
        concurrency: How many requests run at a time; one controller may serve several samplers. Unset: a new
            `AdaptiveConcurrencyController`.
        attempts: When a request is repeated.
        additional_headers: Sent with each request.
        transport: Another httpx transport.

    Raises:
        UsageError: The URL is none, or `model` is empty.
    """

    def __init__(
        self,
        inference_url: str,
        model: str,
        api_key: str,
        tokenizer: ChatTokenizer | None = None,
        concurrency: ConcurrencyController | None = None,
        *,
        attempts: AttemptPolicy | None = None,
        additional_headers: Mapping[str, str] | None = None,
        transport: Transport | None = None,
    ) -> None:
        if not model:
            raise UsageError("model is empty; give the full name, such as accounts/acme/deployments/dep1")
        self.model = model
        self.concurrency = concurrency or AdaptiveConcurrencyController()
        self._http = Http(inference_url, api_key, transport=transport, prefix="", bearer=True)
        self._tokenizer = tokenizer
        self._policy = attempts or AttemptPolicy()
        self._headers = dict(additional_headers or {})
        self._metrics: deque[ServerMetrics] = deque(maxlen=_MOST_METRICS)
        self._calls = Calls("the sampler")
        self._id = uuid.uuid4().hex[:24]
        self._numbers = itertools.count()
        self._is_open = False

    def __repr__(self) -> str:
        return f"<AsyncDeploymentSampler {self.model} at {self._http.base_url}>"

    async def __aenter__(self) -> Self:
        self._is_open = True
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the sampler: samples and streams in progress end with `ClosedError`, and their requests are closed.

        Leaving its block does it.

        **Cancellation:** it is closed all the same.
        """
        self._is_open = False
        await self._calls.end()
        await self._http.__aexit__(None, None, None)

    def drain_metrics(self) -> list[ServerMetrics]:
        """The metrics of the attempts since the last call, failed ones included; at most the newest 65,536."""
        drained = list(self._metrics)
        self._metrics.clear()
        return drained

    async def sample_with_tokens(
        self, messages: Sequence[Mapping[str, Any]], n: int = 1, **options: Unpack[SamplingOptions]
    ) -> list[SampledCompletion]:
        """Sample completions of a conversation, which the tokenizer's chat template makes a prompt of.

        Raises:
            UsageError: There is no tokenizer; else as for `sample_with_prompt_tokens`.

        **Cancellation:** as for `sample_with_prompt_tokens`.
        """
        if self._tokenizer is None:
            raise UsageError("sample_with_tokens needs a tokenizer: AsyncDeploymentSampler(..., tokenizer=...)")
        prompt = self._tokenizer.apply_chat_template(
            list(messages), tokenize=True, add_generation_prompt=True, return_dict=False
        )
        return await self.sample_with_prompt_tokens(prompt, n, **options)

    async def sample_with_prompt_tokens(
        self, prompt_token_ids: Sequence[int], n: int = 1, **options: Unpack[SamplingOptions]
    ) -> list[SampledCompletion]:
        """Sample a group of completions of a prompt, each by a request of its own.

        Args:
            prompt_token_ids: The prompt.
            n: How many completions.
            **options: See `CompletionOptions`.

        Returns:
            The completions, in the order of their seeds. Those that are longer than `max_seq_len` together with their
            prompt are left out; for a prompt that fills it already, nothing is sent, and the list is empty.

        Raises:
            UsageError: The prompt is empty, `n` less than one, or an option out of its range; nothing was sent.
            ServiceError: A refusal, or an answer that is none (`ProtocolError`).
            TransportError: No answer after all attempts.
            ClosedError: The sampler was closed.

        **Cancellation:** the requests of the whole group are closed.
        """
        asked, prompt, stop = self._asked(prompt_token_ids, options)
        if n < 1:
            raise UsageError(f"n is {n}; ask for at least one completion")
        if asked.max_seq_len is not None and len(prompt) >= asked.max_seq_len:
            return []
        bodies = encode_group(completion_request(self.model, prompt, asked, stop=stop, stream=False), n)
        with self._calls.call():
            if n == 1:
                group = [await self._complete(bodies[0], prompt, asked)]
            else:
                group = await self._complete_group(bodies, prompt, asked)
        most = asked.max_seq_len
        return [each for each in group if most is None or len(each.full_tokens) <= most]

    @asynccontextmanager
    async def stream_with_prompt_tokens(
        self, prompt_token_ids: Sequence[int], **options: Unpack[SamplingOptions]
    ) -> AsyncGenerator[CompletionStream]:
        """Sample one completion, and get it in pieces as they come.

        ```python
        async with sampler.stream_with_prompt_tokens(prompt, max_tokens=256) as stream:
            async for piece in stream:
                print(piece.text, end="")
        completion = stream.completion
        ```

        The request is repeated until its answer begins; an answer that breaks off is not. `max_seq_len` is refused.

        Raises:
            UsageError: The prompt is empty, or an option is out of its range.
            ServiceError: A refusal, on entering.
            TransportError: On entering, no answer after all attempts.
            StreamBrokenError: In the loop: the answer broke off. What had come was given out.
            ClosedError: The sampler was closed, which ends the block.

        **Cancellation:** leaving the block, in whatever way, closes the request and frees its slot.
        """
        asked, prompt, stop = self._asked(prompt_token_ids, options)
        if asked.max_seq_len is not None:
            raise UsageError("max_seq_len is for whole completions; stop reading the stream instead")
        body = [encode(completion_request(self.model, prompt, asked, stop=stop, stream=True))]
        with self._calls.call(is_block=True):
            headers, attempts, started = self._request_headers(), Attempts(self._policy), anyio.current_time()
            for retry in itertools.count():
                async with self.concurrency.slot() as slot:
                    outcome: Answer | Unanswered | Streamed
                    try:
                        outcome = await self._http.stream(
                            "POST", _PATH, body, accept=EVENT_STREAM, headers=headers, timeout=asked.http_timeout
                        )
                    except Unanswered as error:
                        outcome = error
                    if isinstance(outcome, Streamed):
                        async with outcome:
                            reader = CompletionReader(prompt, asked)
                            stream = CompletionStream(outcome, reader, started=slot.began, refusal=self._refusal)
                            try:
                                yield stream
                            finally:
                                metrics = stream.metrics(retry=retry)
                                slot.observation = metrics.observation() if stream.is_complete else None
                                self._metrics.append(metrics)
                        return
                    slot.observation = self._failure(outcome, retry, slot.age_s).observation()
                await self._pause(attempts, outcome, started)

    # -- one request -------------------------------------------------------------------------------

    def _refusal(self, answer: Answer) -> Exception:
        return self._http.refusal(answer, "completions")

    async def _complete_group(
        self, bodies: list[list[bytes]], prompt: list[int], options: CompletionOptions
    ) -> list[SampledCompletion]:
        sampled: dict[int, SampledCompletion] = {}
        failures: list[FwasyncError] = []

        async def one(number: int, body: list[bytes]) -> None:
            try:
                sampled[number] = await self._complete(body, prompt, options)
            except FwasyncError as error:
                failures.append(error)
                group.cancel_scope.cancel()

        async with anyio.create_task_group() as group:
            for number, body in enumerate(bodies):
                group.start_soon(one, number, body)
        if failures:
            raise failures[0]
        return [sampled[number] for number in range(len(bodies))]

    async def _complete(self, body: list[bytes], prompt: list[int], options: CompletionOptions) -> SampledCompletion:
        headers, attempts, started = self._request_headers(), Attempts(self._policy), anyio.current_time()
        for retry in itertools.count():
            async with self.concurrency.slot() as slot:
                outcome: Answer | Unanswered
                try:
                    outcome = await self._http.attempt(
                        "POST", _PATH, body, headers=headers, timeout=options.http_timeout
                    )
                except Unanswered as error:
                    outcome = error
                latency = slot.age_s
                if isinstance(outcome, Answer) and 200 <= outcome.status < 300:
                    reader = CompletionReader(prompt, options)
                    answer = await _read(outcome.body, reader)
                    metrics = read_metrics(
                        outcome.headers,
                        answer.perf_metrics,
                        status=outcome.status,
                        retry=retry,
                        latency_s=latency,
                        completion_tokens=answer.usage and answer.usage.completion_tokens,
                    )
                    self._metrics.append(metrics)
                    slot.observation = metrics.observation()
                    return reader.completion()
                slot.observation = self._failure(outcome, retry, latency).observation()
            await self._pause(attempts, outcome, started)
        raise AssertionError("unreachable: a pause after the last attempt raises")

    def _failure(self, failure: Answer | Unanswered, retry: int, latency_s: float) -> ServerMetrics:
        if isinstance(failure, Answer):
            metrics = read_metrics(failure.headers, status=failure.status, retry=retry, latency_s=latency_s)
        else:
            metrics = ServerMetrics(retry_attempt=retry, client_latency=latency_s, error=str(failure))
        self._metrics.append(metrics)
        return metrics

    async def _pause(self, attempts: Attempts, failure: Answer | Unanswered, started: float) -> None:
        if isinstance(failure, Answer):
            status, wanted = failure.status, failure.retry_after_s
        else:
            status, wanted = None, None
        attempts.reached |= isinstance(failure, Answer) or failure.connected
        pause = attempts.pause(status, jitter=random.random(), retry_after_s=wanted)
        if pause is None:
            took = anyio.current_time() - started
            raise self._http.given_up(failure, "completions", attempts.failed, took, reached=attempts.reached)
        await anyio.sleep(pause)

    def _request_headers(self) -> dict[str, str]:
        if not self._is_open:
            raise ClosedError("the sampler is not open: use it as `async with AsyncDeploymentSampler(...) as sampler:`")
        # One id for all attempts, by which the service's logs tell them for one request: unique, and so in order.
        return self._headers | {"x-request-id": f"{self._id}{next(self._numbers):08x}"}

    def _asked(
        self, prompt_token_ids: Sequence[int], options: SamplingOptions
    ) -> tuple[CompletionOptions, list[int], list[str] | None]:
        asked = CompletionOptions(**options)
        try:
            prompt = list(map(operator.index, prompt_token_ids))
        except TypeError as error:  # a text is none, nor are digits in one
            raise UsageError(f"prompt_token_ids must be token ids, whole numbers ({error}); tokenize texts") from None
        if not prompt:
            raise UsageError("prompt_token_ids is empty; a prompt has at least one token")
        return asked, prompt, self._stops(asked.stop)

    def _stops(self, stop: str | Sequence[str | int] | None) -> list[str] | None:
        if not stop:
            return None
        if isinstance(stop, str):
            return [stop]
        if self._tokenizer is None and not all(isinstance(entry, str) for entry in stop):
            raise UsageError("stop has token ids, which need a tokenizer: AsyncDeploymentSampler(..., tokenizer=...)")
        return [entry if isinstance(entry, str) else str(self._decoded(entry)) for entry in stop]

    def _decoded(self, token: int) -> Any:
        assert self._tokenizer is not None
        return self._tokenizer.decode([token])


async def _read(body: bytes, reader: CompletionReader) -> Completion:
    """Read an answer; other tasks run meanwhile if it is long."""
    if len(body) > _LONG:
        long = LongCompletion(body)
        await in_slices(map(reader.add_rows, long.rows()))
        body = long.rest()
    answer = read("completions", body, Completion)
    reader.add(only_choice(answer))
    return answer
