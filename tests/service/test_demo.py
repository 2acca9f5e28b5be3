"""`fwasync demo` and `fwasync serve`, whole: what they leave, that they repeat, that Ctrl-C ends them at any moment."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

unix_only = pytest.mark.skipif(sys.platform == "win32", reason="signals")

SHORT = ("--sft-steps", "6", "--grpo-steps", "3")
FILES = {"report.html", "metrics.jsonl", "checkpoints.jsonl", "config.json", "sort_digits.jsonl"}
# Nobody waits this long: they are here so that a failing test ends.
PATIENCE_S = 60.0
# The promise is 2 s on a quiet machine. On a busy one this still tells an end from a wait that runs out: 30 s or more.
PROMPT_S = 20.0


# As it is where torch is not installed, which is what a newcomer has; importing it would take most of the time.
START = (
    "import sys; sys.modules.update(torch=None, transformers=None)\n"
    "from fwasync.cli import main\n"
    "if __name__ == '__main__': main()"
)


def start(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", START, *arguments],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "FWASYNC_BASE_URL": ""},
    )


def finish(process: subprocess.Popen[str], *, timeout: float = PATIENCE_S) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, out, err


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def without_times(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    times = ("time_s", "train/step_time_sec", "train/tokens_per_sec")
    return [
        {name: value for name, value in record.items() if name not in times and not name.startswith("perf/")}
        for record in records
    ]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A short demo that was run to its end: where, and what it printed."""
    where = tmp_path_factory.mktemp("demo")
    status, out, err = finish(start("demo", *SHORT, cwd=where))
    assert (status, err) == (0, "")
    return where, out


def test_a_demo_leaves_everything_it_promises(demo: tuple[Path, str]) -> None:
    where, out = demo
    run = where / "runs" / "demo-001"
    assert {path.name for path in run.iterdir()} == FILES | {"service", ".lock"}
    phases = [record["phase"] for record in rows(run / "metrics.jsonl")]
    assert phases == ["held-out", *["sft"] * 6, "held-out", *["rl"] * 3, "held-out"]
    names = [entry["name"] for entry in rows(run / "checkpoints.jsonl")]
    assert names == ["step-6", "rl-step-3"]
    assert "mixed on purpose" in out
    assert re.search(r"base model +\d+\.\d% +\d\.\d{3}\n  after SFT .*\n  after GRPO ", out)
    assert (run / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert "after GRPO" in (run / "report.html").read_text(encoding="utf-8")
    assert json.loads((run / "config.json").read_text())["seed"] == 0


def test_sampler_and_trainer_agree(demo: tuple[Path, str]) -> None:
    for record in rows(demo[0] / "runs" / "demo-001" / "metrics.jsonl"):
        if record["phase"] == "rl":
            assert record["train/inference_diff"] < 1e-4
            assert record["version/sample_staleness_max"] == 0
            assert record["rollout/in_flight"] == 16


def test_the_same_seed_gives_the_same_run(demo: tuple[Path, str]) -> None:
    where, out = demo
    status, again, _ = finish(start("demo", *SHORT, cwd=where))
    assert status == 0
    first, second = (rows(where / "runs" / name / "metrics.jsonl") for name in ("demo-001", "demo-002"))
    assert without_times(first) == without_times(second)

    def table(text: str) -> str:
        return text.partition("\nHeld-out")[2].partition("\nGRPO's")[0]

    assert table(out)
    assert table(out) == table(again)


def test_the_next_command_that_it_names_works(demo: tuple[Path, str]) -> None:
    where, out = demo
    command = re.search(r"^  fwasync (train sft --data .*)$", out, re.MULTILINE)
    assert command
    status, trained, err = finish(start(*command[1].split(), "--steps", "2", cwd=where))
    assert (status, err) == (0, "")
    assert "Cross-entropy loss " in trained
    assert len(rows(where / "runs" / "sft-001" / "metrics.jsonl")) == 2


# -- Ctrl-C --------------------------------------------------------------------------------------------------


def said(text: str) -> Callable[[subprocess.Popen[str], Path], str]:
    """Until it has said this; returns what it said so far."""

    def wait(process: subprocess.Popen[str], run: Path) -> str:
        assert process.stdout is not None
        heard = ""
        for line in process.stdout:
            heard += line
            if text in line:
                return heard
        pytest.fail(f"it ended, having said {heard!r}")

    return wait


def has(name: str, content: str = "") -> Callable[[subprocess.Popen[str], Path], str]:
    """Until a file of the run is there, and has this in it."""

    def wait(process: subprocess.Popen[str], run: Path) -> str:
        end = time.monotonic() + PATIENCE_S
        while not ((run / name).exists() and content in (run / name).read_text(encoding="utf-8")):
            assert process.poll() is None, "it ended"
            assert time.monotonic() < end, f"no {content!r} in {name}"
            time.sleep(0.005)
        return ""

    return wait


def processes_of(run: Path) -> list[str]:
    """Processes whose command line names the run."""
    found: list[str] = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(run) in line:
            found.append(line)
    return found


MOMENTS = {
    "before the run": (said("tiny model"), set[str]()),
    "the service starts": (has("config.json"), set[str]()),
    "SFT": (said("sft  "), {"metrics.jsonl", "report.html", "config.json"}),
    "a checkpoint": (has("checkpoints.jsonl", "step-"), {"metrics.jsonl", "report.html", "checkpoints.jsonl"}),
    "GRPO": (has("metrics.jsonl", '"rl"'), {"metrics.jsonl", "report.html", "checkpoints.jsonl"}),
    "the report": (has("checkpoints.jsonl", "rl-step-3"), {"metrics.jsonl", "report.html", "checkpoints.jsonl"}),
}


@unix_only
@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c_at_any_moment(moment: str, tmp_path: Path) -> None:
    wait, kept = MOMENTS[moment]
    run = tmp_path / "run"
    # Only of the last moment it may have ended by itself before the signal comes.
    grpo_steps = "3" if moment == "the report" else "100000"
    steps = ("--sft-steps", "100000" if moment == "SFT" else "6", "--grpo-steps", grpo_steps)
    process = start("demo", "--log-path", str(run), *steps, cwd=tmp_path)
    try:
        wait(process, run)
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        status, _, err = finish(process, timeout=PATIENCE_S)
    finally:
        process.kill()
    ended_by_itself = status == 0 and moment == "the report"
    assert status == 130 or ended_by_itself
    assert time.monotonic() - started < PROMPT_S
    assert err in ("interrupted\n", "")
    left = {path.name for path in run.iterdir()} if run.exists() else set[str]()
    assert kept <= left
    if kept:
        records = rows(run / "metrics.jsonl")
        assert records
        assert "</html>" in (run / "report.html").read_text(encoding="utf-8")
    deadline = time.monotonic() + PROMPT_S
    while processes_of(run) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not processes_of(run)


# -- serve ---------------------------------------------------------------------------------------------------


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    process = start("serve", "--data-dir", "data", cwd=tmp_path)
    yield process, said("Ctrl-C")(process, tmp_path)
    process.kill()
    process.communicate()


@unix_only
def test_serve_tells_how_to_use_it_and_ends_with_ctrl_c(
    served: tuple[subprocess.Popen[str], str], tmp_path: Path
) -> None:
    process, words = served
    exports = dict(re.findall(r"^  export (\w+)=(\S+)$", words, re.MULTILINE))
    assert exports.keys() == {"FWASYNC_BASE_URL", "FWASYNC_API_KEY"}
    assert str(tmp_path / "data") in words
    code = (
        "import sys; sys.modules.update(torch=None, transformers=None)\n"
        "import anyio, fwasync\n"
        "async def ask():\n"
        "    async with fwasync.AsyncServiceClient() as service:\n"
        "        print((await service.get_server_capabilities()).supported_models[0].model_name)\n"
        "anyio.run(ask)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **exports}, capture_output=True, text=True, check=True
    )
    assert done.stdout == "fwasync/qwen3-tiny\n"
    process.send_signal(signal.SIGINT)
    status, _, err = finish(process)
    assert (status, err) == (130, "interrupted\n")
    assert not processes_of(tmp_path / "data")


@unix_only
def test_serve_notices_that_the_service_has_died(served: tuple[subprocess.Popen[str], str]) -> None:
    process, words = served
    number = re.search(r"process (\d+)", words)
    assert number
    os.kill(int(number[1]), signal.SIGKILL)
    status, _, err = finish(process)
    assert status == 1
    assert "has ended by itself" in err
