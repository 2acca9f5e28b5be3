"""The record of a command: kept when there is something to keep, gone without a trace otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import anyio
import pytest
from pydantic import BaseModel

from fwasync.cli.recorded import REPORT, new_run_directory, recorded
from fwasync.errors import RunDirectoryError, TransportError
from fwasync.tracking.run import Record


class Config(BaseModel):
    """A configuration."""

    seed: int = 3


def report(records: Sequence[Record]) -> str:
    return f"{len(records)} records"


def files(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


async def test_a_run_leaves_its_files_and_a_report(tmp_path: Path) -> None:
    async with recorded(tmp_path / "run", Config(), title="t", report=report) as run:
        run.log("p", 1, {"x": 1.0})
    assert files(tmp_path / "run") == {".lock", "metrics.jsonl", "config.json", REPORT}
    assert (tmp_path / "run" / REPORT).read_text() == "1 records"


async def test_a_run_that_fails_or_is_cancelled_keeps_what_was_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(TransportError):
        async with recorded(tmp_path / "a", Config(), title="t", report=report) as run:
            run.log("p", 1, {"x": 1.0})
            raise TransportError("gone")
    with anyio.CancelScope() as scope:
        async with recorded(tmp_path / "b", Config(), title="t", report=report) as run:
            run.log("p", 1, {"x": 1.0})
            run.log("p", 2, {"x": 1.0})
            scope.cancel()
            await anyio.sleep_forever()
    said = capsys.readouterr().out
    for name, count in (("a", 1), ("b", 2)):
        assert (tmp_path / name / REPORT).read_text() == f"{count} records"
        assert len((tmp_path / name / "metrics.jsonl").read_text().splitlines()) == count
        assert f"What was done so far is in {tmp_path / name}." in said


async def test_a_run_that_fails_before_its_first_record_can_be_repeated_as_it_was(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "mine.txt").write_text("mine")
    for _ in range(2):
        with pytest.raises(TransportError):
            async with recorded(directory, Config(), title="t", report=report):
                (directory / "service").mkdir()
                (directory / "service" / "log").write_text("")
                raise TransportError("gone")
        assert files(directory) == {"mine.txt"}
    with pytest.raises(TransportError):
        async with recorded(tmp_path / "new", Config(), title="t", report=report):
            raise TransportError("gone")
    assert not (tmp_path / "new").exists()


async def test_the_run_of_another_is_left_alone(tmp_path: Path) -> None:
    async with recorded(tmp_path, Config(), title="t", report=report) as run:
        with pytest.raises(RunDirectoryError, match="already holds a run"):
            async with recorded(tmp_path, Config(), title="t", report=report):
                pytest.fail("it was opened twice")
        run.log("p", 1, {"x": 1.0})
    assert files(tmp_path) == {".lock", "metrics.jsonl", "config.json", REPORT}


async def test_a_report_that_cannot_be_written_is_a_note(tmp_path: Path) -> None:
    with pytest.raises(TransportError) as caught:
        async with recorded(tmp_path, Config(), title="t", report=report) as run:
            run.log("p", 1, {"x": 1.0})
            (tmp_path / REPORT).mkdir()
            raise TransportError("gone")
    assert any(REPORT in note for note in caught.value.__notes__)


def test_new_directories_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert [new_run_directory("demo").name for _ in range(2)] == ["demo-001", "demo-002"]
    assert new_run_directory("sft") == Path("runs/sft-001")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    Path("runs").write_text("a file")
    with pytest.raises(RunDirectoryError, match="cannot make a run in"):
        new_run_directory("demo")
