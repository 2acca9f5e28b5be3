"""When failing rollouts are more than bad luck: a pure decision over the newest outcomes.

The question is whether something is broken that all rollouts depend on. One row of which every rollout fails says
nothing of that: it settles as failed, and the run goes on.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from fwasync.errors import UsageError

__all__ = ("BreakerSettings", "CircuitBreaker")


@dataclass(frozen=True, slots=True)
class BreakerSettings:
    """The constants of a `CircuitBreaker`.

    Attributes:
        consecutive: So many failures in a row trip it, if they are of more than one row of the data.
        window: How many of the newest outcomes are looked at.
        least: How many there must be before their ratio is judged.
        ratio: The part of them that trips it when it failed, on the same condition.
    """

    consecutive: int = 5
    window: int = 20
    least: int = 10
    ratio: float = 0.5

    def __post_init__(self) -> None:
        if not (self.consecutive >= 1 and 1 <= self.least <= self.window and 0 < self.ratio <= 1):
            raise UsageError(
                f"the breaker cannot work with {self}: consecutive >= 1, 1 <= least <= window, and 0 < ratio <= 1"
            )


class CircuitBreaker:
    """Told of each rollout that succeeded or failed by its surroundings; those that were dropped on purpose are not."""

    def __init__(self, settings: BreakerSettings) -> None:
        self._settings = settings
        self._failed: deque[int | None] = deque(maxlen=settings.window)  # the row, of a failure
        self._in_a_row = 0
        self._rows: set[int] = set()

    def succeeded(self) -> None:
        """Count a success."""
        self._failed.append(None)
        self._in_a_row = 0
        self._rows.clear()

    def failed(self, row: int) -> str | None:
        """Count a failure of a rollout of this row.

        Returns:
            Why it is one too many, or `None` if the run should go on.
        """
        self._failed.append(row)
        self._in_a_row += 1
        self._rows.add(row)
        settings, failures = self._settings, [failed for failed in self._failed if failed is not None]
        rows = min(2, settings.consecutive)
        if self._in_a_row >= settings.consecutive and len(self._rows) >= rows:
            return f"{self._in_a_row} rollouts in a row failed"
        is_much = len(self._failed) >= settings.least and len(failures) >= settings.ratio * len(self._failed)
        if is_much and len(set(failures)) >= rows:
            return f"{len(failures)} of the last {len(self._failed)} rollouts failed"
        return None
