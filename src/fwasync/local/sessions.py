"""Sessions: who is there, and who has fallen silent.

Invariants
    * Used on the event loop's thread only.
    * A session that ended is never known again; its number is random and not used twice.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable

from fwasync.local.refusal import Refused

__all__ = ("Sessions",)


class Sessions:
    """The sessions that are open, each with the time of its last sign of life.

    Args:
        clock: Tells the time in seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._last_sign: dict[str, float] = {}

    def create(self) -> str:
        """Begin a session; returns its id."""
        session_id = f"local-{secrets.token_hex(8)}"
        self._last_sign[session_id] = self._clock()
        return session_id

    def touch(self, session_id: str, *, status: int = 404) -> None:
        """Note a sign of life.

        Raises:
            Refused: The session is not known; with the given HTTP status.
        """
        if session_id not in self._last_sign:
            raise Refused(
                status,
                f"session {session_id!r} is not here: it has ended, the service was restarted, or it never had "
                "it; create a new session",
            )
        self._last_sign[session_id] = self._clock()

    def remove(self, session_id: str) -> None:
        """Forget a session."""
        self._last_sign.pop(session_id, None)

    def silent(self, longer_than_s: float) -> list[str]:
        """The sessions without a sign of life for longer than that."""
        limit = self._clock() - longer_than_s
        return [session_id for session_id, last in self._last_sign.items() if last < limit]
