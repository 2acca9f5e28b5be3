"""`Progress`: how far a phase is, and how long it will take. Time comes in as an argument."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ("Progress",)


@dataclass(slots=True)
class Progress:
    """A phase of a run.

    Attributes:
        name: The phase's name.
        total: Its steps, if they are known.
        began: When it began.
        now: When something was last seen of it.
        step: The last step that was seen.
        before: The steps that were done before it began: those of an earlier process, for a run that goes on.
    """

    name: str
    total: int | None
    began: float
    now: float
    step: int = 0
    before: int | None = None

    def reach(self, step: int, now: float) -> None:
        """A step is done."""
        if self.before is None:
            self.before = max(step - 1, 0)
        self.step, self.now = step, now

    @property
    def done(self) -> bool:
        """Whether the last step is done."""
        return self.total is not None and self.step >= self.total

    @property
    def fraction(self) -> float:
        """The part of the steps that is done, 0 to 1."""
        return min(self.step / self.total, 1.0) if self.total else 0.0

    @property
    def remaining_s(self) -> float | None:
        """Seconds that the other steps take if they are like those so far; `None` while there is nothing to go by."""
        made = self.step - (self.before or 0)
        if self.total is None or self.done or made <= 0:
            return None
        return (self.now - self.began) * (self.total - self.step) / made
