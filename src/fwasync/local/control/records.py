"""What is recorded of each resource, and where."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec

from fwasync._wire.control import Deployment, Model, TrainerJob
from fwasync.local.control.shelf import Record, Shelf

__all__ = ("DeploymentRecord", "JobRecord", "Load", "ModelRecord", "Shelves")


class JobRecord(Record, kw_only=True):
    """A trainer job.

    `resource.state` is the state that was entered at `since`; CREATING means that it has been starting since then.
    `sessions` are those that were made through its gateway; the list is never changed but replaced, so that any thread
    may read it.
    """

    resource: TrainerJob
    since: float
    sessions: list[str] = msgspec.field(default_factory=list[str])


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """A hot-load: of which snapshot (`path` is its tinker path), since when, and why it failed at once, if it did.

    `swap_s` is how many seconds each replica takes. `kept` are the replicas that keep what they have, by number, with
    what they say of it; one that says nothing has not heard of the load.
    """

    identity: str
    path: str
    since: float
    swap_s: float
    error: str | None = None
    kept: dict[int, str] = msgspec.field(default_factory=dict[int, str])


class DeploymentRecord(Record, kw_only=True):
    """A deployment.

    `resource.state` is CREATING (starting since `since`), UPDATING (its replicas are starting anew since then), or
    DELETED. `served` is what each replica had when `load` began: identities by number, `None` for the weights of its
    base model. `paths` tells the tinker path of every identity in use. `generation` counts the restarts of the
    replicas.
    """

    resource: Deployment
    since: float
    served: list[str | None] = msgspec.field(default_factory=list[str | None])
    load: Load | None = None
    paths: dict[str, str] = msgspec.field(default_factory=dict[str, str])
    generation: int = 0


class ModelRecord(Record, kw_only=True):
    """A promoted model: its resource, and the engine's base model that its weights are of."""

    resource: Model
    engine_model: str


@dataclass(frozen=True, slots=True)
class Shelves:
    """All records of a data directory."""

    jobs: Shelf[JobRecord]
    deployments: Shelf[DeploymentRecord]
    models: Shelf[ModelRecord]

    @classmethod
    def open(cls, root: Path) -> Shelves:
        """Read the records below a data directory.

        Raises:
            DataDirError: One cannot be read.
        """
        place = root / "control"
        return cls(
            Shelf(place / "jobs", JobRecord),
            Shelf(place / "deployments", DeploymentRecord),
            Shelf(place / "models", ModelRecord),
        )
