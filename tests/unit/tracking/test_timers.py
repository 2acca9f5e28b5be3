"""Timers add up where they belong, and loops side by side do not mix."""

from __future__ import annotations

from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from fwasync.tracking.run import open_run
from fwasync.tracking.timers import Timings, collect_timings, flush_timing, timer


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_block_and_a_function_add_up_until_they_are_flushed() -> None:
    clock = Clock()

    @timer
    def step(seconds: float) -> str:
        """Doc."""
        clock.now += seconds
        return "done"

    with collect_timings(Timings(clock)):
        assert step(2.0) == "done"
        step(0.5)
        with timer("dcp_save") as saving:
            assert saving.seconds == 0
            clock.now += 4.0
        assert saving.seconds == 4.0
        assert flush_timing() == {"perf/step_time": 2.5, "perf/dcp_save_time": 4.0}
        assert flush_timing() == {}
    assert (step.__name__, step.__doc__) == ("step", "Doc.")


async def test_an_async_function_is_timed_until_it_has_ended() -> None:
    clock = Clock()

    @timer("sample")
    async def sample() -> int:
        await anyio.lowlevel.checkpoint()
        clock.now += 3.0
        return 7

    with collect_timings(Timings(clock)) as timings:
        assert await sample() == 7
        assert timings.flush() == {"perf/sample_time": 3.0}


def test_what_raises_counts_too() -> None:
    clock = Clock()
    with collect_timings(Timings(clock)) as timings:
        with pytest.raises(LookupError):
            with timer("x"):
                clock.now += 1.0
                raise LookupError
        assert timings.flush() == {"perf/x_time": 1.0}


def test_outside_of_a_run_a_timer_only_measures() -> None:
    with timer("x") as block:
        pass
    assert block.seconds >= 0
    assert flush_timing() == {}


async def test_runs_side_by_side_do_not_mix(tmp_path: Path) -> None:
    """Two loops with timers of the same name; each has a child task and a worker thread that belong to it."""
    found: dict[str, dict[str, float]] = {}

    async def loop(name: str, seconds: float) -> None:
        def work() -> None:
            with timer("thread"):
                run.timings.clock.now += seconds  # type: ignore[attr-defined]

        async def child() -> None:
            with timer("child"):
                run.timings.clock.now += 2 * seconds  # type: ignore[attr-defined]

        async with open_run(tmp_path / name, config={}) as run:
            run.timings.clock = Clock()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(child)
            await anyio.to_thread.run_sync(work)
            await anyio.lowlevel.checkpoint()
            found[name] = flush_timing()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(loop, "a", 1.0)
        tasks.start_soon(loop, "b", 10.0)
    assert found == {
        "a": {"perf/child_time": 2.0, "perf/thread_time": 1.0},
        "b": {"perf/child_time": 20.0, "perf/thread_time": 10.0},
    }


async def test_a_run_that_is_left_gives_back_the_times_around_it(tmp_path: Path) -> None:
    clock = Clock()
    with collect_timings(Timings(clock)):
        async with open_run(tmp_path / "run", config={}):
            with timer("inner"):
                pass
        with timer("outer"):
            clock.now += 1.0
        assert flush_timing() == {"perf/outer_time": 1.0}
