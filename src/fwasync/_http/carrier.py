"""What carries requests: the seam between `Http` and that which has sockets.

There are two: `pool.Pool`, our own connections, and `foreign.HttpxCarrier`, any httpx transport. Both answer with a
`Reply`, whose body is still to be read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from fwasync.errors import TransportError

__all__ = ("WRITE_SIZE", "Body", "Carrier", "Reply", "Unanswered", "joined")

Body = Sequence[bytes]
"""A request's body in pieces. It is kept whole until the request is answered, so that it can be sent
again."""

WRITE_SIZE = 256 * 1024
"""A larger body is written in pieces of about this many bytes: one huge write would copy it all at once, on the
loop."""


class Unanswered(TransportError):
    """One attempt got no answer. `connected` is false if it cannot have reached the service."""

    def __init__(self, message: str, *, connected: bool) -> None:
        super().__init__(message)
        self.connected = connected


class Reply(Protocol):
    """An answer whose head has come.

    Whatever ends `read` or `piece` early, a cancellation too, closes the request.
    """

    @property
    def status(self) -> int:
        """The HTTP status."""
        ...

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers, with lower-case names."""
        ...

    async def read(self, deadline: float) -> bytes:
        """What is left of the body.

        Raises:
            TimeoutError: It has not all come at `deadline`, on the loop's clock.
            Unanswered: The answer broke off, or is malformed.
        """
        ...

    async def piece(self, deadline: float) -> bytes | None:
        """The next piece of the body, or `None` at its end; fails as `read` does."""
        ...

    async def aclose(self) -> None:
        """Close the request if its answer has not come to its end. It waits for nobody, and happens also if it is
        cancelled."""
        ...


class Carrier(Protocol):
    """Sends requests to one service, below one root."""

    async def send(self, method: str, path: str, headers: Mapping[str, str], body: Body, deadline: float) -> Reply:
        """Send a request once, until the head of its answer has come.

        Args:
            method: HTTP method.
            path: Below the root, without a leading slash.
            headers: Those of this request, with lower-case names.
            body: Pieces of the body.
            deadline: When the head must have come, on the loop's clock.

        Raises:
            UsageError: A header that cannot be sent.
            TimeoutError: The request was sent, or may have been, and the head has not come in time.
            Unanswered: There was no answer.

        **Cancellation:** the request is closed.
        """
        ...

    async def aclose(self) -> None:
        """Close all connections, without waiting for the other side."""
        ...


async def joined(reply: Reply, deadline: float) -> bytes:
    """All pieces of an answer that are still to come; fails as they do."""
    pieces: list[bytes] = []
    while (piece := await reply.piece(deadline)) is not None:
        pieces.append(piece)
    return b"".join(pieces)
