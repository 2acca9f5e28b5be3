"""The sampling thread, with samplers that do as they are told."""

from __future__ import annotations

import json
import math
import threading
import time
from queue import SimpleQueue
from types import SimpleNamespace

import numpy as np
import pytest

from fwasync._wire.fault_reports import SamplingLoad
from fwasync.local.engine.api import EngineError, SampledSequence, SampledToken, SampleRequest, SampleResult
from fwasync.local.results import Result, json_of
from fwasync.local.sampling_thread import Begun, News, SamplingThread, Weights


class FakeSampler:
    """Answers each request with its prompt after as many steps as it is long."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name
        self.left: dict[str, SampleRequest] = {}
        self.told: list[str] = []
        self.steps = 0
        self.may_step = threading.Event()
        self.may_step.set()
        self.in_step = threading.Semaphore(0)

    @property
    def busy(self) -> bool:
        return bool(self.left)

    @property
    def newest(self) -> list[SampledToken]:
        return [SampledToken(key, 0, self.steps, 0.0, 0.0) for key in self.told]

    def submit(self, request: SampleRequest) -> None:
        if request.num_samples < 1:
            raise EngineError("num_samples must be positive")
        self.left[request.key] = request

    def cancel(self, key: str) -> None:
        self.log.append(f"cancel {key}")
        self.left.pop(key, None)

    def step(self) -> list[SampleResult]:
        self.in_step.release()
        assert self.may_step.wait(100)
        self.steps += 1
        self.told = list(self.left)
        self.log.append(self.name)
        if any(request.temperature == 13 for request in self.left.values()):
            raise RuntimeError("a fault in /secret/path")
        done = [request for request in self.left.values() if len(request.prompt) <= self.steps]
        for request in done:
            del self.left[request.key]
        return [
            SampleResult(request.key, [SampledSequence(request.prompt.tolist(), [request.temperature], [0.0], "stop")])
            for request in done
        ]


class Bench:
    """A thread with fake samplers, and the results that it delivers."""

    def __init__(self, keep: int) -> None:
        self.log: list[str] = []
        self.made: list[FakeSampler] = []
        self.results: SimpleQueue[tuple[str, Result]] = SimpleQueue()
        self.news: list[News] = []
        self.gate = threading.Event()
        self.gate.set()
        self.in_step = threading.Semaphore(0)
        self.thread = SamplingThread(SimpleNamespace(sampler=self._make), self._deliver, keep=keep)

    def _make(self, base_model: str, snapshot: object) -> FakeSampler:
        if base_model == "missing":
            raise FileNotFoundError(2, "No such file", "/secret/path")
        self.made.append(FakeSampler(self.log, base_model))
        self.made[-1].may_step = self.gate
        self.made[-1].in_step = self.in_step
        return self.made[-1]

    def _deliver(self, results: list[tuple[str, Result]], news: list[News]) -> None:
        self.news += news
        for result in results:
            self.results.put(result)

    def submit(self, model: str, key: str, length: int = 1, *, watched: bool = False, **fields: object) -> None:
        request = SampleRequest(key, np.arange(length, dtype=np.int64), **fields)  # pyright: ignore[reportArgumentType]
        self.thread.submit(Weights(model, None), request, watched=watched)

    def load(self) -> SamplingLoad:
        answers: SimpleQueue[SamplingLoad] = SimpleQueue()
        self.thread.ask(answers.put)
        return answers.get(timeout=100)

    def next(self) -> tuple[str, dict]:
        key, result = self.results.get(timeout=100)
        return key, json.loads(json_of(result))


@pytest.fixture
def bench():
    return Bench(keep=2)


def test_results_are_encoded_and_named(bench):
    bench.submit("m", "k", 3)
    assert bench.next() == (
        "k",
        {"type": "sample", "sequences": [{"stop_reason": "stop", "tokens": [0, 1, 2], "logprobs": [1.0]}]},
    )


def test_busy_samplers_take_turns(bench):
    bench.gate.clear()
    bench.submit("a", "1", 4)
    bench.submit("b", "2", 3)
    bench.gate.set()
    assert {bench.next()[0], bench.next()[0]} == {"1", "2"}
    # The first may have begun before the second came; from then on they alternate.
    together = bench.log[bench.log.index("b") - 1 :]
    assert together[:6] == ["a", "b", "a", "b", "a", "b"]


def test_one_sampler_serves_one_set_of_weights(bench):
    for key in ("1", "2", "3"):
        bench.submit("a", key)
        bench.next()
    assert len(bench.made) == 1


def test_idle_samplers_beyond_a_few_are_dropped(bench):
    for model in ("a", "b", "c", "b", "a"):
        bench.submit(model, model)
        bench.next()
    assert [sampler.name for sampler in bench.made] == ["a", "b", "c", "a"]


def test_a_cancelled_request_is_not_delivered(bench):
    bench.gate.clear()
    bench.submit("a", "gone", 5)
    bench.submit("a", "stays", 6)
    bench.thread.cancel("gone")
    bench.thread.cancel("unknown")
    bench.gate.set()
    assert bench.next()[0] == "stays"
    assert "cancel gone" in bench.log
    assert "cancel unknown" not in bench.log


def test_an_impossible_request_fails_alone(bench):
    bench.submit("a", "bad", num_samples=0)
    assert bench.next() == ("bad", {"error": "num_samples must be positive", "category": "user"})
    bench.submit("a", "good")
    assert "sequences" in bench.next()[1]


def test_a_fault_fails_what_runs_and_shows_nothing(bench):
    bench.gate.clear()
    bench.submit("a", "2", 5)
    assert bench.in_step.acquire(timeout=100)  # it runs when the other one comes
    bench.submit("a", "1", 5, temperature=13.0)
    bench.gate.set()
    failed = dict([bench.next(), bench.next()])
    assert set(failed) == {"1", "2"}
    for body in failed.values():
        assert body["category"] == "server"
        assert "secret" not in body["error"]
    bench.submit("a", "3")
    assert "sequences" in bench.next()[1]
    assert len(bench.made) == 2


def test_weights_that_are_gone_are_told(bench):
    bench.submit("missing", "1")
    key, body = bench.next()
    assert (key, body["category"]) == ("1", "user")
    assert "secret" not in body["error"]


def test_logprobs_that_are_no_numbers_fail(bench):
    bench.submit("a", "1", temperature=math.nan)
    assert "not finite" in bench.next()[1]["error"]


def test_the_tokens_of_watched_requests_come_with_each_step(bench):
    bench.gate.clear()
    bench.submit("a", "watched", 5, watched=True)
    bench.submit("a", "not watched", 5)
    bench.gate.set()
    assert {bench.next()[0], bench.next()[0]} == {"watched", "not watched"}
    begun, *tokens = bench.news
    assert isinstance(begun, Begun)
    assert [token.token for token in tokens if isinstance(token, SampledToken)] == [1, 2, 3, 4, 5]
    assert {each.key for each in bench.news} == {"watched"}


def test_a_request_begins_with_the_step_that_gives_its_first_token(bench):
    bench.gate.clear()
    bench.submit("a", "watched", 2, watched=True)
    assert bench.in_step.acquire(timeout=100)
    opened = time.monotonic()
    bench.gate.set()
    bench.next()
    bench.submit("a", "again", 1, watched=True)
    bench.next()
    first, second = (each for each in bench.news if isinstance(each, Begun))
    assert (first.key, second.key) == ("watched", "again")
    assert first.at < opened < second.at < time.monotonic()


def test_the_load_is_told_after_what_was_asked_before(bench):
    assert bench.load() == SamplingLoad(0, 0, 0)
    bench.submit("a", "long", 10**7)
    while not bench.load().running:
        pass
    bench.submit("a", "too", 10**7)
    bench.thread.cancel("long")
    bench.thread.cancel("too")
    load = bench.load()
    assert (load.waiting, load.running) == (0, 0)
    assert load.tokens > 0
    assert bench.load() == load
