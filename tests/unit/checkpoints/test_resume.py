"""Where a run begins, decided from its lines; and how its checkpoints are saved and promoted."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio.lowlevel
import pytest

from fwasync.checkpoints.ledger import CheckpointEntry, CheckpointLedger
from fwasync.checkpoints.promotion import promote
from fwasync.checkpoints.resume import INIT_KEY, ResumeInfo, checkpoint_path, decide, resolve_resume
from fwasync.checkpoints.saving import (
    CheckpointKind,
    get_sampler_checkpoint_id,
    save_checkpoint,
    submit_checkpoint,
)
from fwasync.errors import CheckpointLedgerError, UsageError


def line(step: int, *, state: bool = True, init: str | None = None) -> CheckpointEntry:
    extra = {INIT_KEY: init} if init else {}
    path = f"state:{step}" if state else None
    return CheckpointEntry(f"step-{step}", step, 10 * step, "job-1", path, None if state else "snapshot", extra)


class Client:
    """A training client that answers, or never does."""

    model_id = "model-1"

    def __init__(self) -> None:
        self.log: list[str] = []
        self.hold = anyio.Event()
        self.hold.set()

    async def _answer(self, **fields: str) -> Any:
        await self.hold.wait()
        return SimpleNamespace(**fields)

    def save_state(self, name: str) -> Any:
        self.log.append(f"state {name}")
        return self._answer(path=f"tinker://{name}")

    def save_weights_for_sampler(self, name: str) -> Any:
        self.log.append(f"sampler {name}")
        return self._answer(path=f"tinker://s/{name}")

    def save_weights_for_sampler_ext(self, name: str, checkpoint_type: str) -> Any:
        self.log.append(f"{checkpoint_type} {name}")
        return self._answer(path=f"gs://bucket/{name}-0a", snapshot_name=f"{name}-0a")

    async def load_state_with_optimizer(self, path: str) -> None:
        self.log.append(f"load {path}")


# -- where to begin ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "path", "job_id"),
    [
        ("gs://bucket/dir:a/step-1", "gs://bucket/dir:a/step-1", None),
        ("tinker://m:train:0/weights/step-1", "tinker://m:train:0/weights/step-1", None),
        ("cross_job://job-2/step-1", "cross_job://job-2/step-1", None),
        ("/disk/step-1", "/disk/step-1", None),
        ("job-2:step-1", "cross_job://job-2/step-1", "job-2"),
        ("step-2", "state:2", "job-1"),
        ("step-9", "step-9", None),
    ],
)
def test_the_forms_of_init_from_checkpoint(text: str, path: str, job_id: str | None) -> None:
    assert checkpoint_path(text, [line(1), line(2), line(3)]) == (path, job_id)


@pytest.mark.parametrize("text", ["", ":step-1", "job:"])
def test_what_is_no_checkpoint(text: str) -> None:
    with pytest.raises(UsageError, match=r"init_from_checkpoint is .*job:name"):
        checkpoint_path(text)


def test_a_run_goes_on_from_its_newest_state() -> None:
    entries = [line(2), line(4), line(5, state=False)]
    assert decide(entries) == ResumeInfo("state:4", 4, 40, "job-1", entries[1])
    assert decide([]) is None
    assert decide([line(5, state=False)]) is None


def test_a_run_from_a_checkpoint_begins_at_zero_and_goes_on_where_it_was() -> None:
    assert decide([], "job-2:a") == ResumeInfo("cross_job://job-2/a", source_job_id="job-2")
    assert decide([line(4)], "job-2:a") == ResumeInfo("cross_job://job-2/a", source_job_id="job-2")
    own = [line(4), line(2, init="job-2:a")]
    assert decide(own, "job-2:a") == ResumeInfo("state:2", 2, 20, "job-1", own[1])
    assert decide(own, "job-2:b") == ResumeInfo("cross_job://job-2/b", source_job_id="job-2")
    assert decide(own) == ResumeInfo("state:2", 2, 20, "job-1", own[1])


async def test_what_was_found_is_loaded(tmp_path: Path) -> None:
    client: Any = Client()
    assert await resolve_resume(client, tmp_path) is None
    assert not client.log
    await CheckpointLedger(tmp_path).append(line(3))
    found = await resolve_resume(client, tmp_path)
    assert (found.step, found.data_consumed) == (3, 30)  # pyright: ignore[reportOptionalMemberAccess]
    await resolve_resume(client, tmp_path, "gs://x/y")
    assert client.log == ["load state:3", "load gs://x/y"]


# -- saving --------------------------------------------------------------------------------------------------


async def test_the_line_of_a_checkpoint_of_a_trainer_job(tmp_path: Path) -> None:
    client: Any = Client()
    state = {"step": 10, "data_consumed": 640, "source_job_id": "job-1", "epoch": 2}
    paths = await save_checkpoint(client, "step-10", tmp_path / "run", state, CheckpointKind.BOTH)
    assert paths == {"state_path": "cross_job://job-1/step-10", "sampler_path": "step-10-0a"}
    assert json.loads((tmp_path / "run" / "checkpoints.jsonl").read_text()) == {"name": "step-10", **state, **paths}
    assert client.log == ["state step-10", "base step-10"]


async def test_without_a_trainer_job_the_service_tells_the_paths(tmp_path: Path) -> None:
    client: Any = Client()
    await save_checkpoint(client, "a", tmp_path, {"step": 1, "data_consumed": 5})
    await save_checkpoint(client, "b", tmp_path, {"step": 2, "data_consumed": 9}, "sampler")
    state, sampler = await CheckpointLedger(tmp_path).entries()
    assert state == CheckpointEntry("a", 1, 5, "model-1", "tinker://a")
    assert sampler == CheckpointEntry("b", 2, 9, "model-1", None, "tinker://s/b")
    assert client.log == ["state a", "sampler b"]
    with pytest.raises(ValueError, match="'all' is not a valid CheckpointKind"):
        await save_checkpoint(client, "c", tmp_path, {}, "all")


async def test_nothing_is_listed_before_it_is_saved(tmp_path: Path) -> None:
    client: Any = Client()
    client.hold = anyio.Event()
    ledger = CheckpointLedger(tmp_path)
    pending = submit_checkpoint(client, "a", step=1, data_consumed=2)
    assert client.log == ["state a"]
    async with anyio.create_task_group() as group:
        group.start_soon(pending.finish, ledger)
        for _ in range(10):
            await anyio.lowlevel.checkpoint()
        assert await ledger.entries() == []
        client.hold.set()
    assert [entry.name for entry in await ledger.entries()] == ["a"]


async def test_a_full_disk_is_told_with_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Any, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    client: Any = Client()
    with monkeypatch.context() as patch:
        patch.setattr("fwasync.checkpoints.ledger._write_all", full)
        with pytest.raises(CheckpointLedgerError, match=r"No space left on device; the checkpoint 'a' exists"):
            await save_checkpoint(client, "a", tmp_path, {"step": 1})
    await save_checkpoint(client, "b", tmp_path, {"step": 2})
    assert [entry.name for entry in await CheckpointLedger(tmp_path).entries()] == ["b"]


# -- promotion -----------------------------------------------------------------------------------------------


def test_the_id_of_a_snapshot() -> None:
    assert get_sampler_checkpoint_id(SimpleNamespace(path="gs://a/b", snapshot_name="step-1-0a")) == "step-1-0a"
    assert get_sampler_checkpoint_id(SimpleNamespace(path="gs://a/step-2/")) == "step-2"
    assert get_sampler_checkpoint_id("step-3-0a") == "step-3-0a"
    with pytest.raises(UsageError, match="names no snapshot"):
        get_sampler_checkpoint_id(SimpleNamespace(path="/"))


async def test_promotion() -> None:
    class Promoter:
        async def promote_checkpoint(self, *arguments: Any) -> Any:
            return arguments

    both = CheckpointEntry("step-4", 4, 40, "job-1", "state", "step-4-0a")
    assert await promote(Promoter(), both, "mine", base_model="base") == ("job-1", "step-4-0a", "mine", "base")
    with pytest.raises(UsageError, match="'step-4' has no snapshot"):
        await promote(Promoter(), line(4), "mine")
    with pytest.raises(UsageError, match="tells no trainer job"):
        await promote(Promoter(), CheckpointEntry("x", 1, sampler_path="x"), "mine")
