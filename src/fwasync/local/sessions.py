"""Sessions: who is there, what they say of themselves, and who has fallen silent.

Invariants
    * Used on the event loop's thread only.
    * A session that ended is never known again; its number is random and not used twice.
    * A session is known where it was made: through the gateway of one trainer job, or without any.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from fwasync.local.refusal import Refused

__all__ = ("OWNER", "Session", "Sessions")

OWNER: ContextVar[str | None] = ContextVar("OWNER", default=None)
"""The trainer job through whose gateway the request in hand came; `None`: it came directly."""


@dataclass(slots=True)
class Session:
    """One session: the time of its last sign of life, and what its creator said of it."""

    last_sign: float
    user_metadata: Mapping[str, Any] | None = None
    display_name: str | None = None
    owner: str | None = None


class Sessions:
    """The sessions that are open.

    Args:
        clock: Tells the time in seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._open: dict[str, Session] = {}

    def create(self, user_metadata: Mapping[str, Any] | None = None, display_name: str | None = None) -> str:
        """Begin a session; returns its id."""
        session_id = f"local-{secrets.token_hex(8)}"
        self._open[session_id] = Session(self._clock(), user_metadata, display_name, OWNER.get())
        return session_id

    def ids(self) -> list[str]:
        """The open sessions, oldest first."""
        return list(self._open)

    def find(self, session_id: str, *, status: int = 404) -> Session:
        """A session that is open.

        Raises:
            Refused: It is not known, or was made elsewhere than where this request came; with the given HTTP status.
        """
        session = self._open.get(session_id)
        if session is None or session.owner != OWNER.get():
            raise Refused(
                status,
                f"session {session_id!r} is not here: it has ended, the service was restarted, or it never had "
                "it; create a new session",
            )
        return session

    def touch(self, session_id: str, *, status: int = 404) -> None:
        """Note a sign of life.

        Raises:
            Refused: The session is not known; with the given HTTP status.
        """
        self.find(session_id, status=status).last_sign = self._clock()

    def remove(self, session_id: str) -> None:
        """Forget a session."""
        self._open.pop(session_id, None)

    def silent(self, longer_than_s: float) -> list[str]:
        """The sessions without a sign of life for longer than that."""
        limit = self._clock() - longer_than_s
        return [session_id for session_id, session in self._open.items() if session.last_sign < limit]
