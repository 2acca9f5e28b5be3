"""Spans: a rollout's is current while it runs, and a batch's links to those of its rollouts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import pytest
from opentelemetry import trace

from fwasync.rollout.context import RolloutContext
from fwasync.rollout.scheduler import AsyncRolloutScheduler
from fwasync.rollout.tracing import Tracing
from fwasync.rollout.trajectory import Rollout
from fwasync.testing import virtual_time
from unit.rollout.runs import made, settings, train


class Span(trace.NonRecordingSpan):
    def __init__(self, context: trace.SpanContext, failed: dict[int, str]) -> None:
        super().__init__(context)
        self.failed = failed

    def set_status(self, status: Any, description: str | None = None) -> None:
        if status is trace.StatusCode.ERROR:
            self.failed[self.get_span_context().span_id] = str(description)


class Tracer(trace.Tracer):
    def __init__(self) -> None:
        self.started: list[tuple[str, Any, Any, list[Any]]] = []
        self.failed: dict[int, str] = {}

    def start_span(self, name: str, context: Any = None, **options: Any) -> trace.Span:
        number = len(self.started) + 1
        span = Span(trace.SpanContext(1, number, is_remote=False), self.failed)
        links = [link.context.span_id for link in options.get("links") or []]
        self.started.append((name, number, options["attributes"], links))
        return span

    @contextmanager
    def start_as_current_span(self, name: str, context: Any = None, **options: Any) -> Iterator[trace.Span]:
        with trace.use_span(self.start_span(name, **options)) as span:
            yield span


def test_rollouts_and_batches_are_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    tracer = Tracer()
    monkeypatch.setattr(trace, "get_tracer", lambda name: tracer)
    current: dict[tuple[int, int], int] = {}

    async def rollout(row: int, ctx: RolloutContext) -> Rollout | None:
        await anyio.sleep(1)
        current[row, ctx.rollout_index] = trace.get_current_span().get_span_context().span_id
        return None if ctx.rollout_index == 3 else made(ctx)

    @virtual_time
    async def run() -> None:
        async with AsyncRolloutScheduler(range(3), rollout, settings(), sampler=object()) as scheduler:
            await train(scheduler)

    run()
    spans = {number: (name, attributes) for name, number, attributes, _ in tracer.started}
    assert len(set(current.values())) == 12
    for (row, number), span in current.items():
        name, attributes = spans[span]
        assert name == "fwasync.rollout"
        assert (attributes["fwasync.row"], attributes["fwasync.rollout"]) == (row, number)
    batches = [links for name, _, _, links in tracer.started if name == "fwasync.train_batch"]
    kept = [{current[row, number] for row in rows for number in range(3)} for rows in ((0, 1), (2,))]
    assert [set(links) for links in batches] == kept


def test_the_span_of_a_rollout_that_is_over_its_time_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    tracer = Tracer()
    monkeypatch.setattr(trace, "get_tracer", lambda name: tracer)

    async def rollout(row: int, ctx: RolloutContext) -> Rollout | None:
        await anyio.sleep(100 if ctx.rollout_index == 3 else 1)
        return made(ctx)

    @virtual_time
    async def run() -> None:
        limits = settings(rollout_timeout=10.0)
        async with AsyncRolloutScheduler(range(1), rollout, limits, sampler=object()) as scheduler:
            await train(scheduler)

    run()
    (late,) = [number for _, number, attributes, _ in tracer.started if attributes.get("fwasync.rollout") == 3]
    assert tracer.failed == {late: "ended by CancelledError"}


def test_without_opentelemetry_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", None)
    tracing = Tracing()
    with tracing.current("name", {}) as span:
        assert span is None
    tracing.record("name", {}, started_ns=0, linked=[None])
