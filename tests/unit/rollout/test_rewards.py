"""Reward functions in processes: what they return, and that nothing of them is left whatever they do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

from fwasync.errors import (
    ClosedError,
    RecoverableRolloutError,
    RewardCrashedError,
    RewardTimeoutError,
    UsageError,
)
from fwasync.rollout.context import RolloutContext
from fwasync.rollout.rewards import AsyncRewardPool
from fwasync.rollout.scheduler import AsyncRolloutScheduler
from fwasync.rollout.trajectory import Rollout
from unit.rollout import grading
from unit.rollout.runs import made, settings, train

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="processes are looked at the way of POSIX")


def lives(pid: int) -> bool:
    """Whether a process exists and is no zombie that waits for whoever adopted it."""
    try:
        os.kill(pid, 0)
        status = Path(f"/proc/{pid}/stat")
        return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


async def gone(*pids: int) -> None:
    with anyio.fail_after(100):
        while any(map(lives, pids)):
            await anyio.sleep(0.02)


async def told(path: Path) -> list[int]:
    file = anyio.Path(path)
    with anyio.fail_after(100):
        while not await file.exists():
            await anyio.sleep(0.02)
    return [int(pid) for pid in (await file.read_text()).split()]


async def test_results_come_back_from_processes_that_are_used_again() -> None:
    async with AsyncRewardPool(1) as rewards:
        assert await rewards.run(grading.length, "four") == 4.0
        pids = {await rewards.run(grading.process_id) for _ in range(5)}
        assert len(pids) == 1
        assert os.getpid() not in pids
        assert len(await rewards.run(grading.big, 3_000_000)) == 3_000_000
        assert rewards.statistics().calls == 7
    await gone(*pids)
    assert rewards.statistics().processes == 0


async def test_calls_share_the_processes_there_are() -> None:
    async with AsyncRewardPool(2) as rewards:
        pids: set[int] = set()

        async def one() -> None:
            pids.add(await rewards.run(grading.process_id))

        async with anyio.create_task_group() as tasks:
            for _ in range(10):
                tasks.start_soon(one)
        assert 1 <= len(pids) <= 2


async def test_a_process_is_replaced_after_so_many_calls() -> None:
    async with AsyncRewardPool(1, calls_per_process=2) as rewards:
        pids = [await rewards.run(grading.process_id) for _ in range(5)]
    assert pids[0] == pids[1] != pids[2] == pids[3] != pids[4]


async def test_a_function_that_loops_for_ever_is_killed_and_counted() -> None:
    async with AsyncRewardPool(1) as rewards:
        before = await rewards.run(grading.process_id)
        with pytest.raises(RewardTimeoutError, match=r"0\.2 s and was killed"):
            await rewards.run(grading.for_ever, timeout=0.2)
        await gone(before)
        assert await rewards.run(grading.process_id) != before
        assert rewards.statistics().timed_out == 1


async def test_what_a_function_started_is_killed_with_it(tmp_path: Path) -> None:
    path = tmp_path / "pids"
    async with AsyncRewardPool(1) as rewards:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(rewards.run, grading.writes_and_hangs, str(path))
            pids = await told(path)
            assert all(map(lives, pids))
            tasks.cancel_scope.cancel()
        await gone(*pids)
        assert await rewards.run(grading.length, "x") == 1.0, "a cancelled call leaves a pool that works"


async def test_leaving_the_pool_ends_calls_that_run(tmp_path: Path) -> None:
    path = tmp_path / "pids"
    ended: list[BaseException] = []

    async def call(rewards: AsyncRewardPool) -> None:
        try:
            await rewards.run(grading.writes_and_hangs, str(path), timeout=100)
        except RewardCrashedError as error:
            ended.append(error)

    async with anyio.create_task_group() as tasks:
        async with AsyncRewardPool(1) as rewards:
            tasks.start_soon(call, rewards)
            pids = await told(path)
    await gone(*pids)
    assert len(ended) == 1
    with pytest.raises(ClosedError):
        await rewards.run(grading.length, "x")


@pytest.mark.parametrize(("function", "how"), [(grading.dies, "exited with 3"), (grading.killed, "SIGKILL")])
async def test_a_process_that_dies_is_told_and_replaced(function: Any, how: str) -> None:
    async with AsyncRewardPool(1) as rewards:
        with pytest.raises(RewardCrashedError, match=how):
            await rewards.run(function)
        assert await rewards.run(grading.length, "x") == 1.0
        assert rewards.statistics().crashed == 1


async def test_a_process_that_died_while_it_was_idle_is_told_and_replaced() -> None:
    async with AsyncRewardPool(1) as rewards:
        pid = await rewards.run(grading.process_id)
        os.kill(pid, signal.SIGKILL)
        await gone(pid)
        with pytest.raises(RewardCrashedError):
            await rewards.run(grading.length, "x")
        assert await rewards.run(grading.length, "x") == 1.0


async def test_a_function_that_forks_has_one_answer(tmp_path: Path) -> None:
    path = tmp_path / "pids"
    async with AsyncRewardPool(1) as rewards:
        assert await rewards.run(grading.forks_and_returns, str(path)) == 1.0, "it is waited for, so it has ended"
        assert await rewards.run(grading.length, "x") == 1.0
        with pytest.raises(RewardCrashedError, match="exited with 3"):
            await rewards.run(grading.forks_and_dies, str(path), timeout=1000)
        await gone(*await told(path))


async def test_errors_come_back_with_their_traceback() -> None:
    async with AsyncRewardPool(1) as rewards:
        with pytest.raises(ValueError, match="cannot grade this") as caught:
            await rewards.run(grading.fails, "this")
        assert "in fails" in caught.value.__notes__[0]
        with pytest.raises(RuntimeError, match="Stubborn: 1 and 2"):
            await rewards.run(grading.fails_stubbornly)
        with pytest.raises(RuntimeError, match="SystemExit: enough"):
            await rewards.run(grading.gives_up)
        with pytest.raises(RecoverableRolloutError, match="the judge is away"):
            await rewards.run(grading.lost)
        with pytest.raises(TypeError, match="pickle"):
            await rewards.run(grading.unsendable)
        assert await rewards.run(grading.length, "x") == 1.0
        assert rewards.statistics().processes == 1, "none of these cost a process"


async def test_what_a_function_prints_does_not_come_between(capfd: pytest.CaptureFixture[str]) -> None:
    async with AsyncRewardPool(1) as rewards:
        assert await rewards.run(grading.shouts) == 1.0
        assert await rewards.run(grading.length, "xyz") == 3.0
    captured = capfd.readouterr()
    assert captured.out == ""
    assert all(text in captured.err for text in ("hello", "raw bytes", "from a child"))


async def test_what_cannot_be_sent_is_refused_before_a_process_starts() -> None:
    async with AsyncRewardPool(1) as rewards:
        with pytest.raises(UsageError, match="top of a module"):
            await rewards.run(lambda: 1.0)
        with pytest.raises(UsageError, match="above 0"):
            await rewards.run(grading.length, "x", timeout=0)
        assert rewards.statistics().processes == 0
    for wrong in ({"processes": 0}, {"timeout": float("inf")}, {"calls_per_process": 0}):
        with pytest.raises(UsageError):
            AsyncRewardPool(**wrong)  # pyright: ignore[reportArgumentType]


async def test_a_run_goes_on_after_a_reward_that_loops_for_ever() -> None:
    async def rollout(row: int, ctx: RolloutContext) -> Rollout:
        if ctx.rollout_index == 0:
            await rewards.run(grading.for_ever, timeout=0.2)
        return made(ctx, await rewards.run(grading.length, "x" * ctx.rollout_index))

    async with AsyncRewardPool(2) as rewards:
        async with AsyncRolloutScheduler(range(3), rollout, settings(), sampler=object()) as scheduler:
            batches = await train(scheduler)
            drops = scheduler.statistics().drops
    assert [[rollout.reward for rollout in group.rollouts] for batch in batches for group in batch] == [[1, 2, 3]] * 3
    assert drops == {"RewardTimeoutError": 3}


OWN = """
from dataclasses import dataclass
import anyio
from fwasync.rollout.rewards import AsyncRewardPool
{imports}

@dataclass
class Grade:
    score: float

class Refused(Exception):
    pass

def grade(score):
    return Grade(score)

def refuse(grade):
    raise Refused(grade.score)

async def main():
    async with AsyncRewardPool(1) as rewards:
        made = await rewards.run(grade, 2.0)
        try:
            await rewards.run(refuse, made)
        except Refused as error:
            print(made, error)

if __name__ == "__main__":
    anyio.run(main)
"""


@pytest.mark.parametrize(
    ("imports", "arguments"), [("", ["own/program.py"]), ("from . import neighbour", ["-m", "own.program"])]
)
async def test_classes_of_the_program_itself_go_both_ways(tmp_path: Path, imports: str, arguments: list[str]) -> None:
    package = tmp_path / "own"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "neighbour.py").touch()
    (package / "program.py").write_text(OWN.format(imports=imports))
    done = await anyio.run_process(
        [sys.executable, *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        check=False,
    )
    assert done.stdout.decode() == "Grade(score=2.0) 2.0\n", done.stderr.decode()


PROGRAM = """
import sys, anyio
from fwasync.rollout.rewards import AsyncRewardPool
from unit.rollout.grading import writes_and_hangs

def double(number):
    return 2 * number

async def main():
    async with AsyncRewardPool(1, timeout=1000) as rewards:
        print(await rewards.run(double, 21), flush=True)
        await rewards.run(writes_and_hangs, sys.argv[1], timeout={timeout})

if __name__ == "__main__":
    anyio.run(main)
"""


@pytest.mark.parametrize(("signal_number", "timeout"), [(signal.SIGINT, 1000.0), (signal.SIGKILL, 2.0)])
async def test_a_program_that_is_interrupted_or_killed_leaves_no_process(
    tmp_path: Path, signal_number: signal.Signals, timeout: float
) -> None:
    program, path = tmp_path / "program.py", tmp_path / "pids"
    program.write_text(PROGRAM.format(timeout=timeout))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(  # noqa: ASYNC220  # the point is how it ends
        [sys.executable, str(program), str(path)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        worker, child = await told(path)
        process.send_signal(signal_number)
        out, _ = await anyio.to_thread.run_sync(process.communicate)
        assert out == "42\n", "a function of the program itself was found"
        if signal_number == signal.SIGINT:
            await gone(worker, child)
        else:
            await gone(worker)  # by its own clock, which cannot know what the function started
            with suppress(ProcessLookupError):  # a parent that was slow to be killed may have ended it itself
                os.kill(child, signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
