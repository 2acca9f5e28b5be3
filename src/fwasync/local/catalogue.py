"""Training runs and what was saved of them, as lists. Everything here reads the disk and blocks.

A run is a model, and named after it. It is there while the model's session lasts, and afterwards (also after a
restart) as long as a checkpoint or snapshot of it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

from fwasync._wire.runs import (
    CheckpointEntry,
    CheckpointList,
    Cursor,
    TrainingRunEntry,
    TrainingRunList,
    WeightsInfo,
)
from fwasync.local.engine.api import Engine, EngineError, Lora
from fwasync.local.operations import expiry
from fwasync.local.refusal import Refused, Unacceptable
from fwasync.local.weights import Saved, WeightsPath, WeightStore

__all__ = ("Catalogue", "LiveRun", "Page")

T = TypeVar("T")

_OWNER = "local"


@dataclass(frozen=True, slots=True)
class LiveRun:
    """A model of the running service."""

    model_id: str
    base_model: str
    lora: Lora | None
    last_request: datetime
    user_metadata: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class Page:
    """Which part of a list is wanted."""

    limit: int
    offset: int

    def of(self, entries: list[T]) -> tuple[list[T], Cursor]:
        """That part, and what it is a part of."""
        part = entries[self.offset : self.offset + self.limit]
        return part, Cursor(offset=self.offset, limit=self.limit, total_count=len(entries))


class Catalogue:
    """Tells of runs and checkpoints, and deletes them."""

    def __init__(self, engine: Engine, store: WeightStore) -> None:
        self._engine = engine
        self._store = store

    def runs(self, live: Iterable[LiveRun], page: Page) -> TrainingRunList:
        """The runs, the most recently used first."""
        runs, cursor = page.of(self._runs(live))
        return TrainingRunList(training_runs=runs, cursor=cursor)

    def run(self, live: Iterable[LiveRun], model_id: str) -> TrainingRunEntry:
        """One run.

        Raises:
            Refused: There is none of that name.
        """
        for run in self._runs(live):
            if run.training_run_id == model_id:
                return run
        raise Refused(404, f"there is no training run {model_id!r}, and nothing that was saved of it")

    def checkpoints(self, page: Page) -> CheckpointList:
        """All checkpoints and snapshots, newest first."""
        entries, cursor = page.of([_entry(saved) for saved in self._store.saved()])
        return CheckpointList(checkpoints=entries, cursor=cursor)

    def checkpoints_of(self, live: Iterable[LiveRun], model_id: str) -> CheckpointList:
        """A run's checkpoints and snapshots, newest first.

        Raises:
            Refused: There is no such run.
        """
        entries = [_entry(saved) for saved in self._store.saved() if saved.path.model_id == model_id]
        if not entries:
            self.run(live, model_id)
        return CheckpointList(checkpoints=entries)

    def delete(self, text: str) -> None:
        """Remove a checkpoint or snapshot.

        Raises:
            Refused: There is none of that path.
        """
        self._change(text, self._store.delete)

    def set_time_to_live(self, text: str, ttl_seconds: int | None) -> None:
        """Note when a checkpoint or snapshot expires; `None` is never.

        Raises:
            Refused: There is none of that path, or it cannot live so long.
        """
        try:
            expires_at = expiry(ttl_seconds)
        except Unacceptable as error:
            raise Refused(400, str(error)) from None
        self._change(text, lambda path: self._store.note(path, "expires_at", expires_at))

    def weights_info(self, text: str) -> WeightsInfo:
        """What a checkpoint or snapshot holds.

        Raises:
            Refused: There is none of that path.
        """
        path = _parse(text)
        directory = self._store.directory(path)
        if not directory.is_dir():
            raise _missing(path)
        info = self._engine.snapshot_info(directory)
        lora = info.lora
        return WeightsInfo(
            base_model=info.base_model,
            is_lora=lora is not None,
            lora_rank=lora.rank if lora else None,
            train_unembed=lora.train_unembed if lora else None,
            train_mlp=lora.train_mlp if lora else None,
            train_attn=lora.train_attn if lora else None,
        )

    def _change(self, text: str, change: Callable[[WeightsPath], None]) -> None:
        path = _parse(text)
        try:
            change(path)
        except FileNotFoundError:
            raise _missing(path) from None

    def _runs(self, live: Iterable[LiveRun]) -> list[TrainingRunEntry]:
        saved: dict[str, list[Saved]] = {}
        for entry in self._store.saved():
            saved.setdefault(entry.path.model_id, []).append(entry)
        runs = [_run(run, saved.pop(run.model_id, [])) for run in live]
        for model_id, entries in saved.items():
            try:
                info = self._engine.snapshot_info(entries[0].directory)
            except EngineError:
                continue  # damaged, or removed just now
            runs.append(_run(LiveRun(model_id, info.base_model, info.lora, entries[0].time, None), entries))
        return sorted(runs, key=lambda run: run.last_request_time, reverse=True)


def _run(run: LiveRun, saved: list[Saved]) -> TrainingRunEntry:
    newest: dict[str, CheckpointEntry] = {}
    for entry in saved:
        newest.setdefault(entry.path.kind, _entry(entry))
    return TrainingRunEntry(
        training_run_id=run.model_id,
        base_model=run.base_model,
        model_owner=_OWNER,
        is_lora=run.lora is not None,
        lora_rank=run.lora.rank if run.lora else None,
        last_request_time=run.last_request.isoformat(),
        last_checkpoint=newest.get("weights"),
        last_sampler_checkpoint=newest.get("sampler_weights"),
        user_metadata=dict(run.user_metadata) if run.user_metadata else None,
    )


def _entry(saved: Saved) -> CheckpointEntry:
    path = saved.path
    return CheckpointEntry(
        checkpoint_id=f"{path.kind}/{path.name}",
        checkpoint_type="training" if path.kind == "weights" else "sampler",
        time=saved.time.isoformat(),
        tinker_path=str(path),
        size_bytes=saved.size_bytes,
        expires_at=saved.notes.get("expires_at"),
        user_metadata=saved.notes.get("user_metadata"),
    )


def _parse(text: str) -> WeightsPath:
    try:
        return WeightsPath.parse(text)
    except ValueError as error:
        raise Refused(400, str(error)) from None


def _missing(path: WeightsPath) -> Refused:
    return Refused(404, f"there is nothing at {path} in this data directory")
