"""When failing rollouts are more than bad luck: a pure decision over the newest outcomes."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from fwasync.errors import UsageError

__all__ = ("BreakerSettings", "CircuitBreaker")


@dataclass(frozen=True, slots=True)
class BreakerSettings:
    """The constants of a `CircuitBreaker`.

    Attributes:
        consecutive: So many failures in a row trip it.
        window: How many of the newest outcomes are looked at.
        least: How many there must be before their ratio is judged.
        ratio: The part of them that trips it when it failed.
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
        self._failed: deque[bool] = deque(maxlen=settings.window)
        self._in_a_row = 0

    def succeeded(self) -> None:
        """Count a success."""
        self._failed.append(False)
        self._in_a_row = 0

    def failed(self) -> str | None:
        """Count a failure.

        Returns:
            Why it is one too many, or `None` if the run should go on.
        """
        self._failed.append(True)
        self._in_a_row += 1
        settings, failures = self._settings, sum(self._failed)
        if self._in_a_row >= settings.consecutive:
            return f"{self._in_a_row} rollouts in a row failed"
        if len(self._failed) >= settings.least and failures >= settings.ratio * len(self._failed):
            return f"{failures} of the last {len(self._failed)} rollouts failed"
        return None
