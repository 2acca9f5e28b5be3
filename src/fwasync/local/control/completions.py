"""Completions from what a deployment serves: whole, or each token as soon as it is sampled.

Invariants
    * A request is sampled from one set of weights, those of the moment when it came, whatever is loaded meanwhile.
    * A client that goes away leaves nothing running.
    * A client that reads slowly holds up nobody: what it has not read waits here, at most the tokens that it asked for.
    * What cannot be sampled is refused before the first byte of an answer.
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Callable
from itertools import count

import anyio
import anyio.to_thread
import msgspec
import numpy as np
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fwasync._wire.completions import EVENT_STREAM, Completion, CompletionRequest, encode_event
from fwasync._wire.hot_load import decode_strictly
from fwasync._wire.messages import FailedOperation, decode, encode
from fwasync.local.control.answers import Asked, EventWriter, completion_of
from fwasync.local.control.deployments import DeploymentDesk
from fwasync.local.control.hot_load import HotLoadDesk
from fwasync.local.control.names import ACCOUNT, id_of
from fwasync.local.engine.api import SampledToken, SampleRequest
from fwasync.local.futures import FutureStore, Slot
from fwasync.local.refusal import Refusal, Refused
from fwasync.local.results import Result
from fwasync.local.sampling import SamplingDesk
from fwasync.local.sampling_thread import Begun, News, Weights
from fwasync.local.tokenizer import build_tokenizer
from fwasync.local.web import read_body, until_ready, wait_or_gone

__all__ = ("CompletionDesk",)

_MOST = 128
_DEFAULT_MAX_TOKENS = 16
_LONGEST_S = 86_400.0
# So many tokens are written at a time, between which others have their turn.
_TOGETHER = 256


class _Run:
    """A request that is sampled: when it came, when its turn and its first token, and the tokens that were not sent.

    `ready` is cancelled as soon as its answer can begin.
    """

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.came_at = time.monotonic()
        self.begun_at: float | None = None
        self.first_at: float | None = None
        self.ready = anyio.CancelScope()
        self._unsent: deque[SampledToken] = deque()
        self._news = anyio.Event()

    def note(self, news: News) -> None:
        """Take news of the sampler."""
        if isinstance(news, Begun):
            self.begun_at = news.at
            return
        self.first_at = self.first_at or time.monotonic()
        self._unsent.append(news)
        if self.asked.message.stream:
            self.wake()

    def wake(self) -> None:
        """Let go whoever waits: there are tokens to send, or it has ended."""
        self.ready.cancel()
        self._news.set()

    async def wait(self) -> None:
        """Wait for tokens since the last `take`, or the end."""
        await self._news.wait()

    def take(self) -> list[SampledToken]:
        """Some of the tokens that came."""
        taken = [self._unsent.popleft() for _ in range(min(_TOGETHER, len(self._unsent)))]
        if not self._unsent:
            self._news = anyio.Event()
        return taken

    def rest(self) -> list[SampledToken]:
        """All tokens that were not taken."""
        return list(self._unsent)

    def waited(self) -> dict[str, str]:
        """How long it waited for its turn and for its first token, as metrics."""
        moments = {"prefill-queue-duration": self.begun_at, "server-time-to-first-token": self.first_at}
        return {name: f"{at - self.came_at:.6f}" for name, at in moments.items() if at is not None}

    def took(self) -> dict[str, str]:
        """How long it has taken until now, as a metric."""
        return {"server-processing-time": f"{time.monotonic() - self.came_at:.6f}"}


class CompletionDesk:
    """Serves completions.

    Args:
        deployments: What can be asked.
        hot_load: Tells the weights.
        samplers: Samples.
        futures: Where its results appear.
    """

    def __init__(
        self, deployments: DeploymentDesk, hot_load: HotLoadDesk, samplers: SamplingDesk, futures: FutureStore
    ) -> None:
        self._deployments = deployments
        self._hot_load = hot_load
        self._samplers = samplers
        self._futures = futures
        self._tokenizer = build_tokenizer()
        self._turns = count()
        self._running = 0

    async def complete(self, request: Request) -> Response:
        """Answer one request."""
        body = await read_body(request)
        try:
            message = decode_strictly(body, CompletionRequest)
        except msgspec.MsgspecError as error:
            raise Refused(400, f"completions: {error}") from None
        run = _Run(self._asked(message))
        weights = self._weights(message.model)
        sample = self._sample(run.asked)
        slot = self._samplers.begin(weights, sample, run.note)
        slot.on_wake = run.wake
        self._running += 1

        def end() -> None:
            self._running -= 1
            self._futures.forget(sample.key)
            if slot.result is None:
                self._samplers.cancel(sample.key)

        try:
            await until_ready(request, run.ready)
            if not message.stream or run.first_at is None:
                _require_sampled(slot)
        except BaseException:
            end()
            raise
        metrics = self._metrics(run)
        if message.stream:
            return _EventStream(run, slot, end, metrics)
        end()
        return await anyio.to_thread.run_sync(_whole, run.asked, run.rest(), metrics | run.took())

    # -- what is asked -----------------------------------------------------------------------------

    def _weights(self, model: str) -> Weights:
        record = None
        if model.startswith(f"accounts/{ACCOUNT}/deployments/"):
            record = self._deployments.find(id_of("deployments", model))
        if record is None or record.resource.state == "DELETED":
            raise Refused(404, f"there is no deployment {model!r}: give accounts/{ACCOUNT}/deployments/<id>")
        return self._hot_load.weights(record, next(self._turns))

    def _asked(self, message: CompletionRequest) -> Asked:
        given = message.prompt
        prompt = self._tokenizer.encode(given, add_special_tokens=False).ids if isinstance(given, str) else given
        if not prompt:
            raise Refused(400, "completions: prompt is empty")
        if message.top_logprobs:
            raise Refused(400, "completions: this service does not do top_logprobs")
        if message.include_routing_matrix:
            raise Refused(400, "completions: include_routing_matrix: these models have no experts to route to")
        if not 1 <= (1 if message.n is None else message.n) <= _MOST:
            raise Refused(400, f"completions: n is {message.n}; ask for 1 to {_MOST}")
        last = message.echo_last or 0
        if last < 0 or (message.max_tokens or 0) < 0:
            raise Refused(400, "completions: echo_last and max_tokens are 0 or more")
        echoed = len(prompt) if message.echo else min(last, len(prompt))
        return Asked(message, prompt, echoed, f"cmpl-{secrets.token_hex(12)}", int(time.time()))

    def _sample(self, asked: Asked) -> SampleRequest:
        message = asked.message
        stops = [message.stop] if isinstance(message.stop, str) else message.stop or []
        stop = tuple(tuple(self._tokenizer.encode(entry, add_special_tokens=False).ids) for entry in stops)
        if not all(stop):
            raise Refused(400, "completions: a stop string is empty")
        try:
            prompt = np.asarray(asked.prompt, np.int64)
        except OverflowError:
            raise Refused(400, "completions: prompt: a token id is no 64-bit integer") from None
        return SampleRequest(
            key=f"req-{secrets.token_hex(12)}",
            prompt=prompt,
            num_samples=message.n or 1,
            max_tokens=_DEFAULT_MAX_TOKENS if message.max_tokens is None else max(1, message.max_tokens),
            temperature=1.0 if message.temperature is None else message.temperature,
            top_k=message.top_k or -1,
            top_p=1.0 if message.top_p is None else message.top_p,
            stop=stop,
            seed=message.seed,
            prompt_logprobs=asked.echoed > 0,
        )

    def _metrics(self, run: _Run) -> dict[str, str]:
        return {
            "prompt-tokens": str(len(run.asked.prompt)),
            "cached-prompt-tokens": "0",
            "num-concurrent-requests": str(self._running),
            **run.waited(),
        }


class _EventStream(Response):
    """Sends the events of an answer as they come, until it is complete or the client has gone."""

    def __init__(self, run: _Run, slot: Slot, end: Callable[[], None], metrics: dict[str, str]) -> None:
        super().__init__(media_type=EVENT_STREAM, headers=_headers(metrics))
        del self.headers["content-length"]
        self._run = run
        self._slot = slot
        self._end = end
        self._writer = EventWriter(run.asked, lambda: metrics | run.took())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_all() -> None:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            more = True
            while more:
                events, more = self._next()
                if events or not more:
                    await send({"type": "http.response.body", "body": events, "more_body": more})
                if more:
                    await self._run.wait()

        try:
            await wait_or_gone(Request(scope, receive), send_all, _LONGEST_S)
        finally:
            self._end()

    def _next(self) -> tuple[bytes, bool]:
        """What to send now, and whether there will be more."""
        tokens = self._run.take()
        events = b"".join(map(self._writer.write, tokens))
        if tokens or self._slot.result is None:
            return events, not self._writer.is_complete
        fault = _failure(self._slot.result)
        told = Completion(error={"code": fault.status, "message": fault.detail})
        return encode_event(encode(told)), False


def _require_sampled(slot: Slot) -> None:
    if slot.result is None:
        raise Refused(503, "completions: the service is stopping")
    if slot.result.form != "sample":
        failure = _failure(slot.result)
        raise Refused(failure.status, failure.detail)


def _whole(asked: Asked, tokens: list[SampledToken], metrics: dict[str, str]) -> Response:
    whole = completion_of(asked, tokens, metrics)
    return Response(encode(whole), media_type="application/json", headers=_headers(metrics))


def _headers(metrics: dict[str, str]) -> dict[str, str]:
    return {f"fireworks-{name}": value for name, value in metrics.items()}


def _failure(result: Result) -> Refusal:
    failure = decode(result.body, FailedOperation)
    return Refusal(400 if failure.category == "user" else 500, f"completions: {failure.error}")
