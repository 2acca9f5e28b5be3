"""What the trainers of jobs have saved. Reads the disk and blocks.

Invariants
    * A job's are those of the sessions that were made through its gateway, for ever.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from fwasync.local.control.records import Shelves
from fwasync.local.weights import Saved, WeightsPath, WeightStore

__all__ = ("Snapshot", "Snapshots", "is_delta")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A snapshot for samplers, and the name of the one that its model saved before it."""

    saved: Saved
    previous: str | None


def is_delta(saved: Saved) -> bool:
    """Whether it was saved as the difference to the one before it."""
    return saved.notes.get("checkpoint_type") == "delta"


class Snapshots:
    """Finds checkpoints and snapshots of jobs."""

    def __init__(self, store: WeightStore, shelves: Shelves) -> None:
        self._store = store
        self._shelves = shelves

    def sessions(self, job_ids: Iterable[str]) -> frozenset[str]:
        """The sessions of some jobs; may be asked for on any thread."""
        found = (self._shelves.jobs.find(job_id) for job_id in job_ids)
        return frozenset(session for record in found if record is not None for session in tuple(record.sessions))

    def saved(self, sessions: Collection[str]) -> list[Saved]:
        """All checkpoints and snapshots of some sessions, oldest first."""
        return [entry for entry in reversed(self._store.saved()) if entry.path.model_id.partition(":")[0] in sessions]

    def checkpoint_names(self, job_id: str) -> list[str]:
        """The names of what a job's trainer can resume from, oldest first."""
        return list(dict.fromkeys(path.name for path in self._checkpoints(job_id)))

    def checkpoint(self, job_id: str, name: str) -> WeightsPath | None:
        """The newest checkpoint of that name that a job's trainer can resume from."""
        return next((path for path in reversed(self._checkpoints(job_id)) if path.name == name), None)

    def _checkpoints(self, job_id: str) -> list[WeightsPath]:
        return [entry.path for entry in self.saved(self.sessions([job_id])) if entry.path.kind == "weights"]

    def find(self, sessions: Collection[str], identity: str) -> Snapshot | None:
        """The newest snapshot of that name or path."""
        snapshots = [entry for entry in self.saved(sessions) if entry.path.kind == "sampler_weights"]
        for index in range(len(snapshots) - 1, -1, -1):
            path = snapshots[index].path
            if identity in (path.name, str(path)):
                before = [entry.path.name for entry in snapshots[:index] if entry.path.model_id == path.model_id]
                return Snapshot(snapshots[index], before[-1] if before else None)
        return None

    def directory(self, path: str) -> Path:
        """Where the snapshot of a tinker path is."""
        return self._store.directory(WeightsPath.parse(path))
