"""Which exceptions of a rollout are bad luck, and which mean that the program is wrong. Pure.

Bad luck is what may not happen again: a service that is busy, a connection that broke, a deadline. Everything else is
fatal, unknown exceptions included: a typo in a reward function must end the run, not make it train on nothing.
"""

from __future__ import annotations

import errno
import inspect
import socket
from typing import cast

from fwasync.errors import (
    OperationFailedError,
    RecoverableRolloutError,
    ResultLostError,
    ServiceError,
    TransportError,
    UsageError,
)

__all__ = ("is_recoverable", "plain_verdict", "raisable")

_TRANSIENT = frozenset({408, 425, 429})
_ERRNOS = frozenset(
    {
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.EPIPE,
        errno.ETIMEDOUT,
        socket.EAI_AGAIN,
    }
)
_LIBRARIES = {
    "httpx": {"TransportError"},
    "httpcore": {"NetworkError", "TimeoutException", "RemoteProtocolError", "ProtocolError"},
    "aiohttp": {"ClientConnectionError", "ClientPayloadError"},
    "requests": {"ConnectionError", "Timeout", "ChunkedEncodingError"},
    "urllib3": {"TimeoutError", "ProtocolError", "NewConnectionError"},
    "openai": {"APIConnectionError", "RateLimitError", "InternalServerError"},
    "anthropic": {"APIConnectionError", "RateLimitError", "InternalServerError"},
    "tinker": {"APIConnectionError", "RateLimitError", "InternalServerError"},
    "anyio": {"BrokenResourceError"},
}


def is_recoverable(error: BaseException) -> bool:
    """Whether a rollout that raised this is dropped and the run goes on.

    HTTP errors of any library are known by their status (408, 425, 429 and 5xx are bad luck), connection errors and
    time-outs of common libraries by their class, without importing them. A group is bad luck if all of it is.
    """
    if isinstance(error, BaseExceptionGroup):
        return all(is_recoverable(inner) for inner in cast("BaseExceptionGroup[BaseException]", error).exceptions)
    if isinstance(error, OperationFailedError):
        return error.category == "server"
    if isinstance(error, RecoverableRolloutError | TransportError | ResultLostError | TimeoutError | ConnectionError):
        return True
    status = _status(error)
    if status is not None:
        return status in _TRANSIENT or 500 <= status <= 599
    if isinstance(error, OSError):
        return error.errno in _ERRNOS
    return any(cls.__name__ in _LIBRARIES.get(cls.__module__.partition(".")[0], ()) for cls in type(error).__mro__)


def raisable(error: Exception) -> Exception:
    """The error, unless it would end an `async for` as if the data had ended: then one that tells of it."""
    if not isinstance(error, StopIteration | StopAsyncIteration):
        return error
    told = UsageError(f"{type(error).__name__} was raised where it means nothing: an iterator had no more items")
    told.__cause__ = error
    for note in getattr(error, "__notes__", ()):
        told.add_note(note)
    return told


def plain_verdict(verdict: bool) -> bool:
    """What a filter said.

    Raises:
        UsageError: It is an async function, whose coroutine would be true, whatever it would return.
    """
    if inspect.iscoroutine(verdict):
        verdict.close()
        raise UsageError("keep is an async function; it must be a plain one, and return at once")
    return verdict


def _status(error: BaseException) -> int | None:
    """The HTTP status that an exception carries, wherever its library puts it."""
    if isinstance(error, ServiceError):
        return error.status or None
    for holder in (error, getattr(error, "response", None)):
        for name in ("status_code", "status"):
            status = getattr(holder, name, None)
            if isinstance(status, int) and 100 <= status <= 599:
                return status
    return None
