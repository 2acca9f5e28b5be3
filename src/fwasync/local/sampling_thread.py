"""The thread that decodes tokens: all busy samplers in turn, one step each.

Invariants
    * Samplers are made, driven and dropped on this thread only.
    * A request that was handed in is delivered once, or cancelled.
    * What a step sampled for a watched request is delivered before the next step, and with the request's result or
      before it; that its turn has come, before its first token. Delivering waits for nobody.
    * Commands are obeyed in order, between two steps: what is asked after a cancellation is told without it.
    * Idle samplers beyond a small number are dropped, the longest unused first; busy ones never.
"""

from __future__ import annotations

import logging
import math
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import NamedTuple

from fwasync._wire.fault_reports import SamplingLoad
from fwasync._wire.messages import SampledSequenceMessage
from fwasync._wire.messages import SampleResult as SampleResultMessage
from fwasync.local.engine.api import Engine, EngineError, SampledToken, Sampler, SampleRequest, SampleResult
from fwasync.local.results import Result, failed, sample_result

__all__ = ("Begun", "News", "SamplingThread", "Weights")

_log = logging.getLogger(__name__)


class Begun(NamedTuple):
    """The turn of the request `key` has come: its prompt is read from `at` on, of `time.monotonic`."""

    key: str
    at: float


News = Begun | SampledToken
"""What is told of a watched request before its result."""

Delivery = tuple[str, Result]
Deliver = Callable[[list[Delivery], list[News]], object]


@dataclass(frozen=True, slots=True)
class Weights:
    """What to sample from: a base model, or a snapshot of one."""

    base_model: str
    snapshot: Path | None


@dataclass(slots=True, eq=False)
class _Station:
    sampler: Sampler
    keys: set[str] = field(default_factory=set[str])
    watched: set[str] = field(default_factory=set[str])
    begun: set[str] = field(default_factory=set[str])

    def drop(self, key: str) -> None:
        for names in (self.keys, self.watched, self.begun):
            names.discard(key)


class SamplingThread:
    """Hands requests to samplers and what comes of them to `deliver`, which is called on this thread.

    Args:
        engine: Makes the samplers.
        deliver: Gets (key, result) pairs, and the news of watched requests.
        keep: How many samplers are kept when they are idle.
    """

    def __init__(self, engine: Engine, deliver: Deliver, *, keep: int = 4) -> None:
        self._engine = engine
        self._deliver = deliver
        self._keep = keep
        self._commands: SimpleQueue[Callable[[], list[Delivery]]] = SimpleQueue()
        self._stations: OrderedDict[Weights, _Station] = OrderedDict()
        self._tokens = 0
        threading.Thread(target=self._run, name="fwasync-sampling", daemon=True).start()

    def submit(self, weights: Weights, request: SampleRequest, *, watched: bool = False) -> None:
        """Hand in a request; its key names its result, and its news if it is watched."""
        self._commands.put(partial(self._submit, weights, request, watched))

    def cancel(self, key: str) -> None:
        """Stop a request and free its place; an unknown key is ignored."""
        self._commands.put(partial(self._cancel, key))

    def ask(self, answer: Callable[[SamplingLoad], object]) -> None:
        """Have the load told, on this thread."""
        self._commands.put(partial(self._tell, answer))

    def _run(self) -> None:
        while True:
            results = self._take_commands(wait=not any(s.sampler.busy for s in self._stations.values()))
            news: list[News] = []
            for weights, station in list(self._stations.items()):
                if station.sampler.busy:
                    results += self._step(weights, station, news)
            self._drop_idle()
            if results or news:
                try:
                    self._deliver(results, news)
                except RuntimeError:
                    return  # the loop is closed: the process ends

    def _take_commands(self, *, wait: bool) -> list[Delivery]:
        results: list[Delivery] = []
        try:
            command = self._commands.get(block=wait)
            while True:
                results += command()
                command = self._commands.get_nowait()
        except Empty:
            return results

    def _submit(self, weights: Weights, request: SampleRequest, watched: bool) -> list[Delivery]:
        try:
            station = self._stations.get(weights)
            if station is None:
                station = _Station(self._engine.sampler(weights.base_model, weights.snapshot))
                self._stations[weights] = station
            self._stations.move_to_end(weights)
            station.sampler.submit(request)
            station.keys.add(request.key)
            if watched:
                station.watched.add(request.key)
        except Exception as error:
            return _failures([request.key], error)
        return []

    def _cancel(self, key: str) -> list[Delivery]:
        for station in self._stations.values():
            if key in station.keys:
                station.drop(key)
                station.sampler.cancel(key)
        return []

    def _tell(self, answer: Callable[[SamplingLoad], object]) -> list[Delivery]:
        stations = self._stations.values()
        running = sum(len(station.begun) for station in stations)
        waiting = sum(len(station.keys) for station in stations) - running
        answer(SamplingLoad(waiting, running, self._tokens))
        return []

    def _step(self, weights: Weights, station: _Station, news: list[News]) -> list[Delivery]:
        at = time.monotonic()  # a step begins with the prompts of those whose turn has come
        try:
            finished = station.sampler.step()
        except Exception as error:
            # Its state is unknown now: the next request gets a new sampler.
            del self._stations[weights]
            return _failures(station.keys, error)
        newest = station.sampler.newest
        self._tokens += len(newest)
        fresh = {token.key for token in newest} - station.begun
        station.begun |= fresh
        if station.watched:
            news += [Begun(key, at) for key in fresh & station.watched]
            news += [token for token in newest if token.key in station.watched]
        for result in finished:
            station.drop(result.key)
        return [(result.key, _encode(result)) for result in finished]

    def _drop_idle(self) -> None:
        idle = [weights for weights, station in self._stations.items() if not station.sampler.busy]
        for weights in idle[: max(0, len(self._stations) - self._keep)]:
            del self._stations[weights]


def _failures(keys: Iterable[str], error: Exception) -> list[Delivery]:
    if isinstance(error, EngineError):
        result = failed(str(error), "user")
    elif isinstance(error, FileNotFoundError):
        result = failed(
            "the weights of this sampling session are gone: its session has ended, or they were deleted", "user"
        )
    elif isinstance(error, OSError):
        _log.error("a sampler failed", exc_info=error)
        result = failed(f"the service could not read its data directory: {error.strerror}", "server")
    else:
        number = secrets.token_hex(4)
        _log.error("a sampler failed (%s)", number, exc_info=error)
        result = failed(f"internal error {number} of the service; its log tells more", "server")
    return [(key, result) for key in keys]


def _encode(result: SampleResult) -> Result:
    # JSON has no word for NaN, and clients stumble over what encoders write instead.
    given = (value for value in result.prompt_logprobs or () if value is not None)
    if not all(map(math.isfinite, given)) or not all(
        all(map(math.isfinite, sequence.logprobs)) for sequence in result.sequences
    ):
        return failed("these weights give logprobs that are not finite: did training diverge?", "user")
    return sample_result(
        SampleResultMessage(
            sequences=[
                SampledSequenceMessage(
                    stop_reason=sequence.stop_reason, tokens=sequence.tokens, logprobs=sequence.logprobs
                )
                for sequence in result.sequences
            ],
            prompt_logprobs=result.prompt_logprobs,
            topk_prompt_logprobs=result.topk_prompt_logprobs,
        )
    )
