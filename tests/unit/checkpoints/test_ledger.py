"""The ledger never loses a whole line, and never guesses about a broken one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fwasync.checkpoints import ledger as ledger_module
from fwasync.checkpoints.ledger import CheckpointEntry, CheckpointLedger
from fwasync.errors import CheckpointLedgerError, UsageError

FIRST = CheckpointEntry("step-1", 1, 64, "job-1", state_path="cross_job://job-1/step-1")
SECOND = CheckpointEntry("step-2", 2, 128, "job-1", sampler_path="step-2-ab12", extra={"seed": 7})


async def test_the_keys_of_a_line(tmp_path: Path) -> None:
    ledger = CheckpointLedger(tmp_path / "new" / "run")
    await ledger.append(FIRST)
    await ledger.append(SECOND)
    first, second = map(json.loads, (tmp_path / "new" / "run" / "checkpoints.jsonl").read_text().splitlines())
    assert first == {
        "name": "step-1",
        "step": 1,
        "data_consumed": 64,
        "source_job_id": "job-1",
        "state_path": "cross_job://job-1/step-1",
    }
    assert second == {
        "name": "step-2",
        "step": 2,
        "data_consumed": 128,
        "source_job_id": "job-1",
        "sampler_path": "step-2-ab12",
        "seed": 7,
    }
    assert await ledger.entries() == [FIRST, SECOND]


async def test_the_latest_to_resume_from_is_the_latest_with_a_state(tmp_path: Path) -> None:
    ledger = CheckpointLedger(tmp_path)
    assert await ledger.entries() == []
    assert await ledger.latest() is None
    assert await ledger.latest(resumable=False) is None
    await ledger.append(FIRST)
    await ledger.append(SECOND)
    assert await ledger.latest() == FIRST
    assert await ledger.latest(resumable=False) == SECOND


async def test_lines_of_other_writers(tmp_path: Path) -> None:
    (tmp_path / "checkpoints.jsonl").write_text('{"name": "a", "source_job_id": null, "loop": {"x": [1]}}\n\n')
    assert await CheckpointLedger(tmp_path).entries() == [CheckpointEntry("a", 0, extra={"loop": {"x": [1]}})]


@pytest.mark.parametrize("cut", [1, 10, 60])
async def test_a_torn_last_line_is_skipped_and_then_removed(
    tmp_path: Path, cut: int, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = CheckpointLedger(tmp_path)
    await ledger.append(FIRST)
    whole = ledger.path.read_bytes()
    ledger.path.write_bytes(whole + whole[:cut])
    assert await ledger.entries() == [FIRST]
    assert "line 2 was torn" in caplog.text
    await ledger.append(SECOND)
    assert await ledger.entries() == [FIRST, SECOND]
    assert ledger.path.read_bytes().startswith(whole)


async def test_a_last_line_that_lacks_only_its_newline_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ledger = CheckpointLedger(tmp_path)
    await ledger.append(FIRST)
    ledger.path.write_bytes(ledger.path.read_bytes().rstrip(b"\n"))
    assert await ledger.entries() == [FIRST]
    await ledger.append(SECOND)
    assert await ledger.entries() == [FIRST, SECOND]
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b'{"name": "st', "Unterminated"),
        (b"[1]", "not a JSON object"),
        (b'{"step": 1}', "no 'name'"),
        (b'{"name": "a", "step": "1"}', "'step' is '1'"),
        (b'{"name": "a", "step": true}', "'step' is True"),
        (b"\xff\xfe", "decode"),
    ],
)
async def test_a_broken_line_before_the_end_is_an_error(tmp_path: Path, line: bytes, complaint: str) -> None:
    ledger = CheckpointLedger(tmp_path)
    await ledger.append(FIRST)
    ledger.path.write_bytes(ledger.path.read_bytes() + line + b"\n")
    await ledger.append(SECOND)
    with pytest.raises(CheckpointLedgerError, match=rf"checkpoints\.jsonl, line 2, is broken: .*{complaint}"):
        await ledger.latest()


@given(kept=st.integers(0, 400))
def test_a_crash_at_any_byte_keeps_the_lines_before(kept: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    async def scenario() -> None:
        ledger = CheckpointLedger(tmp_path_factory.mktemp("run"))
        for entry in (FIRST, SECOND):
            await ledger.append(entry)
        content = ledger.path.read_bytes()[:kept]
        ledger.path.write_bytes(content)
        # A line is complete with its closing brace; the newline behind it may be missing.
        survivors = [FIRST, SECOND][: (content + b"\n").count(b"}\n")]
        assert await ledger.entries() == survivors
        await ledger.append(FIRST)
        assert await ledger.entries() == [*survivors, FIRST]

    anyio.run(scenario)


@pytest.mark.parametrize("extra", [{"step": 3}, {"state_path": "x"}, {"f": print}, {"nan": float("nan")}])
async def test_extras_that_cannot_be_written(tmp_path: Path, extra: dict[str, Any]) -> None:
    ledger = CheckpointLedger(tmp_path)
    with pytest.raises(UsageError, match="step-3"):
        await ledger.append(CheckpointEntry("step-3", 3, extra=extra))
    assert not ledger.path.exists()


async def test_a_full_disk_leaves_the_ledger_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = CheckpointLedger(tmp_path)
    await ledger.append(FIRST)
    before = ledger.path.read_bytes()
    write_all = ledger_module._write_all

    def full(file: Any, content: bytes) -> None:
        write_all(file, content[:20])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ledger_module, "_write_all", full)
        with pytest.raises(CheckpointLedgerError, match=r"checkpoints\.jsonl: No space left on device.*'step-2'"):
            await ledger.append(SECOND)
    assert ledger.path.read_bytes() == before
    await ledger.append(SECOND)
    assert await ledger.entries() == [FIRST, SECOND]


async def test_a_path_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "checkpoints.jsonl").mkdir()
    with pytest.raises(CheckpointLedgerError, match="cannot read"):
        await CheckpointLedger(tmp_path).entries()


async def test_appends_at_once_and_cancelled_ones_are_whole(tmp_path: Path) -> None:
    ledger = CheckpointLedger(tmp_path)

    async def append(step: int) -> None:
        await ledger.append(CheckpointEntry(f"step-{step}", step))

    async with anyio.create_task_group() as group:
        for step in range(12):
            group.start_soon(append, step)
    with anyio.CancelScope() as scope:
        scope.cancel()
        await append(12)
    async with anyio.create_task_group() as group:
        group.start_soon(append, 13)
        await anyio.lowlevel.checkpoint()
        await anyio.lowlevel.checkpoint()
        group.cancel_scope.cancel()
    steps = {entry.step for entry in await ledger.entries()}
    assert steps >= set(range(12))
    assert 12 not in steps  # cancelled before it began
    assert ledger.path.read_bytes().count(b"\n") == len(steps)


async def test_an_entry_is_on_the_disk_when_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []

    def fsync(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(ledger_module.os, "fsync", fsync)
    ledger = CheckpointLedger(tmp_path)
    await ledger.append(FIRST)
    assert synced == [ledger.path.stat().st_size]
