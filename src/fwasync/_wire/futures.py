"""What an answer of `retrieve_future` means: a pure decision over status and body.

Services differ: "not ready" comes as 408 or as 200 with a `try_again` body, an unknown id as 404 or 410, and
a failed operation as 200 with an error body, or as 400 or 422.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from fwasync._wire.messages import decode

__all__ = (
    "Expired",
    "Failed",
    "NotReady",
    "Outcome",
    "PayloadHeld",
    "Ready",
    "Transient",
    "read_outcome",
)


@dataclass(frozen=True, slots=True)
class Ready:
    """The operation is done; the body is its result."""


@dataclass(frozen=True, slots=True)
class NotReady:
    """The long poll ended without a result."""

    queue_state: str | None
    reason: str | None


@dataclass(frozen=True, slots=True)
class PayloadHeld:
    """Done, but the payload is large and must be asked for."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The operation ran and failed."""

    message: str
    category: str


@dataclass(frozen=True, slots=True)
class Expired:
    """The service does not know this future (any more)."""

    message: str


@dataclass(frozen=True, slots=True)
class Transient:
    """The answer says nothing about the operation: poll again after a delay."""


Outcome = Ready | NotReady | PayloadHeld | Failed | Expired | Transient


class _Probe(msgspec.Struct):
    # The few fields that tell a result from everything else; results carry none of them but `type`.
    type: Any = None
    status: Any = None
    error: Any = None
    category: Any = None
    queue_state: Any = None
    queue_state_reason: Any = None


_CATEGORIES = ("user", "server")
# Everything but a result is short. Larger bodies are not searched, which would take milliseconds on an event loop.
_LARGEST_WORD = 100_000


def read_outcome(status: int, body: bytes, *, text: str) -> Outcome | None:
    """Read an answer of `retrieve_future`.

    Args:
        status: HTTP status.
        body: The whole body.
        text: What an error body says, already cut and cleaned for people.

    Returns:
        What it means, or `None` for a refusal of the request itself (401, 403 …).
    """
    if status in (404, 410):
        return Expired(text)
    if status in (425, 429) or status >= 500:
        return Transient()
    if status in (400, 422):
        return Failed(text, "user")
    if status not in (200, 408):
        return None
    if status == 200 and len(body) > _LARGEST_WORD:
        return Ready()
    try:
        probe = decode(body, _Probe)
    except msgspec.MsgspecError:
        return Transient() if status == 408 else None
    if status == 408 or probe.type == "try_again":
        return NotReady(_text(probe.queue_state), _text(probe.queue_state_reason))
    if probe.error is not None:
        category = probe.category if probe.category in _CATEGORIES else "unknown"
        return Failed(str(probe.error), category)
    if probe.status == "complete_metadata":
        return PayloadHeld()
    return Ready()


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
