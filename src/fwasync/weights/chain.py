"""Which snapshot is saved next, and onto what it may be loaded: base, then deltas. Pure: no I/O, no time.

A delta is the difference to the snapshot that its trainer saved last. It can be loaded only where that very snapshot is
served.

Invariants
    * A delta is saved only if the snapshot saved last is known, and the deployment serves it by a load of ours that
      was seen to succeed. So the first is a base, and the one after anything that failed, was cancelled or was
      done by others.
    * Whatever begins takes the knowledge away, and only its success gives it back: to be cancelled at any instant
      needs no repair.
    * A delta is loaded only onto its parent. What a delta was made from is forgotten if that is in doubt.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from fwasync.errors import HotLoadFailedError, UsageError

__all__ = ("KINDS", "Loading", "Saving", "Snapshot", "SnapshotChain", "same_snapshot")

KINDS = ("base", "delta", "merged_base")
"""What a snapshot can be: all weights, the difference to the last snapshot, or LoRA folded into its base model."""


def same_snapshot(one: str | None, other: str | None) -> bool:
    """Whether both name one snapshot; deployments tell its name or the whole path."""
    return one is not None and other is not None and one.rpartition("/")[2] == other.rpartition("/")[2]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A snapshot that was saved.

    Attributes:
        identity: Its full name.
        kind: One of `KINDS`.
        parent: What it is the difference to; `None` for what is whole, and for a delta that cannot be loaded.
    """

    identity: str
    kind: str
    parent: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Saving:
    """A save that has begun."""

    kind: str
    parent: str | None


@dataclass(frozen=True, slots=True, eq=False)
class Loading:
    """A hot-load that has begun; `previous` is what it is loaded onto, `None` for a full load."""

    snapshot: Snapshot
    previous: str | None


class SnapshotChain:
    """What is known of one trainer's snapshots and of one deployment.

    Args:
        lora: The trainer trains an adapter, whose snapshots are always whole.
    """

    def __init__(self, *, lora: bool = False) -> None:
        self._lora = lora
        self._tip: str | None = None
        self._served: str | None = None
        self._saving: Saving | None = None
        self._loading: Loading | None = None
        self._saved: dict[str, Snapshot] = {}
        self._names: set[str] = set()

    @property
    def served(self) -> str | None:
        """What every replica serves by a load of ours; `None` if that is not known."""
        return self._served

    @property
    def continues(self) -> bool:
        """Whether the next snapshot may be a delta."""
        return not self._lora and self._tip is not None and self._tip == self._served

    def fresh_name(self, name: str) -> str:
        """The name, or with a number if it was used: caches and deployments hold on to what a name once meant."""
        fresh, number = name, 1
        while fresh in self._names:
            number += 1
            fresh = f"{name}-{number}"
        self._names.add(fresh)
        return fresh

    def choose(self, kind: str | None) -> str:
        """The kind of the next snapshot.

        Args:
            kind: What is asked for; `None` leaves it to the chain.

        Raises:
            UsageError: There is no such kind, or there is nothing that a delta could be loaded onto.
        """
        if kind is None:
            return "delta" if self.continues else "base"
        if kind not in KINDS:
            raise UsageError(f"checkpoint_type is {kind!r}; it must be one of {', '.join(KINDS)}")
        if kind == "delta" and not self.continues:
            why = (
                "snapshots of LoRA are always whole"
                if self._lora
                else "the snapshot saved last is not known to be served by the deployment"
            )
            raise UsageError(f"checkpoint_type is 'delta', but {why}; leave it out, or save a 'base'")
        return kind

    def begin_save(self, kind: str) -> Saving:
        """Before a snapshot of a kind that was chosen is asked for."""
        self._saving = saving = Saving(kind, self._tip if kind == "delta" else None)
        self._tip = None
        return saving

    def saved(self, saving: Saving, identity: str) -> Snapshot:
        """A save has succeeded."""
        self._forget(identity)
        current = self._saving is saving
        parent = saving.parent if current else None
        snapshot = Snapshot(identity, saving.kind, parent)
        self._saved[identity] = snapshot
        if current:
            self._saving = None
            self._tip = identity if saving.kind == "base" or parent is not None else None
        return snapshot

    def find(self, identity: str, kind: str | None = None) -> Snapshot:
        """A snapshot by its name; one that was not saved here has to be declared as whole.

        Raises:
            UsageError: It is not known, or is of another kind.
        """
        known = self._saved.get(identity)
        if known is not None and kind in (None, known.kind):
            return known
        if known is not None:
            raise UsageError(f"snapshot {identity} was saved as {known.kind!r}, not as {kind!r}")
        if kind in ("base", "merged_base"):
            return Snapshot(identity, kind)
        raise UsageError(
            f"snapshot {identity} was not saved here, so what it could be loaded onto is not known; "
            "pass checkpoint_type='base' if it holds all weights"
        )

    def seen(self, serving: Collection[str | None]) -> None:
        """What the replicas serve, one entry each; anything but our own snapshot is another's doing."""
        if not serving or not all(same_snapshot(entry, self._served) for entry in serving):
            self._served = None

    def saved_elsewhere(self) -> None:
        """The trainer's next delta would be the difference to something that is not known here."""
        self._tip = None

    def begin_load(self, snapshot: Snapshot) -> Loading:
        """Before a snapshot is loaded.

        Raises:
            HotLoadFailedError: It is a delta, and what it was made from is not what is served.
        """
        previous = None
        if snapshot.kind == "delta":
            known = self._saved.get(snapshot.identity)
            previous = known.parent if known is not None and known == snapshot else None
            if previous is None or previous != self._served:
                raise HotLoadFailedError(
                    f"snapshot {snapshot.identity} is a delta on {previous or 'a snapshot that is not known'}, and "
                    f"the deployment serves {self._served or 'something else'}: nothing was loaded; sync again, "
                    "which sends all weights",
                    snapshot=snapshot.identity,
                )
        self._loading = loading = Loading(snapshot, previous)
        self._served = None
        return loading

    def loaded(self, loading: Loading) -> None:
        """Every replica serves it."""
        if self._loading is loading:
            self._loading = None
            self._served = loading.snapshot.identity

    def reset(self) -> None:
        """Trainer or deployment may be another than before: the next snapshot is a base.

        What is under way goes on, and its success gives no knowledge.
        """
        self._tip = self._served = self._saving = self._loading = None

    def _forget(self, identity: str) -> None:
        # Saved again under one name: what was called so until now can no longer be told from it.
        if same_snapshot(identity, self._served):
            self._served = None
        if identity == self._tip:
            self._tip = None
        if self._saving is not None and self._saving.parent == identity:
            self._saving = None
        if self._loading is not None and self._loading.snapshot.identity == identity:
            self._loading = None
        for child in [entry for entry in self._saved.values() if entry.parent == identity]:
            self._saved[child.identity] = replace(child, parent=None)
