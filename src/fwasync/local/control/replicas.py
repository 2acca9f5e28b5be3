"""The replicas of a deployment during a hot-load: who has which snapshot at what time. Pure.

A load rolls: replica i swaps `swap_s * (i + 1)` seconds after it began. Until then it serves what it had.

Invariants
    * A replica that is ready serves exactly the snapshot that it tells.
    * A load that failed changes nothing but what is told of it, and the next load clears that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fwasync.local.control.records import Load

__all__ = ("Replica", "delta_problem", "replicas_at", "resized")


@dataclass(frozen=True, slots=True)
class Replica:
    """What a replica has (`None`: the weights of its base model), is to have, and what it is about."""

    current: str | None
    target: str | None
    stage: str
    error: str | None = None

    @property
    def loading(self) -> bool:
        """Whether a swap is still to come."""
        return self.stage == "loading"


def replicas_at(served: Sequence[str | None], load: Load | None, now: float) -> list[Replica]:
    """The replicas at a time.

    Args:
        served: What each of them had when the load began.
        load: The newest load, if there was one.
        now: The time, in seconds since the epoch as `load.since`.
    """
    if load is None:
        return [Replica(current, None, "idle") for current in served]
    if load.error is not None:
        return [Replica(current, load.identity, "error", load.error) for current in served]
    return [_swapping(index, current, load, now) for index, current in enumerate(served)]


def _swapping(index: int, current: str | None, load: Load, now: float) -> Replica:
    if index in load.kept:
        said = load.kept[index]
        return Replica(current, load.identity, "error", said) if said else Replica(current, current, "idle")
    if now >= load.since + load.swap_s * (index + 1):
        return Replica(load.identity, load.identity, "idle")
    return Replica(current, load.identity, "loading")


def resized(served: Sequence[str | None], count: int) -> list[str | None]:
    """Another number of replicas: those that are added start with what the first one has."""
    newcomer = served[0] if served else None
    return [*served[:count], *[newcomer] * (count - len(served))]


def delta_problem(
    *, identity: str, is_delta: bool, made_against: str | None, announced: str | None, serving: Sequence[str | None]
) -> str | None:
    """Why a snapshot cannot be loaded onto what the replicas serve; `None` if it can.

    Args:
        identity: The snapshot.
        is_delta: Whether it was saved as a difference.
        made_against: The snapshot that its trainer saved before it.
        announced: The `previous_snapshot_identity` of the request; `None` asks for a full load.
        serving: What each replica has.
    """
    if announced is None:
        if is_delta:
            return f"{identity} was saved as a delta: announce its previous snapshot, or save a base"
        return None
    if not is_delta:
        return f"{identity} was saved in full: load it without incremental_snapshot_metadata"
    if {_bare(entry) for entry in serving} != {_bare(announced)}:
        told = ", ".join(sorted({entry or "its base model" for entry in serving}))
        return f"{identity} is a delta on {announced}, and the deployment serves {told}: load a base"
    if _bare(made_against) != _bare(announced):
        return f"{identity} was computed against {made_against}, not {announced}: save a base"
    return None


def _bare(identity: str | None) -> str | None:
    # A snapshot may be called by its name or by its whole path.
    return identity and identity.rpartition("/")[2]
