"""A run keeps what was logged, whatever happens, and says so when the disk does not."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from blockbuster import blockbuster_ctx

from fwasync.errors import ClosedError, RunDirectoryError, UsageError
from fwasync.tracking import run as run_module
from fwasync.tracking.files import LineFile
from fwasync.tracking.run import Record, Run, open_run


def lines_of(run: Run) -> list[dict[str, Any]]:
    text = (run.log_path / "metrics.jsonl").read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def steps_of(run: Run) -> list[int]:
    return [line["step"] for line in lines_of(run)]


class Watcher:
    """A view that remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.ticked = anyio.Event()

    def begin(self, phase: str, total_steps: int) -> None:
        self.told.append(("begin", phase, total_steps))

    def show(self, record: Record) -> None:
        self.told.append(("show", record.step))

    def gauge(self, name: str, value: float) -> None:
        self.told.append(("gauge", name, value))

    def message(self, text: str) -> None:
        self.told.append(("message", text))

    def close(self) -> None:
        self.told.append(("close",))

    def tick(self) -> None:
        self.ticked.set()


# -- what is written ---------------------------------------------------------------------------------


async def test_a_line_for_each_record(tmp_path: Path) -> None:
    async with open_run(tmp_path / "a" / "b", config={"lr": 1e-4}) as run:
        run.log("sft", 1, {"train/loss": 2.5, "perf/tokens_per_s": 10240})
        run.log("rl", 1, {"train/loss": math.nan, "rollout/reward": math.inf})
        await run.flush()
        first, second = lines_of(run)
    assert 0 <= first.pop("time_s") <= second.pop("time_s") < 60
    assert first == {"phase": "sft", "step": 1, "train/loss": 2.5, "perf/tokens_per_s": 10240}
    assert second == {"phase": "rl", "step": 1, "train/loss": None, "rollout/reward": None}
    assert [record.phase for record in run.records] == ["sft", "rl"]
    assert math.isnan(run.records[1].metrics["train/loss"])


async def test_lines_appear_while_the_run_goes_on(tmp_path: Path) -> None:
    async with open_run(tmp_path / "run", config={}) as run:
        run.log("sft", 1, {})
        with anyio.fail_after(100):
            while not steps_of(run):
                await anyio.lowlevel.checkpoint()
        assert steps_of(run) == [1]


@pytest.mark.parametrize(
    ("metrics", "complaint"),
    [({"step": 1.0}, "'train/step'"), ({"loss": "low"}, "'loss' is 'low'"), ({"loss": 10**400}, "no number")],
)
async def test_what_is_no_metric_is_refused(tmp_path: Path, metrics: dict[str, Any], complaint: str) -> None:
    async with open_run(tmp_path / "run", config={}) as run:
        with pytest.raises(UsageError, match=complaint):
            run.log("sft", 1, metrics)
        assert run.records == []
        run.log("sft", 2, {})
    assert steps_of(run) == [2]


async def test_logging_does_not_touch_the_disk_on_the_loop(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run", config={"a": 1})
    with blockbuster_ctx("fwasync.tracking"):
        async with run:
            for step in range(50):
                run.log("sft", step, {"train/loss": 1.0})
                await anyio.lowlevel.checkpoint()
            await run.flush()
            await run.write_text("report.html", "page")
    assert steps_of(run) == list(range(50))


async def test_texts_replace_each_other(tmp_path: Path) -> None:
    async with open_run(tmp_path / "run", config={}) as run:
        await run.write_text("report.html", "old")
        path = await run.write_text("report.html", "new \ud800 é")
        assert path.read_text("utf-8") == "new \\ud800 é"
        for name in ("../outside", "a/b", "", ".", "..", str(tmp_path / "absolute"), "metrics.jsonl"):
            with pytest.raises(UsageError, match="plain file name"):
                await run.write_text(name, "text")
        (run.log_path / "taken").mkdir()
        with pytest.raises(RunDirectoryError, match="taken"):
            await run.write_text("taken", "text")
        assert sorted(path.name for path in run.log_path.iterdir()) == [
            ".lock",
            "config.json",
            "metrics.jsonl",
            "report.html",
            "taken",
        ]


async def test_it_is_used_inside_its_block(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run", config={})
    with pytest.raises(ClosedError, match="async with"):
        run.log("sft", 1, {})
    async with run:
        pass
    with pytest.raises(ClosedError, match="async with"):
        await run.flush()


# -- the directory -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json"])
async def test_a_directory_holds_one_run(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("precious")
    with pytest.raises(RunDirectoryError, match=rf"already holds a run .*{name}.*choose another"):
        async with open_run(tmp_path, config={}):
            pass
    assert (tmp_path / name).read_text() == "precious"
    assert not [other for other in ("metrics.jsonl", "config.json") if other != name and (tmp_path / other).exists()]


async def test_of_two_runs_at_once_one_gets_the_directory(tmp_path: Path) -> None:
    winners: list[Run] = []
    losers: list[RunDirectoryError] = []

    async def contend() -> None:
        try:
            async with open_run(tmp_path / "run", config={}) as run:
                winners.append(run)
        except RunDirectoryError as error:
            losers.append(error)

    async with anyio.create_task_group() as group:
        for _ in range(8):
            group.start_soon(contend)
    assert (len(winners), len(losers)) == (1, 7)


async def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match=r"cannot make a run in .*file/run: Not a directory"):
        async with open_run(tmp_path / "file" / "run", config={}):
            pass


async def test_a_config_that_cannot_be_written_leaves_the_directory_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "write_atomically", full)
        with pytest.raises(RunDirectoryError, match="No space left"):
            async with open_run(tmp_path / "run", config={}):
                pass
    async with open_run(tmp_path / "run", config={}) as run:
        run.log("sft", 1, {})
    assert steps_of(run) == [1]


# -- writing fails -----------------------------------------------------------------------------------


async def test_a_full_disk_is_told_and_loses_nothing(tmp_path: Path) -> None:
    async with open_run(tmp_path / "run", config={}) as run:
        metrics = run.log_path / "metrics.jsonl"
        run.log("sft", 1, {})
        await run.flush()
        metrics.rename(tmp_path / "aside")
        metrics.symlink_to("/dev/full")
        run.log("sft", 2, {})
        with pytest.raises(RunDirectoryError, match=r"metrics\.jsonl: No space left on device"):
            await run.flush()
        with pytest.raises(RunDirectoryError, match="No space left on device"):
            run.log("sft", 3, {})
        assert [record.step for record in run.records] == [1, 2, 3]
        metrics.unlink()
        (tmp_path / "aside").rename(metrics)
        await run.flush()
        run.log("sft", 4, {})
    assert steps_of(run) == [1, 2, 3, 4]


async def test_a_removed_directory_is_told_at_the_end(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="No such file or directory"):
        async with open_run(tmp_path / "run", config={}) as run:
            (run.log_path / "metrics.jsonl").unlink()
            run.log("sft", 1, {})
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


async def test_a_failure_does_not_hide_the_exception_of_the_block(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        async with open_run(tmp_path / "run", config={}) as run:
            (run.log_path / "metrics.jsonl").unlink()
            raise ZeroDivisionError
    assert "No such file" in caught.value.__notes__[0]
    assert "No such file" in caplog.text


async def test_a_disk_that_hangs_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(run_module, "_END_S", 0.02)
    monkeypatch.setattr(run_module, "_LEAVE_S", 0.03)

    @asynccontextmanager
    async def hanging(directory: str) -> AsyncIterator[None]:
        async with open_run(tmp_path / directory, config={}) as run:
            drain = run._lines.drain
            monkeypatch.setattr(run._lines, "drain", lambda sync=False: (release.wait(100), drain(sync)))
            run.log("sft", 1, {})
            yield

    try:
        with pytest.raises(RunDirectoryError, match=r"within 0\.02 s"):
            async with hanging("one"):
                pass
        with pytest.raises(ZeroDivisionError) as caught:
            async with hanging("other"):
                raise ZeroDivisionError
        assert "within 0.03 s" in caught.value.__notes__[0]
    finally:
        release.set()


def test_a_cut_line_becomes_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Disk:
        room = 12

        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        def write(self, descriptor: int, content: bytes) -> int:
            if os.fstat(descriptor).st_ino != path.stat().st_ino:
                return os.write(descriptor, content)  # of a thread that another test left behind
            if not self.room:
                raise OSError(28, "No space left on device")
            written = os.write(descriptor, content[: self.room])
            self.room -= written
            return written

    disk = Disk()
    path = tmp_path / "lines"
    path.touch()
    monkeypatch.setattr("fwasync.tracking.files.os", disk)
    file = LineFile(path)
    file.add(b"0123456\n")
    file.add(b"89abcde\n")
    with pytest.raises(OSError, match="No space"):
        file.drain()
    assert path.read_bytes() == b"0123456\n89ab"
    file.add(b"last\n")
    disk.room = 100
    file.drain(sync=True)
    assert path.read_bytes() == b"0123456\n89abcde\nlast\n"


# -- ends of a run -----------------------------------------------------------------------------------


async def test_an_exception_passes_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        async with open_run(tmp_path / "run", config={}) as run:
            run.log("sft", 1, {})
            raise ZeroDivisionError
    assert not hasattr(caught.value, "__notes__")
    assert steps_of(run) == [1]


@pytest.mark.parametrize("native", [False, True])
async def test_cancellation_while_logging_loses_nothing(tmp_path: Path, native: bool) -> None:
    run = open_run(tmp_path / "run", config={})
    logging = anyio.Event()

    async def train() -> None:
        async with run:
            for step in range(1_000_000):
                run.log("sft", step, {"train/loss": 1.0})
                if step == 20:
                    logging.set()
                await anyio.lowlevel.checkpoint()

    if native:
        task = asyncio.get_running_loop().create_task(train())
        await logging.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    else:
        async with anyio.create_task_group() as group:
            group.start_soon(train)
            await logging.wait()
            group.cancel_scope.cancel()
    assert len(run.records) > 20
    assert steps_of(run) == list(range(len(run.records)))


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("survives", [False, True])
async def test_what_follows_a_cancellation_is_the_blocks_own_affair(
    tmp_path: Path, native: bool, survives: bool
) -> None:
    run = open_run(tmp_path / "run", config={})
    outcomes: list[object] = []
    inside = anyio.Event()
    tasks: list[asyncio.Task[Any] | None] = []

    async def train() -> None:
        tasks.append(asyncio.current_task())
        try:
            async with run:
                try:
                    run.log("sft", 1, {})
                    inside.set()
                    await anyio.sleep_forever()
                except anyio.get_cancelled_exc_class():
                    if not survives:
                        raise ZeroDivisionError from None
            outcomes.append("survived")
        except BaseException as error:
            outcomes.append(type(error))

    async with anyio.create_task_group() as group:
        group.start_soon(train)
        await inside.wait()
        if native and tasks[0] is not None:
            tasks[0].cancel()
        else:
            group.cancel_scope.cancel()
    assert outcomes == ["survived" if survives else ZeroDivisionError]
    assert steps_of(run) == [1]


async def test_a_cancelled_flush_leaves_the_run_usable(tmp_path: Path) -> None:
    async with open_run(tmp_path / "run", config={}) as run:
        for step in range(20):
            run.log("sft", step, {})
            with anyio.CancelScope() as scope:
                scope.cancel()
                await run.flush()
        await run.flush()
        assert steps_of(run) == list(range(20))


# -- going on ----------------------------------------------------------------------------------------


async def test_a_run_goes_on_where_it_was_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with open_run(tmp_path, config={"lr": 1, "infra": {"region": None}}, resume=True) as run:
        for phase, step in (("sft", 1), ("sft", 2), ("rl", 1), ("sft", 3)):
            run.log(phase, step, {"train/loss": step, "odd": math.nan})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"time_s": 3, "pha')
    view = Watcher()
    config = {"lr": 2, "infra": {"region": "here"}}
    async with open_run(tmp_path, config=config, view=view, resume=True) as run:
        assert [(record.phase, record.step) for record in run.records] == [
            ("sft", 1),
            ("sft", 2),
            ("rl", 1),
            ("sft", 3),
        ]
        assert run.records[0].metrics["train/loss"] == 1
        assert math.isnan(run.records[0].metrics["odd"])
        assert await run.rewind("sft", 1) == 2
        assert await run.rewind("sft", 1) == 0
        assert [(record.phase, record.step) for record in run.records] == [("sft", 1), ("rl", 1)]
        run.log("sft", 2, {"train/loss": 7.0})
        assert run.records[-1].time_s >= run.records[0].time_s
    lines = lines_of(run)
    assert [(line["phase"], line["step"], line["train/loss"]) for line in lines] == [
        ("sft", 1, 1),
        ("rl", 1, 1),
        ("sft", 2, 7),
    ]
    assert json.loads((tmp_path / "config.json").read_text()) == config
    told = f'the run in {tmp_path} was begun with another configuration: lr 1 → 2, infra.region null → "here"'
    assert view.told[0] == ("message", told)
    assert "torn by a crash" in caplog.text


async def test_a_run_that_does_not_go_on_leaves_the_other_as_it_was(tmp_path: Path) -> None:
    async with open_run(tmp_path, config={"lr": 1}, resume=True) as run:
        run.log("sft", 1, {})
    path = tmp_path / "config.json"
    before = path.read_bytes()
    for begins in (False, True):
        assert path.read_bytes() == before
        with pytest.raises(ValueError, match="refused"):
            async with open_run(tmp_path, config={"lr": 2}, resume=True) as run:
                assert not run.has_begun
                run.message("going on")
                await run.flush()
                if begins:
                    run.begin("sft", 2)
                assert run.has_begun == begins
                raise ValueError("refused")
    assert json.loads(path.read_text()) == {"lr": 2}


async def test_a_broken_line_is_skipped_and_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = b'{"time_s": 1.0, "phase": "sft", "step": 1}\n'
    (tmp_path / "metrics.jsonl").write_bytes(good + b'what\n[1]\n{"phase": "sft", "step": "x", "time_s": 1}\n' + good)
    async with open_run(tmp_path, config={}, resume=True) as run:
        assert [record.step for record in run.records] == [1, 1]
        await run.rewind("sft", 0)
    assert (tmp_path / "metrics.jsonl").read_text().splitlines()[:2] == ["what", "[1]"]
    assert caplog.text.count("is no record and is skipped") == 3


async def test_a_rewind_that_cannot_be_written_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    async with open_run(tmp_path, config={}) as run:
        run.log("sft", 1, {})
        with monkeypatch.context() as patch:
            patch.setattr("fwasync.tracking.files.write_atomically", full)
            with pytest.raises(RunDirectoryError, match="No space left"):
                await run.rewind("sft", 0)
        assert [record.step for record in run.records] == steps_of(run) == [1]


@pytest.mark.parametrize("resume", [False, True])
async def test_a_directory_in_use_is_refused(tmp_path: Path, resume: bool) -> None:
    async with open_run(tmp_path, config={}):
        told = rf"in use by process {os.getpid()} on .*, since 20" if resume else "already holds a run"
        with pytest.raises(RunDirectoryError, match=told):
            async with open_run(tmp_path, config={}, resume=resume):
                pass
    async with open_run(tmp_path, config={}, resume=True):
        pass


_INTERRUPTED = """
import asyncio, sys
from fwasync.tracking.run import open_run
async def main():
    async with open_run(sys.argv[1], config={}) as run:
        for step in range(500):
            run.log("sft", step, {"train/loss": 1.0})
        print("logged", flush=True)
        await asyncio.Event().wait()
asyncio.run(main())
"""


def test_ctrl_c_writes_what_was_logged(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _INTERRUPTED, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "logged\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=200)
    assert "KeyboardInterrupt" in errors
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert [json.loads(line)["step"] for line in text.splitlines()] == list(range(500))


# -- the view ----------------------------------------------------------------------------------------


async def test_the_view_is_told_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "_TICK_S", 0.0)
    view = Watcher()
    async with open_run(tmp_path / "run", config={}, view=view) as run:
        run.begin("rl", 2)
        run.gauge("in_flight", 3)
        run.log("rl", 1, {})
        run.message("hello")
        with anyio.fail_after(100):
            await view.ticked.wait()
    assert view.told == [("begin", "rl", 2), ("gauge", "in_flight", 3), ("show", 1), ("message", "hello"), ("close",)]


async def test_a_failing_view_is_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Watcher):
        def show(self, record: Record) -> None:
            raise BrokenPipeError

    view = Broken()
    async with open_run(tmp_path / "run", config={}, view=view) as run:
        run.log("sft", 1, {})
        run.log("sft", 2, {})
        run.message("nobody listens")
    assert view.told == [("close",)]
    assert caplog.text.count("switched off") == 1
    assert steps_of(run) == [1, 2]
