"""The files by which a program watches a run that it started."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import anyio
import pytest

from fwasync.recipes.runner import Runner, RunnerConfig


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def names(where: Path) -> set[str]:
    return {path.name for path in where.rglob("*")}


def everything(where: Path) -> RunnerConfig:
    return RunnerConfig(
        status_file=where / "a" / "status",
        metadata_file=where / "metadata",
        metrics_file=where / "metrics",
        output_model_path=where / "model",
    )


def test_the_environment_fills_what_is_unset(tmp_path: Path) -> None:
    environment = {"COOKBOOK_STATUS_FILE": "s", "COOKBOOK_OUTPUT_MODEL_PATH": "m", "COOKBOOK_METRICS_FILE": ""}
    config = RunnerConfig(status_file=tmp_path).resolve(environment)
    assert config == RunnerConfig(status_file=tmp_path, output_model_path=Path("m"))
    assert config.enabled
    assert not RunnerConfig().resolve({}).enabled


async def test_the_files_of_a_run(tmp_path: Path) -> None:
    config = everything(tmp_path)
    async with Runner(config, accelerators=8) as runner:
        await runner.pending()
        assert read(tmp_path / "a" / "status") == {"status": "pending", "step": 0, "total_steps": 0, "progress": 0}
        runner.begin(2, 3)
        await runner.step(3, {"loss": 1.5, "odd": math.nan}, tokens=40)
        assert read(tmp_path / "a" / "status")["status"] == "running"
        await runner.step(3, {"loss": 1.0}, tokens=2)
        await runner.output_model("mine", checkpoint="step-3", job_id="job")
        await runner.completed()
    assert read(tmp_path / "a" / "status") == {"status": "completed", "step": 3, "total_steps": 3, "progress": 1.0}
    metadata = read(tmp_path / "metadata")
    assert metadata["tokens_processed"] == 42
    assert metadata["accelerator_count"] == 8
    assert metadata["accelerator_seconds"] >= 0
    lines = (tmp_path / "metrics").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 3, "loss": 1.5, "odd": None}, {"step": 3, "loss": 1.0}]
    assert read(tmp_path / "model") == {"model_id": "mine", "checkpoint": "step-3", "job_id": "job"}
    assert names(tmp_path) == {"a", "status", "metadata", "metrics", "model"}


async def test_a_failure_is_told_and_passes_on(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        async with Runner(everything(tmp_path)) as runner:
            runner.begin(0, 3)
            await runner.step(1, {}, tokens=1)
            raise ZeroDivisionError("oh")
    told = {"status": "failed", "step": 1, "total_steps": 3, "progress": 0.333333, "error": "oh"}
    assert read(tmp_path / "a" / "status") == told


async def test_a_stop_is_told(tmp_path: Path) -> None:
    async with Runner(everything(tmp_path)) as runner:
        runner.begin(0, 4)
        await runner.step(1, {}, tokens=3)
        await runner.stopped("interrupted")
    told = {"status": "failed", "step": 1, "total_steps": 4, "progress": 0.25, "error": "stopped: interrupted"}
    assert read(tmp_path / "a" / "status") == told


async def test_a_cancellation_is_told(tmp_path: Path) -> None:
    with anyio.CancelScope() as scope:
        async with Runner(everything(tmp_path)):
            scope.cancel()
            await anyio.sleep_forever()
    assert read(tmp_path / "a" / "status")["error"] == "interrupted"


async def test_what_cannot_be_written_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    config = RunnerConfig(status_file=tmp_path / "file" / "status", metrics_file=tmp_path)
    with caplog.at_level(logging.WARNING):
        async with Runner(config) as runner:
            await runner.step(1, {}, tokens=1)
    assert caplog.text.count("cannot write") == 2


async def test_nothing_is_written_unless_it_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    async with Runner(RunnerConfig()) as runner:
        await runner.pending()
        await runner.step(1, {}, tokens=1)
        await runner.completed()
    assert not names(tmp_path)
