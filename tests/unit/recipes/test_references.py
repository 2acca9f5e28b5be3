"""Reference logprobs: which are computed, in which order, how many at a time, and what waits for them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import numpy as np
import pytest

from fwasync.checkpoints.resume import ResumeInfo
from fwasync.data.pairs import Pair
from fwasync.errors import OperationFailedError
from fwasync.recipes import dpo
from fwasync.recipes.plan import Plan
from fwasync.recipes.references import ReferenceLogprobs, plan_requests
from fwasync.recipes.rows import TrainingRows
from fwasync.types import ForwardBackwardOutput, TensorData

PAIRS = 6


def pair(index: int) -> Pair:
    return Pair(np.array([1, 2, 10 + index], np.int32), np.array([1, 2, 20 + index, 30], np.int32), 2, index + 1)


ROWS = TrainingRows("pairs", tuple(pair(index) for index in range(PAIRS)), tuple(range(1, PAIRS + 1)))


def plan(*, consumed: int = 0, step: int = 0, **more: Any) -> Plan:
    settings = {"log_path": Path("run"), "dataset": "d", "batch_size": 4, "epochs": 2, **more}
    return Plan.of(dpo.Config(**settings), ROWS.usable, ResumeInfo("path", step, consumed))


class Answer:
    def __init__(self, made: Callable[[], Coroutine[Any, Any, ForwardBackwardOutput]]) -> None:
        self.made = made

    def __await__(self):
        return self.made().__await__()


class Reference:
    """Answers when it is let; the logprob of a token is its own number, negative."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []
        self.open = False
        self.closed = anyio.Event()
        self.go = anyio.Event()
        self.go.set()
        self.failure: Exception | None = None
        self.at_once = self.most = 0

    @asynccontextmanager
    async def opened(self) -> AsyncGenerator[Any]:
        self.open = True
        try:
            yield self
        finally:
            self.open = False
            self.closed.set()

    def forward(self, datums: Sequence[Any], loss_fn: str, *, timeout: float) -> Answer:
        assert self.open
        self.asked.append([datum.loss_fn_inputs["target_tokens"].data[-1] - 10 for datum in datums[0::2]])
        return Answer(lambda: self.answer(datums))

    async def answer(self, datums: Sequence[Any]) -> ForwardBackwardOutput:
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        await self.go.wait()
        self.at_once -= 1
        if self.failure is not None:
            raise self.failure
        rows = [-datum.loss_fn_inputs["target_tokens"].to_numpy().astype(np.float32) for datum in datums]
        records = [{"logprobs": TensorData.from_numpy(row)} for row in rows]
        return ForwardBackwardOutput(loss_fn_output_type="", loss_fn_outputs=records, metrics={})


def logprobs(of: Plan, *, together: int = 1, concurrency: int = 16) -> ReferenceLogprobs:
    return ReferenceLogprobs(ROWS, of, together=together, concurrency=concurrency, timeout=9)


def test_requests_are_in_the_order_of_need_and_only_what_is_left() -> None:
    whole = plan()
    first, second = list(whole.batches())[:2]
    assert plan_requests(whole.order, whole.batches(), 1) == [(row,) for row in (*first.rows, *second.rows)]
    assert [len(request) for request in plan_requests(whole.order, whole.batches(), 3)] == [3, 1, 2]
    last = plan(consumed=2 * PAIRS - 2, step=3)
    (batch,) = last.batches()
    assert plan_requests(last.order, last.batches(), 1) == [(row,) for row in batch.rows]
    assert plan_requests(whole.order, plan(max_steps=1).batches(), 4) == [first.rows]
    assert plan_requests(whole.order, plan(consumed=2 * PAIRS, step=4).batches(), 4) == []


def test_a_run_that_goes_on_asks_in_the_same_company() -> None:
    whole = set(plan_requests(plan().order, plan().batches(), 3))
    for step, consumed in ((1, 4), (2, PAIRS), (3, PAIRS + 4)):
        left = plan(step=step, consumed=consumed)
        assert set(plan_requests(left.order, left.batches(), 3)) <= whole


async def test_logprobs_are_those_of_each_side_and_the_reference_is_closed() -> None:
    reference, told = Reference(), []
    found = logprobs(plan(), together=3)
    async with found.computed(reference.opened, lambda: told.append(found.needed)):
        chosen, rejected = await found.of([5, 0])
        await reference.closed.wait()
        await anyio.lowlevel.checkpoint()
        assert told == [PAIRS]
        chosen_again, _ = await found.of([5])
    assert [row.tolist() for row in chosen] == [[-2, -15], [-2, -10]]
    assert [row.tolist() for row in rejected] == [[-2, -25, -30], [-2, -20, -30]]
    assert chosen_again[0] is chosen[0]
    needed = plan_requests(plan().order, plan().batches(), 3)
    assert reference.asked == [list(request) for request in needed]


async def test_so_many_requests_at_a_time() -> None:
    reference = Reference()
    reference.go = anyio.Event()
    found = logprobs(plan(), concurrency=2)
    async with found.computed(reference.opened, lambda: None):
        while len(reference.asked) < 2:
            await anyio.lowlevel.checkpoint()
        await anyio.wait_all_tasks_blocked()
        assert len(reference.asked) == 2
        reference.go.set()
        await found.of(range(PAIRS))
    assert reference.most == 2


async def test_a_failure_reaches_who_waits_and_passes_as_it_is() -> None:
    reference = Reference()
    reference.failure = OperationFailedError("no memory")
    found = logprobs(plan())
    with pytest.raises(OperationFailedError, match="no memory"):
        async with found.computed(reference.opened, lambda: pytest.fail("nothing is known")):
            await found.of([0])
    assert not reference.open


async def test_leaving_early_closes_the_reference() -> None:
    reference = Reference()
    reference.go = anyio.Event()
    found = logprobs(plan())
    with pytest.raises(ZeroDivisionError):
        async with found.computed(reference.opened, lambda: pytest.fail("nothing is known")):
            await anyio.wait_all_tasks_blocked()
            assert reference.open
            raise ZeroDivisionError
    assert not reference.open


async def test_nothing_is_opened_for_a_run_that_is_done() -> None:
    reference = Reference()
    found = logprobs(plan(consumed=2 * PAIRS, step=4))
    async with found.computed(reference.opened, lambda: pytest.fail("nothing is computed")):
        await anyio.wait_all_tasks_blocked()
    assert not reference.closed.is_set()
