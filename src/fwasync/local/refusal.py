"""Answers that say no, and the bodies of failed operations."""

from __future__ import annotations

from dataclasses import dataclass

from fwasync._wire.messages import FailedOperation, encode

__all__ = ("Refusal", "Refused", "failed")


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


def failed(error: str, category: str) -> bytes:
    """The body of a failed operation; `category` is `user` (the request is at fault) or `server`."""
    return encode(FailedOperation(error=error, category=category))
