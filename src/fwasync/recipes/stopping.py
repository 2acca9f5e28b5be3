"""`StopRequest`: a wish that a run comes to an orderly end.

A recipe looks at it between steps. If it is asked to stop, it finishes the steps that it has submitted, saves a
checkpoint, and returns. It knows nothing of signals: whoever owns the process makes a wish of them.
"""

from __future__ import annotations

__all__ = ("StopRequest",)


class StopRequest:
    """Asked at most once; may be asked from any thread and from a signal handler."""

    def __init__(self) -> None:
        self._reason: str | None = None

    def __repr__(self) -> str:
        return f"<StopRequest {self._reason or 'not asked'}>"

    def request(self, reason: str = "asked to stop") -> None:
        """Ask; the first reason counts."""
        self._reason = self._reason or reason

    @property
    def reason(self) -> str | None:
        """Why; `None` while nobody asked."""
        return self._reason

    @property
    def requested(self) -> bool:
        """Whether somebody asked."""
        return self._reason is not None
