"""`AsyncSamplingClient`: completions of one set of weights, as many at a time as you like.

Invariants
    * The service is told of each sample that it has accepted and nobody waits for any more, so that it stops generating
      it; when the client is left, for a short time.
    * Leaving the client ends what is in progress on it.
"""

from __future__ import annotations

import itertools
import logging
import sys
from types import TracebackType
from typing import TYPE_CHECKING, Self

import anyio
import msgspec
import numpy as np

from fwasync._background import Background
from fwasync._http.checks import require_finite
from fwasync._http.client import Answer, Unanswered
from fwasync._http.reading import read
from fwasync._http.retrieve import retrieve
from fwasync._http.session import Session
from fwasync._wire import messages
from fwasync._wire.codec import decode_sample
from fwasync._wire.messages import encode
from fwasync._wire.tensors import model_input_json
from fwasync.errors import ClosedError, OperationTimeoutError, ProtocolError, ResultLostError, UsageError
from fwasync.sampling.aimd import Observation
from fwasync.sampling.calls import Calls
from fwasync.sampling.concurrency import ConcurrencyController, FixedConcurrencyController

if TYPE_CHECKING:
    from tinker.types import ModelInput, SampleResponse, SamplingParams

__all__ = ("AsyncSamplingClient",)

logger = logging.getLogger("fwasync.sampling")

_TIMEOUT_S = 600.0
_RESUBMISSIONS = 3
_FAREWELL_S = 3.0
# So many abandoned samples are told at a time.
_TOLD_TOGETHER = 16


class AsyncSamplingClient:
    """A sampler of one immutable set of weights. Made by `AsyncServiceClient.create_sampling_client`.

    Use it inside `async with`; any number of tasks may call `sample` at the same time. How many of them the service is
    asked for at a time is up to `concurrency`: each holds a slot from its first attempt to its result. Leaving the
    block ends what is in progress with `ClosedError`, and waits for its end.
    """

    def __init__(
        self,
        session: Session,
        *,
        base_model: str | None = None,
        model_path: str | None = None,
        concurrency: ConcurrencyController | None = None,
    ) -> None:
        if (base_model is None) == (model_path is None):
            raise UsageError("create_sampling_client takes either base_model or model_path (a snapshot's path)")
        self.base_model = base_model
        self.model_path = model_path
        self.concurrency = concurrency or FixedConcurrencyController(sys.maxsize)
        self._session = session
        self._sampling_session_id: str | None = None
        self._numbers = itertools.count()
        self._calls = Calls("the sampling client")
        self._background = Background()
        self._abandoned: list[str | int] = []
        self._abandonment = anyio.Event()
        self._in_flight = 0

    def __repr__(self) -> str:
        return f"<AsyncSamplingClient {self.model_path or self.base_model}: {self._in_flight} in flight>"

    @property
    def in_flight(self) -> int:
        """How many calls of `sample` are waiting for their answer."""
        return self._in_flight

    async def sample(
        self,
        prompt: ModelInput,
        num_samples: int = 1,
        sampling_params: SamplingParams | None = None,
        *,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        timeout: float | None = _TIMEOUT_S,
    ) -> SampleResponse:
        """Sample completions of a prompt.

        Args:
            prompt: The tokens to go on from.
            num_samples: How many completions.
            sampling_params: `max_tokens`, `temperature`, `top_p`, `top_k`, `stop` and `seed`; with a seed, the same
                request gives the same completions.
            include_prompt_logprobs: Also return the logprob of each prompt token; the first has none.
            topk_prompt_logprobs: Also return this many of the likeliest tokens at each prompt position.
            timeout: Seconds for the whole; `None` is without a limit.

        Returns:
            The completions: token ids, their logprobs in nats (of the model itself, at temperature 1), and whether
            each ended by itself (`"stop"`) or by `max_tokens` (`"length"`).

        Raises:
            UsageError: `num_samples` is less than one, or a parameter is not finite.
            OperationTimeoutError: The time is up.
            OperationFailedError: The service could not sample this (a prompt too long …).
            ServiceError: The service refused the request.
            TransportError: The service could not be reached for longer than the retry budget.
            ClosedError: The client was left meanwhile.

        **Cancellation:** the wait ends at once, and the service is told in the background that the completions are
        not wanted any more.
        """
        if num_samples < 1:
            raise UsageError(f"num_samples is {num_samples}; ask for at least one completion")
        params = {} if sampling_params is None else sampling_params.model_dump(exclude_unset=True)
        require_finite("sample", params)
        started = anyio.current_time()
        self._in_flight += 1
        try:
            with self._calls.call(timeout=timeout):
                request = messages.SampleRequestMessage(
                    sampling_session_id=self._open_session_id(),
                    prompt=msgspec.Raw(model_input_json(prompt)),
                    sampling_params=msgspec.convert(params, messages.SamplingParamsMessage),
                    num_samples=num_samples,
                    prompt_logprobs=include_prompt_logprobs or None,
                    topk_prompt_logprobs=topk_prompt_logprobs or None,
                )
                return await self._sample(request)
        finally:
            self._in_flight -= 1
        raise OperationTimeoutError(f"sample has no result after {anyio.current_time() - started:.1f} s")

    async def compute_logprobs(self, prompt: ModelInput, *, timeout: float | None = _TIMEOUT_S) -> list[float | None]:
        """The logprob, in nats, of each token of a prompt given those before it; `None` for the first.

        Errors and cancellation are those of `sample`.
        """
        from tinker.types import SamplingParams

        response = await self.sample(
            prompt, 1, SamplingParams(max_tokens=1), include_prompt_logprobs=True, timeout=timeout
        )
        if response.prompt_logprobs is None:
            raise ProtocolError("compute_logprobs: the service returned no prompt logprobs")
        missing = prompt.length - len(response.prompt_logprobs)
        # Some services leave the first token's empty place out.
        return [None] * missing + response.prompt_logprobs

    async def __aenter__(self) -> Self:
        request = messages.CreateSamplingSessionRequest(
            session_id=self._session.session_id,
            sampling_session_seq_id=self._session.next_sampler_number(),
            base_model=self.base_model,
            model_path=self.model_path,
        )
        body = await self._session.http.call("POST", "create_sampling_session", [encode(request)])
        created = read("create_sampling_session", body, messages.SamplingSessionCreated)
        self._sampling_session_id = created.sampling_session_id
        await self._background.open()
        self._background.start(self._tell_abandoned)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._sampling_session_id = None
        await self._calls.end()
        try:
            await self._background.aclose()
        finally:
            with anyio.move_on_after(_FAREWELL_S, shield=True):
                await self._tell_all()

    def _open_session_id(self) -> str:
        _ = self._session.session_id  # raises if the session is lost
        if self._sampling_session_id is None:
            raise ClosedError(
                "the sampling client is not open: use it as "
                "`async with service.create_sampling_client(...) as sampler:`"
            )
        return self._sampling_session_id

    async def _sample(self, request: messages.SampleRequestMessage) -> SampleResponse:
        for resubmissions_left in reversed(range(_RESUBMISSIONS + 1)):
            request.seq_id = next(self._numbers)
            async with self.concurrency.slot() as slot:
                body = await self._session.http.call("POST", "asample", [encode(request)], on_failure=self._refused)
                submitted = read("asample", body, messages.Submitted)
                try:
                    result = await retrieve(
                        self._session.http, submitted.request_id, what="sample", accept=self._session.codec.accept
                    )
                except ResultLostError:
                    # A sample has no effect to double: it is asked for anew.
                    if not resubmissions_left:
                        raise
                    continue
                except anyio.get_cancelled_exc_class():
                    self._abandoned.append(submitted.request_id)
                    self._abandonment.set()
                    raise
                sample = _read_sample(result)
                # The sequences of a sample grow side by side.
                tokens = max((len(sequence.tokens) for sequence in sample.sequences), default=0)
                slot.observation = Observation(200, latency_s=slot.age_s, tokens=tokens)
            return _response(sample, submitted)
        raise AssertionError("unreachable: the last resubmission returns or raises")

    def _refused(self, status: int | None, before: int) -> None:
        self.concurrency.observe(Observation(status, retry=before))

    async def _tell_abandoned(self) -> None:
        while True:
            await self._abandonment.wait()
            self._abandonment = anyio.Event()
            await self._tell_all()

    async def _tell_all(self) -> None:
        """Tell the service of samples that nobody waits for."""
        async with anyio.create_task_group() as tasks:
            for _ in range(min(_TOLD_TOGETHER, len(self._abandoned))):
                tasks.start_soon(self._tell)

    async def _tell(self) -> None:
        while self._abandoned:
            request_id = self._abandoned.pop()
            body = encode(messages.CancelFutureRequest(request_id=request_id))
            try:
                answer = await self._session.http.attempt("POST", "cancel_future", [body], timeout=10.0)
            except Unanswered as error:
                logger.debug("an abandoned sample was not told to the service: %s", error)
                continue
            except anyio.get_cancelled_exc_class():
                self._abandoned.append(request_id)
                raise
            if answer.status in (404, 405):
                self._abandoned.clear()  # this service knows no such request


def _read_sample(answer: Answer) -> messages.SampleResult:
    try:
        return decode_sample(answer.content_type, answer.body)
    except ValueError as error:
        raise ProtocolError(f"sample: the result cannot be read: {error}") from error


def _response(result: messages.SampleResult, submitted: messages.Submitted) -> SampleResponse:
    from tinker.types import SampledSequence, SampleResponse

    ids = submitted.sample_sequence_ids or [f"{submitted.request_id}:{i}" for i in range(len(result.sequences))]
    return SampleResponse(
        sequences=[
            SampledSequence(
                stop_reason="stop" if sequence.stop_reason == "stop" else "length",
                sequence_id=sequence_id,
                tokens_np=np.asarray(sequence.tokens, dtype=np.int32),
                logprobs_np=None if sequence.logprobs is None else np.asarray(sequence.logprobs, dtype=np.float32),
            )
            for sequence, sequence_id in zip(result.sequences, ids, strict=False)
        ],
        prompt_logprobs_np=None
        if result.prompt_logprobs is None
        else np.asarray([np.nan if p is None else p for p in result.prompt_logprobs], dtype=np.float32),
        _topk_prompt_logprobs_list=result.topk_prompt_logprobs,
    )
