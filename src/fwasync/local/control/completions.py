"""Completions from what a deployment serves. The tokens of an answer come together, when all of them are there.

Invariants
    * A request is sampled from one set of weights, those of the moment when it came, whatever is loaded meanwhile.
    * A client that goes away leaves nothing running.
"""

from __future__ import annotations

import secrets
import time
from itertools import count

import anyio.to_thread
import msgspec
import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from fwasync._wire.completions import EVENT_STREAM, CompletionRequest
from fwasync._wire.hot_load import decode_strictly
from fwasync._wire.messages import FailedOperation, SampleResult, decode, encode
from fwasync._wire.protobuf.samples import decode_sample
from fwasync.local.control.answers import Asked, completion_of, events_of
from fwasync.local.control.deployments import DeploymentDesk
from fwasync.local.control.hot_load import HotLoadDesk
from fwasync.local.control.names import ACCOUNT, id_of
from fwasync.local.engine.api import SampleRequest
from fwasync.local.futures import FutureStore
from fwasync.local.refusal import Refused
from fwasync.local.results import Result
from fwasync.local.sampling import SamplingDesk
from fwasync.local.sampling_thread import Weights
from fwasync.local.tokenizer import build_tokenizer
from fwasync.local.web import read_body, wait_or_gone

__all__ = ("CompletionDesk",)

_MOST = 128
_DEFAULT_MAX_TOKENS = 16
_LONGEST_S = 86_400.0


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
        started = time.monotonic()
        body = await read_body(request)
        try:
            message = decode_strictly(body, CompletionRequest)
        except msgspec.MsgspecError as error:
            raise Refused(400, f"completions: {error}") from None
        asked = self._asked(message)
        weights = self._weights(message.model)
        sample = self._sample(asked)
        self._running += 1
        try:
            result = await self._result(request, weights, sample)
            metrics = self._metrics(asked, time.monotonic() - started)
        finally:
            self._running -= 1
        return await anyio.to_thread.run_sync(_response, asked, result, metrics)

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

    # -- sampling ----------------------------------------------------------------------------------

    async def _result(self, request: Request, weights: Weights, sample: SampleRequest) -> Result:
        slot = self._samplers.begin(weights, sample)
        try:
            await wait_or_gone(request, slot.wait, _LONGEST_S)
        finally:
            if slot.result is None:
                self._samplers.cancel(sample.key)
            self._futures.forget(sample.key)
        if slot.result is None:
            raise Refused(503, "completions: the service is stopping, or you have gone")
        return slot.result

    def _metrics(self, asked: Asked, seconds: float) -> dict[str, str]:
        return {
            "prompt-tokens": str(len(asked.prompt)),
            "cached-prompt-tokens": "0",
            # All tokens come together.
            "server-time-to-first-token": f"{seconds:.6f}",
            "server-processing-time": f"{seconds:.6f}",
            "num-concurrent-requests": str(self._running),
        }


def _response(asked: Asked, result: Result, metrics: dict[str, str]) -> Response:
    whole = completion_of(asked, _sampled(result), metrics)
    headers = {f"fireworks-{name}": value for name, value in metrics.items()}
    if asked.message.stream:
        return Response(events_of(asked, whole), media_type=EVENT_STREAM, headers=headers)
    if not asked.message.logprobs:
        for choice in whole.choices or []:
            choice.logprobs = None
    return Response(encode(whole), media_type="application/json", headers=headers)


def _sampled(result: Result) -> SampleResult:
    if result.form == "sample":
        return decode_sample(result.body)
    failure = decode(result.body, FailedOperation)
    raise Refused(400 if failure.category == "user" else 500, f"completions: {failure.error}")
