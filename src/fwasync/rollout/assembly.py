"""What becomes of a row while its rollouts end, one by one and in any order. Pure."""

from __future__ import annotations

from typing import Generic, Literal, TypeVar

__all__ = ("GroupAssembly", "Verdict")

T = TypeVar("T")

Verdict = Literal["running", "give up", "whole", "retry", "failed"]
"""`running`: wait on. `give up`: too few can be left, end the others (told once). `whole`: all have ended and enough
are left. `retry`: too few, sample the row anew. `failed`: too few, and no retry left."""


class GroupAssembly(Generic[T]):
    """One attempt at a group.

    Args:
        size: Rollouts of the group.
        least: How many must be left of them.
        retries: How often more it may be tried.
    """

    def __init__(self, size: int, least: int, retries: int) -> None:
        self._running = size
        self._least = least
        self._retries = retries
        self._kept: dict[int, T] = {}
        self._given_up = False

    @property
    def kept(self) -> list[T]:
        """The rollouts that are left, in the order of their numbers."""
        return [self._kept[number] for number in sorted(self._kept)]

    @property
    def given_up(self) -> bool:
        """Whether too few can be left."""
        return self._given_up

    def ended(self, number: int, rollout: T | None) -> Verdict:
        """A rollout has ended, and is left if it is not `None`."""
        self._running -= 1
        if rollout is not None:
            self._kept[number] = rollout
        if self._running == 0:
            if len(self._kept) >= self._least:
                return "whole"
            return "retry" if self._retries else "failed"
        if not self._given_up and len(self._kept) + self._running < self._least:
            self._given_up = True
            return "give up"
        return "running"
