"""The order of one model's operations: a pure state machine without I/O, time or threads.

Invariants
    * Items come out strictly by number, from 1 upwards, each once; one that arrives early is held.
    * An item without a number comes out after everything that was held when it arrived.
    * A number belongs for ever to the first request that used it: the same digest again gets the
      first one's receipt, another digest is a conflict.
    * A rejected request uses up its number: it holds nothing back.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ("Accepted", "Conflict", "Repeated", "SequenceGate")

Item = TypeVar("Item")
Receipt = TypeVar("Receipt")


@dataclass(frozen=True, slots=True)
class Accepted(Generic[Item]):
    """The request is new. `ready` may run now, in this order; it need not hold the new item."""

    ready: tuple[Item, ...]


@dataclass(frozen=True, slots=True)
class Repeated(Generic[Receipt]):
    """The request was seen before: this is what it was told."""

    receipt: Receipt


@dataclass(frozen=True, slots=True)
class Conflict:
    """The number was already used by a request of other content."""

    seq_id: int


class SequenceGate(Generic[Item, Receipt]):
    """Holds requests back until their turn comes, and remembers every number that was used."""

    def __init__(self) -> None:
        self._next = 1
        self._seen: dict[int, tuple[bytes, Receipt]] = {}
        self._held: dict[int, Item | None] = {}
        # Each with the number that has to be past before it may run.
        self._unnumbered: deque[tuple[int, Item]] = deque()

    @property
    def waiting_for(self) -> int | None:
        """The missing number that something is held for, or `None` if nothing is held."""
        return self._next if self._held or self._unnumbered else None

    def find(self, seq_id: int | None, digest: bytes) -> Repeated[Receipt] | Conflict | None:
        """What is known of a numbered request; `None` if it is new (or has no number)."""
        known = None if seq_id is None else self._seen.get(seq_id)
        if seq_id is None or known is None:
            return None
        return Repeated(known[1]) if known[0] == digest else Conflict(seq_id)

    def offer(
        self, seq_id: int | None, digest: bytes, receipt: Receipt, item: Item | None
    ) -> Accepted[Item] | Repeated[Receipt] | Conflict:
        """Take a request in.

        Args:
            seq_id: Its number (from 1), or `None` if it has none.
            digest: Stands for its content.
            receipt: What a repetition of it is to be told.
            item: What is to run; `None` for a rejected request, which only uses up its number.

        Raises:
            ValueError: The number is less than 1.
        """
        if seq_id is not None and seq_id < 1:
            raise ValueError(f"seq_id {seq_id}: numbers start at 1")
        known = self.find(seq_id, digest)
        if known is not None:
            return known
        if seq_id is not None:
            self._seen[seq_id] = (digest, receipt)
            self._held[seq_id] = item
        elif item is not None:
            self._unnumbered.append((max(self._held, default=0), item))
        return Accepted(tuple(self._release()))

    def drop(self) -> tuple[Item, ...]:
        """Give up everything that is held; returns it in the order in which it would have run."""
        held = [(number, 0, item) for number, item in self._held.items() if item is not None]
        held += [(barrier, 1, item) for barrier, item in self._unnumbered]
        self._held.clear()
        self._unnumbered.clear()
        return tuple(item for _, _, item in sorted(held, key=lambda entry: entry[:2]))

    def _release(self) -> list[Item]:
        ready: list[Item] = []
        while True:
            if self._unnumbered and self._unnumbered[0][0] < self._next:
                ready.append(self._unnumbered.popleft()[1])
            elif self._next in self._held:
                item = self._held.pop(self._next)
                self._next += 1
                if item is not None:
                    ready.append(item)
            else:
                return ready
