"""Controllers: never more than the window, in order, and no hole after a cancellation."""

from __future__ import annotations

import sys

import anyio
import anyio.to_thread
import pytest

from fwasync import ConcurrencyConfig, concurrency_controller
from fwasync.errors import UsageError
from fwasync.sampling.aimd import AimdSettings, Observation
from fwasync.sampling.concurrency import AdaptiveConcurrencyController, FixedConcurrencyController
from fwasync.testing import virtual_time


@virtual_time
async def test_never_more_than_the_window_and_in_the_order_of_asking() -> None:
    controller = FixedConcurrencyController(3)
    entered: list[int] = []

    async def use(number: int) -> None:
        async with controller.slot():
            entered.append(number)
            assert controller.in_flight <= 3
            await anyio.sleep(1)

    async with anyio.create_task_group() as group:
        for number in range(10):
            group.start_soon(use, number)
    assert entered == list(range(10))
    assert anyio.current_time() == pytest.approx(4)
    assert controller.statistics().max_in_flight == 3
    assert (controller.in_flight, controller.waiting) == (0, 0)
    assert controller.step_completed() == {"window": 3.0}


@pytest.mark.parametrize("cancel_at", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("victim", range(4))
def test_a_cancelled_task_leaves_no_hole(victim: int, cancel_at: float) -> None:
    @virtual_time
    async def scenario() -> None:
        controller = FixedConcurrencyController(1)
        scopes: dict[int, anyio.CancelScope] = {}
        done: list[int] = []

        async def use(number: int) -> None:
            with anyio.CancelScope() as scopes[number]:
                async with controller.slot():
                    await anyio.sleep(1)
                    done.append(number)

        async with anyio.create_task_group() as group:
            for number in range(4):
                group.start_soon(use, number)
            await anyio.sleep(cancel_at)
            scopes[victim].cancel()
        assert set(range(4)) - {victim} <= set(done)
        assert (controller.in_flight, controller.waiting) == (0, 0)
        async with controller.slot():
            assert controller.in_flight == 1

    scenario()


@pytest.mark.parametrize("cancelled_first", [True, False])
def test_a_waiter_cancelled_in_the_moment_of_its_turn_hands_the_slot_on(cancelled_first: bool) -> None:
    @virtual_time
    async def scenario() -> None:
        controller = FixedConcurrencyController(1)
        waiter = anyio.CancelScope()
        followed: list[float] = []

        async def wait() -> None:
            with waiter:
                async with controller.slot():
                    await anyio.sleep_forever()

        async def follow() -> None:
            async with controller.slot():
                followed.append(anyio.current_time())

        async with anyio.create_task_group() as group:
            async with controller.slot():
                group.start_soon(wait)
                group.start_soon(follow)
                await anyio.sleep(1)
                assert controller.waiting == 2
                if cancelled_first:
                    waiter.cancel()
            waiter.cancel()
        assert waiter.cancelled_caught
        assert followed == [pytest.approx(1)]
        assert (controller.in_flight, controller.waiting) == (0, 0)

    scenario()


@virtual_time
async def test_who_is_cancelled_before_it_asks_gets_no_slot() -> None:
    controller = FixedConcurrencyController(1)
    entered = False
    with anyio.CancelScope() as scope:
        scope.cancel()
        async with controller.slot():
            entered = True
    assert not entered
    assert (controller.in_flight, controller.statistics().max_in_flight) == (0, 0)


@virtual_time
async def test_a_free_slot_is_not_taken_before_those_who_wait() -> None:
    controller = FixedConcurrencyController(1)
    entered: list[str] = []

    async def use(name: str) -> None:
        async with controller.slot() as slot:
            entered.append(name)
            await anyio.sleep(1)
            assert slot.age_s == pytest.approx(1)

    async with anyio.create_task_group() as group:
        async with controller.slot():
            group.start_soon(use, "first")
            group.start_soon(use, "second")
            await anyio.sleep(1)
        await use("last")  # asks in the moment in which the slot was given to the first
    assert entered == ["first", "second", "last"]


@virtual_time
async def test_a_grown_window_lets_all_that_fit_in_at_once() -> None:
    settings = AimdSettings(initial_window=1, additive_increase=4, adjustment_interval=1)
    controller = AdaptiveConcurrencyController(settings)
    entered: list[float] = []

    async def use() -> None:
        async with controller.slot() as slot:
            entered.append(anyio.current_time())
            await anyio.sleep(1)
            slot.observation = Observation(200)

    async with anyio.create_task_group() as group:
        for _ in range(6):
            group.start_soon(use)
    assert entered == pytest.approx([0, 1, 1, 1, 1, 1])


@virtual_time
async def test_a_shrunk_window_admits_nobody_until_enough_have_left() -> None:
    controller = AdaptiveConcurrencyController(AimdSettings(initial_window=4))
    entered: list[float] = []

    async def use(seconds: float, status: int) -> None:
        async with controller.slot() as slot:
            entered.append(anyio.current_time())
            await anyio.sleep(seconds)
            slot.observation = Observation(status)

    async with anyio.create_task_group() as group:
        for seconds, status in ((1, 429), (2, 200), (3, 200), (4, 200), (1, 200)):
            group.start_soon(use, seconds, status)
        await anyio.sleep(1.5)
        assert (controller.window_size, controller.in_flight, controller.waiting) == (2, 3, 1)
    assert entered == pytest.approx([0, 0, 0, 0, 3])


@virtual_time
async def test_the_figures_of_a_step() -> None:
    controller = AdaptiveConcurrencyController(AimdSettings(initial_window=16))
    for queued in (0.0, 0.2):
        async with controller.slot() as slot:
            slot.observation = Observation(200, queued, prompt_tokens=10, cached_prompt_tokens=4)
    async with controller.slot():
        pass  # tells nothing
    figures = controller.step_completed()
    assert figures == {
        "window": 16.0,
        "window_after": 20.0,
        "avg_window": 16.0,
        "requests": 2.0,
        "max_in_flight": 1.0,
        "pending_decrease": 0.0,
        "cache_hit_rate": 0.4,
        "avg_pq": 0.1,
        "ema_pq": 0.0,
    }
    for status in (200, 429, 404):
        async with controller.slot() as slot:
            slot.observation = Observation(status)
    figures = controller.step_completed()
    assert (figures["status_responses"], figures["congestion_responses"]) == (2.0, 1.0)
    assert figures["congestion_rate"] == 0.5
    assert "slowdown" not in figures
    assert controller.statistics().requests == 5
    assert controller.statistics().ema_prefill_queue == pytest.approx(0.1)


def test_a_window_of_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="max_concurrency is 0"):
        FixedConcurrencyController(0)


@virtual_time
async def test_latency_is_told_with_the_figures() -> None:
    controller = AdaptiveConcurrencyController(AimdSettings(adjustment_interval=0))
    for latency_s in (1.0, 1.0, 3.0):
        async with controller.slot() as slot:
            await anyio.sleep(latency_s)
            slot.observation = Observation(200, latency_s=latency_s, tokens=10)
        figures = controller.step_completed()
    assert figures["slowdown"] == pytest.approx(1.6)
    assert controller.statistics().slowdown == pytest.approx(1.6)


@virtual_time
async def test_what_runs_while_the_window_shrinks_does_not_shrink_it_again() -> None:
    controller = AdaptiveConcurrencyController(AimdSettings(initial_window=32, adjustment_interval=4))

    async def use(latency_s: float) -> None:
        async with controller.slot() as slot:
            await anyio.sleep(latency_s)
            slot.observation = Observation(200, latency_s=latency_s, tokens=1)

    for latencies in ([1.0] * 4, [5.0] * 4 + [5.5] * 12):
        async with anyio.create_task_group() as group:
            for latency_s in latencies:
                group.start_soon(use, latency_s)
    assert controller.window_size == 16  # 33, halved once though sixteen were slow


@virtual_time
async def test_an_attempt_that_keeps_its_slot_teaches_too() -> None:
    controller = AdaptiveConcurrencyController(AimdSettings(initial_window=16))
    async with controller.slot() as slot:
        controller.observe(Observation(429))
        assert (controller.window_size, controller.in_flight) == (8, 1)
        slot.observation = Observation(200)
    assert controller.statistics().requests == 2
    assert controller.step_completed()["congestion_rate"] == 0.5


def test_another_event_loop_is_refused_while_slots_are_taken() -> None:
    controller = FixedConcurrencyController(2)

    async def take() -> None:
        async with controller.slot():
            assert controller.in_flight == 1

    async def hold() -> None:
        async with controller.slot():
            with pytest.raises(UsageError, match="another event loop"):
                await anyio.to_thread.run_sync(anyio.run, take)
            assert (controller.in_flight, controller.waiting) == (1, 0)

    anyio.run(hold)
    anyio.run(take)  # one loop after another is fine


def test_a_configuration_becomes_a_controller() -> None:
    assert concurrency_controller(ConcurrencyConfig()).window_size == sys.maxsize
    assert concurrency_controller(ConcurrencyConfig(max_concurrency=3)).window_size == 3
    fixed = concurrency_controller(ConcurrencyConfig(mode="fixed", max_concurrency=4))
    assert isinstance(fixed, FixedConcurrencyController)
    assert fixed.window_size == 4
    adaptive = ConcurrencyConfig(mode="adaptive", max_window=100, rollout_adjustment_interval=1)
    controller = concurrency_controller(adaptive, replicas=3)
    assert isinstance(controller, AdaptiveConcurrencyController)
    assert controller.window_size == 24
    assert concurrency_controller(adaptive, replicas=50).window_size == 100
    assert concurrency_controller(ConcurrencyConfig(mode="adaptive", initial_window=5)).window_size == 5
    with pytest.raises(UsageError, match="replicas is 0"):
        concurrency_controller(adaptive, replicas=0)
