"""The numpy sampler: a queue of requests, and slots that decode one token a step.

Invariants
    * Running rows occupy the slots 0..n-1 in the order of `_rows`; a row that leaves is replaced
      by the last one.
    * A request's tokens and logprobs are bit for bit the same whatever else runs: see
      `decoder` for the arithmetic and `choosing` for the randomness.
    * A prompt is read once for all samples of a request, and once for equal prompts that start
      together.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from fwasync.local.engine.api import EngineError, SampledSequence, SampledToken, SampleResult
from fwasync.local.engine.batching import check_tokens
from fwasync.local.engine.choosing import Choice, choose, uniform_stream
from fwasync.local.engine.decoder import Decoder, KeyValueCache, Prefill
from fwasync.local.engine.primitives import log_partition

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from fwasync.local.engine.api import BaseModel, SampleRequest
    from fwasync.local.engine.architecture import Architecture, FloatArray, Weights

__all__ = ("NumpySampler",)

_SLOTS = 64
_MAX_TEMPERATURE = 1e6
_TEMPERATURE_RULE = f"from 0 to {_MAX_TEMPERATURE:g}"


@dataclass(slots=True, eq=False)
class _Job:
    """A request on its way: how many samples have started, and those that are done."""

    request: SampleRequest
    max_tokens: int
    stop_tokens: frozenset[int]
    stop_sequences: tuple[tuple[int, ...], ...]
    prefill: Prefill | None = None
    prompt_logprobs: list[float | None] | None = None
    topk_prompt_logprobs: list[list[tuple[int, float]] | None] | None = None
    started: int = 0
    finished: dict[int, SampledSequence] = field(default_factory=dict[int, SampledSequence])


@dataclass(slots=True, eq=False)
class _Row:
    """One running sample."""

    job: _Job
    prefill: Prefill
    sample: int
    uniforms: npt.NDArray[np.float64]
    tokens: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    sampling_logprobs: list[float] = field(default_factory=list[float])

    @property
    def cached(self) -> int:
        """Positions in the cache: the prompt, and all sampled tokens but the newest."""
        return self.prefill.length + len(self.tokens) - 1

    def stop_reason(self) -> Literal["stop", "length"] | None:
        """Why the newest token is the last one, if it is."""
        if self.tokens[-1] in self.job.stop_tokens or any(
            tuple(self.tokens[-len(stop) :]) == stop for stop in self.job.stop_sequences
        ):
            return "stop"
        return "length" if len(self.tokens) >= self.job.max_tokens else None

    def newest(self) -> SampledToken:
        """The newest token, as it is told."""
        job = self.job
        is_first = self.sample == 0 and len(self.tokens) == 1
        prompt_logprobs = job.prompt_logprobs if is_first else None
        reason = self.stop_reason()
        told = (self.tokens[-1], self.logprobs[-1], self.sampling_logprobs[-1])
        return SampledToken(job.request.key, self.sample, *told, reason, prompt_logprobs)


class NumpySampler:
    """`Sampler` for one set of weights, which must not change any more."""

    def __init__(self, architecture: Architecture, weights: Weights, *, slots: int = _SLOTS) -> None:
        self._model: BaseModel = architecture.base_model
        self._architecture = architecture
        self._decoder = Decoder(architecture, weights)
        self._slots = slots
        self._jobs: dict[str, _Job] = {}
        self._waiting: OrderedDict[str, _Job] = OrderedDict()
        self._rows: list[_Row] = []
        self._cache: KeyValueCache | None = None
        self._newest: list[SampledToken] = []

    @property
    def busy(self) -> bool:
        """Whether any request is waiting or running."""
        return bool(self._jobs)

    @property
    def newest(self) -> Sequence[SampledToken]:
        """The tokens of the last step; see `Sampler.newest`."""
        return self._newest

    def submit(self, request: SampleRequest) -> None:
        """Queue a request; see `Sampler.submit`."""
        if request.key in self._jobs:
            raise EngineError(f"a request with the key {request.key!r} is already running")
        room = _check_request(request, self._model)
        job = _Job(
            request,
            max_tokens=room if request.max_tokens is None else min(room, request.max_tokens),
            stop_tokens=frozenset(
                (
                    *(self._model.stop_token_ids if request.own_stops else ()),
                    *(stop[0] for stop in request.stop if len(stop) == 1),
                )
            ),
            stop_sequences=tuple(stop for stop in request.stop if len(stop) > 1),
        )
        self._jobs[request.key] = job
        self._waiting[request.key] = job

    def cancel(self, key: str) -> None:
        """Forget a request; see `Sampler.cancel`."""
        job = self._jobs.pop(key, None)
        if job is None:
            return
        self._waiting.pop(key, None)
        if job.started:
            self._release([slot for slot, row in enumerate(self._rows) if row.job is job])

    def step(self) -> list[SampleResult]:
        """Decode one token in every slot; see `Sampler.step`."""
        self._newest = []
        if not self.busy:
            return []
        if self._cache is None:
            self._cache = KeyValueCache(self._architecture, self._slots)
        started = self._start_rows(self._cache)
        logits: list[FloatArray] = []
        if self._rows:
            tokens = np.array([row.tokens[-1] for row in self._rows])
            positions = np.array([row.cached for row in self._rows])
            logits.append(self._decoder.decode(self._cache, tokens, positions))
        logits.extend(row.prefill.logits[None] for row in started)
        self._rows.extend(started)
        self._extend_rows(np.concatenate(logits))
        return self._finish_rows()

    def _start_rows(self, cache: KeyValueCache) -> list[_Row]:
        """Take samples from the queue into the free slots, reading their prompts."""
        chosen: list[tuple[_Job, int]] = []
        free = self._slots - len(self._rows)
        while self._waiting and len(chosen) < free:
            key, job = next(iter(self._waiting.items()))
            chosen.append((job, job.started))
            job.started += 1
            if job.started == job.request.num_samples:
                del self._waiting[key]
        prefills = self._read_prompts([job for job, _ in chosen])
        started: list[_Row] = []
        for (job, sample), prefill in zip(chosen, prefills, strict=True):
            cache.fill(len(self._rows) + len(started), prefill)
            if sample == 0:
                self._score_prompt(job, prefill)
            uniforms = uniform_stream(job.request.seed, sample, job.max_tokens)
            started.append(_Row(job, prefill, sample, uniforms))
        return started

    def _read_prompts(self, jobs: Sequence[_Job]) -> list[Prefill]:
        """Return the prefill of each job; a prompt that has none yet is read once."""
        known = {job.request.prompt.tobytes(): job.prefill for job in jobs if job.prefill}
        unread = {key: job.request.prompt for job in jobs if (key := job.request.prompt.tobytes()) not in known}
        known.update(zip(unread, self._decoder.prefill(list(unread.values())), strict=True))
        prefills = [known[job.request.prompt.tobytes()] for job in jobs]
        for job, prefill in zip(jobs, prefills, strict=True):
            job.prefill = prefill
        return prefills

    def _extend_rows(self, logits: FloatArray) -> None:
        """Choose a token for every row from `[n, vocabulary]`."""
        requests = [row.job.request for row in self._rows]
        chosen = choose(
            logits,
            Choice(
                temperature=np.array([request.temperature for request in requests], np.float32),
                top_k=np.array([request.top_k for request in requests]),
                top_p=np.array([request.top_p for request in requests]),
                uniform=np.array([row.uniforms[len(row.tokens)] for row in self._rows]),
            ),
        )
        if not np.isfinite(chosen.logprobs).all():
            raise EngineError("the model's logits are not finite: its training has diverged")
        columns = (chosen.tokens.tolist(), chosen.logprobs.tolist(), chosen.sampling_logprobs.tolist())
        for row, token, logprob, drawn in zip(self._rows, *columns, strict=True):
            row.tokens.append(token)
            row.logprobs.append(logprob)
            row.sampling_logprobs.append(drawn)

    def _finish_rows(self) -> list[SampleResult]:
        """Tell the new tokens, and take out the rows that are done; returns the requests that are complete thereby."""
        self._newest = [row.newest() for row in self._rows]
        done: list[int] = []
        results: list[SampleResult] = []
        for slot, (row, newest) in enumerate(zip(self._rows, self._newest, strict=True)):
            if newest.stop_reason is None:
                continue
            done.append(slot)
            job = row.job
            job.finished[row.sample] = SampledSequence(
                row.tokens, row.logprobs, row.sampling_logprobs, newest.stop_reason
            )
            if len(job.finished) == job.request.num_samples:
                del self._jobs[job.request.key]
                sequences = [job.finished[sample] for sample in range(job.request.num_samples)]
                results.append(SampleResult(job.request.key, sequences, job.prompt_logprobs, job.topk_prompt_logprobs))
        self._release(done)
        return results

    def _release(self, slots: list[int]) -> None:
        """Free slots, moving the last rows into the holes."""
        for slot in reversed(slots):
            last = self._rows.pop()
            if slot < len(self._rows):
                self._rows[slot] = last
                if self._cache is not None:
                    self._cache.move(len(self._rows), slot, last.cached)
        if not self._jobs:
            # An idle sampler holds its weights only: there may be many of them.
            self._cache = None

    def _score_prompt(self, job: _Job, prefill: Prefill) -> None:
        """Give the prompt's tokens the logprobs that are asked for."""
        request = job.request
        if not request.prompt_logprobs and not request.topk_prompt_logprobs:
            return
        wanted = request.prompt_logprobs_last_n
        start = 1 if wanted is None else len(request.prompt) - wanted
        logits = self._decoder.prompt_logits(prefill)[start - 1 : -1]
        logprobs = logits - log_partition(logits)
        unscored = [None] * start
        if request.prompt_logprobs:
            taken = np.take_along_axis(logprobs, request.prompt[start:, None], axis=1)[:, 0]
            job.prompt_logprobs = [*unscored, *taken.tolist()]
        if request.topk_prompt_logprobs:
            job.topk_prompt_logprobs = [*unscored, *_best(logprobs, request.topk_prompt_logprobs)]


def _best(logprobs: FloatArray, count: int) -> list[list[tuple[int, float]]]:
    order = np.argsort(-logprobs, axis=1, kind="stable")[:, :count]
    values = np.take_along_axis(logprobs, order, axis=1)
    pairs = zip(order.tolist(), values.tolist(), strict=True)
    return [list(zip(tokens, scores, strict=True)) for tokens, scores in pairs]


def _check_request(request: SampleRequest, model: BaseModel) -> int:
    """Check a request; returns how many tokens fit behind its prompt."""
    check_tokens(request.prompt, model, "prompt")
    room = model.max_context_length - len(request.prompt)
    if room < 1:
        raise EngineError(
            f"prompt: {len(request.prompt)} tokens leave no room to sample in the context of "
            f"{model.name}, which is {model.max_context_length}"
        )
    last_n = request.prompt_logprobs_last_n
    checks = (
        ("num_samples", request.num_samples >= 1, "at least 1", request.num_samples),
        (
            "prompt_logprobs_last_n",
            last_n is None or 1 <= last_n < len(request.prompt),
            f"from 1 to {len(request.prompt) - 1} (all tokens of the prompt but the first)",
            last_n,
        ),
        ("max_tokens", request.max_tokens is None or request.max_tokens >= 1, "at least 1", request.max_tokens),
        ("temperature", 0 <= request.temperature <= _MAX_TEMPERATURE, _TEMPERATURE_RULE, request.temperature),
        ("top_k", -(2**63) <= request.top_k < 2**63, "a 64-bit integer", request.top_k),
        ("top_p", 0 < request.top_p <= 1, "above 0 and at most 1", request.top_p),
        (
            "topk_prompt_logprobs",
            0 <= request.topk_prompt_logprobs <= model.vocab_size,
            f"from 0 to {model.vocab_size}",
            request.topk_prompt_logprobs,
        ),
    )
    for name, passed, rule, value in checks:
        if not passed:
            raise EngineError(f"{name} must be {rule}, got {value}")
    for stop in request.stop:
        if not stop or not all(0 <= token < model.vocab_size for token in stop):
            raise EngineError(f"stop: {stop} is no sequence of token ids within 0..{model.vocab_size - 1}")
    return room
