"""Sampling sessions and their requests, from submission to result.

Invariants
    * State is touched on the event loop's thread only; samplers on the sampling thread only.
    * A sampling session's weights never change.
    * A request is known by (sampling session, seq_id): a repetition is the same sample.
    * With a session its samples end: nobody is left who could ask for them.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import anyio
import anyio.to_thread
import msgspec
import tokenizers

from fwasync._wire.fault_reports import SamplingLoad
from fwasync._wire.messages import (
    CreateSamplingSessionRequest,
    SampleRequestMessage,
    SamplingParamsMessage,
    decode,
)
from fwasync._wire.runs import SamplerInfo
from fwasync._wire.tensors import ModelInputMessage, model_input_tokens
from fwasync.local.engine.api import Engine, SampleRequest
from fwasync.local.futures import FutureStore, Slot
from fwasync.local.operations import digest_of
from fwasync.local.refusal import Refusal, Refused
from fwasync.local.results import Result, failed
from fwasync.local.sampling_thread import News, SamplingThread, Weights
from fwasync.local.sessions import Sessions
from fwasync.local.tokenizer import build_tokenizer
from fwasync.local.weights import WeightsPath, WeightStore

__all__ = ("SamplingDesk", "Watcher")

T = TypeVar("T")

Watcher = Callable[[News], None]
"""Is told, on the event loop, that a request's turn has come, and of each token once it is sampled."""

# Larger requests are decoded in a thread.
_LARGE_BODY = 32_768
# So many submissions of one sampling session are remembered for repetitions.
_REMEMBERED = 100_000
_MOST_SAMPLES = 4096


@dataclass(slots=True, eq=False)
class SamplingSession:
    """One set of weights, and the requests that were made of it."""

    session_id: str
    weights: Weights
    model_path: str | None
    content: object
    seen: OrderedDict[int, tuple[bytes, str, int]] = field(default_factory=OrderedDict[int, tuple[bytes, str, int]])


class SamplingDesk:
    """Takes sampling requests in."""

    def __init__(self, engine: Engine, store: WeightStore, futures: FutureStore, sessions: Sessions) -> None:
        self._engine = engine
        self._store = store
        self._futures = futures
        self._sessions = sessions
        self._open: dict[str, SamplingSession] = {}
        self._running: dict[str, SamplingSession | None] = {}
        self._watchers: dict[str, Watcher] = {}
        self._tokenizer = build_tokenizer()
        self._loop = asyncio.get_running_loop()
        self._thread = SamplingThread(engine, partial(self._loop.call_soon_threadsafe, self._take))

    # -- sampling sessions -------------------------------------------------------------------------

    async def create(self, message: CreateSamplingSessionRequest) -> str:
        """Open a sampling session, or find the one that the same request opened; returns its id.

        Raises:
            Refused: Unknown session, base model or snapshot, or the number is taken.
        """
        self._sessions.touch(message.session_id)
        weights = await self._weights(message.base_model, message.model_path)
        sampling_id = f"{message.session_id}:sample:{message.sampling_session_seq_id}"
        content = (message.base_model, message.model_path)
        known = self._open.get(sampling_id)
        if known is None:
            self._open[sampling_id] = SamplingSession(message.session_id, weights, message.model_path, content)
        elif known.content != content:
            raise _number_taken(message.sampling_session_seq_id)
        return sampling_id

    def reserve(self, session_id: str, number: int, base_model: str, directory: Path) -> Refusal | None:
        """Open a sampling session for an unnamed snapshot that is about to be written."""
        sampling_id = f"{session_id}:sample:{number}"
        if sampling_id in self._open:
            return _number_taken(number).refusal
        self._open[sampling_id] = SamplingSession(session_id, Weights(base_model, directory), None, directory)
        return None

    def info(self, sampling_id: str) -> SamplerInfo:
        """What a sampling session samples from.

        Raises:
            Refused: It is not here.
        """
        session = self._session(sampling_id)
        return SamplerInfo(sampler_id=sampling_id, base_model=session.weights.base_model, model_path=session.model_path)

    def ids(self, session_id: str) -> list[str]:
        """The sampling sessions of a session."""
        return [sampling_id for sampling_id, entry in self._open.items() if entry.session_id == session_id]

    def end_session(self, session_id: str, why: str) -> list[Path]:
        """Close the sampling sessions of a session, and stop their samples.

        Returns:
            The unnamed snapshots that nobody needs now.
        """
        unnamed: list[Path] = []
        of_it = [key for key, session in self._running.items() if session and session.session_id == session_id]
        for key in of_it:
            self._stop(key, why)
        for sampling_id in self.ids(session_id):
            session = self._open.pop(sampling_id)
            if isinstance(session.content, Path):
                unnamed.append(session.content)
        return unnamed

    def _session(self, sampling_id: str) -> SamplingSession:
        session = self._open.get(sampling_id)
        if session is None:
            raise Refused(
                404,
                f"sampling session {sampling_id!r} is not here: its session has ended, the service was "
                "restarted, or it never had it; create a sampling session",
            )
        return session

    async def _weights(self, base_model: str | None, model_path: str | None) -> Weights:
        if model_path is not None:
            return await anyio.to_thread.run_sync(self._snapshot, model_path)
        if base_model is None:
            raise Refused(400, "a sampling session needs a base_model or a model_path")
        if base_model not in self._engine.models:
            names = ", ".join(self._engine.models)
            raise Refused(400, f"unknown base_model {base_model!r}; this service has: {names}")
        return Weights(base_model, None)

    def _snapshot(self, model_path: str) -> Weights:
        try:
            path = WeightsPath.parse(model_path)
        except ValueError as error:
            raise Refused(400, str(error)) from None
        if path.kind != "sampler_weights":
            raise Refused(400, f"{path} is a training checkpoint; sample from …/sampler_weights/<name>")
        directory = self._store.directory(path)
        if not directory.is_dir():
            raise Refused(404, f"there is no snapshot {path} in this data directory")
        return Weights(self._engine.snapshot_info(directory).base_model, directory)

    # -- samples -----------------------------------------------------------------------------------

    async def sample(self, body: bytes) -> tuple[str, int]:
        """Take a sample request in.

        Returns:
            The future's request id, and how many sequences were asked for.

        Raises:
            Refused: It is not accepted.
            msgspec.MsgspecError: It cannot be read.
        """
        request_id = f"req-{secrets.token_hex(12)}"
        if len(body) > _LARGE_BODY:
            message, request, digest = await anyio.to_thread.run_sync(self._read, request_id, body)
        else:
            message, request, digest = self._read(request_id, body)
        session, seen = None, None
        if message.sampling_session_id is None:
            weights = await self._weights(message.base_model, message.model_path)
        else:
            session = self._session(message.sampling_session_id)
            self._sessions.touch(session.session_id)
            weights, seen = session.weights, session.seen
        number = message.seq_id
        if seen is not None and number is not None:
            known = seen.get(number)
            if known is not None and known[0] == digest:
                return known[1:]
            if known is not None:
                raise Refused(409, f"seq_id {number} was already used by another request of this sampler")
            seen[number] = (digest, request_id, request.num_samples)
            if len(seen) > _REMEMBERED:
                seen.popitem(last=False)
        self.begin(weights, request, session=session)
        return request_id, request.num_samples

    def begin(
        self,
        weights: Weights,
        request: SampleRequest,
        watcher: Watcher | None = None,
        *,
        session: SamplingSession | None = None,
    ) -> Slot:
        """Hand a request to the sampling thread, of a sampling session if it is of one; the future of its key."""
        slot = self._futures.open(request.key, lambda: "sampling")
        self._running[request.key] = session
        if watcher is not None:
            self._watchers[request.key] = watcher
        self._thread.submit(weights, request, watched=watcher is not None)
        return slot

    async def load(self) -> SamplingLoad:
        """What there is to do, after everything that was asked for and cancelled before."""
        told, answered = list[SamplingLoad](), anyio.Event()

        def tell(load: SamplingLoad) -> None:
            told.append(load)
            answered.set()

        self._thread.ask(partial(self._loop.call_soon_threadsafe, tell))
        await answered.wait()
        return told[0]

    def cancel(self, request_id: str) -> bool:
        """Stop a sample. Returns whether the request is one, finished or not."""
        if request_id not in self._running:
            return False
        self._stop(request_id, "the sample was cancelled")
        return True

    def _stop(self, request_id: str, why: str) -> None:
        self._thread.cancel(request_id)
        self._resolve([(request_id, failed(why, "user"))])

    def _take(self, results: list[tuple[str, Result]], news: list[News]) -> None:
        for each in news:
            watcher = self._watchers.get(each.key)
            if watcher is not None:
                watcher(each)
        self._resolve(results)

    def _resolve(self, results: list[tuple[str, Result]]) -> None:
        for request_id, result in results:
            self._running.pop(request_id, None)
            self._futures.resolve(request_id, result)
            self._watchers.pop(request_id, None)

    def _read(self, request_id: str, body: bytes) -> tuple[SampleRequestMessage, SampleRequest, bytes]:
        message = decode(body, SampleRequestMessage)
        params = message.sampling_params
        _check_extras(message)
        try:
            prompt = model_input_tokens(decode(message.prompt, ModelInputMessage))
            stop = _stop(params, self._tokenizer)
        except msgspec.MsgspecError:
            raise
        except (ValueError, OverflowError) as error:
            raise Refused(400, f"asample: {error}") from None
        defaults = SampleRequest(request_id, prompt)
        count = _or(message.num_samples, 1)
        if not 1 <= count <= _MOST_SAMPLES:
            raise Refused(400, f"asample: num_samples is {count}; ask for 1 to {_MOST_SAMPLES}")
        request = SampleRequest(
            key=request_id,
            prompt=prompt,
            num_samples=count,
            max_tokens=params.max_tokens,
            temperature=_or(params.temperature, defaults.temperature),
            top_k=_or(params.top_k, defaults.top_k),
            top_p=_or(params.top_p, defaults.top_p),
            stop=stop,
            own_stops=params.stop is None or bool(stop),
            seed=params.seed,
            prompt_logprobs=bool(message.prompt_logprobs),
            prompt_logprobs_last_n=message.prompt_logprobs_last_n,
            topk_prompt_logprobs=_or(message.topk_prompt_logprobs, 0),
        )
        return message, request, digest_of(body)


def _number_taken(number: int) -> Refused:
    return Refused(409, f"sampling_session_seq_id {number} was already used by another request")


def _check_extras(message: SampleRequestMessage) -> None:
    asked = {
        "topk_sample_logprobs": message.topk_sample_logprobs,
        "target_prompt_logprobs": message.target_prompt_logprobs,
        "prompt_alt_tokens_k": message.prompt_alt_tokens_k,
        "record_stability_info": message.record_stability_info,
    }
    if missing := [name for name, value in asked.items() if value]:
        raise Refused(400, f"asample: this service does not do {', '.join(missing)}")
    if message.prompt_logprobs_last_n is not None and not message.prompt_logprobs:
        raise Refused(400, "asample: prompt_logprobs_last_n needs prompt_logprobs")


def _stop(params: SamplingParamsMessage, tokenizer: tokenizers.Tokenizer) -> tuple[tuple[int, ...], ...]:
    given = params.stop
    if given is None:
        return ()
    sequences: list[tuple[int, ...]] = []
    for entry in [given] if isinstance(given, str) else given:
        tokens = (entry,) if isinstance(entry, int) else tuple(tokenizer.encode(entry, add_special_tokens=False).ids)
        if not tokens:
            raise ValueError("a stop string is empty")
        sequences.append(tokens)
    return tuple(sequences)


def _or(value: T | None, default: T) -> T:
    return default if value is None else value
