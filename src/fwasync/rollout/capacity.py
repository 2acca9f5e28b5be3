"""How many rollouts may start: two limits that are kept apart and composed. Pure.

**Staleness.** With B samples in a batch, v the published version, s0 the version that the run began with and O the
staleness allowed, `(v + O + 1) B - (s0 B + accepted + reserved)` samples may be admitted: as many as the batches up to
version v + O take, less what is already there for them. `accepted` counts the nominal samples of every group that was
kept in this run, `reserved` those of every row that was admitted and has not settled. A row that is dropped gives its
samples back; one that is kept stays charged, and room is made by publication.

**Concurrency.** A window, less what runs. It may be a number or something that adapts; since the rollouts of a row
start together, a window never counts for less than one row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ("Capacity", "ConcurrencyLimiter", "StalenessLimiter")


@dataclass(frozen=True, slots=True)
class Capacity:
    """Samples that may be admitted; `concurrency` is `None` where nothing limits it."""

    staleness: int
    concurrency: int | None

    @property
    def admission(self) -> int:
        """The tighter of the two, at least 0."""
        return max(0, self.staleness if self.concurrency is None else min(self.staleness, self.concurrency))

    def limits(self) -> dict[str, int]:
        """The capacities by name, those that there are."""
        limits = {"admission": self.admission, "staleness": self.staleness}
        return limits if self.concurrency is None else {**limits, "concurrency": self.concurrency}


class StalenessLimiter:
    """Counts samples against versions.

    Args:
        batch_samples: Samples of a batch, B.
        max_staleness: Versions allowed, O.
        version: What is published, s0.
    """

    def __init__(self, batch_samples: int, max_staleness: int, version: int) -> None:
        self._batch = batch_samples
        self._max_staleness = max_staleness
        self._start = version
        self.version = version
        self.accepted = 0
        self.reserved = 0

    @property
    def capacity(self) -> int:
        """Samples that may be admitted."""
        return (self.version + self._max_staleness + 1) * self._batch - (
            self._start * self._batch + self.accepted + self.reserved
        )

    def admitted(self, samples: int) -> None:
        """A row of so many samples was admitted."""
        self.reserved += samples

    def accepted_row(self, samples: int) -> None:
        """Such a row was kept."""
        self.reserved -= samples
        self.accepted += samples

    def dropped_row(self, samples: int) -> None:
        """Such a row was not kept."""
        self.reserved -= samples

    def published(self) -> None:
        """The next version is out."""
        self.version += 1


class ConcurrencyLimiter:
    """Counts what runs against a window.

    Args:
        window: The window now; `None` for no limit.
        least: What the window is at least taken for.
    """

    def __init__(self, window: Callable[[], int] | None, least: int) -> None:
        self._window = window
        self._least = least
        self.in_flight = 0

    @property
    def capacity(self) -> int | None:
        """How many more may run; `None` for any number."""
        return None if self._window is None else max(self._window(), self._least) - self.in_flight

    def has_room(self, samples: int) -> bool:
        """Whether so many more may run."""
        capacity = self.capacity
        return capacity is None or capacity >= samples
