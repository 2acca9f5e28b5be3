"""Answers that say no."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ("Refusal", "Refused", "Unacceptable")


@dataclass(frozen=True, slots=True)
class Refusal:
    """A request that is not accepted: the HTTP status and what to tell its sender."""

    status: int
    detail: str


class Refused(Exception):
    """Ends the handling of a request with a refusal."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.refusal = Refusal(status, detail)


class Unacceptable(Exception):
    """The content of a request is at fault; the text tells its sender what to change."""
