"""W&B gets what the run has logged, and can neither block nor end the run, whatever it does.

What it does is played by modules called `wandb` that the process of its own finds first; the last tests are against the
real one, offline, where it is installed.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from fwasync import WandBConfig
from fwasync.tracking import wandb as wandb_module
from fwasync.tracking.run import Record, Run, open_run

WANDB = WandBConfig(entity="team", project="sorting", run_name="first")

RECORDING = """
import json, os
def say(**what):
    with open(os.environ["SAID"], "a") as file:
        file.write(json.dumps(what) + "\\n")
def Settings(**given): return given
def teardown(): say(teardown=True)
class Run:
    offline, disabled, url, dir = False, False, "https://wandb.example/team/sorting/runs/1", "/x/wandb/run-1/files"
    def define_metric(self, name, step_metric=None): say(axis=step_metric, metric=name)
    def log(self, metrics): say(log=metrics)
    def finish(self, exit_code): say(finish=exit_code)
def init(**given):
    print("noise on the standard output", flush=True)
    say(init=given)
    return Run()
"""


class Listener:
    """A view that keeps the sentences."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def begin(self, phase: str, total_steps: int) -> None: ...

    def show(self, record: Record) -> None: ...

    def gauge(self, name: str, value: float) -> None: ...

    def message(self, text: str) -> None:
        self.told.append(text)

    def close(self) -> None:
        self.told.append("closed")


class Stage:
    """A `wandb` of ours, and what was said to it."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.module = root / "stand-in" / "wandb.py"
        self.module.parent.mkdir()
        self._said = root / "said.jsonl"
        self.view = Listener()
        self.log_path = root / "run"
        monkeypatch.setenv("PYTHONPATH", str(self.module.parent))
        monkeypatch.setenv("SAID", str(self._said))

    def plays(self, code: str) -> None:
        self.module.write_text(code)

    def said(self, kind: str) -> list[Any]:
        lines = self._said.read_text().splitlines() if self._said.exists() else []
        return [message[kind] for message in map(json.loads, lines) if kind in message]

    def run(self, **given: Any) -> Run:
        config = {"lr": 1e-4, "api_key": "sk-secret"}
        return open_run(self.log_path, config=config, **{"view": self.view, "wandb": WANDB, "resume": True, **given})


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a machine on which a process takes long to start; who tests the limits sets them."""
    monkeypatch.setattr(wandb_module, "_FINISH_S", 200.0)
    monkeypatch.setattr(wandb_module, "_FAIL_S", 200.0)


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    return Stage(tmp_path, monkeypatch)


async def eventually(condition: Callable[[], object]) -> None:
    with anyio.fail_after(100):
        while not condition():
            await anyio.sleep(0.005)


# -- what it gets ------------------------------------------------------------------------------------


async def test_it_gets_config_axes_records_and_the_end(stage: Stage) -> None:
    stage.plays(RECORDING)
    async with stage.run() as run:
        run.log("sft", 1, {"train/loss": 2.5})
        run.log("sft", 2, {"train/loss": float("nan"), "perf/x_time": 1})
        await eventually(lambda: run.wandb_place)
        assert run.wandb_place == "W&B: https://wandb.example/team/sorting/runs/1"
    (given,) = stage.said("init")
    assert {name: given[name] for name in ("entity", "project", "name", "dir", "resume")} == {
        "entity": "team",
        "project": "sorting",
        "name": "first",
        "dir": str(stage.log_path),
        "resume": "allow",
    }
    assert given["config"] == {"lr": 1e-4, "api_key": "***"}
    assert given["id"] == json.loads((stage.log_path / "wandb.json").read_text())["id"]
    assert (given["settings"]["console"], given["settings"]["x_stats_pid"]) == ("off", os.getpid())
    assert stage.said("metric") == ["train/step", "train/*", "perf/*", "rollout/*", "batch/*", "infra/*"]
    assert set(stage.said("axis")) == {None, "train/step"}
    first, second = stage.said("log")
    assert first == {"train/step": 1, "phase": "sft", "train/loss": 2.5}
    assert second["perf/x_time"] == 1
    assert second["train/loss"] != second["train/loss"]
    assert stage.said("finish") == [0]
    assert stage.view.told == ["W&B: https://wandb.example/team/sorting/runs/1", "closed"]


async def test_it_is_used_only_where_an_entity_is_set(stage: Stage) -> None:
    stage.plays(RECORDING)
    for settings in (None, WandBConfig(project="sorting")):
        async with stage.run(wandb=settings) as run:
            run.log("sft", 1, {})
    assert stage.said("init") == []
    assert not (stage.log_path / "wandb.json").exists()


async def test_a_run_that_goes_on_is_the_same_run_there(stage: Stage) -> None:
    stage.plays(RECORDING)
    async with stage.run() as run:
        run.log("sft", 1, {"train/loss": 2.0})
    async with stage.run() as run:
        run.log("sft", 2, {"train/loss": 1.0})
    one, other = stage.said("init")
    assert one["id"] == other["id"]
    assert [row["train/step"] for row in stage.said("log")] == [1, 2]
    async with stage.run(wandb=WandBConfig(entity="team", project="another")) as run:
        run.begin("sft", 2)
    assert stage.said("init")[2]["id"] != one["id"]


async def test_a_run_that_does_not_go_on_is_not_told(stage: Stage) -> None:
    stage.plays(RECORDING)
    async with stage.run() as run:
        run.log("sft", 1, {"train/loss": 2.5})
    async with stage.run(wandb=WandBConfig(entity="team", project="another")) as run:
        run.message("refused")
    assert len(stage.said("init")) == 1
    assert json.loads((stage.log_path / "wandb.json").read_text())["project"] == "sorting"
    async with stage.run(wandb=WandBConfig(entity="team", project="another")) as run:
        run.begin("sft", 2)
    assert [given["project"] for given in stage.said("init")] == ["sorting", "another"]


async def test_steps_that_are_taken_again_are_logged_again(stage: Stage) -> None:
    stage.plays(RECORDING)
    async with stage.run() as run:
        for step in (1, 2, 3):
            run.log("sft", step, {})
    async with stage.run() as run:
        assert await run.rewind("sft", 1) == 2
        for step in (2, 3, 4):
            run.log("sft", step, {})
    assert [row["train/step"] for row in stage.said("log")] == [1, 2, 3, 2, 3, 4]


async def test_a_failed_run_is_failed_there(stage: Stage) -> None:
    stage.plays(RECORDING)
    with pytest.raises(ZeroDivisionError):
        async with stage.run() as run:
            run.log("sft", 1, {})
            raise ZeroDivisionError
    assert stage.said("finish") == [1]
    assert len(stage.said("log")) == 1


async def test_the_file_comes_first(stage: Stage) -> None:
    """While the disk refuses, W&B gets nothing either; then both get all."""
    stage.plays(RECORDING)
    async with stage.run() as run:
        metrics = stage.log_path / "metrics.jsonl"
        await eventually(lambda: run.wandb_place)
        metrics.rename(stage.log_path / "aside")
        run.log("sft", 1, {})
        with pytest.raises(Exception, match="No such file"):
            await run.flush()
        await anyio.sleep(0.05)
        assert stage.said("log") == []
        (stage.log_path / "aside").rename(metrics)
        await run.flush()
    assert len(stage.said("log")) == 1
    assert len(metrics.read_text().splitlines()) == 1


# -- what it cannot do -------------------------------------------------------------------------------

OFFLINE = (
    RECORDING
    + """
online = init
def init(mode=None, **given):
    if mode != "offline":
        raise RuntimeError("No API key configured. Use `wandb login`.\\nmore")
    Run.offline, Run.url = True, None
    return online(**given)
"""
)


async def test_without_a_key_it_is_logged_offline_and_told_once(stage: Stage) -> None:
    stage.plays(OFFLINE)
    async with stage.run() as run:
        run.log("sft", 1, {})
    assert stage.view.told == [
        "W&B is not reached, and logged to offline: No API key configured. Use `wandb login`.",
        "W&B is logged to offline; upload it with: wandb sync /x/wandb/run-1",
        "closed",
    ]
    assert len(stage.said("log")) == 1
    assert stage.said("finish") == [0]


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("raise ImportError", "wandb is not installed, so nothing is logged to W&B: pip install 'fwasync[wandb]'"),
        (RECORDING + "def init(**given): raise TypeError('new')\n", "nothing is logged to W&B: new"),
        (RECORDING + "def log(self, metrics): raise OSError('full')\nRun.log = log\n", "take everything: full"),
        (RECORDING + "def finish(self, exit_code): raise OSError('late')\nRun.finish = finish\n", "the run: late"),
        (RECORDING + "def init(**given): os._exit(3)\n", "process that logs to W&B has ended"),
        (RECORDING + "def log(self, metrics): os._exit(3)\nRun.log = log\n", "process that logs to W&B has ended"),
        ("import os\nos.kill(os.getpid(), 9)", "process that logs to W&B has ended"),
    ],
    ids=["not installed", "init", "log", "finish", "init ends it", "log ends it", "killed"],
)
async def test_what_raises_or_ends_is_told_once_and_the_run_goes_on(stage: Stage, code: str, told: str) -> None:
    stage.plays(code)
    async with stage.run() as run:
        for step in range(5):
            run.log("sft", step, {})
            await run.flush()
    assert len((stage.log_path / "metrics.jsonl").read_text().splitlines()) == 5
    assert sum(told in sentence for sentence in stage.view.told) == 1
    assert not any("within" in sentence for sentence in stage.view.told)


HANG = "import time\ntime.sleep(600)\n"


@pytest.mark.parametrize(
    "code",
    [
        HANG,
        RECORDING + f"def init(**given):\n  {HANG.replace(chr(10), chr(10) + '  ')}\n",
        RECORDING + f"def log(self, metrics):\n  {HANG.replace(chr(10), chr(10) + '  ')}\nRun.log = log\n",
        RECORDING + f"def finish(self, exit_code):\n  {HANG.replace(chr(10), chr(10) + '  ')}\nRun.finish = finish\n",
        "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + HANG,
    ],
    ids=["import", "init", "log", "finish", "deaf"],
)
@pytest.mark.parametrize("cancelled", [False, True])
async def test_what_hangs_holds_nobody_up(
    stage: Stage, code: str, cancelled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than any pipe holds is logged, and the process is ended in time, with the run or with its cancellation."""
    monkeypatch.setattr(wandb_module, "_FINISH_S", 0.3)
    monkeypatch.setattr(wandb_module, "_FAIL_S", 0.3)
    stage.plays(code)
    with anyio.CancelScope() as scope:
        async with stage.run() as run:
            for step in range(3000):
                run.log("sft", step, {f"train/metric_{i}": float(i) for i in range(10)})
            await run.flush()
            if cancelled:
                scope.cancel()
                await anyio.sleep_forever()
    assert len((stage.log_path / "metrics.jsonl").read_text().splitlines()) == 3000
    late = [sentence for sentence in stage.view.told if "did not take the last records within 0.3 s" in sentence]
    assert len(late) == 1
    assert stage.view.told[-1] == "closed"


async def test_a_process_that_cannot_be_started_is_told(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(stage.log_path / "none"))
    async with stage.run() as run:
        run.log("sft", 1, {})
    assert "its process does not start: No such file or directory" in stage.view.told[0]


async def test_without_a_view_it_is_told_in_the_log(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    stage.plays("raise ImportError")
    with caplog.at_level(logging.WARNING):
        async with stage.run(view=None):
            pass
    assert "pip install 'fwasync[wandb]'" in caplog.text


ORPHAN = """
import anyio, os, signal, sys
from fwasync import WandBConfig
from fwasync.tracking.run import open_run
async def main():
    async with open_run(sys.argv[1], config={}, wandb=WandBConfig(entity="team")) as run:
        run.log("sft", 1, {"train/loss": 1.0})
        while not run.wandb_place:
            await anyio.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
anyio.run(main)
"""


async def test_the_run_of_a_process_that_was_killed_is_ended_there(stage: Stage) -> None:
    stage.plays(RECORDING)
    environment = {**os.environ, "PYTHONPATH": f"{stage.module.parent}{os.pathsep}{_SRC}"}
    command = [sys.executable, "-c", ORPHAN, str(stage.log_path)]
    done = await anyio.run_process(command, check=False, env=environment)
    assert done.returncode == -signal.SIGKILL
    await eventually(lambda: stage.said("finish"))
    assert stage.said("finish") == [1]


_SRC = Path(wandb_module.__file__).parents[2]


# -- the real one ------------------------------------------------------------------------------------

real = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")


@real
async def test_the_real_one_offline_and_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    view = Listener()
    for step in (1, 2):
        async with open_run(tmp_path / "run", config={"lr": 1}, view=view, wandb=WANDB, resume=True) as run:
            run.log("sft", step, {"train/loss": 1.0 / step})
    run_id = json.loads((tmp_path / "run" / "wandb.json").read_text())["id"]
    places = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert places
    assert all(run_id in place.name for place in places)
    assert all(b"train/loss" in file.read_bytes() for place in places for file in place.glob("*.wandb"))
    assert [sentence.rpartition(" ")[0] for sentence in view.told if sentence != "closed"] == [
        "W&B is logged to offline; upload it with: wandb sync"
    ] * 2


@real
async def test_the_real_one_without_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    view = Listener()
    async with open_run(tmp_path / "run", config={}, view=view, wandb=WANDB) as run:
        run.log("sft", 1, {"train/loss": 1.0})
    assert "logged to offline: " in view.told[0]
    assert "API key" in view.told[0] or "api_key" in view.told[0]
    assert view.told[1].startswith("W&B is logged to offline; upload it with: wandb sync ")


@real
async def test_the_real_one_with_a_network_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_module, "_INIT_S", 1.0)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    view = Listener()
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and never answers
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        async with open_run(tmp_path / "run", config={}, view=view, wandb=WANDB) as run:
            run.log("sft", 1, {"train/loss": 1.0})
    assert view.told[0].startswith("W&B is not reached, and logged to offline: ")
    assert view.told[1].startswith("W&B is logged to offline; upload it with: wandb sync ")
    assert len(view.told) == 3
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    assert b"train/loss" in file.read_bytes()


@real
def test_the_process_of_a_run_does_not_import_wandb(tmp_path: Path) -> None:
    code = (
        "import anyio, sys\nfrom fwasync import WandBConfig\nfrom fwasync.tracking.run import open_run\n"
        "async def main():\n"
        "    async with open_run(sys.argv[1], config={}, wandb=WandBConfig(entity='t')) as run: run.log('p', 1, {})\n"
        "anyio.run(main)\nassert 'wandb' not in sys.modules\n"
    )
    environment = {**os.environ, "WANDB_MODE": "offline"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], check=True, timeout=200, env=environment)
