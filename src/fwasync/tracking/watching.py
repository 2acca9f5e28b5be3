"""What a run asks of those who watch it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from fwasync.tracking.records import Record

__all__ = ("Ticking", "View")


class View(Protocol):
    """Somebody who watches a run. Called on the event loop, so every method returns at once."""

    def begin(self, phase: str, total_steps: int) -> None:
        """A phase of so many steps begins."""
        ...

    def show(self, record: Record) -> None:
        """A step was logged."""
        ...

    def gauge(self, name: str, value: float) -> None:
        """A live number changed, between steps."""
        ...

    def message(self, text: str) -> None:
        """Something worth a sentence happened."""
        ...

    def close(self) -> None:
        """The run has ended. May be called again."""
        ...


@runtime_checkable
class Ticking(Protocol):
    """A view with something that moves while nothing happens, such as a clock."""

    def tick(self) -> None:
        """Time has passed."""
        ...
