"""`fwasync checkpoints`: what is shown, and which snapshot of which job becomes a model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pytest

from fwasync.checkpoints.ledger import CheckpointEntry, CheckpointLedger
from fwasync.cli import checkpoints
from fwasync.cli.checkpoints import run_list, run_promote, run_show
from fwasync.errors import UsageError


@pytest.fixture
async def run(tmp_path: Path) -> Path:
    ledger = CheckpointLedger(tmp_path)
    for entry in (
        CheckpointEntry("step-5", 5, 40, "job-1", "cross_job://job-1/step-5"),
        CheckpointEntry("step-10", 10, 80, "job-1", "cross_job://job-1/step-10", "step-10-aabbccdd"),
        CheckpointEntry("step-15", 1500, 12000, "job-2", None, "x/y/step-15-aabbccdd", {"note": "mine"}),
        CheckpointEntry("step-20", 2000, 16000, "job-2", "cross_job://job-2/step-20"),
    ):
        await ledger.append(entry)
    return tmp_path


class Fireworks:
    """A control plane that remembers what it was asked to promote."""

    asked: list[tuple[Any, ...]] = []  # noqa: RUF012  # emptied for each test

    def __init__(self, base_url: str | None, api_key: str | None) -> None:
        self.where = (base_url, api_key)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None: ...

    async def promote_checkpoint(self, *arguments: Any) -> Any:
        self.asked.append((*self.where, *arguments))
        return SimpleNamespace(name=f"accounts/a/models/{arguments[2]}")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    monkeypatch.setattr(checkpoints, "AsyncFireworksClient", Fireworks)
    Fireworks.asked = []
    return Fireworks.asked


async def promote(run: Path, model: str, **options: Any) -> None:
    given = {"name": None, "job_id": None, "base_model": None, "base_url": "http://x", "api_key": "k", **options}
    await run_promote(run, model, **given)


async def test_the_list_and_one_of_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    await run_list(run)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1] == ["step-5", "5", "40", "state"]
    assert lines[2] == ["step-10", "10", "80", "state", "and", "snapshot"]
    assert lines[3] == ["step-15", "1,500", "12,000", "snapshot"]
    await run_show(run, None)
    assert "cross_job://job-2/step-20" in capsys.readouterr().out
    await run_show(run, "step-15")
    shown = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert shown == {
        "name": "step-15",
        "step": "1500",
        "data_consumed": "12000",
        "source_job_id": "job-2",
        "sampler_path": "x/y/step-15-aabbccdd",
        "note": "mine",
    }


async def test_the_last_snapshot_is_promoted_unless_another_is_named(run: Path, asked: list[tuple[Any, ...]]) -> None:
    await promote(run, "my-model")
    await promote(run, "other", name="step-10", base_model="accounts/f/models/q")
    await promote(run, "third", job_id="job-9")
    assert asked == [
        ("http://x", "k", "job-2", "step-15-aabbccdd", "my-model", None),
        ("http://x", "k", "job-1", "step-10-aabbccdd", "other", "accounts/f/models/q"),
        ("http://x", "k", "job-9", "step-15-aabbccdd", "third", None),
    ]


@pytest.mark.parametrize(
    ("model", "name", "told"),
    [
        ("My_Model", None, "'My_Model' may hold lower-case letters"),
        ("m", "step-5", "'step-5' has no snapshot"),
        ("m", "step-11", "no checkpoint 'step-11'; did you mean 'step-1"),
    ],
)
async def test_what_cannot_be_promoted(
    run: Path, asked: list[tuple[Any, ...]], model: str, name: str | None, told: str
) -> None:
    with pytest.raises(UsageError, match=told):
        await promote(run, model, name=name)
    assert asked == []


async def test_runs_that_have_none(tmp_path: Path, asked: list[tuple[Any, ...]]) -> None:
    for command in (run_list(tmp_path), run_show(tmp_path, None), promote(tmp_path, "m")):
        with pytest.raises(UsageError, match="has no checkpoints"):
            await command
    await CheckpointLedger(tmp_path).append(CheckpointEntry("a", 1, state_path="s"))
    with pytest.raises(UsageError, match="no checkpoint of this run has a snapshot"):
        await promote(tmp_path, "m")
    await CheckpointLedger(tmp_path).append(CheckpointEntry("b", 2, sampler_path="s"))
    with pytest.raises(UsageError, match="pass --job-id"):
        await promote(tmp_path, "m")
    path = "tinker://model-1:train:0/sampler_weights/c"
    await CheckpointLedger(tmp_path).append(CheckpointEntry("c", 3, source_job_id="model-1:train:0", sampler_path=path))
    with pytest.raises(UsageError, match=f"a service without trainer jobs.*: sample from {path}"):
        await promote(tmp_path, "m")
    assert asked == []
