"""`RowCursor`: which rows of the source are done for good. Pure.

Rows settle in any order; the cursor moves in theirs. A row is settled when its batch was published, or when it was
dropped. A run that is resumed skips exactly the rows that were settled, so that none is trained twice and none is lost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from fwasync.errors import UsageError

__all__ = ("RolloutState", "RowAccount", "RowCursor", "Settlement")

Settlement = Literal["kept", "filtered", "failed"]


@dataclass(frozen=True, slots=True)
class RolloutState:
    """What a run needs to go on exactly where another stopped; `as_dict` is JSON.

    Attributes:
        version: The published version.
        position: All rows before this index are settled.
        ahead: Indices of further rows that are settled, ascending.
        kept: How many of the settled rows were trained on.
        filtered: How many the filter dropped.
        failed: How many had too few rollouts left.
    """

    version: int = 0
    position: int = 0
    ahead: tuple[int, ...] = ()
    kept: int = 0
    filtered: int = 0
    failed: int = 0

    def as_dict(self) -> dict[str, Any]:
        """The state as JSON values."""
        return {**asdict(self), "ahead": list(self.ahead)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RolloutState:
        """The state that `as_dict` was called on.

        Raises:
            UsageError: It is not one.
        """
        try:
            state = cls(**{**values, "ahead": tuple(values["ahead"])})  # pyright: ignore[reportArgumentType]  # JSON
        except (TypeError, KeyError) as error:
            raise UsageError(f"this is not the state of a rollout scheduler: {error}") from error
        if state.position + len(state.ahead) != state.kept + state.filtered + state.failed:
            raise UsageError(f"this state of a rollout scheduler contradicts itself: {state}")
        return state


@dataclass(frozen=True, slots=True)
class RowAccount:
    """Where every row is. `submitted` is the sum of `in_flight`, `waiting`, `kept`, `filtered` and `failed`.

    Attributes:
        submitted: Rows that were admitted, in this run and those that it resumes.
        in_flight: Rows whose rollouts run, or wait to run again.
        waiting: Rows that were kept and whose batch is not published.
        kept: Rows whose batch was published.
        filtered: Rows that the filter, or an advantage that is no number, dropped.
        failed: Rows that had too few rollouts left.
        refilled: How many of the rows submitted took the place of one that was dropped, in this run.
        retried: How often a row was sampled anew, in this run.
    """

    submitted: int
    in_flight: int
    waiting: int
    kept: int
    filtered: int
    failed: int
    refilled: int
    retried: int


class RowCursor:
    """Settles rows.

    Args:
        state: Where to begin.
    """

    def __init__(self, state: RolloutState) -> None:
        self.position = state.position
        self._ahead = set(state.ahead)
        self._counts = Counter({"kept": state.kept, "filtered": state.filtered, "failed": state.failed})

    def __getitem__(self, settlement: Settlement) -> int:
        return self._counts[settlement]

    def is_settled(self, row: int) -> bool:
        """Whether a row is done for good."""
        return row < self.position or row in self._ahead

    def settle(self, row: int, settlement: Settlement) -> None:
        """A row is done for good, which happens once."""
        assert not self.is_settled(row), f"row {row} is settled twice"
        self._counts[settlement] += 1
        self._ahead.add(row)
        while self.position in self._ahead:
            self._ahead.remove(self.position)
            self.position += 1

    def state(self, version: int) -> RolloutState:
        """The cursor at this moment, with the version that is published."""
        return RolloutState(
            version,
            self.position,
            tuple(sorted(self._ahead)),
            self._counts["kept"],
            self._counts["filtered"],
            self._counts["failed"],
        )
